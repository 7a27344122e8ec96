"""Builds and pretrains the demo's base model: a Qwen2.5-VL of 1.8 M parameters in the layout of a real checkpoint.

It plays the part of Qwen2.5-VL-7B in the miniature: a model that sees and follows instructions but cannot diagnose.

    python 01_make_dataset.py --phantoms 450 --seed 1000 --out data/base/slices
    python 02_zoom_augment.py --data data/base/slices --out data/base/zoom
    python 02_zoom_augment.py --data data/base/slices --out data/base/plain --no-patch
    python -m support.tiny_vlm --zoom data/base/zoom --plain data/base/plain --seed 0

What it is taught, all from the phantoms' report sentences ("Solid round lesion in the right anterior lung."), which
name visible attributes and never a diagnosis:
  1. vision warm-up (Qwen's tower, too, was trained before its language model): the tower predicts the attributes;
  2. language, tower frozen: describe the lesion (20 %), answer questions on one attribute (25 %), and follow the two
     prompt forms (55 %) with a class drawn uniformly at random. So one diagnosis in seven in its training is true, by
     chance: it learns the form of an answer and nothing about which is right. A fifth of its reasoned answers have
     slips of format or validity, so that there is something for the rewards to mend.
"""

import argparse
import itertools
import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import rewards
from support import phantom, vlm
from support.files import read_records

DEFAULT = Path(__file__).resolve().parent.parent / "assets" / "tiny-qwen2.5-vl"
# Qwen2.5-VL's special tokens, in its order; ids differ, since the vocabulary is smaller.
SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
# Gives the same text as Qwen2.5-VL's own template for chats of text and pictures.
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string %}{{ message['content'] }}
{%- else %}{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
ATTRIBUTES = {
    "texture": phantom.TEXTURES,
    "shape": phantom.SHAPES,
    "side": phantom.SIDES,
    "depth": phantom.DEPTHS,
}
DESCRIBE = "Describe the lesion in the red box."
ASK = "What is the {} of the lesion in the red box?"


def build_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE of 512 merges, learned from the demo's own prompts and sentences."""
    looks = itertools.product(*ATTRIBUTES.values())
    words = [phantom.TEXT.format(Texture=t.capitalize(), shape=s, side=a, depth=d) for t, s, a, d in looks]
    corpus = words + 40 * [rewards.prompt(rewards.QUESTION, mode) for mode in rewards.MODES]
    corpus += 20 * [f"<think>{words[0]}</think>{rewards.target(label)}" for label in rewards.CLASSES]
    corpus += 20 * [DESCRIBE, *(ASK.format(name) for name in ATTRIBUTES), "system\nYou are a helpful assistant.",
                    "user\n", "assistant\n", *(word for values in ATTRIBUTES.values() for word in values)]  # fmt: skip
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = Qwen2Tokenizer()._tokenizer.pre_tokenizer  # split words as Qwen does
    learner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=256 + 512, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(corpus, trainer)
    state = json.loads(learner.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=[tuple(pair) for pair in state["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL,
        model_max_length=2048,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_processor() -> vlm.Processor:
    """The demo's tokenizer, and an image processor that brings phantom slices of 140 to 192 px to 140 x 140 px."""
    return vlm.Processor(build_tokenizer(), Qwen2VLImageProcessorPil(min_pixels=112 * 112, max_pixels=20_000))


def build_config(tokenizer) -> Qwen2_5_VLConfig:
    """The tiny architecture, with the marker that lets the stage scripts use their demo values."""
    token = tokenizer.convert_tokens_to_ids
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10_000.0},
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
        },
        vision_config={
            "depth": 3,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "out_hidden_size": 128,
            "fullatt_block_indexes": [0, 1, 2],
        },
        tie_word_embeddings=True,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        **{vlm.DEMO_MARKER: True},
    )


def build_model(tokenizer, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """The tiny model with random weights, in fp32."""
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(build_config(tokenizer))
    eos = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=eos[1], do_sample=False)
    return model


class AttributeHeads(torch.nn.Module):
    """One attention-pooling query and one linear classifier an attribute; used in the warm-up only, then dropped."""

    def __init__(self, width: int):
        super().__init__()
        self.query = torch.nn.Linear(width, len(ATTRIBUTES))
        self.classify = torch.nn.ModuleList(torch.nn.Linear(width, len(values)) for values in ATTRIBUTES.values())

    def forward(self, tokens: torch.Tensor) -> list[torch.Tensor]:  # [B, image tokens, width] -> logits an attribute
        pooled = torch.einsum("bta,btw->baw", self.query(tokens).softmax(1), tokens)
        return [classify(pooled[:, a]) for a, classify in enumerate(self.classify)]


def warm_up_vision(model, pixels, grid, truth, steps: int, lr: float, batch: int = 64) -> float:
    """Trains tower and merger to predict the attributes; pixels [images, patches, 1176] in fp16, truth [images, 4].

    Returns the mean attribute accuracy over the last 50 training batches."""
    visual, heads = model.model.visual, AttributeHeads(model.config.text_config.hidden_size)
    optimizer = torch.optim.AdamW([*visual.parameters(), *heads.parameters()], lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    order, recent = torch.Generator().manual_seed(1), []
    bar = tqdm(range(steps), desc="vision warm-up", unit="step")
    for _ in bar:
        rows = torch.randint(len(pixels), (batch,), generator=order)
        out = visual(pixels[rows].float().flatten(0, 1), grid_thw=grid.expand(batch, 3))
        logits = heads(out.pooler_output.view(batch, -1, out.pooler_output.shape[-1]))
        loss = sum(F.cross_entropy(part, truth[rows, a]) for a, part in enumerate(logits))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(visual.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        hits = [(part.argmax(1) == truth[rows, a]).float().mean().item() for a, part in enumerate(logits)]
        recent = [*recent[-49:], hits]
        means = torch.tensor(recent).mean(0).tolist()
        bar.set_postfix_str(" ".join(f"{n} {mean:.2f}" for n, mean in zip(ATTRIBUTES, means, strict=True)))
    return sum(map(sum, recent)) / (4 * len(recent))


def questions(records: list[dict]) -> list[dict]:
    """One attribute question a phantom record, the four attributes in turn: the general skill that the base was taught.

    In the form of vqa_metrics.read_questions, `part` being the attribute. Other records have none.
    """
    asked = []
    for record in records:
        if values := phantom.attributes(record.get("text", "")):
            name, value = list(zip(ATTRIBUTES, values, strict=True))[len(asked) % len(ATTRIBUTES)]
            asked.append({**record, "question": ASK.format(name), "answers": [value], "part": name})
    return asked


def lesson(record: dict, rng: random.Random) -> tuple[str, str]:
    """One (prompt, answer) of the language stage. Diagnoses are drawn at random, never read from the record."""
    text, kind = record["text"], rng.random()
    if kind < 0.20:
        return DESCRIBE, text
    if kind < 0.45:
        a = rng.randrange(len(ATTRIBUTES))
        return ASK.format(list(ATTRIBUTES)[a]), phantom.attributes(text)[a]
    label, other = rng.choice(rewards.CLASSES), rng.choice(rewards.CLASSES)
    if kind < 0.65:
        return rewards.prompt(rewards.QUESTION, "direct"), rewards.target(label)
    answer = f"<think>{text}</think>{rewards.target(label)}"
    if rng.random() < 0.20:
        answer = rng.choice([
            f"{text}{rewards.target(label)}",  # format: no think tags
            f"<think>{text}{rewards.target(label)}",  # format: the thinking is never closed
            f"<think>{text}</think>{label}",  # format and validity: no answer tags
            f"<think>{text}</think>{rewards.target(f'{label}; {other}')}",  # validity: two options
            f"<think>{text}</think>{rewards.target(text.split()[0] + ' lesion')}",  # validity: not an option
        ])  # fmt: skip
    return rewards.prompt(rewards.QUESTION, "think"), answer


def teach_language(model, processor, records, pixels, grid, steps: int, lr: float, seed: int, batch=32) -> float:
    """Trains the language model on `lesson`s over frozen, cached picture features. Returns the last 50 steps' loss."""
    with torch.no_grad():
        features = torch.cat([
            model.model.visual(part.float().flatten(0, 1), grid_thw=grid.expand(len(part), 3)).pooler_output
            for part in pixels.split(64)
        ]).view(len(pixels), -1, model.config.text_config.hidden_size)  # fmt: skip
    parameters = list(vlm.set_trainable(model, "llm").values())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    rng, losses = random.Random(seed), []
    blank = Image.new("RGB", (140, 140))
    bar = tqdm(range(steps), desc="language", unit="step")
    for _ in bar:
        rows = [rng.randrange(len(records)) for _ in range(batch)]
        prompts, answers = zip(*(lesson(records[row], rng) for row in rows), strict=True)
        inputs = vlm.encode(processor, [blank] * batch, prompts, answers)
        del inputs["pixel_values"]
        seen = BaseModelOutputWithPooling(pooler_output=list(features[rows]))
        loss = model(**inputs, mm_encoder_outputs={"image": seen}, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses = [*losses[-49:], loss.item()]
        bar.set_postfix_str(f"loss {sum(losses) / len(losses):.3f}")
    return sum(losses) / len(losses)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoom", type=Path, default=Path("data/base/zoom"), help="02's folder with the zoomed patch")
    parser.add_argument("--plain", type=Path, default=Path("data/base/plain"), help="02's folder without it")
    parser.add_argument("--out", type=Path, default=DEFAULT, help="where the checkpoint goes")
    parser.add_argument("--vision-steps", type=int, default=500)
    parser.add_argument("--language-steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    zoom, plain = ({r["id"]: r for s in ("train", "test") for r in read_records(f, s)} for f in (args.zoom, args.plain))
    records = [r for r in zoom.values() if phantom.attributes(r["text"])]
    records = [r if rng.random() < 0.6 else plain[r["id"]] for r in records]  # 60 % with the zoomed patch
    processor = build_processor()
    model = build_model(processor.tokenizer, args.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(records)} pictures")
    pixels = [processor.image_processor(images=[Image.open(r["image"])], return_tensors="pt") for r in tqdm(records)]
    grid, pixels = pixels[0]["image_grid_thw"], torch.stack([p["pixel_values"].half() for p in pixels])
    seen = [zip(ATTRIBUTES.values(), phantom.attributes(record["text"]), strict=True) for record in records]
    truth = [[values.index(value) for values, value in row] for row in seen]
    seeing = warm_up_vision(model, pixels, grid, torch.tensor(truth), args.vision_steps, lr=1.5e-3)
    loss = teach_language(model, processor, records, pixels, grid, args.language_steps, 2e-3, args.seed)
    print(f"attribute accuracy of the vision heads {seeing:.3f}, language loss {loss:.3f}")
    model.requires_grad_(True).half()
    model.config.dtype = torch.float16
    vlm.save_checkpoint(args.out, model, processor)


if __name__ == "__main__":
    main()
