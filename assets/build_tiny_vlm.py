"""Builds and pretrains the demo's base model: a Qwen2.5-VL of 1.8 M parameters in the layout of a
real checkpoint.

It plays the part of Qwen2.5-VL-7B in the miniature: a model that sees and follows instructions but
cannot diagnose. tiny-qwen2.5-vl/README.md tells what it can and cannot do.

    python 01_make_dataset.py --phantoms 450 --seed 1000 --out data/base/slices
    python 02_zoom_augment.py --data data/base/slices --out data/base/zoom
    python 02_zoom_augment.py --data data/base/slices --out data/base/plain --no-patch
    python -m assets.build_tiny_vlm --zoom data/base/zoom --plain data/base/plain --seed 0

What it is taught, all from the phantoms' report sentences ("Solid round lesion in the right
anterior lung."), which name visible attributes and never a diagnosis:
  1. vision warm-up (Qwen's tower, too, was trained before its language model): the tower predicts
     the attributes;
  2. language, tower frozen: describe the lesion (20 %), answer questions on one attribute (25 %),
     and follow the two prompt forms (55 %) with a class drawn uniformly at random. So one diagnosis
     in seven in its training is true, by chance: it learns the form of an answer and nothing about
     which is right. A fifth of its reasoned answers have slips of format or validity, so that there
     is something for the rewards to mend.
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
from assets import phantom
from assets.phantom import ASK, ATTRIBUTES
from support import vlm
from support.records import read_records
from support.stage import natural, positive_int

# Qwen2.5-VL's special tokens, in its order; ids differ, since the vocabulary is smaller.
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>"]
SPECIAL += ["<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"]
SPECIAL += ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>"]
SPECIAL += ["<|video_pad|>"]
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
DESCRIBE = "Describe the lesion in the red box."


def corpus() -> list[str]:
    """The demo's own prompts and sentences, the frequent ones repeated."""
    sentences = []
    for texture, shape, side, depth in itertools.product(*ATTRIBUTES.values()):
        words = {"shape": shape, "side": side, "depth": depth}
        sentences.append(phantom.TEXT.format(Texture=texture.capitalize(), **words))
    prompts = [rewards.prompt(rewards.QUESTION, mode) for mode in rewards.MODES]
    answers = [f"<think>{sentences[0]}</think>{rewards.target(name)}" for name in rewards.CLASSES]
    frame = ["system\nYou are a helpful assistant.", "user\n", "assistant\n"]
    questions = [ASK.format(name) for name in ATTRIBUTES]
    values = list(itertools.chain(*ATTRIBUTES.values()))
    rest = [DESCRIBE, *questions, *frame, *values]
    return sentences + 40 * prompts + 20 * answers + 20 * rest


def build_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE of 512 merges, learned from `corpus`."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = Qwen2Tokenizer()._tokenizer.pre_tokenizer  # split words as Qwen does
    learner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 512, initial_alphabet=alphabet, show_progress=False
    )
    learner.train_from_iterator(corpus(), trainer)
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
    """The demo's tokenizer; an image processor that brings slices of 140 to 192 px to 140 px."""
    images = Qwen2VLImageProcessorPil(min_pixels=112 * 112, max_pixels=20_000)
    return vlm.Processor(build_tokenizer(), images)


def build_config(tokenizer) -> Qwen2_5_VLConfig:
    """The tiny architecture, with the marker that lets the stage scripts use their demo values."""
    token = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10_000.0}
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
            "rope_parameters": rope,
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
    eos = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    generation = GenerationConfig(eos_token_id=eos, pad_token_id=eos[1], do_sample=False)
    model.generation_config = generation
    return model


class AttributeHeads(torch.nn.Module):
    """An attention-pooling query and a linear classifier per attribute, for the warm-up alone."""

    def __init__(self, width: int):
        super().__init__()
        self.query = torch.nn.Linear(width, len(ATTRIBUTES))
        heads = [torch.nn.Linear(width, len(values)) for values in ATTRIBUTES.values()]
        self.classify = torch.nn.ModuleList(heads)

    def forward(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """[B, image tokens, width] -> each attribute's logits [B, values]."""
        pooled = torch.einsum("bta,btw->baw", self.query(tokens).softmax(1), tokens)
        return [classify(pooled[:, a]) for a, classify in enumerate(self.classify)]


def warm_up_vision(model, pixels, grid, truth, steps: int, lr: float, batch: int = 64) -> float:
    """Trains tower and merger to predict the attributes.

    pixels [images, patches, 1176] in fp16, truth [images, 4]. Returns the mean attribute accuracy
    over the last 50 training batches.
    """
    visual = model.model.visual
    heads = AttributeHeads(model.config.text_config.hidden_size)
    parameters = [*visual.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05)
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
        hits = []
        for a, part in enumerate(logits):
            hits.append((part.argmax(1) == truth[rows, a]).float().mean().item())
        recent = [*recent[-49:], hits]
        means = torch.tensor(recent).mean(0).tolist()
        shown = [f"{name} {mean:.2f}" for name, mean in zip(ATTRIBUTES, means, strict=True)]
        bar.set_postfix_str(" ".join(shown))
    return sum(map(sum, recent)) / (4 * len(recent))


def lesson(record: dict, rng: random.Random) -> tuple[str, str]:
    """One (prompt, answer) of the language stage.

    Diagnoses are drawn at random, never read from the record.
    """
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
        texture = text.split()[0]
        slips = [
            f"{text}{rewards.target(label)}",  # format: no think tags
            f"<think>{text}{rewards.target(label)}",  # format: the reasoning is never closed
            f"<think>{text}</think>{label}",  # format and validity: no answer tags
            f"<think>{text}</think>{rewards.target(f'{label}; {other}')}",  # validity: two options
            f"<think>{text}</think>{rewards.target(f'{texture} lesion')}",  # validity: no option
        ]
        answer = rng.choice(slips)
    return rewards.prompt(rewards.QUESTION, "think"), answer


@torch.no_grad()
def picture_features(model, pixels: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """The frozen tower's output for every picture: [images, image tokens, hidden]."""
    parts = []
    for part in pixels.split(64):
        out = model.model.visual(part.float().flatten(0, 1), grid_thw=grid.expand(len(part), 3))
        parts.append(out.pooler_output)
    return torch.cat(parts).view(len(pixels), -1, model.config.text_config.hidden_size)


def teach_language(
    model, processor, records: list[dict], features, steps: int, lr: float, seed: int, batch=32
) -> float:
    """Trains the language model on `lesson`s over kept picture features.

    Returns the mean loss of the last 50 steps.
    """
    parameters = list(vlm.set_trainable(model, "llm").values())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    rng, losses = random.Random(seed), []
    blank = Image.new("RGB", (140, 140))
    bar = tqdm(range(steps), desc="language", unit="step")
    for _ in bar:
        rows = [rng.randrange(len(records)) for _ in range(batch)]
        lessons = [lesson(records[row], rng) for row in rows]
        prompts, answers = zip(*lessons, strict=True)
        inputs = vlm.encode(processor, [blank] * batch, prompts, answers)
        del inputs["pixel_values"]
        pictures = BaseModelOutputWithPooling(pooler_output=list(features[rows]))
        loss = model(**inputs, mm_encoder_outputs={"image": pictures}, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses = [*losses[-49:], loss.item()]
        bar.set_postfix_str(f"loss {sum(losses) / len(losses):.3f}")
    return sum(losses) / len(losses)


def read_both(zoom: Path, plain: Path, seed: int) -> list[dict]:
    """The records that describe a lesion: 60 % with the zoomed patch, the others without."""
    rng = random.Random(seed)
    without = {r["id"]: r for split in ("train", "test") for r in read_records(plain, split)}
    records = []
    for split in ("train", "test"):
        for record in read_records(zoom, split):
            if phantom.attributes(record["text"]):
                records.append(record if rng.random() < 0.6 else without[record["id"]])
    return records


def attribute_indices(records: list[dict]) -> torch.Tensor:
    """Each record's attributes as indices into ATTRIBUTES' values, [records, 4]."""
    rows = []
    for record in records:
        pairs = zip(ATTRIBUTES.values(), phantom.attributes(record["text"]), strict=True)
        rows.append([values.index(value) for values, value in pairs])
    return torch.tensor(rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--zoom", type=Path, default=Path("data/base/zoom"), help="02's folder with the patch")
    add("--plain", type=Path, default=Path("data/base/plain"), help="02's folder without it")
    add("--out", type=Path, default=vlm.TINY, help="where the checkpoint goes")
    add("--vision-steps", type=positive_int, default=500)
    add("--language-steps", type=positive_int, default=500)
    add("--seed", type=natural, default=0)
    args = parser.parse_args(argv)

    records = read_both(args.zoom, args.plain, args.seed)
    processor = build_processor()
    model = build_model(processor.tokenizer, args.seed)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{size:,} parameters, {len(records)} pictures")
    pixels = []
    for record in tqdm(records, desc="pictures"):
        inputs = processor.image_processor(
            images=[Image.open(record["image"])], return_tensors="pt"
        )
        pixels.append(inputs["pixel_values"].half())
    grid, pixels = inputs["image_grid_thw"], torch.stack(pixels)
    truth = attribute_indices(records)

    accuracy = warm_up_vision(model, pixels, grid, truth, args.vision_steps, lr=1.5e-3)
    features = picture_features(model, pixels, grid)
    steps = args.language_steps
    loss = teach_language(model, processor, records, features, steps, lr=2e-3, seed=args.seed)
    print(f"attribute accuracy of the vision heads {accuracy:.3f}, language loss {loss:.3f}")
    model.requires_grad_(True).half()
    model.config.dtype = torch.float16
    vlm.save_checkpoint(args.out, model, processor)


if __name__ == "__main__":
    main()
