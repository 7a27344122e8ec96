"""Evaluation: every table and figure of the paper's Sections 3.3 to 3.5, for any models.

Every model answers every test question twice, greedily: under the direct and the think prompt.
Prompts and parser are those of training (rewards.py).

    python 05_eval.py                                     the base, runs/sft and runs/grpo
    python 05_eval.py --model runs/sft runs/grpo --judge openai/gpt-oss-20b --textvqa val.json
    python 05_eval.py --model runs/grpo --image zoomed.png      one picture, drawn by 02 --image
    python 05_eval.py --task locate --data data/ct_rate_vqa_clean --model runs/locate --think no

Writes to --out predictions.jsonl (per answer: text, class read, truth, reward parts),
general.jsonl (per general-skill answer: text, right answers, score), swapped.jsonl, metrics.json,
what shows it (table.md, report.html, confusion.png and examples.png), and .work/ with the answers
so far: an interrupted run, started again, goes on and ends with the same bytes.

metrics.json holds for each model and prompt form

    accuracy         share of right answers; an answer that cannot be read is wrong
    macro_accuracy   the mean over classes of per_class, the accuracy among one class's records
    invalid          share of answers in which no class can be read
    format           share of answers in the format that the prompt asks for
    confusion        counts: the rows are the truth, the last column invalid answers
    judge            under the think prompt. coverage: share of answers whose reasoning gives the
                     judge a class. Of those: consistency, the share that answer with that class,
                     and right, the share where it is the truth: the judge's own accuracy

and for each model general skill: the mean score on each set, whole and by part, and the average of
ChartQA and TextVQA weighted by their counts. "paired" are differences on the same items, of two
models or of the two prompt forms. Intervals: 95 % bootstrap over patients, null below ten; a record
without "patient" is its own.

--task locate, beyond the paper: boxes.jsonl, for 02 --boxes, holds per answer its box in px of the
slice, null where none can be read, and its IoU with the right box that it meets best. boxes.png is
in place of the other two pictures. metrics.json has their mean iou, half, the share above 0.5,
invalid, format, and "paired" of the IoU.

--swap-thinking: does the answer follow the reasoning? Consistency cannot tell: it is as high where
a reasoning is made up to suit an answer. So the model goes on from the reasoning of another item,
the donor, and from an empty one. To the donor's reasoning the judge gives a class that is neither
that of the item's own reasoning nor its answer. Of the n items with a donor, those that "moved"
answer with the donor's class, those that "stayed" with their own answer. "accuracy_without": share
of all items, right after the empty one.
"""

from support.stage import run_stage  # isort: skip  (first, see support/__init__.py)
import argparse
import functools
import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

import rewards
from assets import phantom
from support import checkpoint, judge, tables, vlm, vqa_metrics
from support.distributed import World, autocast, start, work_once
from support.files import claim, digest, open_picture, read_bytes, write_atomic
from support.grounding import box_grid, box_in_picture, boxes_of, truth
from support.records import load_split
from support.report import write_report
from support.stage import parse_flags, positive_int
from support.stats import bootstrap, paired_differences
from support.vqa_metrics import Skill, skills, summarise_general, weighted_average

# Used instead of the defaults when every --model descends from the tiny demo checkpoint.
DEMO = {"max_new_tokens": 60, "batch_size": 64, "skill": True}
MODES = {"both": ("direct", "think"), "yes": ("think",), "no": ("direct",)}
OUTPUTS = ("predictions.jsonl", "general.jsonl", "swapped.jsonl", "metrics.json", "table.md")
OUTPUTS += ("confusion.png", "examples.png", "report.html", "boxes.jsonl", "boxes.png")


# ==== 1. Asking: greedy answers, batch by batch, each kept on disk ====


@torch.no_grad()
def answer(model, processor, images, prompts, tokens: int, device, begun=None) -> list[str]:
    """The model's greedy completions of one batch, by its own `generate`, at most `tokens` long.

    They go on from `begun`, a text per prompt, which is not repeated in them.
    """
    batch, ends = vlm.encode_any(model, processor, images, prompts, begun)
    vlm.check_room(model, batch, len(prompts), len(prompts), tokens)
    with autocast(device):
        batch = vlm.to_device(batch, device)
        rows = vlm.generate(model, batch, tokens, **ends)  # [B][T]
    opening = vlm.opening(processor, batch)
    if ends:
        stops = ends["eos_token_id"]
        return [opening + vlm.decode(processor, row, stops) for row in rows]
    texts = processor.batch_decode(rows, skip_special_tokens=True)
    return [opening + text for text in texts]


def ask(name: str, place: Path, tasks: dict, args, world: World) -> dict[str, list[str]]:
    """One model's completions of each task's items [picture's path, prompt, the answer's start]."""
    split = world.size if args.tensor_parallel else 1

    @functools.cache  # and called only when answers are missing
    def load() -> tuple:
        return vlm.load_model(name, world.device, split=split), vlm.any_processor(name)

    def work(batch: list) -> list[str]:
        paths, prompts, begun = zip(*batch, strict=True)
        images = [open_picture(Path(path)).convert("RGB") for path in paths]
        return answer(*load(), images, prompts, args.max_new_tokens, world.device, begun)

    texts = {}
    for task, items in tasks.items():
        desc = f"{Path(name).name}, {task}"
        how = args.batch_size, work, world, desc, split > 1
        texts[task] = work_once(place / task, items, *how)
    return texts


def general_sets(args: argparse.Namespace, records: list[dict]) -> dict[str, list[dict]]:
    """The general-skill questions by set."""
    sets = {"skill": phantom.questions(records) if args.skill else []}
    for key in ("chartqa", "textvqa"):
        ten = key == "textvqa"
        sets[key] = []
        for path in getattr(args, key):
            sets[key] += vqa_metrics.read_questions(path, ten)[: args.limit]
    return {key: questions for key, questions in sets.items() if questions}


# ==== 2. Answers: the rows of predictions.jsonl and general.jsonl ====


@dataclass
class Diagnosis:
    """One model's answer to one record under one prompt form, also to where the lesion is."""

    model: str
    mode: str  # "direct" or "think"
    id: str
    patient: str
    label: str  # the true class
    predicted: str | list[int] | None  # class, or box in px; None where neither can be read
    format: float  # the reward's parts, 0 to 1 each
    validity: float
    correctness: float  # of a box: its IoU
    text: str
    judged: str | None = None  # under the think prompt: the judge's class
    kind = property(lambda row: row.mode)
    score = property(lambda row: row.correctness)


def diagnoses(name: str, records: list[dict], mode: str, texts: list[str]) -> list[Diagnosis]:
    """What one model answers under one prompt form, with the reward's parts."""
    rows = []
    for record, text in zip(records, texts, strict=True):
        label, patient = record["label"], record.get("patient", record["id"])
        parts = rewards.reward(text, label, mode=mode)
        scores = parts.predicted, parts.format, parts.validity, parts.correctness
        rows.append(Diagnosis(name, mode, record["id"], patient, label, *scores, text))
    return rows


def locations(name: str, records: list[dict], mode: str, texts: list[str]) -> list[Diagnosis]:
    """Where one model says that the lesion is, as `diagnoses`."""
    processor, rows = vlm.any_processor(name), []
    for record, text in zip(records, texts, strict=True):
        size = open_picture(record["image"]).size
        right = truth("locate", record, processor, size)
        parts = rewards.reward(text, right, mode=mode, task="locate")
        box, overlap = box_in_picture(text, processor, size), 0.0
        if box:  # in px, so that the models' grids do not matter
            overlap = rewards.best_iou(box, rewards.Boxes(boxes_of(record), *size))
        scores = box, parts.format, parts.validity, overlap
        who = record["id"], record.get("patient", record["id"]), record["label"]
        rows.append(Diagnosis(name, mode, *who, *scores, text))
    return rows


def judge_rows(rows: list[Diagnosis], args: argparse.Namespace, world: World) -> None:
    """Sets `judged` under the think prompt: the class that the reasoning makes most probable."""
    rows = [row for row in rows if row.mode == "think" and args.task == "diagnose"]
    texts = sorted({rewards.reasoning(row.text) for row in rows} - {""})
    if args.judge == "keyword":
        verdicts = [judge.keyword_judge(text) for text in texts]
    else:
        load = functools.cache(judge.language_judge)

        def work(batch: list[str]) -> list[str | None]:
            return load(args.judge, world.device)(batch)

        who = [checkpoint.digest_of(args.judge), judge.PROMPT, judge.REPLY_TOKENS]
        place = args.out / ".work" / f"judge-{digest(who)}"
        verdicts = work_once(place, texts, args.batch_size, work, world, "judge")
    by_text = dict(zip(texts, verdicts, strict=True))
    for row in rows:
        row.judged = by_text.get(rewards.reasoning(row.text))


def swap(name: str, place: Path, items: list, rows: list[Diagnosis], args, world) -> list[dict]:
    """One model's lines of swapped.jsonl, for its `items` and `rows` under the think prompt."""
    given, tasks = judge.donors(rows), {"swapped": [], "empty": []}
    for (image, prompt, _), donor in zip(items, given, strict=True):
        tasks["empty"].append([image, prompt, "<think></think>"])
        if donor:
            begun = f"<think>{rewards.reasoning(donor.text)}</think>"
            tasks["swapped"].append([image, prompt, begun])
    texts = ask(name, place, tasks, args, world)
    swapped, lines = iter(texts["swapped"]), []
    for row, donor, text in zip(rows, given, texts["empty"], strict=True):
        line = {"model": name, "id": row.id, "patient": row.patient, "label": row.label}
        line |= {"predicted": row.predicted, "judged": row.judged}
        line |= {"donor": donor and donor.id, "donor_class": donor and donor.judged}
        line["swapped"] = rewards.predicted_class(next(swapped)) if donor else None
        lines.append(line | {"empty": rewards.predicted_class(text)})
    return lines


# ==== 3. Metrics: shares of those rows, with intervals ====


def summarise(rows: list[Diagnosis]) -> dict:
    """The metrics of one model under one prompt form."""
    columns = [*rewards.CLASSES, None]
    confusion = np.zeros((len(rewards.CLASSES), len(columns)), int)
    for row in rows:
        confusion[columns.index(row.label), columns.index(row.predicted)] += 1
    correct = np.array([row.correctness for row in rows])
    patients = [row.patient for row in rows]
    right = bootstrap(correct, patients, [row.label for row in rows])
    per_class, intervals = dict.fromkeys(rewards.CLASSES), {}
    for name, part in right["kinds"].items():
        per_class[name], intervals[name] = part["mean"], part["interval_95"]
    result = {"n": len(rows)}
    result["accuracy"], result["interval_95"] = right["mean"], right["interval_95"]
    result["macro_accuracy"] = right["macro"]["mean"]
    result["macro_interval_95"] = right["macro"]["interval_95"]
    result["invalid"] = float(np.mean([row.predicted is None for row in rows]))
    result["format"] = float(np.mean([row.format for row in rows]))
    result |= {"per_class": per_class, "per_class_interval_95": intervals}
    result["confusion"] = confusion.tolist()
    if rows[0].mode == "think":
        result["judge"] = summarise_judge(rows)
    return result


def summarise_boxes(rows: list[Diagnosis]) -> dict:
    """The metrics of one model that locates, under one prompt form."""
    patients = [row.patient for row in rows]
    result, scores = {"n": len(rows)}, {}
    scores["iou"] = [row.score for row in rows]
    scores["half"] = [row.score > 0.5 for row in rows]
    for key, values in scores.items():
        share = bootstrap(values, patients)
        result |= {key: share["mean"], f"{key}_interval_95": share["interval_95"]}
    result["invalid"] = float(np.mean([row.predicted is None for row in rows]))
    result["format"] = float(np.mean([row.format for row in rows]))
    return result


def summarise_judge(rows: list[Diagnosis]) -> dict:
    """How often the judge decides, agrees with the answer, and is right (Fig. 3)."""
    decided = [row for row in rows if row.judged is not None]
    patients = [row.patient for row in decided]
    same = bootstrap([row.judged == row.predicted for row in decided], patients)
    right = bootstrap([row.judged == row.label for row in decided], patients)
    result = {"coverage": len(decided) / len(rows), "consistency": same["mean"]}
    return result | {"right": right["mean"], "interval_95": same["interval_95"]}


def measure(args, rows: list[Diagnosis], general: list[Skill], swapped: list[dict]) -> dict:
    """The content of metrics.json. Models go by their folder's name where that is unambiguous."""
    names = {name: Path(name).name for name in args.model}
    if len(set(names.values())) < len(names):
        names = {name: name for name in args.model}
    groups, models = defaultdict(list), {}
    for row in [*rows, *general]:
        groups[row.model, row.kind].append(row)
    summary = summarise_boxes if args.task == "locate" else summarise
    for name in args.model:
        by_mode = {mode: summary(groups[name, mode]) for mode in MODES[args.think]}
        sets = dict.fromkeys(row.set for row in general)
        by_set = {key: summarise_general(groups[name, key]) for key in sets}
        model = {"path": name, "parameters": vlm.count_parameters(name)}
        model |= {"modes": by_mode, "general": by_set}
        if args.swap_thinking:
            lines = [line for line in swapped if line["model"] == name]
            model["swap_thinking"] = judge.summarise_swap(lines)
        models[names[name]] = model | {"weighted_average": weighted_average(by_set)}
    first = groups[rows[0].model, rows[0].mode]  # all have the same records
    labels = [row.label for row in first]
    commonest = max(rewards.CLASSES, key=labels.count)
    share = labels.count(commonest) / len(labels)
    metrics = {"task": args.task, "n": len(labels)}
    metrics["commonest_class"] = {"name": commonest, "share": share}
    metrics |= {"judge": args.judge, "models": models}
    return metrics | {"paired": paired_differences(groups, names)}


# ==== 4. Files: what --out holds ====


def open_out(args: argparse.Namespace, records: list[dict]) -> None:
    """Opens --out for these models, data and flags. Raises BadInput when it holds other results."""
    settings = {"script": "05_eval.py"}
    settings["model"] = [[name, checkpoint.digest_of(name)] for name in args.model]
    names = "test/metadata.jsonl", "dataset_info.json"
    files = {"data": [args.data / name for name in names]}
    files |= {"chartqa": args.chartqa, "textvqa": args.textvqa}
    for flag, paths in files.items():
        settings[flag] = [digest(read_bytes(path)) for path in paths]
    sizes = [record["image"].stat().st_size for record in records]
    settings["data"].append(digest(sizes))  # other pictures by the same names
    flags = "task think limit max_new_tokens batch_size skill swap_thinking"
    for flag in flags.split():
        settings[flag] = getattr(args, flag)
    claim(args.out, settings, (*OUTPUTS, ".work/*"), overwrite=args.overwrite)


def write_results(args, records: list[dict], rows: list, general: list, swapped: list) -> None:
    """Writes every file of --out, metrics.json last."""
    metrics = measure(args, rows, general, swapped)
    shown = tables.tables(metrics)
    by_id = {record["id"]: record for record in records}
    answers, boxes, cases = [], [], []
    for row in rows:
        line, record = asdict(row), by_id[row.id]
        if row.mode == "direct":  # no reasoning, no judge
            del line["judged"]
        answers.append(line)
        case = {"image": record["image"], "thinking": rewards.reasoning(row.text)}
        case["prompt"] = rewards.prompt(record["question"], row.mode, args.task)
        if args.task == "locate":
            boxes.append({"id": row.id, "box": row.predicted, "iou": row.score})
            case["predicted"] = str(row.predicted or "")
            case["correctness"] = int(row.score > 0.5)
        cases.append(line | case)
    files = {"predictions": answers, "boxes": boxes, "swapped": swapped}
    for name, lines in (files | {"general": map(asdict, general)}).items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        if text:
            write_atomic(args.out / f"{name}.jsonl", text)
    write_atomic(args.out / "table.md", tables.markdown(shown))
    if args.task == "locate":
        figures = {"From the best box to the worst": args.out / "boxes.png"}
        tables.plot_boxes(args.out / "boxes.png", rows, by_id)
    else:
        figures = {"Confusion": args.out / "confusion.png"}
        tables.plot_confusion(figures["Confusion"], metrics["models"])
        tables.plot_examples(args.out / "examples.png", cases[-len(records) :])
    for name in args.model:
        for run in (Path(name), Path(name).parent):  # a checkpoint lies in its run
            if (run / "curves.png").is_file():
                figures[f"Training: {run}"] = run / "curves.png"
    title = "MedReason-R1: evaluation"
    write_report(args.out / "report.html", title, shown, figures, cases)
    write_atomic(args.out / "metrics.json", json.dumps(metrics, indent=1))
    print(tables.markdown(shown))
    made = [name for name in OUTPUTS if (args.out / name).exists()]
    print(f"{args.out}: {', '.join(made)}")


# ==== 5. Flags ====


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    models = [str(vlm.TINY), "runs/sft", "runs/grpo"]
    chart = "image, question, answer"
    add = parser.add_argument_group("what is asked").add_argument
    add("--data", type=Path, default="data/ct_rate_vqa_zoom", help="02's folder (%(default)s)")
    add("--task", choices=rewards.TASKS, default="diagnose", help="locate: --data is 02 --clean's")
    add("--model", nargs="+", default=models, help="folders or hub ids (tiny base, SFT, GRPO)")
    add("--think", choices=MODES, default="both", help="ask for reasoning first (%(default)s)")
    add("--limit", type=positive_int, help="only the first so many questions of each set")
    add("--image", type=Path, help="only print the answers about this picture that 02 drew")
    add = parser.add_argument_group("beyond accuracy").add_argument
    add("--judge", default="keyword", help="keyword, or a language model (paper: gpt-oss-20b)")
    add("--swap-thinking", action="store_true", help="answer after other reasoning, and after none")
    add("--skill", action=argparse.BooleanOptionalAction, help="ask what the tiny base was taught")
    add("--chartqa", type=Path, nargs="+", default=[], help=f"its JSON, or JSONL of {chart}")
    add("--textvqa", type=Path, nargs="+", default=[], help="its JSON, or JSONL with ten answers")
    add = parser.add_argument_group("running").add_argument
    add("--out", type=Path, default="runs/eval", help="where the results go (%(default)s)")
    add("--overwrite", action="store_true", help="replace what other settings left in --out")
    add("--max-new-tokens", type=positive_int, default=512, help="limit per answer (%(default)s)")
    add("--batch-size", type=positive_int, default=8, help="questions at a time (%(default)s)")
    add("--tensor-parallel", action="store_true", help="split each model over torchrun's GPUs")
    args = parse_flags(parser, argv, DEMO)
    if len(set(args.model)) < len(args.model):
        parser.error("--model names a checkpoint twice; name each once")
    if args.swap_thinking and (args.think == "no" or args.task == "locate"):
        parser.error("--swap-thinking needs a diagnosis with reasoning to swap")
    if args.task == "locate" and (args.chartqa or args.textvqa):
        parser.error("--chartqa and --textvqa go with --task diagnose")
    if args.image and (args.swap_thinking or args.tensor_parallel):
        parser.error("--image goes without --swap-thinking and --tensor-parallel")
    return args


# ==== 6. The stage ====


def answer_image(args: argparse.Namespace) -> None:
    """Prints what each model thinks and answers about --image."""
    picture, device = open_picture(args.image).convert("RGB"), start().device
    question = rewards.QUESTION
    if args.task == "locate":
        question = rewards.LOCATE.format("the lesion")
    for name in args.model:
        model, processor = vlm.load_model(name, device), vlm.any_processor(name)
        for mode in MODES[args.think]:
            prompt = rewards.prompt(question, mode, args.task)
            asked = [picture], [prompt], args.max_new_tokens, device
            text = answer(model, processor, *asked)[0]
            found = rewards.predicted_class(text)
            if args.task == "locate":
                found = box_in_picture(text, processor, picture.size)
            print(f"{name}, {mode}")
            if mode == "think":
                thoughts = rewards.reasoning(text)
                print(f"  thinks:  {thoughts or '(nothing between think tags)'}")
            print(f"  answers: {found or f'neither class nor box in {text!r}'}")


def evaluate(args: argparse.Namespace) -> None:
    """Asks every model everything, measures, and writes --out; or asks about --image alone."""
    if args.image:
        return answer_image(args)
    # A misspelt judge, or a model whose boxes nobody can read, is found now, not after hours.
    if args.judge != "keyword":
        vlm.load_config(args.judge)
    if args.task == "locate":
        for name in args.model:
            box_grid(vlm.any_processor(name), (140, 140))
    world, modes = start(), MODES[args.think]
    records = load_split(args.data, "test", args.task)[: args.limit]
    sets, read = general_sets(args, records), diagnoses
    if args.task == "locate":
        sets, read = {}, locations
    if world.main:
        open_out(args, records)
    world.wait()
    tasks, rows, general, swapped = {}, [], [], []
    for mode in modes:
        tasks[mode] = []
        for record in records:
            prompt = rewards.prompt(record["question"], mode, args.task)
            tasks[mode].append([str(record["image"]), prompt, ""])
    for key, questions in sets.items():
        form = "" if key == "skill" else f"\n{vqa_metrics.SHORT}"
        tasks[key] = []
        for q in questions:
            tasks[key].append([str(q["image"]), q["question"] + form, ""])
    places = {}
    for i, name in enumerate(args.model):
        places[name] = args.out / ".work" / f"model-{i}"
    for name, place in places.items():
        texts = ask(name, place, tasks, args, world)
        for mode in modes:
            rows += read(name, records, mode, texts[mode])
        for key, questions in sets.items():
            general += skills(name, key, questions, texts[key])
    judge_rows(rows, args, world)
    for name, place in places.items() if args.swap_thinking else ():
        thought = [row for row in rows if (row.model, row.mode) == (name, "think")]
        swapped += swap(name, place, tasks["think"], thought, args, world)
    if world.main:
        write_results(args, records, rows, general, swapped)
    world.close()


def main(argv: list[str] | None = None) -> None:
    """Runs the stage; bad input ends in one line and exit code 1, Ctrl-C in 130, SIGTERM in 143."""
    run_stage(lambda: evaluate(parse_args(argv)))


if __name__ == "__main__":
    main()
