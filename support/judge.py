"""Which class does reasoning, read alone, make most probable? Two judges for Fig. 3's consistency.

The keyword judge (offline, the default) counts words. It applies the phantoms' own rule from looks
to class (assets/phantom.py, LOOKS) to the looks that the reasoning names. It can show whether a
model's answers follow what it says it sees. It cannot show that an answer results from the
reasoning, nor judge an argument: it reads words, not sentences. The paper's judge is a language
model, `language_judge`.
"""

import random
import re
from collections.abc import Callable

import torch

from rewards import CLASSES
from support import vlm
from support.stats import bootstrap

# Of each class in turn: words that name it or its sign, 2 points; words that lean to it, 1 point.
KEYWORDS = (
    ("airway, airways, bronchiectasis, bronchial, tram track, ringed, rings", "tubular"),
    ("consolidation, atelectasis, collapse, air bronchogram", "solid, patchy, dense"),
    ("emphysema, emphysematous, bulla, bullae, holed, holes", "low attenuation, lucent"),
    ("fibrosis, fibrotic, reticular, reticulation, honeycombing, septal, meshed", "lines"),
    ("ground glass, hazy, veil", "faint"),
    ("pleural, pleura, effusion, fluid", "solid, band, crescent"),
    ("nodule, nodules, nodular, mass, masses", "solid, round, spherical"),
)
# What is denied, up to the next stop, comma or "but", is dropped.
NEGATED = r"\b(?:no|not|without|absence of|rather than)\b.*?(?=[.,;]|\bbut\b|$)"
PROMPT = (
    "This is a radiologist's reasoning about a lesion on a chest CT slice:\n\n{}\n\n"
    "Which one of these diagnoses does the reasoning alone make most probable? "
    + "; ".join(CLASSES)
    + ". Answer with that one option only."
)
REPLY_TOKENS = 1024  # a reasoning judge thinks first


def keyword_judge(reasoning: str) -> str | None:
    """The class with most points of KEYWORDS, a word counting once; None for a tie or no word."""
    claims = re.sub(NEGATED, " ", reasoning.casefold(), flags=re.DOTALL)
    text = f" {re.sub('[^a-z]+', ' ', claims)} "
    points = {}
    for label, (names, leans) in zip(CLASSES, KEYWORDS, strict=True):
        named = sum(f" {word} " in text for word in names.split(", "))
        leaning = sum(f" {word} " in text for word in leans.split(", "))
        points[label] = 2 * named + leaning
    best, second = sorted(points.values(), reverse=True)[:2]
    return max(points, key=points.get) if best > second else None


def last_class(reply: str) -> str | None:
    """The class whose name stands last in a judge's reply, in any case; None when there is none."""
    text = reply.casefold()
    place, label = max((text.rfind(label.casefold()), label) for label in CLASSES)
    return label if place >= 0 else None


def language_judge(name: str, device: torch.device) -> Callable[[list[str]], list[str | None]]:
    """A causal language model (folder or hub id) as a judge: PROMPT, greedy, the last class named.

    The judge takes texts and gives a class per text: None where the reply is cut off at
    REPLY_TOKENS or names no class. Raises BadInput when the model cannot be loaded.
    """
    from transformers import Mxfp4Config

    tokenizer, options = vlm.pretrained("AutoTokenizer", name), {"use_safetensors": True}
    stored = getattr(vlm.pretrained("AutoConfig", name), "quantization_config", None)
    if isinstance(stored, dict) and stored.get("quant_method") == "mxfp4":
        # gpt-oss: as it is, it needs more packages.
        options["quantization_config"] = Mxfp4Config(dequantize=True)  # to bf16
    model = vlm.pretrained("AutoModelForCausalLM", name, dtype="auto", **options)
    model = model.to(device).eval()
    vlm.generate_plainly(model, name)
    stops = model.generation_config.eos_token_id
    if not isinstance(stops, list):
        stops = [tokenizer.eos_token_id if stops is None else stops]
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = stops[0]
    chat = tokenizer.chat_template is not None
    if chat:
        vlm.try_template(name, tokenizer, PROMPT)
    limits = {"eos_token_id": stops, "pad_token_id": tokenizer.pad_token_id}

    def prompt(text: str) -> str:
        turns = [{"role": "user", "content": PROMPT.format(text)}]
        if not chat:
            return turns[0]["content"]
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    @torch.no_grad()
    def judge(texts: list[str]) -> list[str | None]:
        padding = {"padding": True, "padding_side": "left", "add_special_tokens": not chat}
        with vlm.guarded(name, "its tokenizer or chat template does not work"):
            batch = tokenizer([prompt(text) for text in texts], return_tensors="pt", **padding)
        batch = {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}  # [B, T]
        verdicts = []
        for row in vlm.generate(model, batch, REPLY_TOKENS, **limits):
            ended = any(stop in row for stop in stops)
            reply = tokenizer.decode(row, skip_special_tokens=True)
            verdicts.append(last_class(reply) if ended else None)
        return verdicts

    return judge


# ==== Other reasoning ====


def donors(rows: list) -> list:
    """For each row another, drawn by the row's id alone; None where there is none.

    The judge gives it neither the row's judged class nor its answered one: with the latter, a model
    that always answers alike would seem to move.
    """
    drawn = []
    for row in rows:
        not_these = None, row.judged, row.predicted
        others = [r for r in rows if row.judged and r.judged not in not_these]
        drawn.append(random.Random(row.id).choice(others) if others else None)
    return drawn


def summarise_swap(lines: list[dict]) -> dict:
    """Shares of answers that moved to the donor's class, that stayed, and that are right after an
    empty reasoning. An answer that cannot be read counts in none."""
    given = [line for line in lines if line["donor"]]
    result = {"n": len(given)}
    shares = [("moved", given, "swapped", "donor_class"), ("stayed", given, "swapped", "predicted")]
    shares.append(("accuracy_without", lines, "empty", "label"))
    for name, over, answered, wanted in shares:
        hits = [line[answered] is not None and line[answered] == line[wanted] for line in over]
        share = bootstrap(hits, [line["patient"] for line in over])
        result |= {name: share["mean"], f"{name}_interval_95": share["interval_95"]}
    return result
