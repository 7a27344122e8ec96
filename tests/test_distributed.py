"""Models in training: masters, the rollout's twin, the reference, shards, several machines.

What a GPU does in bf16 is emulated on the CPU: bf16 weights, autocast over fp32 masters.
"""

import importlib
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

import rewards
from support import distributed, engine, vlm
from support.distributed import World
from tests import launch
from tests.test_grpo import random_numbers
from tests.test_scripts import (
    THREE_UPDATES,
    assert_shards_equal_one_process,
    metrics,
    weights,
)

launch.server()
grpo = importlib.import_module("04_grpo")
CPU = torch.device("cpu")
LIKE_A_GPU = World(0, 1, CPU, torch.bfloat16)


def flags(group: str, shard: bool = False) -> SimpleNamespace:
    return SimpleNamespace(model=str(vlm.TINY), train=group, lora_rank=4, shard=shard)


@pytest.fixture
def emulation(monkeypatch):
    """Stages of this process compute as on a GPU."""
    monkeypatch.setattr(distributed, "start", lambda: LIKE_A_GPU)
    autocast = torch.autocast("cpu", torch.bfloat16)
    monkeypatch.setattr(distributed, "autocast", lambda device: autocast)


@pytest.fixture
def group_of_one():
    """A process group of this process alone: it makes `shard` possible."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("group", ["merger", "llm"])
def test_masters_twin_and_reference(group):
    args = flags(group)
    model, trained = distributed.load_for_training(args, LIKE_A_GPU)
    twin = distributed.load_twin(args, model, trained, LIKE_A_GPU)
    reference = distributed.load_reference(args, model, LIKE_A_GPU)
    base = dict(vlm.load_model(args.model, CPU, torch.bfloat16).named_parameters())
    with torch.no_grad():
        for parameter in trained.values():
            parameter += 1
    distributed.refresh(twin, trained)
    for name, parameter in model.named_parameters():
        copies = twin.get_parameter(name), reference.get_parameter(name)
        assert parameter.dtype == (torch.float32 if name in trained else torch.bfloat16)
        assert torch.equal(copies[0], parameter.bfloat16())
        assert torch.equal(copies[1], base[name])
        assert copies[0].requires_grad == (name in trained) and not copies[1].requires_grad
        for copy in copies:
            assert copy.dtype == torch.bfloat16
            assert (copy is parameter) == (name not in trained)


def test_in_fp32_the_policy_is_its_own_twin(world):
    args = flags("llm")
    model, trained = distributed.load_for_training(args, world)
    assert distributed.load_twin(args, model, trained, world) is model
    before = {name: parameter.clone() for name, parameter in trained.items()}
    distributed.refresh(model, trained)
    assert all(torch.equal(before[name], trained[name]) for name in trained)


def test_no_parameter_survives_its_shards(group_of_one, monkeypatch):
    """Neither the policy's nor the reference's: they would lie whole on every GPU."""
    alive, load = weakref.WeakSet(), vlm.load_model

    def watched(*args):
        model = load(*args)
        alive.update(model.parameters())
        return model

    monkeypatch.setattr(vlm, "load_model", watched)
    args = flags("llm", shard=True)
    model, trained = distributed.load_for_training(args, LIKE_A_GPU)
    reference = distributed.load_reference(args, model, LIKE_A_GPU)
    assert not alive
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert {parameter.dtype for parameter in reference.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("group", ["llm", "mlp", "lora"])
def test_shards_score_as_the_whole_model_does(group_of_one, emulation, model, processor, group):
    """In bf16, bit for bit: the angles of the tower's rotary positions are not rounded."""
    if group == "lora":
        pytest.importorskip("peft", reason="pip install -r benchmarks/requirements.txt")
    args = flags(group, shard=True)
    policy, trained = distributed.load_for_training(args, LIKE_A_GPU)
    twin = distributed.load_twin(args, policy, trained, LIKE_A_GPU)
    noise = np.random.default_rng(0).integers(256, size=(2, 140, 140, 3), dtype=np.uint8)
    images = [Image.fromarray(picture) for picture in noise]
    prompts = vlm.encode(processor, images, ["What is it?", "Which lesion is this?"])
    with torch.no_grad(), distributed.autocast(CPU):
        for parameter in trained.values():
            parameter += 0.001
        distributed.refresh(twin, trained)
        roll = engine.rollout(twin, prompts, random_numbers(2, 3, 8), [], 1.0)
        roll.features = None  # each pass runs the tower itself
        scores = [engine.packed_logprobs(each, roll, 1.0) for each in (policy, twin)]
    assert torch.equal(*scores)


@pytest.mark.usefixtures("peft")
def test_shards_of_adapters_are_trained_after_the_reference(group_of_one, emulation, processor):
    """The policy's first pass of all is the reference's: FSDP2 learns the dtypes in it."""
    policy, trained = distributed.load_for_training(flags("lora", shard=True), LIKE_A_GPU)
    images = [Image.new("RGB", (140, 140))]
    batch = vlm.encode(processor, images, ["What is it?"])
    with distributed.autocast(CPU):
        with torch.no_grad(), vlm.adapters_off(policy):
            policy(**batch)
        policy(**batch).logits.sum().backward()
    assert {parameter.grad.dtype for parameter in trained.values()} == {torch.float32}


@pytest.mark.slow
def test_emulated_bf16_is_on_policy_and_resumes_bit_for_bit(emulation, data, tmp_path, monkeypatch):
    def by_length(text: str, *_) -> rewards.Reward:
        return rewards.Reward(0.0, 0.0, 0.0, total=float(len(text)), predicted=None)

    monkeypatch.setattr(rewards, "reward", by_length)
    monkeypatch.setattr(grpo, "plot_curves", lambda *_: None)
    argv = ["--data", str(data), "--model", str(vlm.TINY), "--train", "llm", "--inner-epochs", "1"]
    argv += "--prompts-per-step 2 --micro-batch 2 --max-new-tokens 10 --save-every 1".split()
    argv += "--schedule constant --warmup-ratio 0".split()  # else --steps may not change
    one, two = tmp_path / "one", tmp_path / "two"
    grpo.main([*argv, "--steps", "2", "--out", str(one)])
    grpo.main([*argv, "--steps", "1", "--out", str(two)])
    grpo.main([*argv, "--steps", "2", "--out", str(two), "--resume"])
    assert metrics(one) == metrics(two)
    assert metrics(one)[0]["kl"] == 0 < metrics(one)[1]["kl"]
    first, second = weights(one), weights(two)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_two_machines_of_two_ranks_equal_one_process(data, tmp_path):
    """Sharded within each, replicated across: three updates, and a resume either way."""
    flags = ["--data", data, "--model", vlm.TINY, "--train", "mlp", *THREE_UPDATES]
    assert_shards_equal_one_process(tmp_path, flags, ranks=4, machines=2)
    assert metrics(tmp_path / "one")[2]["kl"] > 0  # there were rewards to learn from
