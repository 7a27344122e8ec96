"""The task's contract: the seven classes, the prompts, the parser and the rewards. No torch.

Training (03, 04) and evaluation (05) share this one file, so that a model is never trained on one
prompt or parser and scored with another. A completion is expected to look like

    <think>reasoning</think><answer>Emphysema</answer>         under the THINK prompt
    <answer>Emphysema</answer>                                 under the DIRECT prompt

and its reward (paper, Section 2.2) is

    R = alpha * R_format + beta * R_validity + gamma * R_correctness

with (alpha, beta, gamma) = (1, 1, 2).
"""

import re
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

WEIGHTS = (1.0, 1.0, 2.0)  # alpha, beta, gamma

_CANONICAL = {name.casefold(): name for name in CLASSES}
# `.` must match newlines (DOTALL), and the tempered dot keeps a pair from swallowing another tag.
_INSIDE = r"((?:(?!</?(?:think|answer)>).)*)"
_ANSWER = re.compile(rf"<answer>{_INSIDE}</answer>", re.DOTALL)
_THOUGHT = re.compile(rf"<think>{_INSIDE}</think>\s*<answer>{_INSIDE}</answer>", re.DOTALL)
_FORMATS = {"think": _THOUGHT, "direct": _ANSWER}


@dataclass(frozen=True)
class Reward:
    """One completion's reward parts (each 0.0 or 1.0), their weighted sum, and the class read."""

    format: float
    validity: float
    correctness: float
    total: float
    predicted: str | None


def prompt(question: str, mode: str) -> str:
    """The user's text for one record: `question`, a newline, and the instruction of `mode`.

    `mode` is "think" or "direct"; raises KeyError for another.
    """
    return f"{question}\n{MODES[mode]}"


def target(label: str) -> str:
    """The answer that supervised fine-tuning teaches under the direct prompt (Stage I)."""
    return f"<answer>{label}</answer>"


def predicted_class(completion: str) -> str | None:
    """The class a completion answers with, or None.

    The text of the single `<answer>` pair, stripped, case-folded, inner whitespace collapsed and
    one trailing period dropped, must equal a class name. No substring and no fuzzy match: "A or B",
    two answer pairs, a nested or an unclosed pair, or a class named only in the reasoning give
    None. The paper's format is not needed.
    """
    if completion.count("<answer>") != 1 or completion.count("</answer>") != 1:
        return None
    pair = _ANSWER.search(completion)
    if pair is None:
        return None
    text = " ".join(pair.group(1).casefold().split())
    return _CANONICAL.get(text.removesuffix(".").rstrip())


def reasoning(completion: str) -> str:
    """The text of the first `<think>` pair, stripped; empty when there is none."""
    pair = re.search(r"<think>(.*?)</think>", completion, re.DOTALL)
    return pair.group(1).strip() if pair else ""


def format_reward(completion: str, mode: str = "think") -> float:
    """R_format: 1 iff a completion is what the prompt of `mode` asks for, and nothing else.

    "think": one non-empty think pair, then one non-empty answer pair. "direct": one non-empty
    answer pair alone. Raises KeyError for another mode.
    """
    whole = _FORMATS[mode].fullmatch(completion.strip())
    return float(whole is not None and all(part.strip() for part in whole.groups()))


def validity_reward(completion: str) -> float:
    """R_validity: 1 iff the completion answers with one of the seven classes."""
    return float(predicted_class(completion) is not None)


def correctness_reward(completion: str, label: str) -> float:
    """R_correctness: 1 iff the completion answers with `label`."""
    return float(predicted_class(completion) == label)


def reward(
    completion: str,
    label: str,
    weights: tuple[float, float, float] = WEIGHTS,
    mode: str = "think",
) -> Reward:
    """All three reward parts of one completion and R, their sum weighted by (alpha, beta, gamma).

    `mode` is the prompt's, "think" or "direct"; only the format depends on it. Raises ValueError
    when `label` is not one of CLASSES: every completion would silently score 0.
    """
    if label not in CLASSES:
        raise ValueError(f"label {label!r} is not one of the classes {CLASSES}")
    parts = (
        format_reward(completion, mode),
        validity_reward(completion),
        correctness_reward(completion, label),
    )
    total = sum(weight * part for weight, part in zip(weights, parts, strict=True))
    return Reward(*parts, total=total, predicted=predicted_class(completion))
