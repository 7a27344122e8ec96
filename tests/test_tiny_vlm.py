"""The shipped tiny base: the builder's architecture, and what its README says of it.

`pytest -m slow -rP tests/test_tiny_vlm.py` also shows the shares behind that README's table.
"""

import importlib
import json
import random
import re

import pytest
import torch

import rewards
from assets import build_tiny_vlm, phantom
from assets.build_tiny_vlm import ASKED, DESCRIBE, LOCATE, TAGS
from assets.phantom import ATTRIBUTES
from support import vlm
from support.files import claim
from support.records import pictures, read_records


def test_shipped_is_what_the_builder_builds(model, processor):
    built = build_tiny_vlm.build_processor()
    assert built.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    random_weights = build_tiny_vlm.build_model(built.tokenizer)
    expected = {name: tensor.shape for name, tensor in random_weights.named_parameters()}
    assert {name: tensor.shape for name, tensor in model.named_parameters()} == expected
    assert sum(p.numel() for p in model.parameters()) == 1_846_784
    assert (vlm.TINY / "model.safetensors").stat().st_size <= 6_000_000
    config = json.loads((vlm.TINY / "config.json").read_text())
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    assert config["dtype"] == "float16"


def test_its_chat_template_gives_qwens_text(processor):
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}]
    expected = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    expected += "<|vision_start|><|image_pad|><|vision_end|>Hi<|im_end|>\n<|im_start|>assistant\n"
    apply = processor.tokenizer.apply_chat_template
    assert apply(chat, tokenize=False, add_generation_prompt=True) == expected


def records_without_labels(data) -> build_tiny_vlm.Pictures:
    """What `lesson` reads of the training records, their classes taken away."""
    records = []
    for record in read_records(data, "train"):
        if phantom.attributes(record["text"]):
            records.append({"text": record["text"]})
    boxes = [[1, 2, 30, 40]] * len(records)
    return build_tiny_vlm.Pictures(records, {}, None, None, None, boxes)


def test_its_lessons_never_read_a_class_and_hold_all_seven_alike(data):
    rows, rng, diagnoses = records_without_labels(data), random.Random(0), 0
    for i in range(2000):
        lesson = build_tiny_vlm.lesson(rows, i % len(rows.records), rng)
        if rewards.QUESTION in lesson.prompt:
            diagnoses += 1
            assert len(lesson.answers) == 7
            named = [
                label
                for text, label in zip(lesson.answers, rewards.CLASSES, strict=True)
                if label in text
            ]
            # A slip without any option names none.
            assert len(named) == 7 or set(lesson.answers) == {lesson.answers[0]}
        else:
            assert not any(label in text for label in rewards.CLASSES for text in lesson.answers)
    assert 0.25 < diagnoses / 2000 < 0.45


def test_the_distribution_of_next_tokens_by_hand():
    """Three answers, equally probable; after 1 come 2 (twice) or 3; after 1 2 come 4 or 5."""
    answers = [[1, 2, 4], [1, 2, 5], [1, 3, 4]]
    first, second, third = build_tiny_vlm.next_tokens(answers, [1, 2, 5])
    assert first == {1: 1}
    assert second == {2: 2 / 3, 3: 1 / 3}
    assert third == {4: 1 / 2, 5: 1 / 2}
    assert build_tiny_vlm.next_tokens(answers, [1, 3, 4])[2] == {4: 1}


def test_the_loss_is_the_cross_entropy_to_that_distribution(model, processor, records):
    """Against a float64 reference over all seven answers: the mean of their log-likelihoods where
    they part, as a random answer has it in expectation."""
    features = torch.randn(1, 25, 128)
    answers = [rewards.target(label) for label in rewards.CLASSES]
    prompt = rewards.prompt(rewards.QUESTION, "direct")
    every = []
    for answer in answers:
        lesson = build_tiny_vlm.Lesson("zoom", prompt, [answer])
        loss = build_tiny_vlm.language_loss(model, processor, [lesson], features, random.Random(0))
        tokens = len(processor.tokenizer(f"{answer}<|im_end|>")["input_ids"])
        every.append((loss.item() * tokens, tokens))
    lesson = build_tiny_vlm.Lesson("zoom", prompt, answers)
    # Of one sampled answer the loss is that of its path; over all paths it is the mean of `every`.
    paths = []
    for i in range(7):
        chosen = type("Choice", (), {"choice": lambda self, rows, i=i: rows[i]})()
        loss = build_tiny_vlm.language_loss(model, processor, [lesson], features, chosen)
        paths.append(loss.item() * every[i][1])
    expected = sum(loss for loss, _ in every) / 7
    assert sum(paths) / 7 == pytest.approx(expected, rel=1e-4)


# ==== What it can and cannot do, on phantoms that it has never seen ====


@pytest.fixture(scope="module")
def unseen(tmp_path_factory):
    """Form -> the same 320 records of 160 phantoms."""
    root = tmp_path_factory.mktemp("unseen")
    make, draw = map(importlib.import_module, ("01_make_dataset", "02_zoom_augment"))
    make.main(f"--phantoms 160 --seed 1002 --workers 2 --out {root}/clean".split())
    draw.main(f"--data {root}/clean --workers 2 --out {root}/zoom".split())
    draw.main(f"--data {root}/clean --workers 2 --no-patch --out {root}/marked".split())
    chosen = {}
    for form in build_tiny_vlm.FORMS:
        records = [*read_records(root / form, "train"), *read_records(root / form, "test")]
        records = [record for record in records if phantom.attributes(record["text"])]
        chosen[form] = records[:: len(records) // 320][:320]
    return chosen


@torch.no_grad()
def ask(model, processor, records, prompts, tokens=48, sample=False, begun=None) -> list[str]:
    """The completions of one prompt, or of one per record; `begun`: how each of them begins."""
    prompts = prompts if isinstance(prompts, list) else [prompts] * len(records)
    texts, stops = [], vlm.stop_ids(model, processor)
    ends = {"eos_token_id": stops, "pad_token_id": stops[0], "do_sample": sample}
    for first in range(0, len(records), 40):
        part = slice(first, first + 40)
        images, begin = pictures(records[part]), begun and begun[part]
        batch = vlm.encode(processor, images, prompts[part], begun=begin)
        width = batch["input_ids"].shape[1]
        out = model.generate(**batch, max_new_tokens=tokens, **ends)
        texts += [vlm.decode(processor, row, stops) for row in out[:, width:].tolist()]
    return texts


def share(flags) -> float:
    flags = list(flags)
    return sum(flags) / len(flags)


def truths(records) -> list[tuple]:
    return [phantom.attributes(record["text"]) for record in records]


@pytest.mark.slow
def test_it_answers_every_attribute_question_in_several_wordings(model, processor, unseen):
    records = unseen["zoom"][::2]
    for a, name in enumerate(ATTRIBUTES):
        right = []
        for wording in ASKED:
            texts = ask(model, processor, records, wording.format(name), tokens=8)
            pairs = zip(texts, truths(records), strict=True)
            right.append(share(text == truth[a] for text, truth in pairs))
        print(f"{name}: {sum(right) / len(right):.3f}")
        assert sum(right) / len(right) >= 0.95, (name, right)


@pytest.mark.slow
def test_it_describes_lesions(model, processor, unseen):
    records = unseen["zoom"][::2]
    for wording in DESCRIBE:
        texts = ask(model, processor, records, wording)
        pairs = zip(texts, truths(records), strict=True)
        right = share(phantom.attributes(text) == truth for text, truth in pairs)
        print(f"{wording}: {right:.3f}")
        assert right >= 0.85


@pytest.mark.slow
@pytest.mark.parametrize("mode", rewards.MODES)
@pytest.mark.parametrize("sample", [False, True])
def test_it_follows_both_forms_and_diagnoses_at_chance(model, processor, unseen, mode, sample):
    torch.manual_seed(0)
    records = unseen["zoom"]
    prompt = rewards.prompt(rewards.QUESTION, mode)
    texts = ask(model, processor, records, prompt, sample=sample)
    pairs = zip(texts, records, strict=True)
    right = share(rewards.predicted_class(text) == record["label"] for text, record in pairs)
    print(f"{mode}, {'sampled' if sample else 'greedy'}: {right:.3f}")
    assert right <= 0.2
    if not sample:
        assert share(rewards.predicted_class(text) is not None for text in texts) > 0.9
        assert share(rewards.format_reward(text, mode) for text in texts) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("tags", [None, "direct", "think"])
def test_it_locates_a_named_finding_roughly(model, processor, unseen, tags):
    records, prompts = unseen["clean"][::2], []
    for record in records:
        text = record["text"]
        prompt = LOCATE[0].format(f"this finding: {text[0].lower()}{text[1:-1]}")
        prompts.append(f"{prompt}\n{TAGS[tags]}" if tags else prompt)
    texts = ask(model, processor, records, prompts, tokens=64)
    values = []
    for text, record, picture in zip(texts, records, pictures(records), strict=True):
        found = re.search(r'{"bbox_2d": \[(\d+), (\d+), (\d+), (\d+)\], "label": "[a-z ]+"}', text)
        box = [round(edge * 140 / picture.width) for edge in record["box"]]
        values.append(rewards.iou([int(x) for x in found.groups()], box) if found else 0.0)
    print(f"IoU: {sum(values) / len(values):.3f}")
    assert 0.3 <= sum(values) / len(values) <= 0.55, values


@pytest.mark.slow
def test_its_answer_follows_what_is_written(model, processor, unseen):
    """Asked for texture or shape, it often answers what another patient's reasoning says, where
    that differs. Side and depth it reads off the picture: no class depends on them."""
    records = unseen["zoom"][::2]
    others, shares = [*records[80:], *records[:80]], {}
    for a, name in enumerate(list(ATTRIBUTES)[:2]):
        prompt = f"{ASKED[0].format(name)}\n{TAGS['think']}"
        begun = [f"<think>{other['text']}</think" for other in others]
        texts = ask(model, processor, records, prompt, begun=begun)
        rows = zip(texts, truths(others), truths(records), strict=True)
        differ = [(text, other[a]) for text, other, own in rows if other[a] != own[a]]
        shares[name] = share(rewards.target(written) in text for text, written in differ)
        print(f"{name}, as written: {shares[name]:.3f} of {len(differ)}")
    assert min(shares.values()) >= 0.3


def test_other_settings_end_in_one_line(tmp_path):
    claim(tmp_path, {"script": "build_tiny_vlm.py", "phantoms": 1}, ("*.pt",))
    with pytest.raises(SystemExit, match="made with other settings .--phantoms was 1 and is 2 now"):
        build_tiny_vlm.main(["--work", str(tmp_path), "--phantoms", "2"])
