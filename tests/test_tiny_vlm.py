"""The shipped tiny base: the builder's architecture, and what the README says of it."""

import importlib
import json
import random

import pytest
import torch

import rewards
from support import phantom, tiny_vlm, train, vlm
from support.files import read_records

evaluate = importlib.import_module("05_eval")


def test_shipped_is_what_the_builder_builds(model, processor):
    built = tiny_vlm.build_processor()
    assert built.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    expected = {n: p.shape for n, p in tiny_vlm.build_model(built.tokenizer).named_parameters()}
    assert {n: p.shape for n, p in model.named_parameters()} == expected
    assert sum(p.numel() for p in model.parameters()) == 1_835_008
    assert (tiny_vlm.DEFAULT / "model.safetensors").stat().st_size <= 4_000_000
    config = json.loads((tiny_vlm.DEFAULT / "config.json").read_text())
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"] and config["dtype"] == "float16"
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}]
    prompt = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Hi<|im_end|>\n<|im_start|>assistant\n"
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert processor.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == system + prompt


@torch.no_grad()
def generate(model, processor, records, prompt):
    batch = vlm.encode(processor, train.pictures(records), [prompt] * len(records))
    stops = vlm.stop_ids(model, processor)
    out = model.generate(**batch, do_sample=False, max_new_tokens=40, eos_token_id=stops, pad_token_id=stops[0])
    return [vlm.decode(processor, row.tolist(), stops) for row in out[:, batch["input_ids"].shape[1] :]]


@pytest.fixture(scope="module")
def typical(data):
    return [r for s in ("train", "test") for r in read_records(data, s)][:120]


def test_it_sees_attributes_and_follows_both_forms_but_does_not_diagnose(model, processor, typical):
    said = [phantom.attributes(text) for text in generate(model, processor, typical, tiny_vlm.DESCRIBE)]
    truth = [phantom.attributes(record["text"]) for record in typical]
    for a in range(2):  # texture and shape, on phantoms it has never seen
        assert sum(s is not None and s[a] == t[a] for s, t in zip(said, truth, strict=True)) > 0.8 * len(typical)
    question = rewards.QUESTION
    direct = generate(model, processor, typical, rewards.prompt(question, "direct"))
    think = generate(model, processor, typical, rewards.prompt(question, "think"))
    assert sum(rewards.validity_reward(text) for text in direct) > 0.9 * len(typical)
    assert sum(rewards.format_reward(text) for text in think) > 0.9 * len(typical)
    for texts in (direct, think):  # near one in seven; what SFT reaches is far above this bound
        right = sum(rewards.correctness_reward(t, r["label"]) for t, r in zip(texts, typical, strict=True))
        assert right < 0.4 * len(typical)


def test_its_lessons_hold_true_diagnoses_by_chance_only(typical):
    rng, true, asked = random.Random(0), 0, 0
    for _ in range(60):
        for record in typical:
            prompt, answer = tiny_vlm.lesson(record, rng)
            if rewards.predicted_class(answer):
                asked, true = asked + 1, true + (rewards.predicted_class(answer) == record["label"])
    assert abs(true / asked - 1 / 7) < 4 * (6 / 49 / asked) ** 0.5
