"""Evaluation: accuracy with and without thinking, invalid answers, per-class accuracy, confusion (paper, Section 4).

Every model answers every test question twice, greedily: under the direct prompt and under the think prompt. Prompts and
parser are those of training (rewards.py). An answer that the parser cannot read counts as wrong.

    python 05_eval.py                                             base, runs/sft and runs/grpo side by side
    python 05_eval.py --model Qwen/Qwen2.5-VL-7B-Instruct runs/sft --think yes
    torchrun --nproc-per-node 8 05_eval.py --data data/real_zoom --model runs/grpo

Writes to --out: predictions.jsonl, metrics.json, table.md, confusion.png, examples.png.
"""

import argparse
import json
import os
import textwrap
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import rewards
from support import train, vlm
from support.files import BadInput, make_folder, open_picture, write_atomic, writes
from support.tiny_vlm import DEFAULT as TINY

# Used instead of the defaults when every --model descends from the tiny demo checkpoint; explicit flags win.
DEMO = {"max_new_tokens": 40, "batch_size": 64}
MODES = {"both": ("direct", "think"), "yes": ("think",), "no": ("direct",)}


@torch.no_grad()
def answer(model, processor: vlm.Processor, records: list[dict], mode: str, args, world: train.World) -> list[str]:
    """The model's greedy completions of one batch, by its own `generate`."""
    prompts = [rewards.prompt(record["question"], mode) for record in records]
    batch = vlm.to_device(vlm.encode(processor, train.pictures(records), prompts), world.device)
    stops = vlm.stop_ids(model, processor)
    with train.autocast(world.device):
        out = model.generate(**batch, do_sample=False, temperature=None, top_k=None, top_p=None, repetition_penalty=1.0,
                             max_new_tokens=args.max_new_tokens, eos_token_id=stops, pad_token_id=stops[0])  # fmt: skip
    return [vlm.decode(processor, row.tolist(), stops) for row in out[:, batch["input_ids"].shape[1] :]]


def predict(name: str, records: list[dict], args, world: train.World) -> list[dict]:
    """Every record's prediction by one model in every asked mode, in the records' order."""
    model, processor = vlm.load_model(name, world.device), vlm.load_processor(name)
    rows = []
    for mode in MODES[args.think]:
        mine, part = world.share(records), []
        batches = [mine[i : i + args.batch_size] for i in range(0, len(mine), args.batch_size)]
        for batch in tqdm(batches, desc=f"{Path(name).name}, {mode}", disable=not world.main):
            for record, text in zip(batch, answer(model, processor, batch, mode, args, world), strict=True):
                part.append({"model": name, "mode": mode, "id": record["id"], "patient": record.get("patient"),
                             "label": record["label"], "predicted": rewards.predicted_class(text),
                             "format": rewards.format_reward(text), "text": text})  # fmt: skip
        rows += world.gather(part)
    return rows


def interval(correct: np.ndarray, patients: list, draws: int = 1000) -> tuple[float, float]:
    """95 % bootstrap interval of the accuracy; patients are drawn, not slices, since one person's slices are alike."""
    _, group = np.unique([str(p) for p in patients], return_inverse=True)
    hits, sizes = np.bincount(group, correct), np.bincount(group)
    drawn = np.random.default_rng(0).integers(len(sizes), size=(draws, len(sizes)))
    low, high = np.percentile(hits[drawn].sum(1) / sizes[drawn].sum(1), [2.5, 97.5])
    return float(low), float(high)


def summarise(rows: list[dict]) -> dict:
    """Metrics of one model in one mode; the confusion matrix's rows are the truth, its last column invalid answers."""
    correct = np.array([row["predicted"] == row["label"] for row in rows], float)
    columns = [*rewards.CLASSES, None]
    confusion = np.zeros((len(rewards.CLASSES), len(columns)), int)
    for row in rows:
        confusion[rewards.CLASSES.index(row["label"]), columns.index(row["predicted"])] += 1
    per_class = {name: (float(line[i] / line.sum()) if line.sum() else None)
                 for i, (name, line) in enumerate(zip(rewards.CLASSES, confusion, strict=True))}  # fmt: skip
    return {
        "n": len(rows),
        "accuracy": float(correct.mean()),
        "interval_95": interval(correct, [row["patient"] for row in rows]),
        "macro_accuracy": float(np.mean([value for value in per_class.values() if value is not None])),
        "invalid": float(np.mean([row["predicted"] is None for row in rows])),
        "format": float(np.mean([row["format"] for row in rows])),
        "per_class": per_class,
        "confusion": confusion.tolist(),
    }


def markdown(metrics: dict, majority: float, n: int) -> str:
    """The tables of a run as Markdown."""
    lines = [f"Test accuracy, greedy, n = {n}; chance {100 / 7:.1f} %, commonest class {100 * majority:.1f} %", "",
             "| model | prompt | accuracy % (95 % interval) | invalid % | format % |", "|---" * 5 + "|"]  # fmt: skip
    for model, modes in metrics.items():
        for mode, m in modes.items():
            low, high = m["interval_95"]
            form = f"{100 * m['format']:.1f}" if mode == "think" else ""
            lines.append(f"| {model} | {mode} | {100 * m['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f}) | "
                         f"{100 * m['invalid']:.1f} | {form} |")  # fmt: skip
    heads = [(model, mode) for model, modes in metrics.items() for mode in modes]
    lines += ["", "| accuracy % by class | " + " | ".join(f"{model} {mode}" for model, mode in heads) + " |",
              "|---" * (len(heads) + 1) + "|"]  # fmt: skip
    for name in rewards.CLASSES:
        cells = [metrics[model][mode]["per_class"][name] for model, mode in heads]
        shown = ["" if value is None else f"{100 * value:.1f}" for value in cells]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


@writes
def plot_confusion(path: Path, metrics: dict) -> None:
    """One confusion matrix a model and mode: truth down, answer across, shares of the truth's row in per cent."""
    from matplotlib.figure import Figure

    modes = sorted({mode for part in metrics.values() for mode in part})
    figure = Figure(figsize=(4.6 * len(metrics), 4.4 * len(modes)), layout="constrained")
    axes = figure.subplots(len(modes), len(metrics), squeeze=False)
    short = [name.split("/")[0].split()[0].split("-")[0] for name in rewards.CLASSES]
    for column, (model, part) in enumerate(metrics.items()):
        for line, mode in enumerate(modes):
            counts, axis = np.array(part[mode]["confusion"]), axes[line, column]
            share = 100 * counts / counts.sum(1, keepdims=True).clip(min=1)
            axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
            for (y, x), value in np.ndenumerate(share):
                axis.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=7, color="w" if value > 55 else "k")
            axis.set_xticks(range(len(short) + 1), [*short, "invalid"], rotation=45, ha="right", fontsize=7)
            axis.set_yticks(range(len(short)), short, fontsize=7)
            axis.set_title(f"{model}, {mode}: {100 * part[mode]['accuracy']:.1f} %", fontsize=9)
    temporary = path.with_name(".confusion.tmp.png")
    figure.savefig(temporary, dpi=100)
    os.replace(temporary, path)


@writes
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
        axis.set_title("\n".join(lines), fontsize=9, loc="left", color="k" if answer == row["label"] else "tab:red")
        axis.axis("off")
    temporary = path.with_name(".examples.tmp.png")
    figure.savefig(temporary, dpi=90)
    os.replace(temporary, path)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=Path("data/ct_rate_vqa_zoom"), help="02's folder (%(default)s)")
    add("--model", nargs="+", default=[str(TINY), "runs/sft", "runs/grpo"], help="folders or hub ids (default: the "
        "tiny base, runs/sft and runs/grpo)")  # fmt: skip
    add("--out", type=Path, default=Path("runs/eval"), help="where the results go (%(default)s)")
    add("--think", choices=MODES, default="both", help="prompt: think (yes), direct (no) or both (%(default)s)")
    add("--limit", type=int, help="only the first so many test records")
    add("--max-new-tokens", type=int, default=512, help="tokens at which an answer is cut off (%(default)s)")
    add("--batch-size", type=int, default=8, help="questions at a time on one GPU (%(default)s)")
    return parser


def evaluate(argv: list[str] | None = None) -> None:
    args = train.parse(parser(), argv, DEMO)
    if args.batch_size < 1 or args.max_new_tokens < 1 or (args.limit is not None and args.limit < 1):
        raise BadInput("--batch-size, --max-new-tokens and --limit must be above 0")
    world = train.start(0)
    make_folder(args.out)
    records = train.load_split(args.data, "test")[: args.limit]
    rows = [row for name in args.model for row in predict(name, records, args, world)]
    if not world.main:
        return
    metrics = {name: {mode: summarise([r for r in rows if (r["model"], r["mode"]) == (name, mode)])
                      for mode in MODES[args.think]} for name in args.model}  # fmt: skip
    # Shown by the folder's last name where that is unambiguous.
    short = {name: Path(name).name for name in args.model}
    if len(set(short.values())) == len(short):
        metrics = {short[name]: value for name, value in metrics.items()}
    counts = np.unique([record["label"] for record in records], return_counts=True)[1]
    table = markdown(metrics, counts.max() / len(records), len(records))
    write_atomic(args.out / "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_atomic(args.out / "metrics.json", json.dumps(metrics, indent=1))
    write_atomic(args.out / "table.md", table)
    plot_confusion(args.out / "confusion.png", metrics)
    last = (args.model[-1], MODES[args.think][-1])
    plot_examples(args.out / "examples.png", [r for r in rows if (r["model"], r["mode"]) == last], records)
    print(table)
    print(f"{args.out}: predictions.jsonl, metrics.json, table.md, confusion.png, examples.png")


def main(argv: list[str] | None = None) -> None:
    """Runs the stage; bad input ends in one line and exit code 1."""
    train.run(evaluate, argv)


if __name__ == "__main__":
    main()
