"""The paper's tables and figures in miniature: three seeds of every arm, on phantoms and the tiny model.

    python benchmarks/miniature.py                      trains, evaluates, prints: under two hours on 2 cores
    python benchmarks/miniature.py --seeds 0 --jobs 1   a part of it

Started again it goes on where it was stopped. Every arm of a seed has the same phantoms, made by 01 and 02 from NIfTI
files of its own, and RL arms have equal steps. A run that fails is reported in the tables, not dropped. Everything lies
under --out; `report.md` there is what this prints.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
BASE = "assets/tiny-qwen2.5-vl"
# RL arm -> its flags; all but the last start from the SFT checkpoint.
RL = {
    "rl": "",
    "rl_no_format": "--reward-weights 0 1 2",
    "rl_no_validity": "--reward-weights 1 0 2",
    "rl_correctness": "--reward-weights 0 0 2",
    "rl_no_sft": f"--model {BASE}",
}


def tasks(out: Path, seed: int) -> dict[str, tuple[list[str], str]]:
    """Task -> (tasks that come first, command). Every command works without the others' being repeated."""
    at = out / f"seed{seed}"
    listed = {
        "slices": ([], f"01_make_dataset.py --seed {seed} --out {at}/slices --workers 1"),
        "zoom": (["slices"], f"02_zoom_augment.py --data {at}/slices --out {at}/zoom --workers 1"),
        "plain": (["slices"], f"02_zoom_augment.py --data {at}/slices --out {at}/plain --no-patch --workers 1"),
        "sft": (["zoom"], f"03_sft.py --seed {seed} --data {at}/zoom --out {at}/sft"),
        "sft_plain": (["plain"], f"03_sft.py --seed {seed} --data {at}/plain --out {at}/sft_plain"),
    }
    for arm, flags in RL.items():
        start = "" if "--model" in flags else f"--model {at}/sft"
        command = f"04_grpo.py --seed {seed} --data {at}/zoom {start} {flags} --out {at}/{arm}"
        listed[arm] = (["sft"] if start else ["zoom"], command)
    return {f"seed{seed}/{name}": ([f"seed{seed}/{need}" for need in needs], command)
            for name, (needs, command) in listed.items()}  # fmt: skip


def run(out: Path, name: str, command: str) -> str | None:
    """Runs one task; None, or what it said last when it failed. `<task>.done` holds the command that is done."""
    done, log = out / f"{name}.done", out / f"{name}.log"
    if done.exists() and done.read_text() == command:
        return None
    done.parent.mkdir(parents=True, exist_ok=True)
    argv = command.split()
    if (out / name / "run.json").exists():
        argv.append("--resume")
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "30"}  # one thread a task: the same floats again
    with open(log, "w") as file:
        code = subprocess.run([sys.executable, *argv], cwd=ROOT, env=quiet, stdout=file, stderr=file).returncode
    if code:
        said = log.read_text().strip().splitlines() or ["(nothing)"]  # splitlines() also breaks at tqdm's returns
        return f"exit {code}: {said[-1]}"
    done.write_text(command)
    return None


def run_all(out: Path, todo: dict[str, tuple[list[str], str]], jobs: int) -> dict[str, str]:
    """Runs tasks in the order of their needs, `jobs` at a time; returns the failed ones and why."""
    waiting, running, finished, failed = dict(todo), {}, set(), {}
    bar = tqdm(total=len(todo), unit="task")
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            for name, (needs, command) in list(waiting.items()):
                if any(need in failed for need in needs):
                    failed[name] = f"not run: {next(need for need in needs if need in failed)} failed"
                elif finished.issuperset(needs):
                    running[pool.submit(run, out, name, command)] = name
                else:
                    continue
                del waiting[name]
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name, error = running.pop(future), future.result()
                failed.update({name: error} if error else {})
                finished.add(name)
                bar.update()
    bar.close()
    return failed


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/miniature"), help="where all goes (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2, fixed beforehand)")
    parser.add_argument("--jobs", type=int, default=2, help="tasks at a time, each on one thread (%(default)s)")
    args = parser.parse_args(argv)
    todo = {name: task for seed in args.seeds for name, task in tasks(args.out, seed).items()}
    failed = run_all(args.out, todo, args.jobs)
    print(json.dumps(failed))


if __name__ == "__main__":
    main()
