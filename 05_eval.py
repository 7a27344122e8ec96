"""Evaluation: every table and figure of the paper's Section 4, for any models side by side.

Every model answers every test question twice, greedily: under the direct prompt and under the think prompt. Prompts and
parser are those of training (rewards.py). An answer that the parser cannot read counts as wrong.

    python 05_eval.py                                             base, runs/sft and runs/grpo side by side
    python 05_eval.py --model Qwen/Qwen2.5-VL-7B-Instruct runs/sft --think yes --judge openai/gpt-oss-20b
    python 05_eval.py --model runs/real_sft runs/real_grpo --chartqa test_human.json --textvqa TextVQA_0.5.1_val.json
    python 05_eval.py --model runs/grpo --image slice.png --box 120 88 161 130
    torchrun --nproc-per-node 8 05_eval.py --data data/real_zoom --model runs/real_grpo --out runs/real_eval

Writes to --out: predictions.jsonl, general.jsonl, metrics.json, table.md, confusion.png, examples.png, report.html, and
.work/ with the answers so far: an interrupted run, started again, goes on and ends with the same bytes.
"""

import argparse
import functools
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import rewards
from support import judge, tables, tiny_vlm, train, vlm, vqa_metrics, zoom
from support.files import BadInput, open_picture, open_work, read_bytes, read_json, write_atomic
from support.report import write_report
from support.stats import bootstrap

# Used instead of the defaults when every --model descends from the tiny demo checkpoint; explicit flags win.
DEMO = {"max_new_tokens": 40, "batch_size": 64, "skill": True}
MODES = {"both": ("direct", "think"), "yes": ("think",), "no": ("direct",)}
SCORES = {  # of the general-skill sets
    "skill": vqa_metrics.exact_match,
    "chartqa": vqa_metrics.relaxed_accuracy,
    "textvqa": vqa_metrics.textvqa_accuracy,
}
OUTPUTS = ("predictions.jsonl", "general.jsonl", "metrics.json", "table.md", "confusion.png", "examples.png")
OUTPUTS += ("report.html",)


# ---- asking: greedy answers, batch by batch, each kept on disk ----


@torch.no_grad()
def answer(model, processor, images: list, prompts: list[str], tokens: int, device: torch.device) -> list[str]:
    """The model's greedy completions of one batch of pictures and prompts, by its own `generate`."""
    if isinstance(processor, vlm.Processor):
        batch, stops = vlm.encode(processor, images, prompts), vlm.stop_ids(model, processor)
        own = {"eos_token_id": stops, "pad_token_id": stops[0]}
    else:  # another family: its own processor, stop tokens and padding
        turns = [[{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]
                 for image, prompt in zip(images, prompts, strict=True)]  # fmt: skip
        batch, own = processor.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"}), {}  # fmt: skip
    with train.autocast(device):
        out = model.generate(**vlm.to_device(batch, device), **vlm.GREEDY, **own, max_new_tokens=tokens)
    rows = out[:, batch["input_ids"].shape[1] :].tolist()  # [B, T]
    if isinstance(processor, vlm.Processor):
        return [vlm.decode(processor, row, stops) for row in rows]
    return processor.batch_decode(rows, skip_special_tokens=True)


def digest(value: object) -> str:
    """A short name for a JSON value, or for the bytes of a file."""
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def cached(folder: Path, items: list, size: int, work: Callable[[list], list], world: train.World, title: str) -> list:
    """One result an item, by `work` on batches of `size`, which are dealt out over ranks.

    Each batch's results are a file of `folder`, named by what was asked. So nothing is done twice, and as the batches
    are the same however many ranks there are and wherever a run was cut, so are the results. All ranks share the disk.
    """
    batches = [items[i : i + size] for i in range(0, len(items), size)]
    files = [folder / f"{digest(batch)}.json" for batch in batches]
    # Rank 0 alone looks which are missing: others may already be writing by then.
    missing = world.gather([i for i, file in enumerate(files) if not file.exists()] if world.main else [])
    for i in tqdm(world.share(missing), desc=title, unit="batch", disable=not world.main or not missing):
        write_atomic(files[i], json.dumps(work(batches[i])))
    world.gather([])  # waits for every rank
    results = [result for file in files for result in read_json(file)]
    if len(results) != len(items):
        raise BadInput(f"{folder}: holds too few or too many answers; start anew with --overwrite")
    return results


def ask(name: str, place: Path, tasks: dict[str, list], args, world: train.World) -> dict[str, list[str]]:
    """One model's completions of each task's [picture path, prompt] pairs; it is loaded only when some are missing."""
    load = functools.cache(lambda: (vlm.load_model(name, world.device), vlm.any_processor(name)))

    def work(batch: list) -> list[str]:
        images = [open_picture(Path(path)).convert("RGB") for path, _ in batch]
        return answer(*load(), images, [prompt for _, prompt in batch], args.max_new_tokens, world.device)

    return {task: cached(place / task, pairs, args.batch_size, work, world, f"{Path(name).name}, {task}")
            for task, pairs in tasks.items()}  # fmt: skip


# ---- answers: the rows of predictions.jsonl and general.jsonl ----


def diagnoses(name: str, records: list[dict], mode: str, texts: list[str]) -> list[dict]:
    """The rows of predictions.jsonl: what one model answered under one prompt form, with the reward's parts."""
    rows = []
    for record, text in zip(records, texts, strict=True):
        parts = rewards.reward(text, record["label"])
        rows.append({"model": name, "mode": mode, "id": record["id"], "patient": record.get("patient", record["id"]),
                     "label": record["label"], "predicted": parts.predicted, "format": parts.format,
                     "validity": parts.validity, "correctness": parts.correctness, "text": text})  # fmt: skip
    return rows


def judged(rows: list[dict], args, world: train.World) -> None:
    """Adds to each row under the think prompt the class that its thinking alone makes most probable ("judged")."""
    rows = [row for row in rows if row["mode"] == "think"]
    texts = sorted({rewards.thinking(row["text"]) for row in rows} - {""})
    if args.judge == "keyword":
        verdicts = [judge.keyword_judge(text) for text in texts]
    else:
        load = functools.cache(lambda: judge.language_judge(args.judge, world.device))
        who = digest([checkpoint_digest(args.judge), judge.PROMPT, judge.REPLY_TOKENS]) if world.main else ""
        place = args.out / ".work" / f"judge-{world.gather([who])[0]}"
        verdicts = cached(place, texts, args.batch_size, lambda batch: load()(batch), world, "judge")
    by_text = dict(zip(texts, verdicts, strict=True))
    for row in rows:
        row["judged"] = by_text.get(rewards.thinking(row["text"]))


def general_sets(args, records: list[dict]) -> dict[str, list[dict]]:
    """The general-skill questions by set, each with its whole prompt."""
    sets = {"skill": [{**q, "prompt": q["question"]} for q in tiny_vlm.questions(records)] if args.skill else []}
    for key in ("chartqa", "textvqa"):
        files = [vqa_metrics.read_questions(path, ten=key == "textvqa")[: args.limit] for path in getattr(args, key)]
        sets[key] = [{**q, "prompt": f"{q['question']}\n{vqa_metrics.SHORT}"} for questions in files for q in questions]
    return {key: questions for key, questions in sets.items() if questions}


def scored(name: str, key: str, questions: list[dict], texts: list[str]) -> list[dict]:
    """The rows of general.jsonl: one model's answers to one set, and their scores."""
    return [{"model": name, "set": key, "part": q["part"], "id": q["id"], "patient": q.get("patient", q["image"].name),
             "question": q["question"], "answers": q["answers"], "text": text,
             "score": SCORES[key](vqa_metrics.bare(text), q["answers"])}
            for q, text in zip(questions, texts, strict=True)]  # fmt: skip


# ---- metrics: shares of those rows, with intervals ----


def summarise(rows: list[dict]) -> dict:
    """Metrics of one model in one mode; the confusion matrix's rows are the truth, its last column invalid answers."""
    columns = [*rewards.CLASSES, None]
    confusion = np.zeros((len(rewards.CLASSES), len(columns)), int)
    for row in rows:
        confusion[rewards.CLASSES.index(row["label"]), columns.index(row["predicted"])] += 1
    patients = [row["patient"] for row in rows]
    right = bootstrap(np.array([row["correctness"] for row in rows]), patients, [row["label"] for row in rows])
    result = {
        "n": len(rows),
        "accuracy": right["mean"],
        "interval_95": right["interval_95"],
        "macro_accuracy": right["macro"]["mean"],
        "macro_interval_95": right["macro"]["interval_95"],
        "invalid": float(np.mean([row["predicted"] is None for row in rows])),
        "format": float(np.mean([row["format"] for row in rows])),
        "per_class": {name: right["kinds"].get(name, {}).get("mean") for name in rewards.CLASSES},
        "per_class_interval_95": {name: part["interval_95"] for name, part in right["kinds"].items()},
        "confusion": confusion.tolist(),
    }
    if "judged" in rows[0]:
        decided = [row for row in rows if row["judged"] is not None]
        result["judge"] = {"coverage": len(decided) / len(rows), "consistency": None, "right": None}
        if decided:
            same = np.array([row["judged"] == row["predicted"] for row in decided], float)
            consistency = bootstrap(same, [row["patient"] for row in decided])
            true = float(np.mean([row["judged"] == row["label"] for row in decided]))
            result["judge"] |= {"consistency": consistency["mean"], "interval_95": consistency["interval_95"],
                                "right": true}  # fmt: skip
    return result


def summarise_general(rows: list[dict]) -> dict:
    """Scores of one model on one general-skill set, whole and by part (ChartQA's human and augmented)."""
    scores, parts = np.array([row["score"] for row in rows]), [row["part"] for row in rows]
    result = {"n": len(rows), **bootstrap(scores, [row["patient"] for row in rows])}
    named = sorted({part for part in parts if part})
    result["parts"] = {name: {"n": parts.count(name), "mean": float(scores[[p == name for p in parts]].mean())}
                       for name in named}  # fmt: skip
    return result


def weighted(general: dict) -> float | None:
    """Table 2's average of ChartQA and TextVQA, weighted by their sample counts."""
    parts = [general[name] for name in ("chartqa", "textvqa") if name in general]
    return sum(part["n"] * part["mean"] for part in parts) / sum(part["n"] for part in parts) if parts else None


def paired(rows: list[dict], general: list[dict], models: dict[str, str], modes: tuple[str, ...]) -> list[dict]:
    """Differences on the same items with paired bootstrap intervals: every two models under one prompt form or on one
    general-skill set, and each model's think against its direct prompt."""
    columns, patients = {}, {}
    for row in [*rows, *general]:
        key = row["model"], row.get("mode") or row["set"]
        columns.setdefault(key, []).append(row.get("correctness", row.get("score")))
        patients.setdefault(key, []).append(row["patient"])
    kinds = [*modes, *dict.fromkeys(row["set"] for row in general)]
    pairs = [((one, kind), (other, kind)) for one, other in itertools.combinations(models, 2) for kind in kinds]
    pairs += [((name, "direct"), (name, "think")) for name in models if len(modes) == 2]
    return [{"from": [models[one[0]], one[1]], "to": [models[other[0]], other[1]],
             **bootstrap(np.array(columns[other]) - np.array(columns[one]), patients[one])}
            for one, other in pairs]  # fmt: skip


def measure(args, rows: list[dict], general: list[dict]) -> dict:
    """The content of metrics.json. Models go by their folder's last name where that is unambiguous."""
    short = {name: Path(name).name for name in args.model}
    if len(set(short.values())) < len(short):
        short = {name: name for name in args.model}
    models = {}
    for name in args.model:
        modes = {mode: summarise([r for r in rows if (r["model"], r["mode"]) == (name, mode)])
                 for mode in MODES[args.think]}  # fmt: skip
        parts = {key: summarise_general([r for r in general if (r["model"], r["set"]) == (name, key)])
                 for key in dict.fromkeys(row["set"] for row in general)}  # fmt: skip
        models[short[name]] = {"path": name, "parameters": vlm.count_parameters(name), "modes": modes, "general": parts,
                               "weighted_average": weighted(parts)}  # fmt: skip
    items = len(rows) // (len(args.model) * len(MODES[args.think]))  # every model and mode answers the same ones
    kinds, counts = np.unique([row["label"] for row in rows[:items]], return_counts=True)
    n, most = int(counts.sum()), int(counts.argmax())
    return {"n": n, "commonest_class": {"name": str(kinds[most]), "share": counts[most] / n}, "judge": args.judge,
            "models": models, "paired": paired(rows, general, short, MODES[args.think])}  # fmt: skip


# ---- one slice of one's own ----


def diagnose(args) -> None:
    """Prints what each model thinks and answers about --image: a windowed slice, and the lesion's --box in it, px."""
    picture, device = zoom.augment(open_picture(args.image), args.box), train.start(0).device
    for name in args.model:
        model, processor = vlm.load_model(name, device), vlm.any_processor(name)
        for mode in MODES[args.think]:
            prompt = rewards.prompt(rewards.QUESTION, mode)
            text = answer(model, processor, [picture], [prompt], args.max_new_tokens, device)[0]
            print(f"{name}, {mode}")
            if mode == "think":
                print(f"  thinks:  {rewards.thinking(text) or '(nothing between think tags)'}")
            print(f"  answers: {rewards.predicted_class(text) or f'no class in {text!r}'}")


# ---- flags and the output folder ----


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what is asked").add_argument
    add("--data", type=Path, default=Path("data/ct_rate_vqa_zoom"), help="02's folder (%(default)s)")
    add("--model", nargs="+", default=[str(tiny_vlm.DEFAULT), "runs/sft", "runs/grpo"],
        help="folders or hub ids (default: the tiny base, runs/sft and runs/grpo)")  # fmt: skip
    add("--think", choices=MODES, default="both", help="prompt: think (yes), direct (no) or both (%(default)s)")
    add("--limit", type=int, help="only the first so many questions of each file")
    add("--image", type=Path, help="diagnose this one windowed slice instead, and print thinking and answer")
    add("--box", type=int, nargs=4, metavar=("X0", "Y0", "X1", "Y1"), help="its lesion, px, end-exclusive")
    add = parser.add_argument_group("beyond accuracy").add_argument
    add("--judge", default="keyword", help="names a class from the thinking alone: keyword (offline), or a causal "
        "language model's folder or hub id (%(default)s; the paper: openai/gpt-oss-20b)")  # fmt: skip
    add("--skill", action=argparse.BooleanOptionalAction, help="general skill: the attribute questions that the tiny "
        "base was taught, on the test pictures (default: for the tiny demo checkpoint)")  # fmt: skip
    add("--chartqa", type=Path, nargs="+", default=[], help="its JSON files, or JSONL with image, question, answer")
    add("--textvqa", type=Path, nargs="+", default=[], help="its JSON file, or JSONL with ten answers")
    add = parser.add_argument_group("running").add_argument
    add("--out", type=Path, default=Path("runs/eval"), help="where the results go (%(default)s)")
    add("--overwrite", action="store_true", help="start anew where --out holds other settings' results")
    add("--max-new-tokens", type=int, default=512, help="tokens at which an answer is cut off (%(default)s)")
    add("--batch-size", type=int, default=8, help="questions at a time on one GPU (%(default)s)")
    return parser


def check(args) -> None:
    """Raises BadInput for flags that do not go together."""
    if min(args.batch_size, args.max_new_tokens, 1 if args.limit is None else args.limit) < 1:
        raise BadInput("--batch-size, --max-new-tokens and --limit must be above 0")
    if len(set(args.model)) < len(args.model):
        raise BadInput("--model names a checkpoint twice; name each once")
    if (args.image is None) != (args.box is None):
        raise BadInput("--image FILE and --box X0 Y0 X1 Y1 go together")
    if args.judge != "keyword":
        vlm.load_config(args.judge)  # a misspelt judge is found now, not after hours of answers


def checkpoint_digest(name: str) -> str:
    """Tells checkpoints apart: a hub id's commit, or a digest of a folder's weights, configuration and tokenizer."""
    folder, total = Path(name), hashlib.blake2b(digest_size=12)
    if not folder.is_dir():
        return str(vlm.load_config(name)._commit_hash)
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".json", ".jinja", ".txt") and file.is_file():
            with open(file, "rb") as content:
                total.update(file.name.encode() + hashlib.file_digest(content, "blake2b").digest())
    return total.hexdigest()


def begin(args) -> None:
    """Opens --out for these models, data and settings. Raises BadInput when it holds others' results."""
    made = args.out / ".work" / "settings.json"
    made = read_json(made) if made.exists() else None
    ours = isinstance(made, dict) and made.get("script") == "05_eval.py"
    if ours and args.overwrite:
        try:
            for name in OUTPUTS:
                (args.out / name).unlink(missing_ok=True)
            for part in (args.out / ".work").iterdir():  # settings.json goes last: a stop here leaves no answers to it
                if part.is_dir():
                    shutil.rmtree(part)
            shutil.rmtree(args.out / ".work")
        except OSError as error:
            raise BadInput(f"{args.out}: cannot be cleared: {error.strerror}") from error
    files = {
        "data": [args.data / "test" / "metadata.jsonl", args.data / "dataset_info.json"],
        "chartqa": args.chartqa,
        "textvqa": args.textvqa,
    }
    settings = {"model": [[name, checkpoint_digest(name)] for name in args.model]}
    settings |= {flag: [digest(read_bytes(path)) for path in paths] for flag, paths in files.items()}
    settings |= {flag: getattr(args, flag) for flag in ("think", "limit", "max_new_tokens", "batch_size", "skill")}
    try:
        open_work(args.out, settings, "05_eval.py")
    except BadInput as error:
        raise BadInput(f"{error}{', or start anew with --overwrite' if ours else ''}") from error


def write_results(args, records: list[dict], rows: list[dict], general: list[dict]) -> None:
    """Every file of --out."""
    metrics = measure(args, rows, general)
    shown = tables.tables(metrics)
    write_atomic(args.out / "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    if general:
        write_atomic(args.out / "general.jsonl", "".join(json.dumps(row) + "\n" for row in general))
    tables.plot_confusion(args.out / "confusion.png", metrics["models"])
    last = (args.model[-1], MODES[args.think][-1])
    tables.plot_examples(args.out / "examples.png", [r for r in rows if (r["model"], r["mode"]) == last], records)
    by_id = {record["id"]: record for record in records}
    cases = [{"image": by_id[r["id"]]["image"], "id": r["id"], "model": r["model"], "mode": r["mode"],
              "text": r["text"], "answer": r["predicted"], "truth": r["label"], "correct": bool(r["correctness"]),
              "prompt": rewards.prompt(by_id[r["id"]]["question"], r["mode"]), "thinking": rewards.thinking(r["text"]),
              "rewards": {part: r[part] for part in ("format", "validity", "correctness")}}
             for r in rows]  # fmt: skip
    write_atomic(args.out / "table.md", tables.markdown(shown))
    folders = dict.fromkeys(folder for name in args.model for folder in (Path(name), Path(name).parent))
    runs = [folder for folder in folders if (folder / "run.json").is_file()]  # a checkpoint lies in its run
    write_report(args.out / "report.html", title="MedReason-R1: evaluation", tables=shown, runs=runs,
                 figures=[("Confusion", args.out / "confusion.png")], cases=cases)  # fmt: skip
    write_atomic(args.out / "metrics.json", json.dumps(metrics, indent=1))
    print(tables.markdown(shown))
    print(f"{args.out}: {', '.join(name for name in OUTPUTS if (args.out / name).exists())}")


# ---- the whole evaluation ----


def evaluate(argv: list[str] | None = None) -> None:
    args = train.parse(parser(), argv, DEMO)
    check(args)
    if args.image:
        return diagnose(args)
    world = train.start(0)
    records = train.load_split(args.data, "test")[: args.limit]
    sets, rows, general = general_sets(args, records), [], []
    if world.main:
        begin(args)
    world.gather([])  # the other ranks wait until --out is open
    for number, name in enumerate(args.model):
        tasks = {mode: [[str(r["image"]), rewards.prompt(r["question"], mode)] for r in records]
                 for mode in MODES[args.think]}  # fmt: skip
        tasks |= {key: [[str(q["image"]), q["prompt"]] for q in questions] for key, questions in sets.items()}
        texts = ask(name, args.out / ".work" / f"model-{number}", tasks, args, world)
        rows += [row for mode in MODES[args.think] for row in diagnoses(name, records, mode, texts[mode])]
        general += [row for key, questions in sets.items() for row in scored(name, key, questions, texts[key])]
    judged(rows, args, world)
    if world.main:
        write_results(args, records, rows, general)


def main(argv: list[str] | None = None) -> None:
    """Runs the stage; bad input ends in one line and exit code 1."""
    train.run(evaluate, argv)


if __name__ == "__main__":
    main()
