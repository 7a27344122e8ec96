"""Kills 03 and 04 with SIGKILL at random moments, resumes them, and compares with a run that nobody
disturbed.

    python benchmarks/kill_resume.py --data data/ct_rate_vqa_zoom            20 kills, 1 and 2 ranks
    python benchmarks/kill_resume.py --data data/ct_rate_vqa_zoom --kills 3 --ranks 1

Every second kill waits for a checkpoint that is just being written. Final weights must be equal bit
for bit, and so must metrics.jsonl and rollouts.jsonl but for their timing keys. Linux, CPU. The
last line says how many were.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
TIMES = {"seconds", "seconds_rollout", "seconds_update", "peak_memory_gib"}
RUNS = {
    "03_sft.py": "--max-steps 12 --batch-size 4 --micro-batch 2 --save-every 2",
    "04_grpo.py": "--model assets/tiny-qwen2.5-vl --steps 8 --prompts-per-step 2 --micro-batch 1 "
    "--max-new-tokens 10 --save-every 1",
}


def start(script: str, data: Path, out: Path, ranks: int, *flags: str) -> subprocess.Popen:
    """Starts a run of RUNS on its own or under torchrun."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [script, "--data", str(data), "--out", str(out), *RUNS[script].split(), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> None:
    """Waits for the end of a run. Raises RuntimeError when it fails."""
    output = process.communicate()[0]
    if process.returncode:
        raise RuntimeError(f"{process.args} ended with {process.returncode}:\n{output}")


def kill(out: Path) -> None:
    """SIGKILL for every process that names `out`: torchrun's workers outlive torchrun."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            if str(out).encode() in entry.read_bytes().split(b"\0"):
                os.kill(int(entry.parent.name), signal.SIGKILL)


def interrupted_run(
    script: str, data: Path, out: Path, ranks: int, delay: float, writing: int = 0
) -> bool:
    """Starts a run, kills it `delay` seconds after its start, or after it has begun its
    `writing`-th checkpoint, and resumes it to its end. False when it had ended before."""
    process = start(script, data, out, ranks)
    begun, there = 0, False
    while begun < writing and process.poll() is None:
        before, there = there, (out / ".checkpoint.tmp").exists()
        begun += there and not before
        time.sleep(0.0005)
    end = time.monotonic() + delay
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.0005)
    alive = process.poll() is None
    kill(out)
    process.communicate()
    finish(start(script, data, out, ranks, "--resume"))
    return alive


def results(out: Path) -> tuple[bytes, list[dict]]:
    """What must be equal: the final weights' bytes, and all rows of the logs but for TIMES."""
    rows = []
    for path in sorted(out.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            rows.append({key: value for key, value in row.items() if key not in TIMES})
    return (out / "model.safetensors").read_bytes(), rows


def count_equal(script: str, ranks: int, args: argparse.Namespace, folder: Path, rng) -> int:
    """How many of --kills killed and resumed runs equal the undisturbed one."""
    data, undisturbed = args.data.resolve(), folder / f"undisturbed-{script}-{ranks}"
    began = time.monotonic()
    finish(start(script, data, undisturbed, ranks))
    seconds, equal = time.monotonic() - began, 0
    for i in tqdm(range(args.kills), desc=f"{script}, ranks: {ranks}"):
        out, killed = folder / "killed", False
        while not killed:  # a moment after the end is drawn again
            shutil.rmtree(out, ignore_errors=True)
            writing = rng.randint(1, 5) if i % 2 else 0
            delay = rng.uniform(0, 0.05 if writing else seconds)
            killed = interrupted_run(script, data, out, ranks, delay, writing)
        equal += results(out) == results(undisturbed)
    print(f"{script}, ranks: {ranks}: {equal} of {args.kills} equal")
    return equal


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="02's folder")
    add("--kills", type=int, default=20, help="of each script with each number of ranks (20)")
    add("--ranks", type=int, nargs="+", default=[1, 2])
    add("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args(argv)
    rng, equal = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        for script in RUNS:
            for ranks in args.ranks:
                equal += count_equal(script, ranks, args, Path(folder), rng)
    kills = len(RUNS) * len(args.ranks) * args.kills
    print(f"{equal} of {kills} killed and resumed runs equal the undisturbed one bit for bit")
    sys.exit(equal < kills)


if __name__ == "__main__":
    main()
