"""The study's tables and its figure: what the arms of benchmarks/miniature.py answered.

An effect is a difference of two arms on the same test items. Its interval is the wider of two:
Student's t over the seeds' differences, in which training, phantoms and test set all vary, and the
normal one of the patients' bootstraps within the seeds. The tiny base is the same in all seeds, and
intervals are not corrected for the number of effects.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from rewards import CLASSES
from support.files import write_atomic
from support.log import numbers, read_log, save_figure
from support.stats import bootstrap

ARMS = {
    "base": "base",
    "sft": "SFT",
    "sft_plain": "SFT without the patch",
    "sft_corner": "SFT, patch in the farthest corner",
    "rl": "SFT + RL, all rewards",
    "rl_no_format": "SFT + RL, without format",
    "rl_no_validity": "SFT + RL, without validity",
    "rl_correctness": "SFT + RL, correctness only",
    "rl_direct": "SFT + RL, without thinking",
    "rl_no_sft": "RL without SFT",
}
MAIN = ("base", "sft", "rl")  # the arms of Fig. 1d and 3
SWAPPED = (*MAIN, "rl_no_sft")  # those that answer after another slice's reasoning
TABLE_1 = (*MAIN, "rl_direct")  # and Table 2
TABLE_3 = ("sft", "sft_plain", "sft_corner")
TABLE_4 = ("rl", "rl_no_format", "rl_no_validity", "rl_correctness", "rl_no_sft")
# Whose classes without a right answer are counted.
NEVER = (("sft", "direct"), ("rl", "think"), ("rl_direct", "direct"), ("rl_no_sft", "think"))
# SFT (direct) and RL (thinking) are also asked about pictures with a wrong box of this IoU with the
# right one, or with no box and no patch. Name -> the flags with which 02 draws them.
WRONG_BOXES = {
    "iou_0.7": "--jitter 0.7",
    "iou_0.5": "--jitter 0.5",
    "iou_0.3": "--jitter 0.3",
    "iou_0": "--jitter 0",
    "whole": "--whole",
}
DRAWN = (*WRONG_BOXES, "predicted")  # the last: by the boxes that a model predicted
LOCATES = {"locate_base": "base", "locate_sft": "SFT", "locate_rl": "SFT + RL"}
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


@dataclass(frozen=True)
class Effect:
    """What is compared: first minus second, each an evaluation and a measure of it."""

    name: str
    first: str
    second: str
    # "+" or "-": the sign that the paper's claim, or without one ours, has. "kept": a skill is not
    # lost. "": nobody claims anything.
    expected: str = "+"


# The base's thinking, RL alone against SFT, RL's gain with thinking, readable answers, correctness
# only and RL's swapped reasoning against the base's were added when two or three of the seeds had
# been seen; the sign "+" of the swapped reasoning against SFT's was withdrawn then.
EFFECTS = [
    Effect("Table 1: the base loses by thinking", "base think", "base direct", "-"),
    Effect("Table 1: SFT raises direct accuracy over the base", "sft direct", "base direct"),
    Effect("Table 1: RL raises accuracy over SFT (think against direct)", "rl think", "sft direct"),
    Effect("Table 1: RL raises direct accuracy, too", "rl direct", "sft direct"),
    Effect("Table 1: after RL, thinking beats direct answers", "rl think", "rl direct"),
    Effect("Table 2: general skill is kept by SFT", "sft skill", "base skill", "kept"),
    Effect("Table 2: general skill is kept by RL", "rl skill", "sft skill", "kept"),
    Effect("Table 3: the zoomed patch helps (SFT, direct)", "sft direct", "sft_plain direct"),
    Effect("Table 3: the farthest corner (SFT, direct)", "sft_corner direct", "sft direct", ""),
    Effect("Table 4: the format reward helps", "rl think", "rl_no_format think"),
    Effect("Table 4: the validity reward helps", "rl think", "rl_no_validity think"),
    Effect("Table 4: all rewards against correctness only", "rl think", "rl_correctness think", ""),
    Effect("Table 4: RL needs SFT before it", "rl think", "rl_no_sft think"),
    Effect("Table 4: RL alone stays below SFT (direct)", "rl_no_sft think", "sft direct", "-"),
    Effect("Fig. 3: SFT forced to think loses accuracy", "sft think", "sft direct", "-"),
    Effect("Fig. 3: so it does among readable answers alone", "sft readable", "sft direct", "-"),
    Effect("Fig. 3: RL raises accuracy with thinking", "rl think", "sft think"),
    Effect("Fig. 3: RL makes reasoning and answer agree", "rl consistency", "sft consistency"),
    Effect(
        "Swapped reasoning moves more answers of RL than of the base", "rl moved", "base moved", ""
    ),
    Effect("Swapped reasoning moves more answers of RL than of SFT", "rl moved", "sft moved", ""),
    Effect("RL with thinking beats RL without", "rl think", "rl_direct direct"),
    Effect("Locating: RL raises the mean IoU over SFT", "locate_rl direct", "locate_sft direct"),
    Effect("Predicted boxes beat none (RL, think)", "rl_predicted think", "rl_whole think"),
    Effect("True boxes beat predicted ones (RL, think)", "rl think", "rl_predicted think"),
]
# What the table of seeds shows: column and measure. Lesson 5 reads it.
BY_SEED = [
    ("base: direct", "base direct"),
    ("base: think", "base think"),
    ("SFT: direct", "sft direct"),
    ("forced to think", "sft think"),
    ("skill", "sft skill"),
    ("consistency", "sft consistency"),
    ("GRPO: direct", "rl direct"),
    ("thinking", "rl think"),
    ("skill", "rl skill"),
    ("consistency", "rl consistency"),
    ("SFT without patch", "sft_plain direct"),
]
# Points. A skill is kept when its interval excludes a larger loss, lost when all of it is larger;
# two arms are equivalent when it excludes a larger difference.
SMALL = 5.0
STEPS = 10  # before a run and at its end: what sampled answers earn
# What RL starts from -> a run that samples from it and hardly moves it.
BEFORE = {"sft": "before_sft", "base": "before_base"}


# ==== 1. What they answered ====


def read_items(folder: Path) -> dict[str, dict[str, tuple[float, str, str]]]:
    """Measure -> item -> (value 0 to 1, patient, class) of one evaluation."""
    names = (
        "direct",
        "think",
        "readable",
        "half",
        "format",
        "invalid",
        "coverage",
        "consistency",
        "judge right",
    )
    items = {name: dict() for name in (*names, "skill", "moved", "stayed", "without")}
    for row in read_log(folder / "predictions.jsonl"):
        values = {row["mode"]: row["correctness"], "half": row["correctness"] > 0.5}
        if row["mode"] == "think":
            values |= {"format": row["format"], "invalid": 1 - row["validity"]}
            values["coverage"] = row["judged"] is not None
            if row["validity"]:
                values["readable"] = row["correctness"]
            if row["judged"] is not None:
                values["consistency"] = row["judged"] == row["predicted"]
                values["judge right"] = row["judged"] == row["label"]
        for name, value in values.items():
            items[name][row["id"]] = (float(value), row["patient"], row["label"])
    for row in read_log(folder / "swapped.jsonl"):
        values = {"without": row["empty"] == row["label"]}
        if row["donor"] is not None:
            values["moved"] = row["swapped"] == row["donor_class"]
            own = row["predicted"]
            values["stayed"] = own is not None and row["swapped"] == own
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


def compare(items: dict, first: str, second: str) -> list[dict] | str:
    """The seeds' differences of two "evaluation measure"s, or why there are none."""
    (one, measure), (other, another) = first.split(), second.split()
    pairs = []
    for left, right in zip(items[one], items[other], strict=True):
        if not (left and right):
            return "a run failed"
        pairs.append(difference(left[measure], right[another]))
    return "too few patients in common" if None in pairs else pairs


def verdict(low: float, high: float, expected: str) -> str:
    """What an interval says about an effect of this kind (see Effect)."""
    if expected == "kept":
        if low >= -SMALL:
            return "agrees"
        return "disagrees" if high < -SMALL else "not resolved"
    sign = "+" if low > 0 else "-" if high < 0 else None
    if sign and expected:
        return "agrees" if sign == expected else "disagrees"
    if max(-low, high) <= SMALL:
        return f"equivalent within {SMALL:g}"
    return "differs" if sign else "not resolved"


# ==== 2. Tables ====


def cell(means: list[float]) -> str:
    """A mean over seeds, and in brackets each seed's; NaN where a seed has none."""
    if np.isnan(means).all():
        return ""
    each = ["none" if math.isnan(mean) else f"{mean:.1f}" for mean in means]
    return f"{np.nanmean(means):.1f} ({', '.join(each)})"


def percents(seeds: list[dict | None], measure: str, label: str | None = None) -> list[float]:
    """Each seed's mean of a measure, in %, of the items of one class or of all; or NaN."""
    found = []
    for items in seeds:
        rows = items[measure].values() if items else ()
        values = [value for value, _, kind in rows if label in (None, kind)]
        found.append(100 * float(np.mean(values)) if values else math.nan)
    return found


def shares(seeds: list[dict | None], measure: str, label: str | None = None) -> str:
    """The cell of a measure, in %, of the items of one class or of all."""
    return cell(percents(seeds, measure, label)) if any(seeds) else "failed"


def gains(pairs: list[dict] | str) -> str:
    """The cell of a difference: its mean and interval over seeds."""
    if isinstance(pairs, str):
        return pairs
    middle, low, high = over_seeds(pairs)
    return f"{middle:+.1f} ({low:+.1f} to {high:+.1f})"


def paper(arm: str, measure: str) -> str:
    """The paper's figure, where it has one."""
    return f"{PAPER[arm, measure]:.2f}" if (arm, measure) in PAPER else ""


def paper_effect(effect: Effect) -> float | None:
    """The paper's difference in points, where it has both figures."""
    first, second = [PAPER.get(tuple(side.split())) for side in (effect.first, effect.second)]
    return None if None in (first, second) else first - second


def table(title: str, header: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table with its title."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    return [title, "", *lines, ""]


def cells(items: dict, arm: str, *measures: str) -> list[str]:
    """The arm's name, and of each measure the miniature's cell; after "+", the paper's, too."""
    row = [(ARMS | LOCATES)[arm]]
    for measure in measures:
        row.append(shares(items[arm], measure.strip("+")))
        if measure.endswith("+"):
            row.append(paper(arm, measure.strip("+")))
    return row


def paper_tables(items: dict) -> list[str]:
    """Tables 1 to 4, Fig. 1d and Fig. 3."""
    title = "**Table 1. Accuracy without and with thinking** (the paper's base: Qwen2.5-VL-7B)"
    header = ["", "miniature, direct", "paper", "miniature, think", "paper"]
    lines = table(title, header, [cells(items, arm, "direct+", "think+") for arm in TABLE_1])

    rows = []
    for name in CLASSES:
        row = [name]
        for arm, mode in zip(MAIN, ("direct", "direct", "think"), strict=True):
            row.append(shares(items[arm], mode, name))
        rows.append(row)
    title = "**Fig. 1d. Accuracy by class** (base and SFT direct, RL thinking)"
    lines += table(title, ["", *(ARMS[arm] for arm in MAIN)], rows)

    rows = []
    for arm, mode in NEVER:
        right = np.array([percents(items[arm], mode, name) for name in CLASSES])  # [class, seed]
        each = []
        for count, run in zip((right == 0).sum(0), items[arm], strict=True):
            each.append(str(count) if run else "failed")
        rows.append([f"{ARMS[arm]}, {mode}", ", ".join(each)])
    title = "**Classes of which no item is right**, of seven"
    lines += table(title, ["", "each seed"], rows)

    sets = "attribute questions on the test pictures; the paper: ChartQA, TextVQA"
    rows = [cells(items, arm, "skill") for arm in TABLE_1]
    lines += table(f"**Table 2. General skill** ({sets})", ["", "miniature"], rows)

    rows = [cells(items, arm, "direct+") for arm in TABLE_3]
    rows[0][0] = "SFT, patch in the upper left"
    title = "**Table 3. Zoom** (direct; each arm asked about pictures drawn as those it learnt)"
    lines += table(title, ["", "miniature", "paper"], rows)

    title = "**Table 4. Training stages and rewards** (thinking; SFT: direct)"
    header = ["", "miniature", "paper", "format, think", "invalid, think", "direct"]
    rows = [cells(items, "sft", "direct+", "format", "invalid", "direct")]
    rows += [cells(items, arm, "think+", "format", "invalid", "direct") for arm in TABLE_4]
    lines += table(title, header, rows)

    judge = "the miniature's judge: keyword"
    title = f"**Fig. 3. Forced thinking; reasoning and answer agree** ({judge})"
    header = ["", "accuracy, think", "paper", "consistency", "paper"]
    header += ["judge's coverage", "judge right"]
    measures = ("think+", "consistency+", "coverage", "judge right")
    return lines + table(title, header, [cells(items, arm, *measures) for arm in MAIN])


def swap_table(items: dict) -> list[str]:
    """Does the answer follow the reasoning?"""
    title = (
        "**Swapped reasoning.** Each item is answered again after the reasoning of another item "
        "whose judged class differs: the share of answers that are then that class (moved), or "
        "still the answer before (stayed); and accuracy after an empty reasoning"
    )
    header = ["", "moved", "stayed", "consistency", "accuracy, think", "without reasoning"]
    measures = ("moved", "stayed", "consistency", "think", "without")
    return table(title, header, [cells(items, arm, *measures) for arm in SWAPPED])


def box_table(items: dict) -> list[str]:
    """What does a wrong box cost?"""
    rows = [["1", shares(items["sft"], "direct"), "", shares(items["rl"], "think"), ""]]
    for pictures in DRAWN:
        row = [pictures.removeprefix("iou_")]
        for arm, mode in (("sft", "direct"), ("rl", "think")):
            wrong = f"{arm}_{pictures}"
            row.append(shares(items[wrong], mode))
            row.append(gains(compare(items, f"{wrong} {mode}", f"{arm} {mode}")))
        rows.append(row)
    title = (
        "**What a wrong box costs.** Accuracy where box and patch are drawn from a box of this "
        "overlap (IoU) with the right one (whole: from none; predicted: from the one that the "
        "model below predicts), and the paired difference to IoU 1"
    )
    names = [f"{ARMS['sft']}, direct", f"{ARMS['rl']}, think"]
    header = ["IoU", names[0], "difference", names[1], "difference"]
    return table(title, header, rows)


def kept(seed: tuple[dict, dict, dict], mode: str, ids: set | None) -> float:
    """What predicted boxes keep of the gain of true ones over none, %: of all items, or of `ids`.

    `seed`: one seed's items with true, predicted and no boxes. NaN where nothing is gained.
    """
    means = []
    for items in seed:
        values = [row[0] for key, row in items[mode].items() if ids is None or key in ids]
        means.append(np.mean(values) if values else math.nan)
    true, predicted, none = means
    return 100 * (predicted - none) / (true - none) if true != none else math.nan


def locate_table(items: dict, out: Path, seeds: list[int]) -> list[str]:
    """How well is the lesion found, and what of the true boxes' gain do predicted ones keep?

    "The lesion" names none where a slice has several, so slices with one are also counted alone.
    """
    rows = [cells(items, arm, "direct", "half") for arm in LOCATES]
    title = "**Locating the lesion** on clean slices, without thinking"
    lines = table(title, ["", "mean IoU", "IoU above 0.5"], rows)
    lone = {}  # seed -> the records whose slice has one lesion
    for seed in seeds:
        rows = read_log(out / f"seed{seed}" / "slices" / "test" / "metadata.jsonl")
        lone[seed] = {row["id"] for row in rows if len(row["slice_boxes"]) == 1}
    for arm, mode in (("sft", "direct"), ("rl", "think")):
        shares = {"": [], "on slices with one lesion": []}
        arms = items[arm], items[f"{arm}_predicted"], items[f"{arm}_whole"]
        for seed, found in zip(seeds, zip(*arms, strict=True), strict=True):
            if all(found):
                shares[""].append(kept(found, mode, None))
                shares["on slices with one lesion"].append(kept(found, mode, lone[seed]))
        for where, each in shares.items():
            told = "Of what the true box adds to no box, predicted ones keep"
            told += f" {where}" if where else ""
            lines.append(f"- {told}: {ARMS[arm]} {mode} {cell(each or [math.nan]) or 'failed'} %.")
    return [*lines, ""]


def reward_table(out: Path, seeds: list[int], failed: dict[str, str]) -> list[str]:
    """Where does the reward go?"""
    rows = []
    for arm in TABLE_4:
        row, before = [ARMS[arm]], BEFORE["base" if arm == "rl_no_sft" else "sft"]
        for key in ("format", "validity", "correctness"):
            for run in (before, arm):
                means = []
                for seed in seeds:
                    task = f"seed{seed}/{run}"
                    log = [] if task in failed else read_log(out / task / "metrics.jsonl")
                    values = [value for _, value in numbers(log, key)] or [math.nan]
                    means.append(100 * float(np.mean(values[-STEPS:])))
                row.append(cell(means) or "failed")
        rows.append(row)
    title = (
        f"**Where the reward goes.** Sampled answers at temperature 1 to the prompts of {STEPS} "
        "steps: of the model before RL, to the first; of GRPO itself, to the last"
    )
    header = ["", "format, before", "format, last", "validity, before", "validity, last"]
    header += ["right, before", "right, last"]
    return table(title, header, rows)


def effects_table(found: list[list[dict] | str]) -> list[str]:
    """One row per effect: the paper's, the miniature's, each seed's, and the verdict."""
    rows = []
    for effect, pairs in zip(EFFECTS, found, strict=True):
        known = paper_effect(effect)
        claim = "kept" if effect.expected == "kept" else f"none ({effect.expected or 'open'})"
        row = [effect.name, claim if known is None else f"{known:+.2f}", gains(pairs)]
        if isinstance(pairs, str):
            row += ["", "not resolved"]
        else:
            row.append(", ".join(f"{pair['mean']:+.1f}" for pair in pairs))
            row.append(verdict(*over_seeds(pairs)[1:], effect.expected))
        rows.append(row)
    title = (
        "**Effects.** Percentage points, paired on the test items (consistency and moved: those "
        "that have a value in both arms), with the 95 % interval over seeds. In brackets: the sign "
        "expected where the paper has no figure"
    )
    count = len(EFFECTS)
    chance = f"by chance alone {0.05 * count:.2g} of {count} intervals would exclude 0"
    note = f"{count} effects at 95 % each, not corrected for their number: {chance}."
    header = ["effect", "paper", "miniature", "each seed", "verdict"]
    return [*table(title, header, rows), note, ""]


def seed_table(items: dict, seeds: list[int]) -> list[str]:
    """The main arms' figures, one row per seed."""
    header, columns = ["seed"], [[str(seed) for seed in seeds]]
    for name, arm_and_measure in BY_SEED:
        arm, measure = arm_and_measure.split()
        header.append(name)
        columns.append([f"{value:.1f}" for value in percents(items[arm], measure)])
    return table("**Each seed**", header, list(zip(*columns, strict=True)))


# ==== 3. The figure and the report ====


def draw_effects(path: Path, found: list[list[dict] | str]) -> None:
    """The effects as a figure: seeds as dots, the interval as a line, the paper's as a diamond."""
    from matplotlib.figure import Figure  # here: it takes most of a second to import

    figure = Figure(figsize=(11, 0.36 * len(EFFECTS) + 1.4), layout="constrained")
    axis = figure.subplots()
    axis.axvspan(-SMALL, SMALL, color="0.93", label=f"within {SMALL:g} points")
    axis.axvline(0, color="0.4", linewidth=1)
    names = {"line": "95 % interval", "dots": "seeds", "mark": "paper"}  # once in the legend
    for row, (effect, pairs) in enumerate(zip(EFFECTS, found, strict=True)):
        if not isinstance(pairs, str):
            _, *ends = over_seeds(pairs)
            means = [pair["mean"] for pair in pairs]
            axis.plot(ends, [row, row], color="tab:blue", label=names.pop("line", None))
            rows = [row] * len(means)
            axis.plot(means, rows, "o", color="tab:blue", alpha=0.5, label=names.pop("dots", None))
        known = paper_effect(effect)
        if known is not None:
            axis.plot(known, row, "D", color="tab:orange", label=names.pop("mark", None))
    axis.set_yticks(range(len(EFFECTS)), [effect.name for effect in EFFECTS], fontsize=9)
    axis.invert_yaxis()
    axis.set_xlabel("difference, percentage points")
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=4, fontsize=9)
    save_figure(path, figure)


def report(out: Path, seeds: list[int], failed: dict[str, str]) -> str:
    """Writes report.md and miniature.png of these seeds; returns the report."""
    names = [*ARMS, *LOCATES]
    for pictures in DRAWN:
        names += [f"sft_{pictures}", f"rl_{pictures}"]
    items = {name: [] for name in names}  # of each evaluation, by seed; None where it failed
    for name in names:
        for seed in seeds:
            task = f"seed{seed}/eval_{name}"
            items[name].append(None if task in failed else read_items(out / task))
    found = [compare(items, effect.first, effect.second) for effect in EFFECTS]

    sizes = [len(one["direct"]) if one else 0 for one in items["base"]]
    head = f"Seeds {', '.join(map(str, seeds))}; test items {', '.join(map(str, sizes))}."
    means = "All figures in %, of greedy answers except in the last table: the mean over seeds, in "
    means += "brackets each seed's."
    lines = [f"{head} {means} Chance: 14.3 %.", ""]
    lines += effects_table(found)
    lines += seed_table(items, seeds)
    lines += paper_tables(items)
    lines += swap_table(items)
    lines += box_table(items)
    lines += locate_table(items, out, seeds)
    lines += reward_table(out, seeds, failed)
    lines.append(f"Failed runs: {len(failed) or 'none'}.")
    lines += [f"- {name}: {why}" for name, why in failed.items()]
    text = "\n".join(lines) + "\n"
    write_atomic(out / "report.md", text)
    draw_effects(out / "miniature.png", found)
    return text
