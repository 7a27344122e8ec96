"""Qwen3-VL and Qwen3.5 on tiny random models, LoRA adapters, tensor parallelism."""

import copy
import functools
import importlib
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import rewards
from support import distributed, engine, grounding, vlm
from support.distributed import World
from support.files import BadInput
from support.log import read_log
from tests import launch
from tests.test_sft import ROPE, SIZES

launch.server()
sft, grpo, evaluation = map(importlib.import_module, ("03_sft", "04_grpo", "05_eval"))
CPU = torch.device("cpu")
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}
INTERLEAVED = {
    "rope_type": "default",
    "mrope_section": [4, 2, 2],
    "mrope_interleaved": True,
    "rope_theta": 1e4,
    "partial_rotary_factor": 1.0,
}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 64,
}
SFT = "--max-steps 2 --batch-size 4 --micro-batch 2 --lr 1e-3".split()
GRPO = "--steps 2 --prompts-per-step 2 --group-size 3 --max-new-tokens 8 --inner-epochs 2".split()
GRPO += "--lr 1e-2".split()


def write(folder, family, kind, text: dict, vision: dict, template: str | None = None) -> str:
    """A checkpoint of random weights with the shipped tokenizer and patches of 16 px."""
    tokenizer = vlm.load_processor(str(vlm.TINY)).tokenizer
    token = tokenizer.convert_tokens_to_ids
    tokenizer.chat_template = template or tokenizer.chat_template
    config = family(
        text_config={**TEXT, "vocab_size": len(tokenizer), "rope_parameters": INTERLEAVED, **text},
        vision_config={**VISION, **vision},
        tie_word_embeddings=True,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    torch.manual_seed(0)
    model = kind(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 4  # so that answers differ
    ends = {"eos_token_id": [token("<|im_end|>")], "pad_token_id": token("<|endoftext|>")}
    model.generation_config = GenerationConfig(**ends)
    images = Qwen2VLImageProcessorPil(min_pixels=64 * 64, max_pixels=96 * 96, patch_size=16)
    vlm.save_checkpoint(folder, model, vlm.Processor(tokenizer, images))
    return str(folder)


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3-vl")
    vision = {"deepstack_visual_indexes": [0, 1]}
    return write(folder, Qwen3VLConfig, Qwen3VLForConditionalGeneration, {}, vision)


@pytest.fixture(scope="session")
def qwen35(tmp_path_factory):
    """Its template opens the reasoning, as those of the real ones do."""
    folder = tmp_path_factory.mktemp("qwen3.5")
    text = {
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    template = opened(vlm.load_processor(str(vlm.TINY))).tokenizer.chat_template
    kind = Qwen3_5ForConditionalGeneration
    return write(folder, Qwen3_5Config, kind, text, {}, template)


def opened(processor: vlm.Processor) -> vlm.Processor:
    """The processor with a template that opens the reasoning."""
    processor = copy.deepcopy(processor)
    template = processor.tokenizer.chat_template
    processor.tokenizer.chat_template = template.replace("assistant\\n'", "assistant\\n<think>\\n'")
    return processor


def reward_by_length(patch=setattr) -> None:
    """What a random model says earns nothing, and equal rewards teach nothing."""

    def reward(text: str, *_):
        return rewards.Reward(0.0, 0.0, 0.0, total=float(len(text) % 5), predicted=None)

    patch(rewards, "reward", reward)


def roll(name: str, group: str):
    """A model with `group` trained, and three prompts of unequal length and picture size, four
    samples each."""
    model, processor = vlm.load_model(name, CPU), vlm.load_processor(name)
    vlm.set_trainable(model, group)
    sizes = [(140, 140), (300, 70), (97, 181)]
    images = [Image.effect_noise(size, 60).convert("RGB") for size in sizes]
    texts = [rewards.prompt(rewards.QUESTION, mode) for mode in ("think", "direct", "think")]
    u = torch.rand(3, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    # Many stop tokens, so that lengths differ. Nobody has drawn an image token with this seed.
    stops = [*vlm.stop_ids(model, processor), *range(40)]
    return model, engine.rollout(model, vlm.encode(processor, images, texts), u, stops, 1.0)


# ==== Qwen3-VL ====


def test_qwen3_vl_goes_through_all_stages(qwen3, data, tmp_path, monkeypatch):
    common = ["--data", str(data), "--model"]
    sft.main([*common, qwen3, "--out", str(tmp_path / "sft"), *SFT])
    with monkeypatch.context() as patch:
        reward_by_length(patch.setattr)
        grpo.main([*common, str(tmp_path / "sft"), "--out", str(tmp_path / "grpo"), *GRPO])
    flags = "--limit 4 --max-new-tokens 8 --out".split()
    evaluation.main([*common, str(tmp_path / "grpo"), *flags, str(tmp_path / "eval")])
    assert len(read_log(tmp_path / "eval" / "predictions.jsonl")) == 2 * 4
    assert "torchvision" not in sys.modules
    first, last = read_log(tmp_path / "grpo" / "metrics.jsonl")
    assert first["kl"] > 0 and last["grad_norm"] > 0  # the second inner epoch has moved away
    before, after = vlm.load_model(qwen3, CPU), vlm.load_model(str(tmp_path / "sft"), CPU)
    changed = set()
    for (name, one), other in zip(before.named_parameters(), after.parameters(), strict=True):
        if not torch.equal(one, other):
            changed.add(name.split(".")[2])
    assert changed == {"merger", "deepstack_merger_list"}  # 03's default


@pytest.mark.parametrize("group", ["llm", "full"])  # the tower frozen, its features kept; trained
def test_qwen3_vl_packed_equals_plain(qwen3, group):
    model, rolled = roll(qwen3, group)
    assert (rolled.features is None) == (group == "full")
    results = []
    for score in (grpo.plain_logprobs, engine.packed_logprobs):
        logp = score(model, rolled, 0.7) * rolled.mask
        logp.sum().backward()
        results.append((logp.detach(), [p.grad for p in model.parameters() if p.requires_grad]))
        model.zero_grad()
    assert torch.allclose(results[0][0], results[1][0], atol=2e-5)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert (one - other).norm() <= 1e-4 * one.norm() + 1e-6


def test_the_features_that_are_kept_hold_the_deepstacks(qwen3):
    model, rolled = roll(qwen3, "llm")
    with torch.no_grad():
        kept = engine.packed_logprobs(model, rolled, 1.0)
        rolled.features = None
        assert torch.equal(kept, engine.packed_logprobs(model, rolled, 1.0))


def test_mergers_of_qwen3_vl_by_hand():
    """Width 1152, 2 x 2 patches merged to 4608, language model 4096: the 8B's."""
    text = {"hidden_size": 4096, "num_hidden_layers": 1, "rope_parameters": INTERLEAVED}
    config = Qwen3VLConfig(text_config=text, vision_config={"out_hidden_size": 4096})
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(config)
    trained = vlm.set_trainable(model, "merger")
    layers = (4608 + 1) * 4608 + (4608 + 1) * 4096
    # The merger's norm comes before its patches are joined, those of the deepstack's after.
    expected = (2 * 1152 + layers) + 3 * (2 * 4608 + layers)
    assert sum(parameter.numel() for parameter in trained.values()) == expected


def positions_by_hand(batch: dict, row: int, merge: int, image_token: int) -> list[tuple]:
    """(time, height, width) of each token: a picture's is its place in the grid, and the text goes
    on after its longer side."""
    t, height, width = (n // merge for n in batch["image_grid_thw"][row].tolist())
    ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
    first, expected = ids.index(image_token), []
    for i in range(len(ids)):
        if i < first:
            expected.append((i, i, i))
        elif i < first + height * width:
            y, x = divmod(i - first, width)
            expected.append((first, first + y, first + x))
        else:
            n = i - height * width + max(height, width)
            expected.append((n, n, n))
    return expected


@functools.cache
def loaded(name: str) -> tuple:
    return vlm.load_model(name, CPU), vlm.load_processor(name)


SIDE = st.integers(20, 260)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=3))
def test_positions_for_any_picture_size(qwen3, qwen35, sizes):
    for name in (str(vlm.TINY), qwen3, qwen35):
        model, processor = loaded(name)
        images = [Image.new("RGB", size) for size in sizes]
        batch = vlm.encode(processor, images, [f"{'?' * i} what?" for i in range(len(sizes))])
        position = vlm.positions(model, batch)  # [3, B, T]
        for row in range(len(sizes)):
            seen = position[:, row, batch["attention_mask"][row].bool()]
            expected = positions_by_hand(batch, row, 2, model.config.image_token_id)
            assert [tuple(column) for column in seen.T.tolist()] == expected


@pytest.mark.slow
def test_qwen3_vl_sharded_over_two_ranks_equals_one_process(qwen3, data, tmp_path):
    flags = ["--data", data, "--model", qwen3, *GRPO, "--train", "full", "--out"]
    one, two = tmp_path / "one", tmp_path / "two"
    before = ["tests.test_models", "reward_by_length"]
    whole = launch.start("04_grpo", *flags, one, before=before)
    sharded = launch.start("04_grpo", *flags, two, "--shard", ranks=2, before=before)
    assert (whole.wait(), sharded.wait()) == (0, 0), sharded.stderr
    assert_close(one, two)


# ==== Qwen3.5: layers that no mask governs ====


def test_only_full_attention_is_packed(qwen3, qwen35, model):
    assert engine.can_pack(model.config) and engine.can_pack(vlm.load_config(qwen3))
    assert not engine.can_pack(vlm.load_config(qwen35))
    model.config.text_config.layer_types[1] = "sliding_attention"
    assert not engine.can_pack(model.config)


def test_qwen35_takes_the_plain_path_and_says_so(qwen35, data, tmp_path, monkeypatch, capsys):
    def packed(*args):
        raise AssertionError

    monkeypatch.setattr(grpo, "packed_logprobs", packed)
    reward_by_length(monkeypatch.setattr)
    flags = ["--data", str(data), "--model", qwen35, "--out", str(tmp_path), *GRPO]
    grpo.main(flags)
    assert "scoring takes one row per sample" in capsys.readouterr().out
    assert all(row["kl"] > 0 for row in read_log(tmp_path / "metrics.jsonl"))
    texts = [row["text"] for row in read_log(tmp_path / "rollouts.jsonl")]
    assert all(text.startswith("<think>") for text in texts)


def test_qwen35_scores_as_each_sequence_alone(qwen35):
    """The cache of its linear layers is repeated and padding on either side is harmless."""
    model, rolled = roll(qwen35, "llm")
    prompts = vlm.repeat(rolled.prompts, 4)
    with torch.no_grad():
        logp = grpo.plain_logprobs(model, rolled, 1.0)
        for row in range(0, 12, 3):
            b, n = divmod(row, 4)
            one = vlm.select(prompts, slice(row, row + 1))
            real, kept = one["attention_mask"].bool(), rolled.mask[b, n]
            tokens = rolled.tokens[b, n][kept][None]
            ids = torch.cat([one["input_ids"][real][None], tokens], 1)
            types = torch.cat([one["mm_token_type_ids"][real][None], torch.zeros_like(tokens)], 1)
            pictures = {key: one[key] for key in ("pixel_values", "image_grid_thw")}
            logits = model(input_ids=ids, mm_token_type_ids=types.int(), **pictures).logits
            alone = logits[:, -tokens.shape[1] - 1 : -1].log_softmax(-1)
            alone = alone.gather(-1, tokens[..., None])[0, :, 0]
            assert torch.allclose(alone, logp[b, n][kept], atol=2e-4)


# ==== Templates that open the reasoning ====


@pytest.mark.parametrize("begun", [False, True])
def test_format_is_read_from_the_prompts_tail_on(model, processor, records, begun, monkeypatch):
    """In 04 and in 05 alike."""
    processor = opened(processor) if begun else processor
    rest = "a veil</think><answer>Emphysema</answer>"
    ids = processor.tokenizer(rest + "<|im_end|>")["input_ids"]
    images, prompts = [Image.new("RGB", (64, 64))] * 2, ["What is it?", "And this?"]
    expected = "<think>" + rest if begun else rest
    monkeypatch.setattr(vlm, "generate", lambda *_, **__: [ids, ids])
    answers = evaluation.answer(model, processor, images, prompts, 40, CPU)
    assert answers == [expected, expected]
    tokens = torch.tensor(ids).expand(2, 1, -1)
    mask = torch.ones_like(tokens).bool()
    rolled = engine.Rollout(vlm.encode(processor, images, prompts), tokens, mask, mask.any(2))
    stops = vlm.stop_ids(model, processor)
    args = grpo.parse_args(["--model", str(vlm.TINY)])
    truths = [record["label"] for record in records[:2]]
    groups = grpo.score_samples(1, records[:2], truths, rolled, processor, stops, args)
    assert [group[0].text for group in groups] == [expected, expected]
    assert [group[0].format for group in groups] == [begun, begun]


def test_direct_answers_close_what_the_template_has_opened(processor, records):
    batch = sft.encode(records[:3], opened(processor))
    for row, labels, record in zip(batch["input_ids"], batch["labels"], records, strict=False):
        answer = f"</think>\n\n<answer>{record['label']}</answer><|im_end|>"
        assert processor.tokenizer.decode(row[labels >= 0]) == answer
        assert f"<think>\n{answer}" in processor.tokenizer.decode(row)


# ==== LoRA ====


@pytest.mark.usefixtures("peft")
@pytest.mark.parametrize(("size", "count"), [("3B", 29_933_568), ("7B", 40_370_176)])
def test_adapters_of_the_real_models(size, count):
    """By hand, per layer and rank: the sum of in + out over seven matrices."""
    text = {**SIZES[size], "rope_parameters": ROPE}
    hidden, width = text["hidden_size"], text["intermediate_size"]
    kv = 128 * text["num_key_value_heads"]
    layer = 2 * (hidden + hidden) + 2 * (hidden + kv) + 3 * (hidden + width)
    assert 16 * layer * text["num_hidden_layers"] == count
    config = Qwen2_5_VLConfig(text_config=text, vision_config={"depth": 1})
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
        trained = vlm.set_trainable(model, "lora", 16)
    assert sum(parameter.numel() for parameter in trained.values()) == count


def test_lora_needs_peft(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(BadInput, match="needs the package peft: pip install"):
        vlm.set_trainable(model, "lora")


@pytest.fixture(scope="module")
def lora(peft, data, tmp_path_factory):
    """04 with adapters on the shipped model."""
    out = tmp_path_factory.mktemp("lora")
    with pytest.MonkeyPatch.context() as patch:
        reward_by_length(patch.setattr)
        grpo.main([*lora_flags(data, out), "--steps", "4"])
    return out


def lora_flags(data, out) -> list[str]:
    flags = ["--data", str(data), "--model", str(vlm.TINY), "--out", str(out), *GRPO]
    flags += "--max-new-tokens 30 --train lora --lora-rank 4 --save-every 2".split()
    return flags


def test_lora_trains_against_the_model_without_adapters(lora):
    rows = read_log(lora / "metrics.jsonl")
    assert all(row["grad_norm"] > 0 and row["kl"] > 0 for row in rows)
    assert_only_projections_differ(vlm.TINY, lora)


def assert_only_projections_differ(one, two) -> None:
    """Of the language model, which is what has adapters."""
    models = [vlm.load_model(str(folder), CPU) for folder in (one, two)]
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        adapted = "language_model" in name and name.endswith("_proj.weight")
        assert torch.equal(a, b) != adapted, name


@pytest.mark.usefixtures("peft")
def test_adapters_off_is_the_model_as_it_was(tiny, model, processor, records, world):
    batch = sft.encode(records[:2], processor)
    trained = vlm.set_trainable(model, "lora", 4)
    with torch.no_grad():
        base = sft.sum_loss(tiny, batch)
        assert torch.equal(sft.sum_loss(model, batch), base)  # B is 0
    sft.add_gradients(model, [batch], world)
    torch.optim.SGD(trained.values(), lr=1.0).step()
    with torch.no_grad():
        assert not torch.equal(sft.sum_loss(model, batch), base)
        with vlm.adapters_off(model):
            assert torch.equal(sft.sum_loss(model, batch), base)
        assert not torch.equal(sft.sum_loss(model, batch), base)
    assert all(parameter.requires_grad for parameter in trained.values())


@pytest.mark.usefixtures("peft")
def test_what_is_saved_is_merged(model, processor, records, tmp_path):
    trained = vlm.set_trainable(model, "lora", 4)
    for parameter in trained.values():
        torch.nn.init.normal_(parameter, std=0.1)
    vlm.save_checkpoint(tmp_path, model, processor)
    assert vlm.is_demo(tmp_path) and not list(tmp_path.glob("adapter*"))
    again, batch = vlm.load_model(str(tmp_path), CPU), sft.encode(records[:2], processor)
    with torch.no_grad():
        expected = sft.sum_loss(model, batch)
        assert torch.allclose(sft.sum_loss(again, batch), expected, rtol=1e-5)


@pytest.mark.usefixtures("peft")
def test_adapters_as_on_a_gpu(processor):
    """The twin shares all but the adapters; the reference is the policy with those off."""
    args = SimpleNamespace(model=str(vlm.TINY), train="lora", lora_rank=4, shard=False)
    like_a_gpu = World(0, 1, CPU, torch.bfloat16)
    policy, trained = distributed.load_for_training(args, like_a_gpu)
    twin = distributed.load_twin(args, policy, trained, like_a_gpu)
    assert distributed.load_reference(args, policy, like_a_gpu) is policy
    for name, parameter in policy.named_parameters():
        copy = twin.get_parameter(name)
        assert (copy is parameter) == (name not in trained)
        assert copy.dtype == torch.bfloat16 and copy.requires_grad == (name in trained)


@pytest.mark.slow
def test_lora_resumes_bit_for_bit(lora, data, tmp_path, monkeypatch):
    shutil.copytree(lora, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoint-000004")
    reward_by_length(monkeypatch.setattr)
    grpo.main([*lora_flags(data, tmp_path), "--steps", "4", "--resume"])
    one, other = (vlm.load_model(str(folder), CPU) for folder in (lora, tmp_path))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert read_log(lora / "rollouts.jsonl") == read_log(tmp_path / "rollouts.jsonl")


@pytest.mark.usefixtures("peft")
def test_sft_with_lora(data, tmp_path):
    flags = ["--data", str(data), "--model", str(vlm.TINY), *SFT, "--train", "lora", "--out"]
    sft.main([*flags, str(tmp_path)])
    first, last = read_log(tmp_path / "metrics.jsonl")
    assert last["loss"] < first["loss"]
    assert_only_projections_differ(vlm.TINY, tmp_path)


@pytest.mark.usefixtures("peft")
def test_lora_under_checkpointing(model, processor, records, world):
    batch, gradients = sft.encode(records[:3], processor), []
    trained = vlm.set_trainable(model.train(), "lora", 4)
    for _ in range(2):
        sft.add_gradients(model, [batch], world)
        gradients.append([parameter.grad.clone() for parameter in trained.values()])
        model.zero_grad()
        model.activation_checkpointing_enable()
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-7)


def assert_close(one, two, atol: float = 2e-5) -> None:
    """The weights and metrics of two runs agree."""
    models = [vlm.load_model(str(folder), CPU) for folder in (one, two)]
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(a, b, atol=atol), name
    for a, b in zip(*(read_log(folder / "metrics.jsonl") for folder in (one, two)), strict=True):
        for key in ("reward", "loss", "kl", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), key


@pytest.mark.slow
def test_lora_sharded_over_two_ranks_equals_one_process(lora, data, tmp_path):
    shutil.copytree(lora, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoint-000004")
    flags = [*lora_flags(data, tmp_path), "--steps", "4", "--resume", "--shard"]
    before = ["tests.test_models", "reward_by_length"]
    process = launch.start("04_grpo", *flags, ranks=2, before=before)
    assert process.wait() == 0, process.stderr
    assert_close(lora, tmp_path, atol=2e-3)  # what is saved is fp16


# ==== Tensor parallelism ====


def test_models_that_cannot_be_split(qwen3):
    with pytest.raises(BadInput, match="no --tensor-parallel plan for qwen3_vl_text"):
        vlm.load_model(qwen3, CPU, split=2)
    with pytest.raises(BadInput, match="2 key-value heads cannot be split over 3 processes"):
        vlm.load_model(str(vlm.TINY), CPU, split=3)


@pytest.mark.slow
def test_tensor_parallel_gives_the_same_bytes(data, tmp_path):
    pytest.importorskip("accelerate", reason="pip install -r benchmarks/requirements.txt")
    flags = ["--data", data, "--model", vlm.TINY, "--limit", 6, "--no-skill"]
    flags += "--batch-size 4 --max-new-tokens 24 --out".split()
    one, two = tmp_path / "one", tmp_path / "two"
    whole = launch.start("05_eval", *flags, one)
    split = launch.start("05_eval", *flags, two, "--tensor-parallel", ranks=2)
    assert (whole.wait(), split.wait()) == (0, 0), split.stderr
    for name in ("predictions.jsonl", "metrics.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert json.loads((one / "metrics.json").read_text())["n"] == 6


def test_qwen3s_grid_has_a_thousand_steps(qwen3, qwen35, processor):
    for folder in (qwen3, qwen35):
        other = vlm.load_processor(folder)
        assert grounding.box_grid(other, (640, 480)) == (1000, 1000)
    assert not processor.thousandths
    record = {"label": "Emphysema", "boxes": [[64, 48, 320, 240]]}
    right = grounding.truth("locate", record, other, (640, 480))
    assert right == rewards.Boxes([[100, 100, 500, 500]], 1000, 1000)
    assert grounding.truth("diagnose", record, other, (640, 480)) == "Emphysema"
    text = '<answer>{"bbox_2d": [100, 200, 300, 400]}</answer>'
    assert grounding.box_in_picture(text, other, (640, 480)) == [64, 96, 192, 192]
