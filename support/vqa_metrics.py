"""General skill before and after training (Table 2): metrics and files of ChartQA and TextVQA.

Both sets are asked as `question`, a newline, SHORT. `bare` strips think and answer tags before
either is scored: a model that keeps its new format would otherwise seem to have lost its skill.
"""

import itertools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support.files import BadInput, inside, read_bytes
from support.stats import bootstrap

SHORT = "Answer the question using a single word or phrase."
_NUMBERS = "zero one two three four five six seven eight nine ten".split()
_DIGITS = {word: str(i) for i, word in enumerate(_NUMBERS)} | {"none": "0"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Written without some of its apostrophes, a contraction gets them back. Those that would then be
# another word are left out (ill, its, well, were, wed, shed, hell, shell, id).
_CONTRACTIONS = Path(__file__).with_name("contractions.txt").read_text().split()
_RESTORED = {}
for _word in _CONTRACTIONS:
    for _marks in itertools.product(("'", ""), repeat=_word.count("'")):
        _RESTORED[_word.replace("'", "{}").format(*_marks)] = _word


def bare(completion: str) -> str:
    """What a completion answers: the text of its answer tags, else all that is not reasoning.

    Chat templates that open the think tag themselves leave a completion with the closing tag alone.
    """
    text = re.sub(r"<think>.*?</think>", "", completion, flags=re.DOTALL)
    text = re.sub(r"^.*</think>|<think>.*$", "", text, flags=re.DOTALL)
    pair = re.search(r"<answer>(.*?)(</answer>|$)", text, re.DOTALL)
    return re.sub(r"</?(think|answer)>", "", pair.group(1) if pair else text).strip()


def _number(text: str) -> float | None:
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def relaxed_accuracy(prediction: str, golds: list[str]) -> float:
    """ChartQA's metric, the best over `golds`: 1 for a number within 5 % of the gold or equal text.

    "12 %" is 0.12; a gold of 0 and text that is no number ("1,200" is none) are compared as text,
    in any case. Source: Methani et al., PlotQA; Masry et al., ChartQA.
    """

    def right(gold: str) -> bool:
        p, g = _number(prediction.strip()), _number(gold.strip())
        if p is not None and g:
            return abs(p - g) / abs(g) <= 0.05
        return prediction.strip().lower() == gold.strip().lower()

    return float(any(map(right, golds)))


def normalise(text: str) -> str:
    """VQA's normal form: lower case, number words as digits, contractions restored, no articles.

    A mark between two letters becomes a space; beside a space, or anywhere in a text that holds a
    number like "1,200", it goes. A full stop stays only before a digit. Source: Antol et al., VQA.
    """
    text = out = text.replace("\n", " ").replace("\t", " ").strip()
    thousands = re.search(r"\d,\d", text)
    for mark in _PUNCTUATION:
        goes = thousands or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if goes else " ")
    words = re.sub(r"\.(?!\d)", "", out).lower().split()
    words = [_DIGITS.get(word, _RESTORED.get(word, word)) for word in words]
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def textvqa_accuracy(prediction: str, golds: list[str]) -> float:
    """TextVQA's metric: the mean over ten human answers of min(1, matches with the others / 3)."""
    matches = [normalise(prediction) == normalise(gold) for gold in golds]
    scores = [min(1.0, (sum(matches) - match) / 3) for match in matches]
    return sum(scores) / len(scores)


def exact_match(prediction: str, golds: list[str]) -> float:
    """1 where the normal forms of the prediction and of a gold are equal."""
    return float(normalise(prediction) in map(normalise, golds))


SCORES = {"skill": exact_match, "chartqa": relaxed_accuracy, "textvqa": textvqa_accuracy}


def read_questions(path: Path, ten: bool = False) -> list[dict]:
    """The checked questions of a file: id, image (Path), question, answers, part.

    JSONL with image, question and answer (or answers), or a set's own JSON: ChartQA's
    test_human.json beside its png/, TextVQA's TextVQA_0.5.1_val.json beside its train_images/.
    `part` is "human", "augmented" or None. Raises BadInput naming file, record and field, also for
    a picture outside the file's folder and, with `ten`, unless there are ten answers.
    """
    content = read_bytes(path)
    try:
        if path.suffix == ".jsonl":
            data = [json.loads(line) for line in content.splitlines()]
        else:
            data = json.loads(content)
            data = data["data"] if isinstance(data, dict) else data
    except (ValueError, RecursionError, KeyError) as error:
        raise BadInput(f"{path}: not JSON of ChartQA or TextVQA, no .jsonl: {error!r}") from error
    if not isinstance(data, list) or not data:
        raise BadInput(f"{path}: holds no questions")
    questions = []
    for number, record in enumerate(data, 1):
        try:
            questions.append({"id": f"{path.stem}-{number}", **_question(path, record, ten)})
        except (BadInput, OSError) as error:
            where = f"{path}, record {number}"
            raise BadInput(f"{where}: {error}; mend it or leave it out") from error
    return questions


def _question(path: Path, record: object, ten: bool) -> dict:
    if not isinstance(record, dict):
        raise BadInput("not a JSON object")
    known = {"image": "{}", "imgname": "png/{}", "image_id": "train_images/{}.jpg"}
    field = next((name for name in known if isinstance(record.get(name), str)), None)
    if field is None:
        raise BadInput("field 'image' (imgname, image_id) is missing")
    image = inside(path.parent, known[field].format(record[field]))
    if not image.is_file():
        raise BadInput(f"field {field!r}: there is no picture {image}")
    question = record.get("question", record.get("query"))
    if not isinstance(question, str) or not question:
        raise BadInput("field 'question' (query) must be text")
    answers = record.get("answers", record.get("answer", record.get("label")))
    answers = answers if isinstance(answers, list) else [answers]
    texts = all(isinstance(answer, str) for answer in answers)
    if not texts or len(answers) == 0 or (ten and len(answers) != 10):
        wanted = "a list of ten texts" if ten else "text or texts"
        raise BadInput(f"field 'answers' (answer, label) must be {wanted}")
    source = str(record.get("part") or record.get("type") or path.stem).lower()
    part = next((name for name in ("human", "augmented") if name in source), None)
    return {"image": image, "question": question, "answers": answers, "part": part}


# ==== What a model answers, and its scores ====


@dataclass
class Skill:
    """One model's answer to one general-skill question."""

    model: str
    set: str
    part: str | None
    id: str
    patient: str
    question: str
    answers: list[str]  # the right ones
    text: str
    score: float
    kind = property(lambda row: row.set)


def skills(name: str, key: str, questions: list[dict], texts: list[str]) -> list[Skill]:
    """What one model answers to one general-skill set, with the scores."""
    rows = []
    for q, text in zip(questions, texts, strict=True):
        score = SCORES[key](bare(text), q["answers"])
        patient = q.get("patient", q["image"].name)
        asked = q["part"], q["id"], patient, q["question"], q["answers"]
        rows.append(Skill(name, key, *asked, text, score))
    return rows


def summarise_general(rows: list[Skill]) -> dict:
    """The scores of one model on one set, whole and by part (ChartQA's human and augmented)."""
    scores = np.array([row.score for row in rows])
    result = {"n": len(rows), **bootstrap(scores, [row.patient for row in rows]), "parts": {}}
    for name in sorted({row.part for row in rows if row.part}):
        part = scores[[row.part == name for row in rows]]
        result["parts"][name] = {"n": len(part), "mean": float(part.mean())}
    return result


def weighted_average(general: dict) -> float | None:
    """Table 2's average of ChartQA and TextVQA, weighted by their sample counts."""
    parts = [general[name] for name in ("chartqa", "textvqa") if name in general]
    total = sum(part["n"] for part in parts)
    return sum(part["n"] * part["mean"] for part in parts) / total if parts else None
