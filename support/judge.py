"""Which class does a thinking, read alone, make most probable? Two judges for reasoning-answer consistency (Fig. 3).

The keyword judge (offline, the default) counts words. It applies the phantoms' own rule from looks to class
(support/phantom.py, LOOKS) to the looks that a thinking names. It can show whether model answers follow what they say
they see. It cannot show that an answer came from the thinking, nor judge an argument: it reads words, not sentences.
The paper's judge is a language model, `language_judge`.
"""

import re
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rewards import CLASSES
from support import vlm

# Class -> words that name it or its sign (2 points each) and words that only lean to it (1 point).
KEYWORDS = {
    "Airway abnormalities": ("airway, airways, bronchiectasis, bronchial, tram track, ringed, rings", "tubular"),
    "Consolidation/atelectasis": ("consolidation, atelectasis, collapse, air bronchogram", "solid, patchy, dense"),
    "Emphysema": ("emphysema, emphysematous, bulla, bullae, holed, holes", "low attenuation, lucent"),
    "Fibrosis-related changes": ("fibrosis, fibrotic, reticular, reticulation, honeycombing, septal, meshed", "lines"),
    "Ground-glass opacity": ("ground glass, hazy, veil", "faint"),
    "Pleural effusion/thickening": ("pleural, pleura, effusion, fluid", "solid, band, crescent"),
    "Pulmonary nodules/masses": ("nodule, nodules, nodular, mass, masses", "solid, round, spherical"),
}
# What is denied, up to the next stop, comma or "but", is dropped.
NEGATED = re.compile(r"\b(?:no|not|without|absence of|rather than)\b.*?(?=[.,;]|\bbut\b|$)", re.DOTALL)
PROMPT = (
    "This is a radiologist's reasoning about a lesion on a chest CT slice:\n\n{}\n\nWhich one of these diagnoses does "
    "the reasoning alone make most probable? " + "; ".join(CLASSES) + ". Answer with that one option only."
)
REPLY_TOKENS = 1024  # a reasoning judge thinks first


def keyword_judge(thinking: str) -> str | None:
    """The class with the most points of KEYWORDS, a word counting once; None for a tie or no word at all."""
    text = f" {re.sub('[^a-z]+', ' ', NEGATED.sub(' ', thinking.casefold()))} "
    points = {
        label: sum(f" {word} " in text for words in (names, names, leans) for word in words.split(", "))
        for label, (names, leans) in KEYWORDS.items()
    }
    best, second = sorted(points.values(), reverse=True)[:2]
    return max(points, key=points.get) if best > second else None


def last_class(reply: str) -> str | None:
    """The class whose name stands last in a judge's reply, in any case; None when it names none."""
    place, label = max((reply.casefold().rfind(label.casefold()), label) for label in CLASSES)
    return label if place >= 0 else None


def language_judge(name: str, device: torch.device) -> Callable[[list[str]], list[str | None]]:
    """A causal language model of the hub or a folder as a judge of texts: PROMPT, greedy, the last class it names.

    A reply that is cut off at REPLY_TOKENS or names no class gives None. Raises BadInput when it cannot be loaded.
    """
    tokenizer = vlm.pretrained(AutoTokenizer, name)
    model = vlm.pretrained(AutoModelForCausalLM, name, dtype="auto", use_safetensors=True).to(device).eval()
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [tokenizer.eos_token_id if stops is None else stops]
    tokenizer.pad_token_id = stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    chat = tokenizer.chat_template is not None

    @torch.no_grad()
    def judge(texts: list[str]) -> list[str | None]:
        prompts = [PROMPT.format(text) for text in texts]
        if chat:
            turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
            prompts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        batch = tokenizer(
            prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=not chat
        ).to(device)
        out = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **vlm.GREEDY,
            max_new_tokens=REPLY_TOKENS, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id,
        )[:, batch["input_ids"].shape[1] :]  # fmt: skip
        replies = tokenizer.batch_decode(out, skip_special_tokens=True)
        ended = [any(stop in row for stop in stops) for row in out.tolist()]
        return [last_class(reply) if end else None for reply, end in zip(replies, ended, strict=True)]

    return judge
