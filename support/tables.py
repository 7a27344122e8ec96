"""What 05_eval.py shows of its metrics: tables (for table.md and report.html) and pictures."""

import io
import textwrap
from pathlib import Path

import numpy as np

import rewards
from support.files import open_picture, write_atomic

SETS = {"skill": "attribute questions", "chartqa": "ChartQA", "textvqa": "TextVQA"}


def percent(value: float | None, interval: list[float] | None = None) -> str:
    shown = "" if value is None else f"{100 * value:.1f}"
    return f"{shown} ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if shown and interval else shown


def tables(metrics: dict) -> list[tuple[str, str, list[list[str]]]]:
    """Caption, note and rows (the header first) of each table; accuracies in % with 95 % intervals."""
    models = metrics["models"]
    heads = [(name, mode) for name, model in models.items() for mode in model["modes"]]
    cells = {(name, mode): models[name]["modes"][mode] for name, mode in heads}
    first = [["model", "parameters", "prompt", "accuracy %", "macro %", "invalid %", "format %"]]
    for (name, mode), m in cells.items():
        size = f"{models[name]['parameters'] / 1e6:,.1f} M"
        first.append([name, size, mode, percent(m["accuracy"], m["interval_95"]),
                      percent(m["macro_accuracy"], m["macro_interval_95"]), percent(m["invalid"]),
                      percent(m["format"]) if mode == "think" else ""])  # fmt: skip
    common, chance = metrics["commonest_class"], percent(1 / len(rewards.CLASSES))
    seen = percent(1 / sum(value is not None for value in next(iter(cells.values()))["per_class"].values()))
    first += [["chance", "", "", chance, chance, "", ""],
              [f"always {common['name']}", "", "", percent(common["share"]), seen, "", ""]]  # fmt: skip
    note = f"Greedy, n = {metrics['n']}; in brackets the 95 % interval of a bootstrap over patients."
    result = [("Accuracy with and without thinking (Table 1)", note, first)]
    by_class = [["class", *(f"{name} {mode}" for name, mode in heads)]]
    by_class += [[name, *(percent(m["per_class"][name]) for m in cells.values())] for name in rewards.CLASSES]
    result.append(("Accuracy by class, % (Fig. 1d)", "", by_class))
    judgements = [(name, m["judge"]) for (name, _), m in cells.items() if "judge" in m]
    if judgements:
        rows = [[name, percent(j["consistency"], j.get("interval_95")), percent(j["coverage"]), percent(j["right"])]
                for name, j in judgements]  # fmt: skip
        note = (f"Judge: {metrics['judge']}; it reads the thinking alone. Coverage: answers whose thinking it gives a "
                "class. Of those: answers equal to that class, and classes equal to the truth.")  # fmt: skip
        header = ["model", "consistency %", "coverage %", "judge right %"]
        result.append(("Reasoning and answer agree (Fig. 3)", note, [header, *rows]))
    general = {name: model["general"] for name, model in models.items() if model["general"]}
    if general:
        sets = next(iter(general.values()))
        header, rows = ["model"], [[name] for name in general]
        for key in sets:
            header += [f"{SETS[key]} % (n = {sets[key]['n']})", *(f"{part} %" for part in sets[key]["parts"])]
            for row, own in zip(rows, general.values(), strict=True):
                row += [percent(own[key]["mean"], own[key]["interval_95"])]
                row += [percent(part["mean"]) for part in own[key]["parts"].values()]
        if {"chartqa", "textvqa"} & set(sets):
            header.append("weighted average %")
            for row in rows:
                row.append(percent(models[row[0]]["weighted_average"]))
        note = "Think and answer tags are stripped before scoring. The average is that of ChartQA and TextVQA."
        result.append(("General skill (Table 2)", note, [header, *rows]))
    if metrics["paired"]:
        rows = [[*map(" ".join, (d["from"], d["to"])), percent(d["mean"], d["interval_95"])] for d in metrics["paired"]]
        note = "Percentage points, second minus first; an interval without 0 is a difference beyond chance."
        result.append(("Differences on the same items", note, [["first", "second", "difference"], *rows]))
    return result


def markdown(shown: list[tuple[str, str, list[list[str]]]]) -> str:
    """`tables` as Markdown."""
    parts = []
    for caption, note, (header, *rows) in shown:
        lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
        lines.insert(1, "|---" * len(header) + "|")
        parts.append("\n".join([f"**{caption}.** {note}".strip(), "", *lines, ""]))
    return "\n".join(parts)


def save(path: Path, figure) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    write_atomic(path, buffer.getvalue())


def plot_confusion(path: Path, models: dict) -> None:
    """One confusion matrix a model and mode: truth down, answer across, shares of the truth's row in per cent."""
    from matplotlib.figure import Figure

    modes = list(next(iter(models.values()))["modes"])
    figure = Figure(figsize=(4.6 * len(models), 4.4 * len(modes)), layout="constrained")
    axes = figure.subplots(len(modes), len(models), squeeze=False)
    short = [name.split("/")[0].split()[0].split("-")[0] for name in rewards.CLASSES]
    for column, (name, model) in enumerate(models.items()):
        for line, mode in enumerate(modes):
            counts, axis = np.array(model["modes"][mode]["confusion"]), axes[line, column]
            share = 100 * counts / counts.sum(1, keepdims=True).clip(min=1)
            axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
            for (y, x), value in np.ndenumerate(share):
                axis.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=7, color="w" if value > 55 else "k")
            axis.set_xticks(range(len(short) + 1), [*short, "invalid"], rotation=45, ha="right", fontsize=7)
            axis.set_yticks(range(len(short)), short, fontsize=7)
            axis.set_title(f"{name}, {mode}: {100 * model['modes'][mode]['accuracy']:.1f} %", fontsize=9)
    save(path, figure)


def plot_examples(path: Path, rows: list[dict], records: list[dict]) -> None:
    """The first record of each of four classes: the picture, and what the last model thought and answered."""
    from matplotlib.figure import Figure

    pictures = {record["id"]: record["image"] for record in records}
    chosen = {row["label"]: row for row in reversed(rows)}
    chosen = [chosen[name] for name in rewards.CLASSES if name in chosen][:4]
    figure = Figure(figsize=(3.2 * len(chosen), 4.2), layout="constrained")
    for axis, row in zip(figure.subplots(1, len(chosen), squeeze=False)[0], chosen, strict=True):
        axis.imshow(open_picture(pictures[row["id"]]))
        answer = row["predicted"] or "(no class)"
        lines = textwrap.wrap(f"thinks: {rewards.thinking(row['text'])}", 38)[:5] if row["mode"] == "think" else []
        lines += [f"answers: {answer}", f"truth: {row['label']}"]
        axis.set_title("\n".join(lines), fontsize=9, loc="left", parse_math=False,
                       color="k" if answer == row["label"] else "tab:red")  # fmt: skip
        axis.axis("off")
    save(path, figure)
