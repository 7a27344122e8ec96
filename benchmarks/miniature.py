"""The paper's tables and figures in miniature: three seeds of every arm, on phantoms and the tiny model.

    python benchmarks/miniature.py                      trains, evaluates, prints: under two hours on 2 cores
    python benchmarks/miniature.py --seeds 0 --jobs 1   a part of it

Started again it goes on where it was stopped (the tasks that ran then must have ended). All arms of a seed share its
phantoms, which went through NIfTI files, 01 and 02, and RL arms have equal steps. A run that fails is reported, not
dropped. Everything lies under --out; what this prints is `report.md` there.

An effect is a difference of two arms on the same test items. Its interval is the wider of two: Student's t over the
seeds' differences, in which training, phantoms and test set all vary, and the normal one of the patients' bootstraps
within the seeds. The tiny base is the same in all seeds, and intervals are not corrected for the number of effects.
"""

import argparse
import importlib
import math
import os
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
from scipy import stats
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from rewards import CLASSES  # noqa: E402
from support.stats import bootstrap  # noqa: E402
from support.train import read_log  # noqa: E402

BASE = "assets/tiny-qwen2.5-vl"
# RL arm -> its flags; all but the last start from the SFT checkpoint.
RL = {
    "rl": "",
    "rl_no_format": "--reward-weights 0 1 2",
    "rl_no_validity": "--reward-weights 1 0 2",
    "rl_correctness": "--reward-weights 0 0 2",
    "rl_no_sft": f"--model {BASE}",
}

ARMS = {
    "base": "base",
    "sft": "SFT",
    "sft_plain": "SFT without the patch",
    "rl": "SFT + RL, all rewards",
    "rl_no_format": "SFT + RL, without format",
    "rl_no_validity": "SFT + RL, without validity",
    "rl_correctness": "SFT + RL, correctness only",
    "rl_no_sft": "RL without SFT",
}
# The paper's figures (Tables 1, 3, 4 and Fig. 3), arm and measure -> %.
PAPER = {
    ("sft", "direct"): 48.54, ("sft", "think"): 37.60, ("sft_plain", "direct"): 45.32, ("rl", "think"): 52.18,
    ("rl", "direct"): 51.68, ("rl_no_format", "think"): 51.22, ("rl_no_validity", "think"): 50.86,
    ("rl_no_sft", "think"): 46.95, ("sft", "consistency"): 91.17, ("rl", "consistency"): 97.98,
}  # fmt: skip
# What is compared: name, first, second (arm, measure), the sign that the paper reports for first - second.
EFFECTS = [
    ("Table 1: SFT raises direct accuracy over the base", ("sft", "direct"), ("base", "direct"), 1),
    ("Table 1: RL raises accuracy over SFT (think against direct)", ("rl", "think"), ("sft", "direct"), 1),
    ("Table 1: RL raises direct accuracy, too", ("rl", "direct"), ("sft", "direct"), 1),
    ("Table 1: after RL, thinking beats direct answers", ("rl", "think"), ("rl", "direct"), 1),
    ("Table 2: general skill is kept by SFT", ("sft", "skill"), ("base", "skill"), 0),
    ("Table 2: general skill is kept by RL", ("rl", "skill"), ("sft", "skill"), 0),
    ("Table 3: the zoomed patch helps (SFT, direct)", ("sft", "direct"), ("sft_plain", "direct"), 1),
    ("Table 4: the format reward helps", ("rl", "think"), ("rl_no_format", "think"), 1),
    ("Table 4: the validity reward helps", ("rl", "think"), ("rl_no_validity", "think"), 1),
    ("Table 4: RL needs SFT before it", ("rl", "think"), ("rl_no_sft", "think"), 1),
    ("Fig. 3: SFT forced to think loses accuracy", ("sft", "think"), ("sft", "direct"), -1),
    ("Fig. 3: RL makes reasoning and answer agree", ("rl", "consistency"), ("sft", "consistency"), 1),
]  # fmt: skip
KEPT = 5.0  # points: a skill counts as kept when its interval excludes a larger loss, as lost when it is all larger


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
    for arm in ARMS:
        model, data = (BASE, "zoom") if arm == "base" else (f"{at}/{arm}", "plain" if arm == "sft_plain" else "zoom")
        command = f"05_eval.py --data {at}/{data} --model {model} --out {at}/eval_{arm}"
        listed[f"eval_{arm}"] = ([data] if arm == "base" else [arm], command)
    return {f"seed{seed}/{name}": ([f"seed{seed}/{need}" for need in needs], command)
            for name, (needs, command) in listed.items()}  # fmt: skip


def run(out: Path, name: str, command: str) -> str | None:
    """Runs one task; None, or what it said last when it failed. `<task>.done` holds the command and recipe of what is
    done: with another recipe the scripts refuse the old folder, which is then reported."""
    done, log = out / f"{name}.done", out / f"{name}.log"
    script = Path(command.split()[0])
    recipe = getattr(importlib.import_module(script.stem), "DEMO", "") if script.suffix else ""
    stamp = f"{command}\n{recipe}\n"
    if done.exists() and done.read_text() == stamp:
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
    done.write_text(stamp)
    return None


def run_all(out: Path, plan: dict[str, tuple[list[str], str]], jobs: int) -> dict[str, str]:
    """Runs tasks in the order of their needs, `jobs` at a time; returns the failed ones and why."""
    waiting, running, finished, failed = dict(plan), {}, set(), {}
    bar = tqdm(total=len(plan), unit="task")
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


# ---- what came out ----


def read_items(folder: Path) -> dict[str, dict[str, tuple[float, str, str]]]:
    """Measure -> item -> (value 0 to 1, patient, class) of an arm's evaluation."""
    names = ("direct", "think", "format", "invalid", "coverage", "consistency", "judge right", "skill")
    items = {name: {} for name in names}
    for row in read_log(folder / "predictions.jsonl"):
        of = row["patient"], row["label"]
        items[row["mode"]][row["id"]] = (row["correctness"], *of)
        if row["mode"] == "think":
            items["format"][row["id"]] = (row["format"], *of)
            items["invalid"][row["id"]] = (1 - row["validity"], *of)
            items["coverage"][row["id"]] = (float(row["judged"] is not None), *of)
            if row["judged"] is not None:
                items["consistency"][row["id"]] = (float(row["judged"] == row["predicted"]), *of)
                items["judge right"][row["id"]] = (float(row["judged"] == row["label"]), *of)
    for row in read_log(folder / "general.jsonl"):
        items["skill"][row["id"]] = (row["score"], row["patient"], row["part"])
    return items


def difference(first: dict, second: dict) -> dict | None:
    """Mean of the items' differences and its 95 % bootstrap interval over patients, percentage points; None where no
    item has a value in both."""
    both = [key for key in first if key in second]
    if not both:
        return None
    found = bootstrap(np.array([100 * (first[k][0] - second[k][0]) for k in both]), [first[k][1] for k in both])
    return {"mean": found["mean"], "interval": found["interval_95"]}


def over_seeds(seeds: list[dict]) -> tuple[float, float, float]:
    """Mean and 95 % interval over the seeds' differences, see the head of this file; one seed has its own interval."""
    means, n = np.array([seed["mean"] for seed in seeds]), len(seeds)
    if n == 1:
        return means[0], *seeds[0]["interval"]
    within = [(seed["interval"][1] - seed["interval"][0]) / 2 / 1.96 for seed in seeds]
    half = max(stats.t.ppf(0.975, n - 1) * means.std(ddof=1), 1.96 * np.sqrt(np.mean(np.square(within)))) / np.sqrt(n)
    return means.mean(), means.mean() - half, means.mean() + half


def verdict(low: float, high: float, sign: int) -> str:
    if sign == 0:
        return "agrees" if low >= -KEPT else "disagrees" if high < -KEPT else "not resolved"
    if low <= 0 <= high:
        return "not resolved"
    return "agrees" if (low > 0) == (sign > 0) else "disagrees"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)] + [""]


def report(out: Path, seeds: list[int], failed: dict[str, str]) -> str:
    """Tables 1 to 4, Fig. 1d, Fig. 3 and the verdicts, as Markdown."""
    items = {arm: [None if f"seed{seed}/eval_{arm}" in failed else read_items(out / f"seed{seed}" / f"eval_{arm}")
                   for seed in seeds] for arm in ARMS}  # fmt: skip

    def cell(arm: str, measure: str, label: str | None = None) -> str:
        """Mean over seeds, and the seeds' own values in brackets."""
        values = []
        for one in items[arm]:
            kept = [v[0] for v in one[measure].values() if label in (None, v[2])] if one else []
            values.append(100 * float(np.mean(kept)) if kept else math.nan)
        if np.isnan(values).all():
            return "" if any(items[arm]) else "failed"
        each = ["none" if math.isnan(value) else f"{value:.1f}" for value in values]
        return f"{np.nanmean(values):.1f} ({', '.join(each)})"

    def paper(arm: str, measure: str) -> str:
        return f"{PAPER[arm, measure]:.2f}" if (arm, measure) in PAPER else ""

    sizes = [len(one["direct"]) if one else 0 for one in items["base"]]
    lines = [f"Seeds {', '.join(map(str, seeds))}; test items {', '.join(map(str, sizes))}. "
             "All figures in %, greedy: the mean over seeds, in brackets each seed's. Chance: 14.3 %.", ""]  # fmt: skip
    lines += ["**Table 1. Accuracy without and with thinking**", ""]
    lines += ["The paper's base, Qwen2.5-VL-7B: 22.38 and 23.86 for its two prompts.", ""]
    lines += table(["", "miniature, direct", "paper", "miniature, think", "paper"],
                   [[ARMS[arm], cell(arm, "direct"), paper(arm, "direct"), cell(arm, "think"), paper(arm, "think")]
                    for arm in ("base", "sft", "rl")])  # fmt: skip
    lines += ["**Fig. 1d. Accuracy by class** (base and SFT direct, RL thinking)", ""]
    lines += table(["", *(ARMS[arm] for arm in ("base", "sft", "rl"))],
                   [[name, cell("base", "direct", name), cell("sft", "direct", name), cell("rl", "think", name)]
                    for name in CLASSES])  # fmt: skip
    lines += ["**Table 2. General skill** (attribute questions on the test pictures; the paper: ChartQA, TextVQA)", ""]
    lines += table(["", "miniature"], [[ARMS[arm], cell(arm, "skill")] for arm in ("base", "sft", "rl")])
    lines += ["**Table 3. Zoom** (SFT, direct)", ""]
    lines += table(["", "miniature", "paper"], [[name, cell(arm, "direct"), paper(arm, "direct")]
                   for arm, name in (("sft", "with the patch"), ("sft_plain", "without"))])  # fmt: skip
    lines += ["**Table 4. Training stages and rewards** (thinking; SFT: direct)", ""]
    rows = []
    for arm in list(ARMS)[1:]:
        mode = "direct" if arm == "sft" else "think"
        if arm != "sft_plain":
            rows.append([ARMS[arm], cell(arm, mode), paper(arm, mode),
                         *(cell(arm, measure) for measure in ("format", "invalid", "direct"))])  # fmt: skip
    lines += table(["", "miniature", "paper", "format, think", "invalid, think", "direct"], rows)
    lines += ["**Fig. 3. Forced thinking; reasoning and answer agree** (the miniature's judge: keyword)", ""]
    lines += table(["", "accuracy, think", "paper", "consistency", "paper", "judge's coverage", "judge right"],
                   [[ARMS[arm], cell(arm, "think"), paper(arm, "think"), cell(arm, "consistency"),
                     paper(arm, "consistency"), cell(arm, "coverage"), cell(arm, "judge right")]
                    for arm in ("base", "sft", "rl")])  # fmt: skip
    lines += ["**Effects.** Percentage points, paired on the test items (consistency: those whose thinking the judge "
              "decides in both arms), with the 95 % interval over seeds", ""]  # fmt: skip
    rows = []
    for name, first, second, sign in EFFECTS:
        known = [PAPER.get(side) for side in (first, second)]
        told = f"{known[0] - known[1]:+.2f}" if all(known) else "kept" if sign == 0 else "+" if sign > 0 else "-"
        sides = zip(items[first[0]], items[second[0]], strict=True)
        pairs = [difference(one[first[1]], other[second[1]]) if one and other else "failed" for one, other in sides]
        if "failed" in pairs:
            rows.append([name, told, "a run failed", "", "not resolved"])
            continue
        if None in pairs:
            rows.append([name, told, "no items in common", "", "not resolved"])
            continue
        middle, low, high = over_seeds(pairs)
        each = ", ".join(f"{pair['mean']:+.1f}" for pair in pairs)
        rows.append([name, told, f"{middle:+.1f} ({low:+.1f} to {high:+.1f})", each, verdict(low, high, sign)])
    lines += table(["effect", "paper", "miniature", "each seed", "verdict"], rows)
    lines += [f"Failed runs: {len(failed) or 'none'}.", *(f"- {name}: {why}" for name, why in failed.items())]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/miniature"), help="where all goes (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2, fixed beforehand)")
    parser.add_argument("--jobs", type=int, default=2, help="tasks at a time, each on one thread (%(default)s)")
    args = parser.parse_args(argv)
    plan = {name: task for seed in args.seeds for name, task in tasks(args.out, seed).items()}
    failed = run_all(args.out, plan, args.jobs)
    text = report(args.out, args.seeds, failed)
    (args.out / "report.md").write_text(text)
    print(text)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
