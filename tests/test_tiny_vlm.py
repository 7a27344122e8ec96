"""The shipped tiny base: the builder's architecture, and what the README says of it."""

import json
import random

import pytest
import torch

import rewards
from assets import build_tiny_vlm, phantom
from support import vlm
from support.records import pictures, read_records


def test_shipped_is_what_the_builder_builds(model, processor):
    built = build_tiny_vlm.build_processor()
    assert built.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    random_weights = build_tiny_vlm.build_model(built.tokenizer)
    expected = {name: tensor.shape for name, tensor in random_weights.named_parameters()}
    assert {name: tensor.shape for name, tensor in model.named_parameters()} == expected
    assert sum(p.numel() for p in model.parameters()) == 1_835_008
    assert (vlm.TINY / "model.safetensors").stat().st_size <= 4_000_000
    config = json.loads((vlm.TINY / "config.json").read_text())
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    assert config["dtype"] == "float16"


def test_its_chat_template_gives_qwens_text(processor):
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}]
    expected = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    expected += "<|vision_start|><|image_pad|><|vision_end|>Hi<|im_end|>\n<|im_start|>assistant\n"
    apply = processor.tokenizer.apply_chat_template
    assert apply(chat, tokenize=False, add_generation_prompt=True) == expected


@torch.no_grad()
def generate(model, processor, records, prompt):
    batch = vlm.encode(processor, pictures(records), [prompt] * len(records))
    stops = vlm.stop_ids(model, processor)
    tokens = {"max_new_tokens": 40, "eos_token_id": stops, "pad_token_id": stops[0]}
    out = model.generate(**batch, do_sample=False, **tokens)
    rows = out[:, batch["input_ids"].shape[1] :].tolist()
    return [vlm.decode(processor, row, stops) for row in rows]


@pytest.fixture(scope="module")
def typical(data):
    return [*read_records(data, "train"), *read_records(data, "test")][:120]


def test_it_sees_attributes_and_follows_both_forms_but_does_not_diagnose(model, processor, typical):
    texts = generate(model, processor, typical, build_tiny_vlm.DESCRIBE)
    right = [0, 0]
    for text, record in zip(texts, typical, strict=True):
        named, truth = phantom.attributes(text), phantom.attributes(record["text"])
        for a in (0, 1):  # texture and shape, on phantoms it has never seen
            right[a] += named is not None and named[a] == truth[a]
    assert min(right) > 0.8 * len(typical)
    question = rewards.QUESTION
    direct = generate(model, processor, typical, rewards.prompt(question, "direct"))
    think = generate(model, processor, typical, rewards.prompt(question, "think"))
    assert sum(rewards.validity_reward(text) for text in direct) > 0.9 * len(typical)
    assert sum(rewards.format_reward(text) for text in think) > 0.9 * len(typical)
    for texts in (direct, think):  # near one in seven; what SFT reaches is far above this bound
        answers = zip(texts, typical, strict=True)
        right = sum(rewards.correctness_reward(text, record["label"]) for text, record in answers)
        assert right < 0.4 * len(typical)


def test_its_lessons_hold_true_diagnoses_by_chance_only(typical):
    rng, true, asked = random.Random(0), 0, 0
    for _ in range(60):
        for record in typical:
            _, answer = build_tiny_vlm.lesson(record, rng)
            label = rewards.predicted_class(answer)
            asked += label is not None
            true += label == record["label"]
    assert abs(true / asked - 1 / 7) < 4 * (6 / 49 / asked) ** 0.5
