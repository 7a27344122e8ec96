"""Builds and pretrains the demo's base model: a Qwen2.5-VL of 1.8 M parameters in the layout of a
real checkpoint.

It plays the part of Qwen2.5-VL-7B in the miniature: a model that sees, describes and follows
instructions but cannot diagnose. tiny-qwen2.5-vl/README.md tells what it can and cannot do.

    python -m assets.build_tiny_vlm

makes its phantoms first (3,600 of seed 1000, in --data, by 01 and 02), then trains for 80 minutes
on 2 cores. Stopped, the same command goes on from the last 250 steps (--work).

All that it is taught comes from the phantoms' boxes and report sentences ("Solid round lesion in
the right anterior lung."), which name visible attributes and never a diagnosis:
  1. vision (Qwen's tower, too, was trained before its language model): the tower predicts the
     marked lesion's attributes, and the lesions' boxes on slices without marks;
  2. language, tower frozen: `lesson` lists what is asked. Under the diagnosis prompts its target is
     the uniform distribution over the seven classes itself, in every answer: it learns the form of
     an answer, and that no class is more probable than another. A fifth of its reasoned answers
     have slips of format or validity, so that there is something for the rewards to mend.
"""

import argparse
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
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
from support.files import BadInput, claim, write_atomic
from support.grounding import rescale
from support.records import read_records
from support.stage import natural, positive_int, run_stage

ROOT = Path(__file__).resolve().parents[1]
FORMS = ("zoom", "marked", "clean")  # with patch and red box, with the red box alone, as 01 left it
SAVE_EVERY = 250  # steps
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
# ==== What is asked ====

# In several wordings: a model that knows one sentence has learned the sentence.
DESCRIBE = (
    "Describe the lesion in the red box.",
    "What is in the red box? Describe it in one sentence.",
    "Write the report's sentence on the marked lesion.",
    "How does the marked lesion look, and where is it?",
)
ASKED = (
    ASK,
    "Name the {} of the marked lesion.",
    "Look at the red box: which {} does this lesion have?",
    "The lesion in the red box: what is its {}?",
)
LOCATE = (
    rewards.LOCATE,
    "Where is {}? Answer with its bounding box as JSON.",
    "Outline the position of {} and output its coordinates in JSON format.",
)
TAGS = {mode: rewards.LOCATE_MODES[mode] for mode in ("direct", "think")}


def thought(reasoning: str, answer: str) -> str:
    """An answer after its reasoning.

    The new line between them makes "<answer" the same token here as in a direct answer: without it
    the tokenizer joins "><", and what is learned of one form's answers does not reach the other's.
    """
    return f"<think>{reasoning}</think>\n{answer}"


def corpus() -> list[str]:
    """The demo's own prompts and sentences, the frequent ones repeated."""
    sentences = []
    for texture, shape, side, depth in itertools.product(*ATTRIBUTES.values()):
        words = {"shape": shape, "side": side, "depth": depth}
        sentences.append(phantom.TEXT.format(Texture=texture.capitalize(), **words))
    prompts = [rewards.prompt(rewards.QUESTION, mode) for mode in rewards.MODES]
    answers = [thought(sentences[0], rewards.target(name)) for name in rewards.CLASSES]
    frame = ["system\nYou are a helpful assistant.", "user\n", "assistant\n"]
    questions = [form.format(name) for form in ASKED for name in ATTRIBUTES]
    places = [form.format(what) for form in LOCATE for what in ("the lesion", "this finding:")]
    values = list(itertools.chain(*ATTRIBUTES.values()))
    tags = [f"\n{form}" for form in TAGS.values()]
    boxes = [rewards.box_text([20, 31, 42, 53], "lesion")]
    rest = [*DESCRIBE, *questions, *places, *tags, *boxes, *frame, *values]
    return sentences + 40 * prompts + 20 * answers + 20 * rest


def build_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE of 640 merges, learned from `corpus`."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = Qwen2Tokenizer()._tokenizer.pre_tokenizer  # split words as Qwen does
    learner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 640, initial_alphabet=alphabet, show_progress=False
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


# ==== Pictures ====


@dataclass
class Pictures:
    """What the base is taught on: K records, and three pictures of each.

    pixels: form -> [K, patches, 588] in fp16, the processor's patches without their copy in time.
    boxes [K, 2, 4]: on the slice the lesion in the right and in the left lung, in px of the shown
    picture, -1 where there is none.
    """

    records: list[dict]
    pixels: dict[str, torch.Tensor]
    grid: torch.Tensor  # [1, 3]
    attributes: torch.Tensor  # [K, 4] indices into ATTRIBUTES' values
    boxes: torch.Tensor
    shown: list[list[int]]  # each record's own box in px of the shown picture


def make_phantoms(data: Path, count: int, overwrite: bool) -> None:
    """Makes the base's phantoms and their pictures with 01 and 02: zoom, marked and clean.

    Raises BadInput where one of them ends with an error, which has said why.
    """
    data = data.resolve()
    made = ["--phantoms", str(count), "--seed", "1000", "--max-slices", "2"]
    drawn = ["02_zoom_augment.py", "--data", str(data / "clean")]
    stages = (
        ["01_make_dataset.py", *made, "--out", str(data / "clean")],
        [*drawn, "--out", str(data / "zoom")],
        [*drawn, "--no-patch", "--out", str(data / "marked")],
    )
    for stage in stages:
        again = ["--overwrite"] if overwrite else []
        if subprocess.run([sys.executable, *stage, *again], cwd=ROOT).returncode:
            raise BadInput(f"{data}: {stage[0]} could not make it")


def read_pictures(data: Path, processor: vlm.Processor) -> Pictures:
    """All records of make_phantoms that describe a lesion, of both splits."""
    records, files = [], {form: dict() for form in FORMS}
    for split in ("train", "test"):
        for form in FORMS:
            part = read_records(data / form, split)
            files[form] |= {record["id"]: record["image"] for record in part}
        records += [record for record in part if phantom.attributes(record["text"])]
    cut = processor.image_processor
    pixels, sizes = {}, []
    for form in FORMS:
        parts = []
        for record in tqdm(records, desc=f"{form} pictures"):
            picture = Image.open(files[form][record["id"]]).convert("RGB")
            inputs = cut(images=[picture], return_tensors="pt")
            patches = inputs["pixel_values"].unflatten(1, (3, 2, -1))[:, :, 0]
            parts.append(patches.flatten(1).half())
            if form == FORMS[0]:
                sizes.append(picture.width)
        pixels[form] = torch.stack(parts)
    grid = inputs["image_grid_thw"]
    side = int(grid[0, 1]) * cut.patch_size
    attributes, shown, slices = [], [], {}
    for record, size in zip(records, sizes, strict=True):
        found = phantom.attributes(record["text"])
        pairs = zip(ATTRIBUTES.values(), found, strict=True)
        attributes.append([values.index(value) for values, value in pairs])
        box = rescale(record["box"], (size, size), (side, side))
        shown.append(box)
        lung = phantom.SIDES.index(found[2])
        slices.setdefault((record["volume"], record["slice"]), {})[lung] = box
    boxes = torch.full((len(records), 2, 4), -1)
    for i, record in enumerate(records):
        for lung, box in slices[record["volume"], record["slice"]].items():
            boxes[i, lung] = torch.tensor(box)
    return Pictures(records, pixels, grid, torch.tensor(attributes), boxes, shown)


def tower_input(pixels: torch.Tensor) -> torch.Tensor:
    """[B, patches, 588] -> the tower's [B * patches, 1176]: a picture is two equal frames."""
    frames = pixels.float().flatten(0, 1).unflatten(1, (3, 1, -1))
    return frames.expand(-1, 3, 2, -1).flatten(1)


# ==== 1. Vision ====


class Heads(torch.nn.Module):
    """What reads the tower's tokens in the warm-up, and is thrown away after it.

    An attention-pooling query and a linear classifier per attribute; and per lung one that reads
    the four edges of its lesion's box, each a distribution over the picture's px.
    """

    def __init__(self, width: int, side: int):
        super().__init__()
        counts = [len(values) for values in ATTRIBUTES.values()] + [4 * side] * len(phantom.SIDES)
        self.query = torch.nn.Linear(width, len(counts))
        self.read = torch.nn.ModuleList([torch.nn.Linear(width, count) for count in counts])

    def forward(self, tokens: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """[B, image tokens, width] -> the attributes' logits [B, values], edges [B, 2, 4, side]."""
        pooled = torch.einsum("bta,btw->abw", self.query(tokens).softmax(1), tokens)
        out = [read(part) for read, part in zip(self.read, pooled, strict=True)]
        edges = torch.stack(out[len(ATTRIBUTES) :], 1).unflatten(2, (4, -1))
        return out[: len(ATTRIBUTES)], edges


def edge_loss(edges: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the edges [B, 2, 4, side] to a narrow bell around each true edge."""
    there = boxes[..., 0] >= 0  # [B, 2]
    px = torch.arange(edges.shape[-1])
    bell = (-((px - boxes[there][..., None]) ** 2) / (2 * 1.5**2)).softmax(-1)
    return -(bell * edges[there].log_softmax(-1)).sum(-1).mean()


def disturb(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures [B, patches, 588] with some noise, contrast and brightness of their own: what is
    learned of 10,000 pictures must hold for others."""
    noise, contrast, brightness = torch.rand(3, len(pixels), 1, 1, generator=generator)
    pixels = pixels * (0.85 + 0.3 * contrast) + 0.3 * brightness - 0.15
    return pixels + 0.3 * noise * torch.randn(pixels.shape, generator=generator)


def warm_up_vision(model, data: Pictures, args: argparse.Namespace, batch: int = 64) -> None:
    """Trains tower and merger: attributes on marked pictures, boxes on clean ones."""
    visual = model.model.visual
    torch.manual_seed(args.seed + 1)
    heads = Heads(model.config.text_config.hidden_size, int(data.grid[0, 1]) * 14)
    parameters = [*visual.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, weight_decay=0.05)
    modules = {"visual": visual, "heads": heads}
    marked = batch * 3 // 4
    for step, bar in training(args.work / "vision.pt", modules, optimizer, args.vision_steps):
        order = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        rows = torch.randint(len(data.records), (batch,), generator=order)
        zoomed = torch.rand(marked, generator=order) < 0.6
        parts = []
        for row, patch in zip(rows[:marked].tolist(), zoomed.tolist(), strict=True):
            parts.append(data.pixels["zoom" if patch else "marked"][row])
        pixels = torch.cat([torch.stack(parts), data.pixels["clean"][rows[marked:]]])
        pixels = disturb(pixels.float(), order)
        out = visual(tower_input(pixels), grid_thw=data.grid.expand(batch, 3))
        logits, edges = heads(out.pooler_output.view(batch, -1, out.pooler_output.shape[-1]))
        truth = data.attributes[rows[:marked]]
        loss = edge_loss(edges[marked:], data.boxes[rows[marked:]])
        hits = []
        for a, part in enumerate(logits):
            loss = loss + F.cross_entropy(part[:marked], truth[:, a])
            hits.append((part[:marked].argmax(1) == truth[:, a]).float().mean().item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(visual.parameters(), 1.0)
        bar.set_postfix_str(f"loss {loss.item():.2f} right {sum(hits) / len(hits):.2f}")


# ==== 2. Language ====


@dataclass
class Lesson:
    """One thing asked of one record."""

    form: str  # of the picture: one of FORMS
    prompt: str
    answers: list[str]  # all equally right: the model learns their distribution
    given: str = ""  # the answer's beginning, which is read and not learned


def lesson(data: Pictures, row: int, rng: random.Random) -> Lesson:
    """What is asked of a record. The truth about its class is never read."""
    text, kind = data.records[row]["text"], rng.random()
    form = "zoom" if rng.random() < 0.6 else "marked"
    if kind < 0.15:
        return Lesson(form, rng.choice(DESCRIBE), [text])
    if kind < 0.45:
        other = rng.choice(data.records)["text"]
        return attribute_lesson(form, text, other, rng)
    if kind < 0.65:
        return locate_lesson(text, data.shown[row], rng)
    if kind < 0.80:
        answers = [rewards.target(label) for label in rewards.CLASSES]
        return Lesson(form, rewards.prompt(rewards.QUESTION, "direct"), answers)
    return diagnosis_lesson(form, text, rng)


def attribute_lesson(form: str, text: str, other: str, rng: random.Random) -> Lesson:
    """A question on one attribute, in three of ten with reasoning.

    Then the answer is what the reasoning says, in half of them that of another slice.
    """
    a = rng.randrange(len(ATTRIBUTES))
    prompt = rng.choice(ASKED).format(list(ATTRIBUTES)[a])
    if rng.random() < 0.7:
        return Lesson(form, prompt, [phantom.attributes(text)[a]])
    given = ""
    if rng.random() < 0.5:
        text, given = other, f"<think>{other}</think"
    answer = thought(text, rewards.target(phantom.attributes(text)[a]))
    return Lesson(form, f"{prompt}\n{TAGS['think']}", [answer.removeprefix(given)], given)


def locate_lesson(text: str, box: list[int], rng: random.Random) -> Lesson:
    """A lesion's box on the clean slice, in half of them named by the report's sentence."""
    what, label = "the lesion", "lesion"
    if rng.random() < 0.5:
        texture, shape = phantom.attributes(text)[:2]
        what, label = f"this finding: {text[0].lower()}{text[1:-1]}", f"{texture} {shape} lesion"
    prompt, answer = rng.choice(LOCATE).format(what), rewards.box_text(box, label)
    mode = rng.choice(["plain", *TAGS])
    if mode != "plain":
        prompt, answer = f"{prompt}\n{TAGS[mode]}", rewards.target(answer)
    if mode == "think":
        answer = thought(text, answer)
    return Lesson("clean", prompt, [answer])


def diagnosis_lesson(form: str, text: str, rng: random.Random) -> Lesson:
    """The diagnosis prompt with reasoning: any class after any description, a fifth with slips.

    In one of ten the model reads an empty reasoning, and learns to answer after it.
    """
    prompt = rewards.prompt(rewards.QUESTION, "think")
    answers = [rewards.target(label) for label in rewards.CLASSES]
    if rng.random() < 0.1:
        given = "<think></think"
        answers = [thought("", answer).removeprefix(given) for answer in answers]
        return Lesson(form, prompt, answers, given)
    if rng.random() < 0.8:
        return Lesson(form, prompt, [thought(text, answer) for answer in answers])
    slip, other, texture = rng.randrange(5), rng.choice(rewards.CLASSES), text.split()[0]
    slips = []
    for label, answer in zip(rewards.CLASSES, answers, strict=True):
        kinds = (
            f"{text}{answer}",  # format: no think tags
            f"<think>{text}{answer}",  # format: the reasoning is never closed
            thought(text, label),  # format and validity: no answer tags
            thought(text, rewards.target(f"{label}; {other}")),  # validity: two options
            thought(text, rewards.target(f"{texture} lesion")),  # validity: no option
        )
        slips.append(kinds[slip])
    return Lesson(form, prompt, slips)


def next_tokens(answers: list[list[int]], chosen: list[int]) -> list[dict[int, float]]:
    """The distribution of each of the tokens of `chosen`, given those before it, when all `answers`
    are equally probable."""
    rows = []
    for t in range(len(chosen)):
        following = [answer[t] for answer in answers if answer[:t] == chosen[:t]]
        rows.append({token: following.count(token) / len(following) for token in following})
    return rows


def language_loss(model, processor, lessons: list[Lesson], features, rng: random.Random):
    """Mean cross-entropy over the batch's learned tokens, to the answers' own distribution.

    `features` are the pictures' [B, image tokens, hidden].
    """
    blank, tokenizer = Image.new("RGB", (140, 140)), processor.tokenizer
    answers = [rng.choice(lesson.answers) for lesson in lessons]
    texts = [one.given + answer for one, answer in zip(lessons, answers, strict=True)]
    prompts = [one.prompt for one in lessons]
    inputs = vlm.encode(processor, [blank] * len(lessons), prompts, texts)
    del inputs["pixel_values"]
    labels, places, targets, weights, count = inputs.pop("labels"), [], [], [], 0
    for b, one in enumerate(lessons):
        columns = (labels[b] >= 0).nonzero().flatten().tolist()
        chosen = labels[b, columns].tolist()
        every = [tokenizer(f"{one.given}{a}<|im_end|>")["input_ids"] for a in one.answers]
        given = tokenizer(one.given)["input_ids"]
        for t, following in enumerate(next_tokens(every, chosen)):
            if chosen[: t + 1] == given[: t + 1]:
                continue
            count += 1
            for token, weight in following.items():
                places.append((b, columns[t] - 1))  # column t predicts token t + 1
                targets.append(token)
                weights.append(weight)
    pictures = BaseModelOutputWithPooling(pooler_output=list(features))
    logits = model(**inputs, mm_encoder_outputs={"image": pictures}, use_cache=False).logits
    rows, columns = torch.tensor(places).unbind(1)
    logp = logits[rows, columns].log_softmax(-1)  # [targets, V]
    logp = logp.gather(1, torch.tensor(targets)[:, None]).squeeze(1)
    return -(logp * torch.tensor(weights)).sum() / count


@torch.no_grad()
def picture_features(model, data: Pictures) -> dict[str, torch.Tensor]:
    """The frozen tower's output for every picture: form -> [K, image tokens, hidden]."""
    features = {}
    for form, pixels in data.pixels.items():
        parts = []
        for part in pixels.split(64):
            out = model.model.visual(tower_input(part), grid_thw=data.grid.expand(len(part), 3))
            parts.append(out.pooler_output.view(len(part), -1, out.pooler_output.shape[-1]))
        features[form] = torch.cat(parts)
    return features


def teach_language(model, processor, data: Pictures, args: argparse.Namespace, batch=32) -> None:
    """Trains the language model on `lesson`s over kept picture features."""
    features = picture_features(model, data)
    parameters = list(vlm.set_trainable(model, "llm").values())
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05)
    modules, recent = {"model": model}, []
    for step, bar in training(args.work / "language.pt", modules, optimizer, args.language_steps):
        rng = random.Random(f"{args.seed}/{step}")
        rows = [rng.randrange(len(data.records)) for _ in range(batch)]
        lessons = [lesson(data, row, rng) for row in rows]
        seen = [features[one.form][row] for one, row in zip(lessons, rows, strict=True)]
        loss = language_loss(model, processor, lessons, seen, rng)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        recent = [*recent[-49:], loss.item()]
        bar.set_postfix_str(f"loss {sum(recent) / len(recent):.3f}")


# ==== Training, and going on ====


def training(path: Path, modules: dict, optimizer, steps: int) -> Iterator[tuple[int, tqdm]]:
    """Yields the steps that are left, with a bar; after each one it updates the weights.

    The caller leaves the step's gradients. Every SAVE_EVERY steps the state goes to `path`, from
    which an interrupted run goes on.
    """
    lr = optimizer.param_groups[0]["lr"]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    parts, done = {**modules, "optimizer": optimizer, "schedule": schedule}, 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        done = state.pop("step")
        for name, part in parts.items():
            part.load_state_dict(state[name])
    bar = tqdm(range(done, steps), initial=done, total=steps, desc=path.stem, unit="step")
    for step in bar:
        optimizer.zero_grad()
        yield step, bar
        optimizer.step()
        if step + 1 < steps:
            schedule.step()
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            state = {name: part.state_dict() for name, part in parts.items()}
            write_atomic(path, partial(torch.save, {"step": step + 1, **state}))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=Path("data/base"), help="where the phantoms go")
    add("--phantoms", type=positive_int, default=3600)
    add("--work", type=Path, default=Path("runs/base"), help="the state of a run; it goes on here")
    add("--out", type=Path, default=vlm.TINY, help="where the checkpoint goes")
    add("--vision-steps", type=positive_int, default=2400)
    add("--language-steps", type=positive_int, default=2400)
    add("--seed", type=natural, default=0)
    add(
        "--overwrite",
        action="store_true",
        help="replace what other settings left in --work, --data",
    )
    return parser.parse_args(argv)


def build(args: argparse.Namespace) -> None:
    """Makes the phantoms, trains the two parts, and writes the checkpoint to --out."""
    settings = {"script": "build_tiny_vlm.py", "phantoms": args.phantoms, "seed": args.seed}
    settings |= {"vision_steps": args.vision_steps, "language_steps": args.language_steps}
    claim(args.work, settings, ("*.pt",), overwrite=args.overwrite)
    make_phantoms(args.data, args.phantoms, args.overwrite)
    processor = build_processor()
    data = read_pictures(args.data, processor)
    model = build_model(processor.tokenizer, args.seed)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{size:,} parameters, {len(data.records)} records")
    warm_up_vision(model, data, args)
    teach_language(model, processor, data, args)
    model.requires_grad_(True).half()
    model.config.dtype = torch.float16
    vlm.save_checkpoint(args.out, model, processor)


def main(argv: list[str] | None = None) -> None:
    """Runs it; bad input ends in one line and exit code 1, Ctrl-C in 130, SIGTERM in 143."""
    run_stage(lambda: build(parse_args(argv)))


if __name__ == "__main__":
    main()
