"""The contract of both tasks: what is asked, how an answer is read, what it earns. No torch.

Training (03, 04) and evaluation (05) share this one file, so that a model is never trained on one
prompt or parser and scored with another. A completion is expected to look like

    <think>reasoning</think><answer>Emphysema</answer>         under the think prompt
    <answer>Emphysema</answer>                                 under the direct prompt

and its reward (paper, Section 2.2) is

    R = alpha * R_format + beta * R_validity + gamma * R_correctness

with (alpha, beta, gamma) = (1, 1, 2). The paper's task is "diagnose": one of seven classes. Beyond
the paper, "locate" asks where the lesion is, so that no one has to draw its box: the answer is a
box in the model family's own form, and R_correctness is its IoU with a right one.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

# The seven classes of CT-RATE-VQA, in the order in which tables and confusion matrices show them.
CLASSES = (
    "Airway abnormalities",
    "Consolidation/atelectasis",
    "Emphysema",
    "Fibrosis-related changes",
    "Ground-glass opacity",
    "Pleural effusion/thickening",
    "Pulmonary nodules/masses",
)

# The paper does not print its prompts; these three are ours. The question speaks of the red box
# only, which is drawn with and without the zoomed patch: both arms of Table 3 ask the same thing.
QUESTION = "What does the red box on this chest CT slice show? Options: " + "; ".join(CLASSES) + "."
THINK = (
    "Reason inside <think> </think> tags, "
    "then write exactly one option inside <answer> </answer> tags."
)
DIRECT = "Write exactly one option inside <answer> </answer> tags and nothing else."
MODES = {"think": THINK, "direct": DIRECT}

# "locate": {} is "the lesion", or the finding in the report's words.
LOCATE = "Locate {} on this slice and output its box in JSON format."
LOCATE_MODES = {
    "think": "Reason inside <think> </think> tags, "
    "then write only this inside <answer> </answer> tags.",
    "direct": "Write only this inside <answer> </answer> tags and nothing else.",
}

WEIGHTS = (1.0, 1.0, 2.0)  # alpha, beta, gamma

_CANONICAL = {name.casefold(): name for name in CLASSES}
# `.` must match newlines (DOTALL), and the tempered dot keeps a pair from swallowing another tag.
_INSIDE = r"((?:(?!</?(?:think|answer)>).)*)"
_ANSWER = re.compile(rf"<answer>{_INSIDE}</answer>", re.DOTALL)
_THOUGHT = re.compile(rf"<think>{_INSIDE}</think>\s*<answer>{_INSIDE}</answer>", re.DOTALL)
_FORMATS = {"think": _THOUGHT, "direct": _ANSWER}
# One box as Qwen's models write it: alone or the only one of a list, with or without code fences.
_EDGES = r"\s*,\s*".join([r"(0|[1-9]\d{0,4})"] * 4)
_ONE_BOX = rf'\{{\s*"bbox_2d"\s*:\s*\[\s*{_EDGES}\s*\]\s*(?:,\s*"label"\s*:\s*"[^"\\\n]*"\s*)?\}}'
_BODY = rf"(?:{_ONE_BOX}|\[\s*{_ONE_BOX}\s*\])"
_BOX = re.compile(rf"{_BODY}|```json\s*{_BODY}\s*```", re.ASCII)


# ==== Answers ====


def answer_text(completion: str) -> str | None:
    """The text of the single `<answer>` pair; None where there is none, or more than one tag."""
    if completion.count("<answer>") != 1 or completion.count("</answer>") != 1:
        return None
    pair = _ANSWER.search(completion)
    return pair and pair.group(1)


def reasoning(completion: str) -> str:
    """The text of the first `<think>` pair, stripped; empty when there is none."""
    pair = re.search(r"<think>(.*?)</think>", completion, re.DOTALL)
    return pair.group(1).strip() if pair else ""


def predicted_class(completion: str) -> str | None:
    """The class a completion answers with, or None.

    The text of the single `<answer>` pair, stripped, case-folded, inner whitespace collapsed and
    one trailing period dropped, must equal a class name. No substring and no fuzzy match: "A or B",
    two answer pairs, a nested or an unclosed pair, or a class named only in the reasoning give
    None. The paper's format is not needed.
    """
    text = answer_text(completion)
    if text is None:
        return None
    text = " ".join(text.casefold().split())
    return _CANONICAL.get(text.removesuffix(".").rstrip())


def predicted_box(completion: str, width: int, height: int) -> list[int] | None:
    """The box [x0, y0, x1, y1] a completion answers with, or None.

    The single `<answer>` pair must hold one box and nothing else, in whole numbers, of positive
    area, inside a picture of `width` x `height`. The paper's format is not needed.
    """
    found = _BOX.fullmatch((answer_text(completion) or "").strip())
    if found is None:
        return None
    x0, y0, x1, y1 = box = [int(edge) for edge in found.groups() if edge is not None]
    return box if x0 < x1 <= width and y0 < y1 <= height else None


def area(box: list[int]) -> int:
    """Of the box [x0, y0, x1, y1], end-exclusive."""
    return (box[2] - box[0]) * (box[3] - box[1])


def shared_area(a: list[int], b: list[int]) -> int:
    """The area that two boxes share."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def iou(a: list[int], b: list[int]) -> float:
    """Intersection over union: the area that two boxes share, of the area that they cover."""
    shared = shared_area(a, b)
    return shared / (area(a) + area(b) - shared)


# ==== Tasks ====


@dataclass(frozen=True)
class Boxes:
    """The truth of "locate": a slice's right boxes, on the grid on which the model writes them.

    SFT teaches the first; an answer is scored against the one that it meets best.
    """

    boxes: list[list[int]]
    width: int
    height: int


@dataclass(frozen=True)
class Task:
    """What is asked, and how its answers are read and scored; the truth is a class or Boxes."""

    modes: dict[str, str]  # prompt form -> instruction
    write: Callable  # truth -> the right text inside the answer tags
    read: Callable  # completion, truth -> what it answers; None: invalid
    score: Callable  # what it answers, truth -> R_correctness, 0 to 1


def box_text(box: list[int], label: str = "lesion") -> str:
    """A box in Qwen's own grounding form."""
    return f'{{"bbox_2d": {list(box)}, "label": "{label}"}}'


def best_iou(box: list[int], truth: Boxes) -> float:
    """The IoU of `box` with the right one that it meets best."""
    return max(iou(box, right) for right in truth.boxes)


DIAGNOSE = Task(
    modes=MODES,
    write=str,
    read=lambda completion, truth: predicted_class(completion),
    score=lambda predicted, truth: float(predicted == truth),
)
LOCATION = Task(
    modes=LOCATE_MODES,
    write=lambda truth: box_text(truth.boxes[0]),
    read=lambda completion, truth: predicted_box(completion, truth.width, truth.height),
    score=best_iou,
)
TASKS = {"diagnose": DIAGNOSE, "locate": LOCATION}


def prompt(question: str, mode: str, task: str = "diagnose") -> str:
    """The user's text for one record: `question`, a newline, and the instruction of `mode`.

    `mode` is "think" or "direct"; raises KeyError for another.
    """
    return f"{question}\n{TASKS[task].modes[mode]}"


def target(truth: str | Boxes, task: str = "diagnose") -> str:
    """The answer that supervised fine-tuning teaches under the direct prompt (Stage I)."""
    return f"<answer>{TASKS[task].write(truth)}</answer>"


# ==== Rewards ====


@dataclass(frozen=True)
class Reward:
    """One completion's reward parts (0 to 1 each), their weighted sum, and what it answers."""

    format: float
    validity: float
    correctness: float
    total: float
    predicted: str | list[int] | None


def format_reward(completion: str, mode: str = "think") -> float:
    """R_format: 1 iff a completion is what the prompt of `mode` asks for, and nothing else.

    "think": one non-empty think pair, then one non-empty answer pair. "direct": one non-empty
    answer pair alone. Raises KeyError for another mode.
    """
    whole = _FORMATS[mode].fullmatch(completion.strip())
    return float(whole is not None and all(part.strip() for part in whole.groups()))


def reward(
    completion: str,
    truth: str | Boxes,
    weights: tuple[float, float, float] = WEIGHTS,
    mode: str = "think",
    task: str = "diagnose",
) -> Reward:
    """All three reward parts of one completion and R, their sum weighted by (alpha, beta, gamma).

    R_validity is 1 iff the completion answers with one of the seven classes, or with one box;
    R_correctness is 1 iff that class is the right one, or the box's IoU. `truth` is the class, of
    "locate" Boxes. `mode` is the prompt's, "think" or "direct"; only the format depends on it.
    Raises ValueError for a class that is not one of CLASSES: every completion would silently
    score 0.
    """
    if task == "diagnose" and truth not in CLASSES:
        raise ValueError(f"label {truth!r} is not one of the classes {CLASSES}")
    predicted = TASKS[task].read(completion, truth)
    valid = predicted is not None
    correctness = TASKS[task].score(predicted, truth) if valid else 0.0
    parts = format_reward(completion, mode), float(valid), correctness
    total = sum(weight * part for weight, part in zip(weights, parts, strict=True))
    return Reward(*parts, total=total, predicted=predicted)
