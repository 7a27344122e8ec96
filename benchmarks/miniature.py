"""The paper's tables and figures in miniature: three seeds of every arm, on phantoms.

    python benchmarks/miniature.py                      all: under two hours on 2 cores
    python benchmarks/miniature.py --seeds 0 --jobs 1   a part of it

Started again it goes on where it was stopped (the tasks that ran then must have ended). All arms of
a seed share its phantoms, which went through NIfTI files, 01 and 02, and RL arms have equal steps.
A run that fails is reported, not dropped. Everything lies under --out; what this prints is
`report.md` there.

An effect is a difference of two arms on the same test items. Its interval is the wider of two:
Student's t over the seeds' differences, in which training, phantoms and test set all vary, and the
normal one of the patients' bootstraps within the seeds. The tiny base is the same in all seeds, and
intervals are not corrected for the number of effects.
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
from support.log import read_log  # noqa: E402
from support.stats import bootstrap  # noqa: E402

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
MAIN = ("base", "sft", "rl")  # the arms of Tables 1 and 2 and of Fig. 1d and 3
# The paper's figures (Tables 1, 3, 4 and Fig. 3), arm and measure -> %; its base: Qwen2.5-VL-7B.
PAPER = {
    ("base", "direct"): 23.86,
    ("base", "think"): 22.38,
    ("sft", "direct"): 48.54,
    ("sft", "think"): 37.60,
    ("sft_plain", "direct"): 45.32,
    ("rl", "think"): 52.18,
    ("rl", "direct"): 51.68,
    ("rl_no_format", "think"): 51.22,
    ("rl_no_validity", "think"): 50.86,
    ("rl_no_sft", "think"): 46.95,
    ("sft", "consistency"): 91.17,
    ("rl", "consistency"): 97.98,
}
# What is compared: name, first and second "arm measure", the paper's sign of first - second.
EFFECTS = [
    ("Table 1: SFT raises direct accuracy over the base", "sft direct", "base direct", 1),
    ("Table 1: RL raises accuracy over SFT (think against direct)", "rl think", "sft direct", 1),
    ("Table 1: RL raises direct accuracy, too", "rl direct", "sft direct", 1),
    ("Table 1: after RL, thinking beats direct answers", "rl think", "rl direct", 1),
    ("Table 2: general skill is kept by SFT", "sft skill", "base skill", 0),
    ("Table 2: general skill is kept by RL", "rl skill", "sft skill", 0),
    ("Table 3: the zoomed patch helps (SFT, direct)", "sft direct", "sft_plain direct", 1),
    ("Table 4: the format reward helps", "rl think", "rl_no_format think", 1),
    ("Table 4: the validity reward helps", "rl think", "rl_no_validity think", 1),
    ("Table 4: RL needs SFT before it", "rl think", "rl_no_sft think", 1),
    ("Fig. 3: SFT forced to think loses accuracy", "sft think", "sft direct", -1),
    ("Fig. 3: RL makes reasoning and answer agree", "rl consistency", "sft consistency", 1),
]
# Points: a skill is kept when its interval excludes a larger loss, lost when all of it is larger.
KEPT = 5.0


# ==== 1. The runs ====


def tasks(out: Path, seed: int) -> dict[str, tuple[list[str], str]]:
    """Task -> (tasks that come first, command). Every command works without the others' repeat."""
    at, name = out / f"seed{seed}", f"seed{seed}"
    listed = {}

    def add(task: str, needs: list[str], command: str) -> None:
        listed[f"{name}/{task}"] = [f"{name}/{need}" for need in needs], command

    zoom = f"02_zoom_augment.py --data {at}/slices"
    add("slices", [], f"01_make_dataset.py --seed {seed} --out {at}/slices --workers 1")
    add("zoom", ["slices"], f"{zoom} --out {at}/zoom --workers 1")
    add("plain", ["slices"], f"{zoom} --out {at}/plain --no-patch --workers 1")
    add("sft", ["zoom"], f"03_sft.py --seed {seed} --data {at}/zoom --out {at}/sft")
    add("sft_plain", ["plain"], f"03_sft.py --seed {seed} --data {at}/plain --out {at}/sft_plain")
    for arm, flags in RL.items():
        start = "" if "--model" in flags else f"--model {at}/sft"
        command = f"04_grpo.py --seed {seed} --data {at}/zoom {start} {flags} --out {at}/{arm}"
        add(arm, ["sft"] if start else ["zoom"], command)
    for arm in ARMS:
        model = BASE if arm == "base" else f"{at}/{arm}"
        data = "plain" if arm == "sft_plain" else "zoom"
        command = f"05_eval.py --data {at}/{data} --model {model} --out {at}/eval_{arm}"
        add(f"eval_{arm}", [data] if arm == "base" else [arm], command)
    return listed


def run(out: Path, name: str, command: str) -> str | None:
    """Runs one task; None, or its last line when it failed.

    `<task>.done` holds the command and the script's DEMO of what is done: when either changes, the
    scripts refuse the old folder, which is then reported.
    """
    done, log = out / f"{name}.done", out / f"{name}.log"
    script = Path(command.split()[0])
    recipe = getattr(importlib.import_module(script.stem), "DEMO", "") if script.suffix else ""
    stamp = f"{command}\n{recipe}\n"
    if done.exists() and done.read_text() == stamp:
        return None
    done.parent.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, *command.split()]
    if (out / name / "run.json").exists():
        argv.append("--resume")
    # One thread per task: the same floats again.
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "30"}
    with open(log, "w") as file:
        code = subprocess.run(argv, cwd=ROOT, env=quiet, stdout=file, stderr=file).returncode
    if code:
        lines = log.read_text().strip().splitlines()  # also broken at tqdm's returns
        return f"exit {code}: {lines[-1] if lines else '(nothing)'}"
    done.write_text(stamp)
    return None


def run_all(out: Path, plan: dict[str, tuple[list[str], str]], jobs: int) -> dict[str, str]:
    """Runs tasks in the order of their needs, `jobs` at a time; returns the failed ones and why."""
    waiting, running, finished, failed = dict(plan), {}, set(), {}
    bar = tqdm(total=len(plan), unit="task")
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            for name, (needs, command) in list(waiting.items()):
                lost = [need for need in needs if need in failed]
                if lost:
                    failed[name] = f"not run: {lost[0]} failed"
                elif finished.issuperset(needs):
                    running[pool.submit(run, out, name, command)] = name
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


# ==== 2. What they answered ====


def read_items(folder: Path) -> dict[str, dict[str, tuple[float, str, str]]]:
    """Measure -> item -> (value 0 to 1, patient, class) of an arm's evaluation."""
    names = ("direct", "think", "format", "invalid", "coverage", "consistency", "judge right")
    items = {name: dict() for name in (*names, "skill")}
    for row in read_log(folder / "predictions.jsonl"):
        values = {row["mode"]: row["correctness"]}
        if row["mode"] == "think":
            values |= {"format": row["format"], "invalid": 1 - row["validity"]}
            values["coverage"] = row["judged"] is not None
            if row["judged"] is not None:
                values["consistency"] = row["judged"] == row["predicted"]
                values["judge right"] = row["judged"] == row["label"]
        for name, value in values.items():
            items[name][row["id"]] = (float(value), row["patient"], row["label"])
    for row in read_log(folder / "general.jsonl"):
        items["skill"][row["id"]] = (row["score"], row["patient"], row["part"])
    return items


def difference(first: dict, second: dict) -> dict | None:
    """Mean of the items' differences and its 95 % bootstrap interval over patients, in percentage
    points; None where items with a value in both are missing or of fewer than ten patients."""
    both = [key for key in first if key in second]
    if not both:
        return None
    gains = np.array([100 * (first[key][0] - second[key][0]) for key in both])
    found = bootstrap(gains, [first[key][1] for key in both])
    return found["interval_95"] and {"mean": found["mean"], "interval": found["interval_95"]}


def over_seeds(seeds: list[dict]) -> tuple[float, float, float]:
    """Mean and 95 % interval over the seeds' differences (the head of this file says how); one seed
    has its own interval."""
    means, n = np.array([seed["mean"] for seed in seeds]), len(seeds)
    if n == 1:
        return means[0], *seeds[0]["interval"]
    widths = np.array([seed["interval"][1] - seed["interval"][0] for seed in seeds])
    between = stats.t.ppf(0.975, n - 1) * means.std(ddof=1)
    within = 1.96 * np.sqrt(np.mean(np.square(widths / 2 / 1.96)))
    half = max(between, within) / np.sqrt(n)
    return means.mean(), means.mean() - half, means.mean() + half


def verdict(low: float, high: float, sign: int) -> str:
    """Whether an interval agrees with the paper's sign; 0: with a skill that is kept."""
    if sign == 0:
        agrees, disagrees = low >= -KEPT, high < -KEPT
    else:
        agrees, disagrees = (low > 0, high < 0) if sign > 0 else (high < 0, low > 0)
    return "agrees" if agrees else "disagrees" if disagrees else "not resolved"


# ==== 3. The report ====


def cell(seeds: list[dict | None], measure: str, label: str | None = None) -> str:
    """Mean over seeds, in brackets each seed's, of the items of one class or of all."""
    means = []
    for items in seeds:
        rows = items[measure].values() if items else ()
        values = [value for value, _, kind in rows if label in (None, kind)]
        means.append(100 * float(np.mean(values)) if values else math.nan)
    if np.isnan(means).all():
        return "" if any(seeds) else "failed"
    each = ["none" if math.isnan(mean) else f"{mean:.1f}" for mean in means]
    return f"{np.nanmean(means):.1f} ({', '.join(each)})"


def paper(arm: str, measure: str) -> str:
    """The paper's figure, where it has one."""
    return f"{PAPER[arm, measure]:.2f}" if (arm, measure) in PAPER else ""


def effect(items: dict, first: str, second: str, sign: int) -> list[str]:
    """One row of effects: the paper's, the miniature's, each seed's, and the verdict."""
    first, second = first.split(), second.split()
    known = [PAPER.get((arm, measure)) for arm, measure in (first, second)]
    if all(known):
        expected = f"{known[0] - known[1]:+.2f}"
    else:
        expected = {0: "kept", 1: "+", -1: "-"}[sign]
    sides = list(zip(items[first[0]], items[second[0]], strict=True))
    if not all(one and other for one, other in sides):
        return [expected, "a run failed", "", "not resolved"]
    pairs = [difference(one[first[1]], other[second[1]]) for one, other in sides]
    if None in pairs:
        return [expected, "too few patients in common", "", "not resolved"]
    middle, low, high = over_seeds(pairs)
    each = ", ".join(f"{pair['mean']:+.1f}" for pair in pairs)
    interval = f"{middle:+.1f} ({low:+.1f} to {high:+.1f})"
    return [expected, interval, each, verdict(low, high, sign)]


def table(title: str, header: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table with its title."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    return [title, "", *lines, ""]


def report(out: Path, seeds: list[int], failed: dict[str, str]) -> str:
    """Tables 1 to 4, Fig. 1d, Fig. 3 and the verdicts, as Markdown."""
    items = {arm: [] for arm in ARMS}  # of each arm, by seed; None where it failed
    for arm in ARMS:
        for seed in seeds:
            name = f"seed{seed}/eval_{arm}"
            items[arm].append(None if name in failed else read_items(out / name))

    def cells(arm: str, *measures: str) -> list[str]:
        """The arm's name, and of each measure the miniature's cell; after "+", the paper's, too."""
        row = [ARMS[arm]]
        for measure in measures:
            row.append(cell(items[arm], measure.strip("+")))
            if measure.endswith("+"):
                row.append(paper(arm, measure.strip("+")))
        return row

    sizes = [len(one["direct"]) if one else 0 for one in items["base"]]
    head = f"Seeds {', '.join(map(str, seeds))}; test items {', '.join(map(str, sizes))}."
    means = "All figures in %, greedy: the mean over seeds, in brackets each seed's."
    lines = [f"{head} {means} Chance: 14.3 %.", ""]

    title = "**Table 1. Accuracy without and with thinking** (the paper's base: Qwen2.5-VL-7B)"
    header = ["", "miniature, direct", "paper", "miniature, think", "paper"]
    lines += table(title, header, [cells(arm, "direct+", "think+") for arm in MAIN])

    rows = []
    for name in CLASSES:
        modes = zip(MAIN, ("direct", "direct", "think"), strict=True)
        rows.append([name, *(cell(items[arm], mode, name) for arm, mode in modes)])
    title = "**Fig. 1d. Accuracy by class** (base and SFT direct, RL thinking)"
    lines += table(title, ["", *(ARMS[arm] for arm in MAIN)], rows)

    sets = "attribute questions on the test pictures; the paper: ChartQA, TextVQA"
    rows = [cells(arm, "skill") for arm in MAIN]
    lines += table(f"**Table 2. General skill** ({sets})", ["", "miniature"], rows)

    rows = [cells("sft", "direct+"), cells("sft_plain", "direct+")]
    rows[0][0], rows[1][0] = "with the patch", "without"
    lines += table("**Table 3. Zoom** (SFT, direct)", ["", "miniature", "paper"], rows)

    title = "**Table 4. Training stages and rewards** (thinking; SFT: direct)"
    header = ["", "miniature", "paper", "format, think", "invalid, think", "direct"]
    rows = [cells("sft", "direct+", "format", "invalid", "direct")]
    rows += [cells(arm, "think+", "format", "invalid", "direct") for arm in RL]
    lines += table(title, header, rows)

    title = (
        "**Fig. 3. Forced thinking; reasoning and answer agree** (the miniature's judge: keyword)"
    )
    header = [
        "",
        "accuracy, think",
        "paper",
        "consistency",
        "paper",
        "judge's coverage",
        "judge right",
    ]
    measures = ("think+", "consistency+", "coverage", "judge right")
    lines += table(title, header, [cells(arm, *measures) for arm in MAIN])

    items_of = "consistency: those whose thinking the judge decides in both arms"
    pairs = f"Percentage points, paired on the test items ({items_of})"
    header = ["effect", "paper", "miniature", "each seed", "verdict"]
    rows = [[name, *effect(items, *sides)] for name, *sides in EFFECTS]
    lines += table(f"**Effects.** {pairs}, with the 95 % interval over seeds", header, rows)

    lines.append(f"Failed runs: {len(failed) or 'none'}.")
    lines += [f"- {name}: {why}" for name, why in failed.items()]
    return "\n".join(lines) + "\n"


# ==== 4. The study ====


def main(argv: list[str] | None = None) -> None:
    """Runs what is not done yet, and writes and prints the report."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--out", type=Path, default="runs/miniature", help="where all goes (%(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2, fixed beforehand)")
    add("--jobs", type=int, default=2, help="tasks at a time, each on one thread (%(default)s)")
    args = parser.parse_args(argv)
    plan = {}
    for seed in args.seeds:
        plan |= tasks(args.out, seed)
    failed = run_all(args.out, plan, args.jobs)
    text = report(args.out, args.seeds, failed)
    (args.out / "report.md").write_text(text)
    print(text)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
