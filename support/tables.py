"""What 05_eval.py shows of its metrics: tables (for table.md and report.html) and pictures."""

import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np

import rewards
from support.files import open_picture
from support.grounding import boxes_of
from support.log import draw_box, save_figure
from support.stats import FEWEST

SETS = {"skill": "attribute questions", "chartqa": "ChartQA", "textvqa": "TextVQA"}


class Table(NamedTuple):
    """A table of texts; the first row is the header."""

    caption: str
    note: str
    rows: list[list[str]]


def percent(value: float | None, interval: list[float] | None = None) -> str:
    """A share in %, with its interval in brackets; empty when there is none."""
    shown = "" if value is None else f"{100 * value:.1f}"
    if interval is None:
        return shown
    return f"{shown} ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def tables(metrics: dict) -> list[Table]:
    """The tables of metrics.json's content; accuracies in % with 95 % intervals."""
    models = metrics["models"].values()
    if metrics["task"] == "locate":
        result = [_located(metrics)]
    else:
        result = [_accuracy(metrics), _by_class(metrics["models"])]
        if any("think" in model["modes"] for model in models):
            result.append(_agreement(metrics))
    if any("swap_thinking" in model for model in models):
        result.append(_swapped(metrics["models"]))
    if any(model["general"] for model in models):
        result.append(_general(metrics["models"]))
    if metrics["paired"]:
        result.append(_differences(metrics["paired"]))
    return result


def _accuracy(metrics: dict) -> Table:
    rows = [["model", "parameters", "prompt", "accuracy %", "macro %", "invalid %", "format %"]]
    for name, model in metrics["models"].items():
        size = f"{model['parameters'] / 1e6:,.1f} M"
        for mode, m in model["modes"].items():
            accuracy = percent(m["accuracy"], m["interval_95"])
            macro = percent(m["macro_accuracy"], m["macro_interval_95"])
            shares = percent(m["invalid"]), percent(m["format"])
            rows.append([name, size, mode, accuracy, macro, *shares])
    chance, common = percent(1 / len(rewards.CLASSES)), metrics["commonest_class"]
    rows.append(["chance", "", "", chance, chance, "", ""])
    shares = m["per_class"].values()  # of the same classes in all
    present = [share for share in shares if share is not None]
    one, macro = percent(common["share"]), percent(1 / len(present))
    rows.append([f"always {common['name']}", "", "", one, macro, "", ""])
    note = "in brackets the 95 % interval of a bootstrap over patients"
    note = f"Greedy, n = {metrics['n']}; {note}."
    note += f" Of fewer than {FEWEST} patients it would be too narrow, and is left out."
    return Table("Accuracy with and without thinking (Table 1)", note, rows)


def _located(metrics: dict) -> Table:
    rows = [["model", "prompt", "mean IoU %", "IoU above 0.5 %", "invalid %", "format %"]]
    for name, model in metrics["models"].items():
        for mode, m in model["modes"].items():
            iou = percent(m["iou"], m["iou_interval_95"])
            half = percent(m["half"], m["half_interval_95"])
            shares = percent(m["invalid"]), percent(m["format"])
            rows.append([name, mode, iou, half, *shares])
    note = f"Greedy, n = {metrics['n']}; with the right box that is met best, 0 if unreadable. "
    note += "In brackets the 95 % interval of a bootstrap over patients."
    return Table("Where is the lesion?", note, rows)


def _by_class(models: dict) -> Table:
    rows = [["class"], *([name] for name in rewards.CLASSES)]
    for name, model in models.items():
        for mode, m in model["modes"].items():
            rows[0].append(f"{name} {mode}")
            for row in rows[1:]:
                row.append(percent(m["per_class"][row[0]]))
    return Table("Accuracy by class, % (Fig. 1d)", "", rows)


def _agreement(metrics: dict) -> Table:
    rows = [["model", "consistency %", "coverage %", "judge right %"]]
    for name, model in metrics["models"].items():
        m = model["modes"]["think"]["judge"]
        consistency = percent(m["consistency"], m.get("interval_95"))
        rows.append([name, consistency, percent(m["coverage"]), percent(m["right"])])
    note = f"Judge: {metrics['judge']}; it reads the thinking alone. "
    note += "Coverage: answers whose thinking it gives a class. "
    note += "Of those: answers equal to that class, and classes equal to the truth."
    return Table("Reasoning and answer agree (Fig. 3)", note, rows)


def _swapped(models: dict) -> Table:
    rows = [["model", "moved %", "stayed %", "right without reasoning %", "n"]]
    for name, model in models.items():
        m = model["swap_thinking"]
        shares = []
        for key in ("moved", "stayed", "accuracy_without"):
            shares.append(percent(m[key], m[f"{key}_interval_95"]))
        rows.append([name, *shares, str(m["n"])])
    note = "Moved: after another item's reasoning, the answer is the class of that. "
    note += "(The judge gives it neither the own reasoning's class nor the own answer.) "
    note += "Stayed: it is the own answer. "
    note += "Both of the n items that have such a reasoning. "
    note += "Right without reasoning: after an empty one, of all items."
    return Table("Does the answer follow the reasoning?", note, rows)


def _general(models: dict) -> Table:
    rows = []
    for name, model in models.items():
        header, row = ["model"], [name]
        for key, m in model["general"].items():
            header.append(f"{SETS[key]} % (n = {m['n']})")
            row.append(percent(m["mean"], m["interval_95"]))
            header += [f"{part} %" for part in m["parts"]]
            row += [percent(part["mean"]) for part in m["parts"].values()]
        if model["weighted_average"] is not None:
            header.append("weighted average %")
            row.append(percent(model["weighted_average"]))
        rows.append(row)
    note = "Think and answer tags are stripped before scoring. "
    note += "The average is that of ChartQA and TextVQA."
    return Table("General skill (Table 2)", note, [header, *rows])


def _differences(paired: list[dict]) -> Table:
    rows = [["first", "second", "difference"]]
    for d in paired:
        difference = percent(d["mean"], d["interval_95"])
        rows.append([" ".join(d["from"]), " ".join(d["to"]), difference])
    note = "Percentage points, second minus first; an interval without 0 is a difference beyond "
    note += "what other patients would change; of several comparisons some pass that by chance. "
    note += f"Of fewer than {FEWEST} patients it would be too narrow, and is left out."
    return Table("Differences on the same items", note, rows)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def markdown(shown: list[Table]) -> str:
    """Tables as Markdown."""
    parts = []
    for caption, note, rows in shown:
        lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
        lines.insert(1, "|---" * len(rows[0]) + "|")
        head = f"**{caption}.** {note}".replace("?.**", "?**").strip()
        parts.append("\n".join([head, "", *lines, ""]))
    return "\n".join(parts)


def plot_confusion(path: Path, models: dict) -> None:
    """One confusion matrix per model and mode: truth down, answer across, % of the truth's row."""
    from matplotlib.figure import Figure  # here: it takes most of a second to import

    height, width = len(next(iter(models.values()))["modes"]), len(models)
    figure = Figure(figsize=(4.6 * width, 4.4 * height), layout="constrained")
    axes = figure.subplots(height, width, squeeze=False)
    short = [name.split("/")[0].split()[0].split("-")[0] for name in rewards.CLASSES]
    for column, (name, model) in enumerate(models.items()):
        for line, (mode, m) in enumerate(model["modes"].items()):
            counts, axis = np.array(m["confusion"]), axes[line, column]
            share = 100 * counts / counts.sum(1, keepdims=True).clip(min=1)
            axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
            for (y, x), value in np.ndenumerate(share):
                look = {"ha": "center", "va": "center", "color": "w" if value > 55 else "k"}
                axis.text(x, y, f"{value:.0f}", fontsize=7, **look)
            axis.set_xticks(range(8), [*short, "invalid"], rotation=45, ha="right", fontsize=7)
            axis.set_yticks(range(7), short, fontsize=7)
            title = f"{name}, {mode}: {100 * m['accuracy']:.1f} %"
            axis.set_title(title, fontsize=9, parse_math=False)
    save_figure(path, figure)


def plot_examples(path: Path, cases: list[dict]) -> None:
    """The first case of each of four classes: picture, reasoning, answer; cases: see report.py."""
    from matplotlib.figure import Figure

    first = {case["label"]: case for case in reversed(cases)}
    chosen = [first[name] for name in rewards.CLASSES if name in first][:4]
    figure = Figure(figsize=(3.2 * len(chosen), 4.2), layout="constrained")
    axes = figure.subplots(1, len(chosen), squeeze=False)[0]
    for axis, case in zip(axes, chosen, strict=True):
        lines = []
        if case["mode"] == "think":
            lines = textwrap.wrap(f"thinks: {case['thinking']}", 38)[:5]
        lines.append(f"answers: {case['predicted'] or '(no class)'}")
        lines.append(f"truth: {case['label']}")
        look = {"parse_math": False, "color": "k" if case["correctness"] else "tab:red"}
        axis.imshow(open_picture(case["image"]))
        axis.set_title("\n".join(lines), fontsize=9, loc="left", **look)
        axis.set_anchor("S")  # close to its title
        axis.axis("off")
    save_figure(path, figure)


def plot_boxes(path: Path, rows: list, records: dict[str, dict]) -> None:
    """Per model and prompt form six answers from the best IoU to the worst: the right boxes in
    green, the predicted one in orange. `rows` are 05's answers, `records` by id."""
    from matplotlib.figure import Figure

    groups, count = {}, 6
    for row in rows:
        groups.setdefault((row.model, row.mode), []).append(row)
    figure = Figure(figsize=(2.4 * count, 2.75 * len(groups)), layout="constrained")
    axes = figure.subplots(len(groups), count, squeeze=False)
    for line, ((model, mode), group) in zip(axes, groups.items(), strict=True):
        group = sorted(group, key=lambda row: -row.score)
        for i, axis in enumerate(line):
            row = group[i * (len(group) - 1) // (count - 1)]
            record = records[row.id]
            axis.imshow(open_picture(record["image"]))
            boxes = [*boxes_of(record), row.predicted]
            for box in filter(None, boxes):
                colour = "darkorange" if box is row.predicted else "lime"
                draw_box(axis, box, colour)
            head = f"{Path(model).name}, {mode}" if i == 0 else ""
            title = f"{head}\nIoU {row.score:.2f}"
            axis.set_title(title, fontsize=8, loc="left", parse_math=False)
            axis.axis("off")
    save_figure(path, figure)
