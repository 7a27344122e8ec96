"""The paper's tables and figures in miniature: five seeds of every arm, on phantoms.

    python benchmarks/miniature.py                        all: some hours on 2 cores
    python benchmarks/miniature.py --seeds 0 --jobs 1     a part of it
    python benchmarks/miniature.py --report               runs nothing: the seeds that are finished
    python benchmarks/miniature.py --logs benchmarks/logs     also copies seed 0's training logs

Started again it goes on where it was stopped (the tasks that ran then must have ended). Seeds
finish one after another. All arms of a seed share its phantoms, which went through NIfTI files, 01
and 02, and RL arms have equal steps. A run that fails is reported, not dropped. Everything lies
under --out; what this prints is `report.md` there, and `miniature.png` shows the effects. What is
compared, and how its intervals come about, stands in miniature_tables.py.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.miniature_tables import (  # noqa: E402
    ARMS,
    BEFORE,
    LOCATES,
    MAIN,
    STEPS,
    WRONG_BOXES,
    report,
)
from support.files import write_atomic  # noqa: E402
from support.log import read_log  # noqa: E402

SEEDS = [0, 1, 2, 3, 4]  # fixed beforehand: nothing is chosen on them
BASE = "assets/tiny-qwen2.5-vl"
# How 02 draws the records: folder -> its flags.
PICTURES = {"zoom": "", "plain": "--no-patch", "corner": "--patch-corner auto", "clean": "--clean"}
PICTURES |= WRONG_BOXES
# SFT arm -> the pictures that it learns and is asked about; all other arms: zoom.
SFT = {"sft": "zoom", "sft_plain": "plain", "sft_corner": "corner"}
# RL arm -> its flags; all but the last start from the SFT checkpoint.
RL = {
    "rl": "",
    "rl_no_format": "--reward-weights 0 1 2",
    "rl_no_validity": "--reward-weights 1 0 2",
    "rl_correctness": "--reward-weights 0 0 2",
    "rl_direct": "--prompt direct",
    "rl_no_sft": f"--model {BASE}",
}
# What 05 is asked beside both prompts, or instead: no more than the report shows.
DIRECT, THINK = "--think no --no-skill", "--think yes --no-skill"
ASKED = dict.fromkeys(MAIN, "--swap-thinking")
ASKED |= {"rl_no_sft": "--swap-thinking --no-skill", "rl_direct": ""}
ASKED |= {"sft_plain": DIRECT, "sft_corner": DIRECT}
LOCATE = "--task locate"
NOT_YET = "not done yet"


# ==== 1. The runs ====


def tasks(out: Path, seed: int) -> dict[str, tuple[list[str], str]]:
    """Task -> (tasks that come first, command)."""
    at, name = out / f"seed{seed}", f"seed{seed}"
    listed = {}

    def add(task: str, needs: list[str], command: str) -> None:
        listed[f"{name}/{task}"] = [f"{name}/{need}" for need in needs], command

    def add_evaluation(evaluation: str, arm: str, pictures: str, flags: str) -> None:
        model, needs = f"{at}/{arm}", [arm, pictures]
        if arm in ("base", "locate_base"):
            model, needs = BASE, [pictures]
        command = f"05_eval.py --data {at}/{pictures} --model {model} {flags}"
        add(f"eval_{evaluation}", needs, f"{command} --out {at}/eval_{evaluation}")

    add("slices", [], f"01_make_dataset.py --seed {seed} --out {at}/slices --workers 1")
    for pictures, flags in PICTURES.items():
        command = f"02_zoom_augment.py --data {at}/slices {flags} --out {at}/{pictures}"
        add(pictures, ["slices"], f"{command} --workers 1")
    for arm, pictures in SFT.items():
        command = f"03_sft.py --seed {seed} --data {at}/{pictures} --out {at}/{arm}"
        add(arm, [pictures], command)
    for arm, flags in RL.items():
        start = "" if "--model" in flags else f"--model {at}/sft"
        command = f"04_grpo.py --seed {seed} --data {at}/zoom {start} {flags} --out {at}/{arm}"
        add(arm, ["zoom", "sft"] if start else ["zoom"], command)
    still = f"--seed {seed} --data {at}/zoom --steps {STEPS} --lr 1e-12"
    for start, run in BEFORE.items():
        needs, model = (["zoom"], BASE) if start == "base" else (["zoom", start], f"{at}/{start}")
        add(run, needs, f"04_grpo.py {still} --model {model} --out {at}/{run}")
    for arm in ARMS:
        add_evaluation(arm, arm, SFT.get(arm, "zoom"), ASKED.get(arm, "--no-skill"))
    # Without annotated boxes: a model that locates predicts them, and they are drawn.
    train = f"{LOCATE} --seed {seed} --data {at}/clean --out {at}"
    add("locate_sft", ["clean"], f"03_sft.py {train}/locate_sft")
    rl = f"04_grpo.py --model {at}/locate_sft --prompt direct {train}/locate_rl"
    add("locate_rl", ["clean", "locate_sft"], rl)
    for arm in LOCATES:
        add_evaluation(arm, arm, "clean", f"{LOCATE} --think no")
    drawn = f"02_zoom_augment.py --data {at}/slices --boxes {at}/eval_locate_rl/boxes.jsonl"
    add("predicted", ["slices", "eval_locate_rl"], f"{drawn} --out {at}/predicted --workers 1")
    for pictures in (*WRONG_BOXES, "predicted"):
        add_evaluation(f"sft_{pictures}", "sft", pictures, DIRECT)
        add_evaluation(f"rl_{pictures}", "rl", pictures, THINK)
    return listed


def stamp(command: str) -> str:
    """What `<task>.done` holds: the command and its script's DEMO.

    When either changes, the scripts refuse the old folder, which is then reported.
    """
    script = Path(command.split()[0])
    recipe = getattr(importlib.import_module(script.stem), "DEMO", "") if script.suffix else ""
    return f"{command}\n{recipe}\n"


def look(out: Path, name: str, command: str) -> str | None:
    """None for a task that is done, otherwise how it failed, or NOT_YET."""
    done, failure = out / f"{name}.done", out / f"{name}.failed"
    if done.exists() and done.read_text() == stamp(command):
        return None
    return failure.read_text() if failure.exists() else NOT_YET


def run(out: Path, name: str, command: str) -> str | None:
    """Runs one task unless it is done; None, or its last line when it failed."""
    if look(out, name, command) is None:
        return None
    log, failure = out / f"{name}.log", out / f"{name}.failed"
    log.parent.mkdir(parents=True, exist_ok=True)
    failure.unlink(missing_ok=True)
    argv = [sys.executable, *command.split()]
    if (out / name / "run.json").exists():
        argv.append("--resume")
    # One thread per task: the same floats again.
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "30"}
    with open(log, "w") as file:
        code = subprocess.run(argv, cwd=ROOT, env=quiet, stdout=file, stderr=file).returncode
    if code == 0:
        (out / f"{name}.done").write_text(stamp(command))
        return None
    lines = log.read_text().strip().splitlines()  # also broken at tqdm's returns
    why = f"exit {code}: {lines[-1] if lines else '(nothing)'}"
    if code not in (130, 143):  # it was not stopped
        failure.write_text(why)
    return why


def run_all(
    out: Path, plan: dict[str, tuple[list[str], str]], jobs: int, work: Callable = run
) -> dict[str, str]:
    """Calls `work` on each task, `jobs` at a time: the first of `plan` whose needs are finished.

    Returns the failed ones and why.
    """
    waiting, running, finished, failed = dict(plan), {}, set(), {}
    bar = tqdm(total=len(plan), unit="task")
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            for name, (needs, command) in list(waiting.items()):
                lost = [need for need in needs if need in failed]
                if lost:
                    failed[name] = f"not run: {lost[0]} failed"
                    bar.update()
                elif len(running) < jobs and finished.issuperset(needs):
                    running[pool.submit(work, out, name, command)] = name
                else:
                    continue
                del waiting[name]
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name, error = running.pop(future), future.result()
                if error:
                    failed[name] = error
                finished.add(name)
                bar.update()
    bar.close()
    return failed


def copy_logs(run: Path, folder: Path) -> int:
    """Copies the metrics of a seed's training runs to <folder>/<arm>.jsonl; returns their bytes.

    What differs when the same run is repeated, times and memory, is left out; six digits are kept.
    """
    total = 0
    for arm in (*SFT, *RL, "locate_sft", "locate_rl"):
        lines = []
        for row in read_log(run / arm / "metrics.jsonl"):
            kept = {}
            for key, value in row.items():
                if not key.startswith(("seconds", "peak_memory")):
                    kept[key] = float(f"{value:.6g}") if isinstance(value, float) else value
            lines.append(json.dumps(kept) + "\n")
        if lines:
            text = "".join(lines)
            write_atomic(folder / f"{arm}.jsonl", text)
            total += len(text)
    return total


# ==== 2. The study ====


def main(argv: list[str] | None = None) -> None:
    """Runs what is not done yet, and writes and prints the report."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--out", type=Path, default="runs/miniature", help="where all goes (%(default)s)")
    add("--seeds", type=int, nargs="+", default=SEEDS, help="(0 1 2 3 4)")
    add("--jobs", type=int, default=2, help="tasks at a time, each on one thread (%(default)s)")
    add("--report", action="store_true", help="run nothing, report the seeds that are finished")
    add("--logs", type=Path, metavar="DIR", help="copy seed 0's training logs there at the end")
    args = parser.parse_args(argv)
    plan = {}
    for seed in args.seeds:
        plan |= tasks(args.out, seed)
    failed = run_all(args.out, plan, args.jobs, look if args.report else run)
    unfinished = {name.split("/")[0] for name, why in failed.items() if why == NOT_YET}
    seeds = [seed for seed in args.seeds if f"seed{seed}" not in unfinished]
    if not seeds:
        sys.exit(f"{args.out}: no seed is finished yet")
    failed = {name: why for name, why in failed.items() if name.split("/")[0] not in unfinished}
    print(report(args.out, seeds, failed))
    if unfinished:
        print(f"left out, not finished: {', '.join(sorted(unfinished))}")
    if args.logs and 0 in seeds:
        size = copy_logs(args.out / "seed0", args.logs)
        print(f"{args.logs}: the training logs of seed 0, {size / 1000:.0f} kB")
    elif args.logs:
        print(f"{args.logs}: nothing copied, seed 0 is not finished")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
