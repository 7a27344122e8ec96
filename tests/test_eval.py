"""Evaluation: statistics against values worked by hand, judges, model families, and 05 itself."""

import copy
import importlib
import json
import math
import re
import shutil
import signal
import time
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.quantizers import quantizer_mxfp4

import rewards
from assets import build_tiny_vlm, phantom
from support import judge, stats, tables, vlm, vqa_metrics
from support.files import BadInput
from support.judge import keyword_judge, last_class
from support.log import read_log
from support.records import load_split, pictures
from tests import ct_fixtures as ct
from tests import launch

launch.server()
evaluation = importlib.import_module("05_eval")
CPU = torch.device("cpu")
QUICK = "--limit 12 --batch-size 4 --max-new-tokens 40".split()

FILES = set(evaluation.OUTPUTS) - {"boxes.jsonl", "boxes.png"}
EMPTY = "<think></think>"


# ==== Intervals ====


def test_bootstrap_means_by_hand():
    #        patient a: 1 of 2 right        b: 1 of 1       c: 0 of 3
    values = np.array([1, 0, 1, 0, 0, 0.0])
    kinds = ["nodule", "fluid", "nodule", "fluid", "fluid", "gas"]
    result = stats.bootstrap(values, ["a", "a", "b", "c", "c", "c"], kinds)
    assert result["mean"] == pytest.approx(2 / 6)
    means = {name: part["mean"] for name, part in result["kinds"].items()}
    assert means == {"nodule": 1, "fluid": 0, "gas": 0}
    assert result["macro"]["mean"] == pytest.approx(1 / 3)
    assert result["interval_95"] is result["kinds"]["nodule"]["interval_95"] is None


@pytest.mark.parametrize("patients", [9, 10])
def test_few_patients_have_no_interval(patients):
    """Of the whole, and of a kind that few of them have."""
    values, people = np.ones(100), [i % patients for i in range(100)]
    kinds = ["nodule" if person else "gas" for person in people]
    result = stats.bootstrap(values, people, kinds)
    ends = None if patients == 9 else [1, 1]
    assert result["interval_95"] == result["macro"]["interval_95"] == ends
    assert [part["interval_95"] for part in result["kinds"].values()] == [None, None]


@pytest.mark.parametrize("size", [1, 10])
def test_bootstrap_width_is_that_of_the_patients(size):
    """400 patients of one slice, or 40 of ten like ones: standard errors are those of patients."""
    patients = 400 // size
    values = np.repeat(np.arange(patients) % 2, size).astype(float)
    low, high = stats.bootstrap(values, np.repeat(np.arange(patients), size))["interval_95"]
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(0.25 / patients), rel=0.15)
    assert (low + high) / 2 == pytest.approx(0.5, abs=0.02)


def row(model, mode, right, patient="p", label="Emphysema", **more):
    predicted = label if right else rewards.CLASSES[0]
    scores = {"predicted": predicted, "format": 1.0, "validity": 1.0, "correctness": float(right)}
    names = {"model": model, "mode": mode, "id": "i", "patient": patient, "label": label}
    return evaluation.Diagnosis(**{**names, **scores, "text": "", **more})


def paired(rows, names):
    """The differences of these answers."""
    groups = defaultdict(list)
    for row in rows:
        groups[row.model, row.kind].append(row)
    return stats.paired_differences(groups, names)


def test_paired_differences_are_of_the_same_items():
    """Two models that are right on the same half of the items differ by 0, whoever is drawn."""
    rows = [row("x/a", "direct", i % 2, str(i)) for i in range(100)]
    rows += [row("x/b", "direct", i % 2, str(i)) for i in range(100)]
    rows += [row("x/c", "direct", i % 4 != 0, str(i)) for i in range(100)]  # on 25 more of them
    names = {"x/a": "a", "x/b": "b", "x/c": "c"}
    same, gain, other = paired(rows, names)
    ends = {"from": ["a", "direct"], "to": ["b", "direct"]}
    assert same == {**ends, "mean": 0, "interval_95": [0, 0]}
    assert (gain["from"], gain["to"]) == (["a", "direct"], ["c", "direct"])
    assert (other["from"], other["to"]) == (["b", "direct"], ["c", "direct"])
    assert gain["mean"] == pytest.approx(0.25)
    low, high = gain["interval_95"]
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(0.25 * 0.75 / 100), rel=0.15)


def test_think_is_compared_with_direct():
    rows = [row("a", "direct", i < 8, str(i)) for i in range(10)]
    rows += [row("a", "think", i < 5, str(i)) for i in range(10)]
    (pair,) = paired(rows, {"a": "a"})
    assert (pair["from"], pair["to"]) == (["a", "direct"], ["a", "think"])
    assert pair["mean"] == pytest.approx(-0.3)


def test_summary_by_hand():
    nodule, fluid = "Pulmonary nodules/masses", "Pleural effusion/thickening"
    rows = [row("a", "think", right, "p", nodule, judged=nodule) for right in (1, 1, 1)]
    rows.append(row("a", "think", 0, "p", nodule, judged=nodule, predicted=None, format=0.0))
    rows.append(row("a", "think", 0, "q", fluid, judged=None))
    rows.append(row("a", "think", 1, "r", fluid, judged=nodule))
    result = evaluation.summarise(rows)
    assert result["n"] == 6
    assert result["accuracy"] == pytest.approx(4 / 6)
    assert result["macro_accuracy"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert result["invalid"] == pytest.approx(1 / 6)
    assert result["format"] == pytest.approx(5 / 6)
    assert result["per_class"] == dict.fromkeys(rewards.CLASSES) | {nodule: 3 / 4, fluid: 1 / 2}
    assert result["confusion"][6] == [0, 0, 0, 0, 0, 0, 3, 1]  # three right, one invalid
    assert result["confusion"][5] == [1, 0, 0, 0, 0, 1, 0, 0]
    assert result["judge"]["coverage"] == pytest.approx(5 / 6)
    # An invalid answer follows from no reasoning.
    assert result["judge"]["consistency"] == pytest.approx(3 / 5)
    assert result["judge"]["right"] == pytest.approx(4 / 5)


def test_donors_are_of_another_class_and_drawn_by_the_id_alone():
    classes = [*rewards.CLASSES[:3], None]
    rows = [row("a", "think", 1, id=f"item {i}", judged=classes[i % 4]) for i in range(80)]
    donors = judge.donors(rows)
    for one, donor in zip(rows, donors, strict=True):
        assert (donor is None) == (one.judged is None)
        assert donor is None or donor.judged not in (None, one.judged, one.predicted)
    # All are drawn from, and not in step with the item.
    given = Counter(donor.id for donor in donors if donor)
    assert len(given) > 25 and max(given.values()) < 8
    assert donors == judge.donors(rows)
    # Another item's id changes its own donor alone.
    rows[0].id = "another id"
    assert judge.donors(rows)[1:] == donors[1:]


@pytest.mark.parametrize("judged", [None, "Emphysema"])
def test_no_donor_where_all_reasonings_are_alike(judged):
    rows = [row("a", "think", 1, id=str(i), judged=judged) for i in range(4)]
    assert judge.donors(rows) == [None] * 4


def test_swapped_answers_by_hand():
    a, b, c = rewards.CLASSES[:3]
    #          predicted  donor's  swapped  empty  label
    answers = [(a, b, b, a, a)]  # moved
    answers += [(a, b, a, b, a)]  # stayed
    answers += [(a, b, c, None, a)]  # neither
    answers += [(None, b, None, b, b)]  # unreadable before and after: neither
    answers += [(c, b, c, b, b)]  # stayed
    answers += [(a, None, None, a, a)]  # no donor
    lines = []
    for i, (predicted, given, swapped, empty, label) in enumerate(answers):
        line = {"id": str(i), "patient": str(i), "label": label, "predicted": predicted}
        line |= {"donor": given and "x", "donor_class": given, "swapped": swapped}
        lines.append(line | {"empty": empty})
    result = judge.summarise_swap(lines)
    assert result["n"] == 5
    assert result["moved"] == pytest.approx(1 / 5)
    assert result["stayed"] == pytest.approx(2 / 5)
    assert result["accuracy_without"] == pytest.approx(4 / 6)
    assert result["moved_interval_95"] is result["accuracy_without_interval_95"] is None
    for i, line in enumerate(20 * lines):  # of 120 patients
        lines.append(line | {"patient": f"more {i}"})
    low, high = judge.summarise_swap(lines)["stayed_interval_95"]
    assert low < 2 / 5 < high and (high - low) / 2 == pytest.approx(0.096, rel=0.2)


def test_without_donors_nothing_is_said_of_moving():
    line = {"patient": "p", "label": "Emphysema", "donor": None, "empty": "Emphysema"}
    result = judge.summarise_swap([line])
    assert result["n"] == 0 and result["accuracy_without"] == 1
    assert result["moved"] is result["stayed"] is result["moved_interval_95"] is None


def test_weighted_average_is_by_sample_count():
    general = {"skill": {"n": 1000, "mean": 0.0}, "chartqa": {"n": 30, "mean": 0.5}}
    general["textvqa"] = {"n": 10, "mean": 0.9}
    assert vqa_metrics.weighted_average(general) == pytest.approx((30 * 0.5 + 10 * 0.9) / 40)
    assert vqa_metrics.weighted_average({"skill": {"n": 5, "mean": 1.0}}) is None


# ==== Judges ====


@pytest.mark.parametrize(
    ("reasoning", "label"),
    [
        ("A faint veil in both lower lobes.", "Ground-glass opacity"),
        ("Septal thickening with honeycombing.", "Fibrosis-related changes"),
        (
            "Multiple air bronchograms are absent; dense collapse of the lobe.",
            "Consolidation/atelectasis",
        ),
        ("A band of fluid along the chest wall.", "Pleural effusion/thickening"),
        ("No effusion, not a mass, but bronchiectasis.", "Airway abnormalities"),
        ("No effusion but\na mass; not emphysema", "Pulmonary nodules/masses"),
        ("A round mass without emphysema.", "Pulmonary nodules/masses"),
        ("MASS", "Pulmonary nodules/masses"),
        ("There is no mass.", None),
        ("Massive findings.", None),  # words are whole words
        ("A mass beside emphysema.", None),  # a tie
        ("The left lung.", None),
        ("", None),
    ],
)
def test_keyword_judge(reasoning, label):
    assert keyword_judge(reasoning) == label


LABELS = {
    "1b": "Airway abnormalities",
    "1c": "Emphysema",
    "1d": "Fibrosis-related changes",
    "2b": "Consolidation/atelectasis",
    "2c": "Ground-glass opacity",
    "2d": "Pulmonary nodules/masses",
    "2e": "Pleural effusion/thickening",
}


def test_keyword_judge_knows_the_phantoms_rule():
    for code, (textures, shapes) in phantom.LOOKS.items():
        for texture in textures:
            for shape in shapes:
                words = {"Texture": texture.capitalize(), "shape": shape, "side": "left"}
                text = phantom.TEXT.format(**words, depth="anterior")
                assert keyword_judge(text) == LABELS[code]


def test_last_class_of_a_reply():
    assert last_class("Not emphysema. Final: ground-glass OPACITY.") == "Ground-glass opacity"
    assert last_class("Ground-glass opacity, or rather Emphysema") == "Emphysema"
    assert last_class("a mass") is None


REPLIES = {
    "holed round": "It has holes: emphysema<|im_end|>",
    "solid band": "pleural effusion/thickening<|im_end|>",
    "left lung": "unclear<|im_end|>",
    "endless": 40 * "emphysema ",
}


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A causal language model of 0.2 M parameters that was taught REPLIES."""
    folder = tmp_path_factory.mktemp("judge")
    tokenizer = build_tiny_vlm.build_tokenizer()
    tokenizer.save_pretrained(folder)
    eos = tokenizer.eos_token_id
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    model = Qwen2ForCausalLM(Qwen2Config(**shape, eos_token_id=eos, bos_token_id=None))
    model.generation_config = GenerationConfig(do_sample=True, top_k=1, eos_token_id=eos)
    rows, labels = [], []
    for text, reply in REPLIES.items():
        turn = [{"role": "user", "content": judge.PROMPT.format(text)}]
        start = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        start, reply = tokenizer(start)["input_ids"], tokenizer(reply)["input_ids"]
        rows.append(torch.tensor(start + reply))
        labels.append(torch.tensor([-100] * len(start) + reply))
    # Padded on the right, where no label and no token before it looks.
    rows = pad_sequence(rows, batch_first=True)
    labels = pad_sequence(labels, batch_first=True, padding_value=-100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        loss = model(input_ids=rows, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def test_language_judge(language_model, monkeypatch):
    monkeypatch.setattr(judge, "REPLY_TOKENS", 24)
    ask = judge.language_judge(str(language_model), CPU)
    # Of unequal lengths: padded on the left.
    texts = ["holed round", "endless", "left lung", "solid band"]
    expected = ["Emphysema", None, None, "Pleural effusion/thickening"]
    assert ask(texts) == expected  # cut off, and naming no class, give None
    assert [ask([text])[0] for text in texts] == expected
    with pytest.raises(BadInput, match="no such checkpoint folder"):
        judge.language_judge("runs/none", CPU)


def test_a_judge_in_mxfp4_needs_no_other_package(tmp_path, monkeypatch):
    """Of gpt-oss's form: experts as 4-bit blocks with scales, read as bf16."""
    tokenizer = build_tiny_vlm.build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    shape |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    GptOssForCausalLM(GptOssConfig(**shape)).bfloat16().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj")]:
        E, wide, out = weights.pop(name).shape
        blocks = (E, out, wide // 32)
        weights[f"{name}_blocks"] = torch.randint(256, (*blocks, 16), dtype=torch.uint8)
        weights[f"{name}_scales"] = torch.randint(118, 124, blocks, dtype=torch.uint8)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(quantizer_mxfp4, "is_accelerate_available", lambda: False)
    monkeypatch.setattr(judge, "REPLY_TOKENS", 2)
    assert judge.language_judge(str(tmp_path), CPU)(["holed round"]) == [None]


def test_judgements_are_kept_by_text(language_model, tmp_path, world, monkeypatch):
    monkeypatch.setattr(judge, "REPLY_TOKENS", 24)
    flags = ["--model", str(vlm.TINY), "--judge", str(language_model), "--out", str(tmp_path)]
    args = evaluation.parse_args(flags)
    texts = ["<think>holed round</think><answer>Emphysema</answer>", "<answer>Emphysema</answer>"]
    rows = [row("a", "think", 1, text=text) for text in 2 * texts]
    rows.append(row("a", "direct", 1, text=texts[0]))
    evaluation.judge_rows(rows, args, world)
    assert [row.judged for row in rows] == ["Emphysema", None, "Emphysema", None, None]

    def never(*_):
        raise AssertionError("asked twice")

    monkeypatch.setattr(judge, "language_judge", never)
    evaluation.judge_rows(rows, args, world)
    assert rows[0].judged == "Emphysema"


# ==== Families ====


def tiny_qwen2_vl(folder):
    """A tiny Qwen2-VL of random weights in the layout of a real checkpoint."""
    processor = build_tiny_vlm.build_processor()
    token = processor.tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10_000.0}
    text = {"vocab_size": len(processor.tokenizer), "hidden_size": 64, "intermediate_size": 96}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    text |= {"bos_token_id": token("<|endoftext|>"), "eos_token_id": token("<|im_end|>")}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
    config = Qwen2VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config)
    eos = token("<|im_end|>")
    model.generation_config = GenerationConfig(do_sample=True, top_k=5, eos_token_id=eos)
    model.save_pretrained(folder)
    processor.save(folder)
    return folder


def tiny_llava(folder):
    """A tiny LLaVA of random weights: a family that is asked through its own processor."""
    tokenizer = build_tiny_vlm.build_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    size = {"height": 56, "width": 56}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=size),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=build_tiny_vlm.CHAT_TEMPLATE.replace(picture, "<image>"),
    )
    processor.save_pretrained(folder)
    shape = {"hidden_size": 32, "intermediate_size": 64}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**shape, "model_type": "clip_vision_model", "image_size": 56, "patch_size": 14}
    text = {**shape, "model_type": "qwen2", "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    image = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image)
    model = LlavaForConditionalGeneration(config)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(do_sample=True, **ends)
    model.save_pretrained(folder)
    return folder


def test_another_family_goes_through_its_own_processor(tmp_path, records):
    name = str(tiny_llava(tmp_path))
    model, processor = vlm.load_model(name, CPU), vlm.any_processor(name)
    assert isinstance(processor, LlavaProcessor)
    images = pictures(records[:3])
    prompts = ["What?", build_tiny_vlm.DESCRIBE, phantom.ASK.format("shape")]
    together = evaluation.answer(model, processor, images, prompts, 12, CPU)
    assert len(set(together)) > 1
    for image, prompt, text in zip(images, prompts, together, strict=True):
        assert "<image>" not in text and "assistant" not in text
        assert evaluation.answer(model, processor, [image], [prompt], 12, CPU) == [text]


def greedy(model, processor, image, prompt: str, length: int) -> str:
    """The reference: one forward pass per token, without a cache."""
    batch, stops = vlm.encode(processor, [image], [prompt]), vlm.stop_ids(model, processor)
    ids = []
    while len(ids) < length and not (ids and ids[-1] in stops):
        more = torch.tensor([ids], dtype=torch.long)
        whole = {**batch, "input_ids": torch.cat([batch["input_ids"], more], 1)}
        for key, fill in (("attention_mask", 1), ("mm_token_type_ids", 0)):
            whole[key] = torch.cat([batch[key], torch.full_like(more, fill)], 1)
        with torch.no_grad():
            ids.append(model(**whole).logits[0, -1].argmax().item())
    return vlm.decode(processor, ids, stops)


@pytest.mark.parametrize("family", ["Qwen2.5-VL", "Qwen2-VL"])
def test_families_answer_in_batches_as_alone(family, tmp_path, records):
    """Greedy though generation_config says otherwise; pictures and prompts of unequal sizes."""
    name = str(vlm.TINY if family == "Qwen2.5-VL" else tiny_qwen2_vl(tmp_path))
    model, processor = vlm.load_model(name, CPU), vlm.any_processor(name)
    assert vlm.count_parameters(name) == sum(p.numel() for p in model.parameters())
    images = pictures(records[:3])
    images[1] = images[1].resize((112, 140))
    think = rewards.prompt(rewards.QUESTION, "think")
    prompts = [think, build_tiny_vlm.DESCRIBE, phantom.ASK.format("shape")]
    together = evaluation.answer(model, processor, images, prompts, 16, CPU)
    assert len(set(together)) > 1
    for image, prompt, text in zip(images, prompts, together, strict=True):
        assert evaluation.answer(model, processor, [image], [prompt], 16, CPU) == [text]
        assert greedy(model, processor, image, prompt, 16) == text


# ==== Answers that go on from a reasoning ====


def test_own_reasoning_put_back_gives_the_own_answer(records, processor, model):
    """The tokens are those that the model had sampled, up to a joint of two tags."""
    images = pictures(records[:4])
    prompts = [rewards.prompt(rewards.QUESTION, "think")] * 4
    texts = evaluation.answer(model, processor, images, prompts, 40, CPU)
    starts = [text.partition("</think>")[0] + "</think>" for text in texts]
    assert all(map(rewards.predicted_class, texts)) and all(map(rewards.reasoning, starts))
    rest = evaluation.answer(model, processor, images, prompts, 40, CPU, starts)
    for text, start, end in zip(texts, starts, rest, strict=True):
        assert end.startswith(">\n<answer>") and start[:-1] + end == text


@pytest.mark.parametrize(
    "begun", ["<think>Faint band.</think>", EMPTY, "<think><|image_pad|></think>"]
)
def test_the_reasoning_stands_before_the_answer(begun, records, processor, model):
    """As if written after the prompt by hand; what looks like a special token is plain text."""
    image, prompt = pictures(records[:1]), rewards.prompt(rewards.QUESTION, "think")
    plain, stops = vlm.encode(processor, image, [prompt]), vlm.stop_ids(model, processor)
    start = begun[:-1]  # ">" is joined with "<"
    more = torch.tensor([processor.tokenizer(start, split_special_tokens=True)["input_ids"]])
    batch = {**plain, "input_ids": torch.cat([plain["input_ids"], more], 1)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    zeros = torch.zeros_like(more).int()
    batch["mm_token_type_ids"] = torch.cat([plain["mm_token_type_ids"], zeros], 1)
    found = vlm.encode(processor, image, [prompt], begun=[begun])
    assert all(torch.equal(found[key], batch[key]) for key in plain)
    ends = {"eos_token_id": stops, "pad_token_id": stops[0], "max_new_tokens": 12}
    row = model.generate(**batch, **ends)[0, batch["input_ids"].shape[1] :]
    text = vlm.decode(processor, row.tolist(), stops)
    images, prompts = image + pictures(records[1:2]), [prompt, rewards.QUESTION]
    texts = evaluation.answer(model, processor, images, prompts, 12, CPU, [begun, EMPTY])
    assert texts[0] == text


@pytest.mark.parametrize("chat", ["assistant\n", "assistant\n<think>\n"])
@pytest.mark.parametrize("whole", [False, True])  # whether "</think>" is one token
def test_the_reasoning_is_opened_once_and_closed(chat, whole, processor):
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.add_tokens(["<think>", "</think>"] if whole else [])
    text = vlm.beginning(tokenizer, chat, "<think>A veil.</think>")
    opening = "" if "<think>" in chat else "<think>"
    assert text == f"{opening}A veil.</think" + (">" if whole else "")
    assert vlm.beginning(tokenizer, chat, "") == ""


@pytest.mark.parametrize("opened", [False, True])
def test_another_family_goes_on_from_a_reasoning(opened, tmp_path, records):
    name = str(tiny_llava(tmp_path))
    model, processor = vlm.load_model(name, CPU), vlm.any_processor(name)
    if opened:
        template = processor.chat_template
        processor.chat_template = template.replace("assistant\\n'", "assistant\\n<think>\\n'")
    images, starts = pictures(records[:2]), ["<think>A faint veil.</think>", EMPTY]
    batch, _ = vlm.encode_any(model, processor, images, ["What?", "And this?"], starts)
    plain, _ = vlm.encode_any(model, processor, images, ["What?", "And this?"], ["", ""])
    texts = []
    for ids in (batch["input_ids"], plain["input_ids"]):
        pad = processor.tokenizer.pad_token
        texts.append([text.replace(pad, "") for text in processor.batch_decode(ids)])
    assert all(("<think>" in text) == opened for text in texts[1])
    for text, before, start in zip(*texts, starts, strict=True):
        assert text == before + start.removeprefix("<think>" if opened else "")[:-1]
    together = evaluation.answer(model, processor, images, ["What?", "And this?"], 6, CPU, starts)
    for i, text in enumerate(together):
        one = [images[i]], [["What?", "And this?"][i]], 6, CPU, [starts[i]]
        assert evaluation.answer(model, processor, *one) == [text]


# ==== The script ====


def main(*args: object) -> None:
    """In this process: quicker."""
    evaluation.main(list(map(str, args)))


def complaint(*args: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main(*args)
    message = stop.value.code
    assert message.startswith("error: ") and "\n" not in message
    return message


def read(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def sft(tmp_path_factory, processor):
    """A checkpoint unlike the base in weights, with its training curves beside it."""
    folder = tmp_path_factory.mktemp("runs") / "sft"
    model = vlm.load_model(str(vlm.TINY), CPU)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    vlm.save_checkpoint(folder, model, processor)
    Image.new("RGB", (30, 20), "blue").save(folder / "curves.png")
    return folder


def write_lines(path, *rows: dict) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def flags(data, sft, tmp_path_factory):
    """A small evaluation of everything: two models, both prompts, three general-skill sets."""
    folder = tmp_path_factory.mktemp("general")
    charts, texts = folder / "charts.jsonl", folder / "texts.jsonl"
    Image.new("RGB", (100, 80), "red").save(folder / "a.png")
    line = {"image": "a.png", "question": "What colour?", "answer": "red"}
    write_lines(charts, {**line, "type": "human"}, {**line, "type": "augmented"})
    line = {"image": "a.png", "question": "What does it say?", "answers": 10 * ["stop"]}
    write_lines(texts, line)
    models = ["--data", data, "--model", vlm.TINY, sft]
    more = ["--chartqa", charts, "--textvqa", texts, "--swap-thinking"]
    return [*models, *more, *QUICK]


@pytest.fixture(scope="module", autouse=True)
def evaluation_by_python(flags, tmp_path_factory):
    """Starts that evaluation; meanwhile tests in this process run."""
    out = tmp_path_factory.mktemp("results") / "eval"
    return out, launch.start_python("05_eval", *flags, "--out", out)


@pytest.fixture(scope="module")
def results(evaluation_by_python):
    """The folder of the evaluation done by `python`, and what was printed."""
    out, process = evaluation_by_python
    done = launch.ended(process)
    assert not done.returncode, done.stderr
    return out, done.stdout


def test_every_file_is_there(results):
    out, printed = results
    assert set(read(out)) == FILES
    assert (out / "table.md").read_text() in printed


def test_predictions_are_right(results):
    metrics = json.loads((results[0] / "metrics.json").read_text())
    rows = read_log(results[0] / "predictions.jsonl")
    assert list(metrics["models"]) == ["tiny-qwen2.5-vl", "sft"] and len(rows) == 2 * 2 * 12
    for row in rows:
        parts = rewards.reward(row["text"], row["label"], mode=row["mode"])
        for key in ("format", "validity", "correctness", "predicted"):
            assert row[key] == getattr(parts, key)
        assert ("judged" in row) == (row["mode"] == "think")
    for name, model in metrics["models"].items():
        assert model["parameters"] == 1_846_784
        of_model = [row for row in rows if row["model"].endswith(name)]
        for mode, m in model["modes"].items():
            answers = [row for row in of_model if row["mode"] == mode]
            right = sum(rewards.predicted_class(row["text"]) == row["label"] for row in answers)
            assert m["n"] == len(answers) == 12 == sum(map(sum, m["confusion"]))
            assert m["accuracy"] == pytest.approx(right / 12)
            asked = [rewards.format_reward(row["text"], mode) for row in answers]
            assert m["format"] == pytest.approx(np.mean(asked))
            assert m["interval_95"] is None  # five patients are too few


def test_general_skill_is_right(results):
    metrics = json.loads((results[0] / "metrics.json").read_text())
    rows = read_log(results[0] / "general.jsonl")
    assert len(rows) == 2 * (12 + 2 + 1)
    for name, model in metrics["models"].items():
        of_model = [row for row in rows if row["model"].endswith(name)]
        for key, part in model["general"].items():
            scores = [row["score"] for row in of_model if row["set"] == key]
            assert part["n"] == len(scores) and part["mean"] == pytest.approx(np.mean(scores))
    base = metrics["models"]["tiny-qwen2.5-vl"]
    assert base["general"]["skill"]["mean"] > 0.4  # it was taught to answer attribute questions
    assert base["modes"]["think"]["judge"]["coverage"] > 0.9


def test_swapped_lines_are_right(results):
    """Beside the answers of predictions.jsonl."""
    out = results[0]
    metrics = json.loads((out / "metrics.json").read_text())
    lines, thought = read_log(out / "swapped.jsonl"), {}
    for answer in read_log(out / "predictions.jsonl"):
        if answer["mode"] == "think":
            thought[answer["model"], answer["id"]] = answer
    assert [(line["model"], line["id"]) for line in lines] == list(thought)
    keys = "model id patient label predicted judged donor donor_class swapped empty".split()
    for line in lines:
        assert list(line) == keys
        own = thought[line["model"], line["id"]]
        assert all(line[key] == own[key] for key in keys[:6])
        # With the own answer's class a model that always answers alike would seem to move.
        classes = {other["judged"] for other in lines if other["model"] == line["model"]}
        classes -= {None, line["judged"], line["predicted"]}
        assert (line["donor"] is None) == (line["judged"] is None or not classes)
        if line["donor"]:
            assert thought[line["model"], line["donor"]]["judged"] == line["donor_class"]
            assert line["donor_class"] in classes
    for name, model in metrics["models"].items():
        of_model = [line for line in lines if line["model"].endswith(name)]
        assert model["swap_thinking"] == judge.summarise_swap(of_model)
    assert metrics["models"]["tiny-qwen2.5-vl"]["swap_thinking"]["n"] > 6


def test_tables_and_figures_show_the_metrics(results, flags):
    out = results[0]
    metrics = json.loads((out / "metrics.json").read_text())
    table = (out / "table.md").read_text()
    for caption in ("Table 1", "Fig. 1d", "Fig. 3", "Table 2", "Differences"):
        assert caption in table
    think = metrics["models"]["tiny-qwen2.5-vl"]["modes"]["think"]
    shown = f"{100 * think['accuracy']:.1f} | {100 * think['macro_accuracy']:.1f}"
    assert f"| tiny-qwen2.5-vl | 1.8 M | think | {shown} |" in table
    assert "Of fewer than 10 patients it would be too narrow" in table
    assert not re.search(r"\d to \d", table)
    think |= {"interval_95": [0.25, 0.75], "macro_interval_95": [0, 1]}
    shown = f"{100 * think['accuracy']:.1f} (25.0 to 75.0) | {100 * think['macro_accuracy']:.1f} "
    assert shown + "(0.0 to 100.0)" in tables.markdown(tables.tables(metrics))
    swap = metrics["models"]["tiny-qwen2.5-vl"]["swap_thinking"]
    swap |= {"moved_interval_95": [0.125, 0.5]}
    assert "**Does the answer follow the reasoning?**" in table
    shown = f"| tiny-qwen2.5-vl | {100 * swap['moved']:.1f} (12.5 to 50.0) | "
    shown += f"{100 * swap['stayed']:.1f} | {100 * swap['accuracy_without']:.1f} | {swap['n']} |"
    assert shown in tables.markdown(tables.tables(metrics))
    assert "Does the answer follow the reasoning?" in (out / "report.html").read_text()
    header = "| model | attribute questions % (n = 12) | depth % | shape % | side % | texture % | "
    header += "ChartQA % (n = 2) | augmented % | human % | TextVQA % (n = 1) | weighted average % |"
    assert header in table
    labels = [record["label"] for record in load_split(flags[1], "test")[:12]]
    assert metrics["commonest_class"]["share"] == max(map(labels.count, labels)) / 12
    # The training curves of the run given as --model.
    assert f"Training: {flags[4]}" in (out / "report.html").read_text()


@pytest.mark.slow
def test_two_ranks_give_the_same_bytes(results, flags, tmp_path):
    done = launch.run("05_eval", *flags, "--out", tmp_path / "e", ranks=2)
    assert not done.returncode, done.stderr
    assert read(tmp_path / "e") == read(results[0])


@pytest.mark.slow
def test_killed_and_started_again_gives_the_same_bytes(results, flags, tmp_path):
    out, kept = tmp_path / "e", {}
    for batches in (1, 5, 9):  # of 2 x (3 + 3 + 3 + 1 + 1) and the swaps
        process = launch.start("05_eval", *flags, "--out", out)
        while len(list(out.glob(".work/*/*/[!.]*.json"))) < batches:
            assert process.poll() is None, process.stderr
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL  # it was not done yet
        assert not set(read(out)) & FILES
        assert kept == ct.times(kept)  # nothing is asked twice
        kept = ct.times(out.glob(".work/*/*/[!.]*.json"))
    done = launch.run("05_eval", *flags, "--out", out)
    assert not done.returncode, done.stderr
    assert read(out) == read(results[0])
    assert kept == ct.times(kept)


def test_other_settings_are_refused(results, flags, sft, data, tmp_path):
    out = shutil.copytree(results[0], tmp_path / "e")
    before = read(out)
    plain = [flag for flag in flags if flag != "--swap-thinking"]
    message = complaint(*flags, "--think", "yes", "--out", out)
    assert "made with other settings (--think was both and is yes now)" in message
    assert str(out) in message and "--overwrite" in message
    # In the other order each model would get the other's answers.
    rest = flags[flags.index("--chartqa") :]
    swapped = ["--data", data, "--model", sft, vlm.TINY, *rest]
    assert "made with other settings (--model was" in complaint(*swapped, "--out", out)
    # Other pictures of the same records.
    other = shutil.copytree(data, tmp_path / "data")
    info = json.loads((other / "dataset_info.json").read_text())
    (other / "dataset_info.json").write_text(json.dumps({**info, "border": 0.5}))
    message = complaint("--data", other, *flags[2:], "--out", out)
    assert "made with other settings (--data was" in message
    shutil.copy(data / "dataset_info.json", other)
    picture = load_split(other, "test")[0]["image"]
    Image.open(picture).rotate(90).convert("L").save(picture)
    message = complaint("--data", other, *flags[2:], "--out", out)
    assert "made with other settings (--data was" in message
    assert read(out) == before
    assert "made with other settings (--swap-thinking was" in complaint(*plain, "--out", out)
    main(*plain, "--think", "no", "--out", out, "--overwrite")
    kept = ct.times(out.glob(".work/*/*/[!.]*.json"))
    main(*plain, "--think", "no", "--out", out, "--overwrite")  # the same settings: it goes on
    assert kept and kept == ct.times(kept)
    assert not (out / "swapped.jsonl").exists()
    assert {row["mode"] for row in read_log(out / "predictions.jsonl")} == {"direct"}


def test_another_checkpoint_by_the_same_name_is_refused(sft, data, tmp_path):
    other = shutil.copytree(sft, tmp_path / "other")
    flags = ["--data", data, "--model", other, "--think", "no", "--no-skill", *QUICK]
    main(*flags, "--out", tmp_path / "one")
    shutil.copy(vlm.TINY / "model.safetensors", other)
    message = complaint(*flags, "--out", tmp_path / "one")
    assert "made with other settings (--model was" in message


def test_foreign_files_are_left_alone(data, tmp_path):
    (tmp_path / "metrics.json").write_text("mine")
    for extra in ([], ["--overwrite"]):
        message = complaint("--data", data, "--model", vlm.TINY, "--out", tmp_path, *extra)
        assert f"{tmp_path}: holds metrics.json of another run" in message
    assert read(tmp_path) == {"metrics.json": b"mine"}


def test_one_drawn_picture(records, processor, model, tmp_path, capsys):
    picture = records[0]["image"]
    main("--image", picture, "--model", vlm.TINY, "--out", tmp_path / "e")
    assert not (tmp_path / "e").exists()
    image, prompt = pictures(records[:1]), rewards.prompt(rewards.QUESTION, "think")
    (text,) = evaluation.answer(model, processor, image, [prompt], 40, CPU)
    lines = f"  thinks:  {rewards.reasoning(text)}\n  answers: {rewards.predicted_class(text)}\n"
    printed = capsys.readouterr().out
    assert lines in printed and printed.count("answers:") == 2  # under both prompt forms


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--image", "no.png"], "no.png: cannot be read"),
        (["--image", "README.md"], "README.md: cannot be read"),
        (["--chartqa", "no.json"], "no.json: cannot be read"),
        (["--judge", "runs/none", "--limit", 1], "runs/none: no such checkpoint folder"),
    ],
)
def test_bad_input_is_one_line(data, tmp_path, extra, words):
    flags = ["--data", data, "--model", vlm.TINY, "--out", tmp_path / "e"]
    assert words in complaint(*flags, *extra)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([vlm.TINY], "names a checkpoint twice"),
        (["--swap-thinking", "--think", "no"], "--swap-thinking needs a diagnosis with reasoning"),
        (["--swap-thinking", "--image", "a.png"], "--image goes without --swap-thinking"),
        (["--tensor-parallel", "--image", "a.png"], "--image goes without --swap-thinking and"),
    ],
)
def test_flags_that_contradict_are_refused(given, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main("--model", vlm.TINY, *given)
    assert stop.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]
