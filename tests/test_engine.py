"""The engine against slower ways to the same numbers: decoding with a static cache and a captured
step, rows that leave the batch, packed rows of very different lengths."""

import importlib
from contextlib import nullcontext
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rewards
from support import engine, vlm

grpo = importlib.import_module("04_grpo")


@pytest.fixture
def prompts(processor):
    """Three prompts of unequal length, with pictures of unequal size."""
    rng, images = np.random.default_rng(0), []
    for size in ((140, 140), (70, 300), (112, 112)):
        images.append(Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)))
    texts = [rewards.prompt(rewards.QUESTION, mode) for mode in ("think", "direct", "think")]
    batch = vlm.encode(processor, images, texts)
    assert len(batch["attention_mask"].sum(1).unique()) == 3
    return batch


@pytest.fixture
def stops(model, processor):
    return vlm.stop_ids(model, processor)


def random_numbers(seed: int, L: int = 24) -> torch.Tensor:
    """The samples' random numbers u [3, 4, L]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(3, 4, L, generator=generator, dtype=torch.float64)


def assert_equal(one: engine.Rollout, other: engine.Rollout) -> None:
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.mask, other.mask)
    assert torch.equal(one.finished, other.finished)


def test_a_static_cache_samples_the_same_tokens(model, prompts, stops):
    """Prompts of several lengths, stops at different steps, two rollouts in a row in one cache."""
    engine.static_decode.cache_clear()
    for seed in range(2):
        u = random_numbers(seed)
        dynamic = engine.rollout(model, prompts, u, stops, 1.5)
        lengths = dynamic.mask.sum(2).unique()
        assert len(lengths) > 4 and dynamic.finished.any() and not dynamic.finished.all()
        assert_equal(engine.rollout(model, prompts, u, stops, 1.5, "static"), dynamic)
    made = engine.static_decode.cache_info()
    assert (made.misses, made.hits) == (1, 1)


class Tape(TorchDispatchMode):
    """Plays a CUDAGraph on a CPU: records the operations on tensors and repeats them blindly.

    So Python's part of the step is gone in a replay, and tensors are found by address alone. What
    the host would read from a tensor is an error while it records.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def test_a_captured_step_samples_the_same_tokens(model, prompts, stops, monkeypatch):
    """All but the capture itself, in two rollouts, with weights that changed in between."""
    for name, fake in (("CUDAGraph", Tape), ("Stream", Mock), ("current_stream", Mock)):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graph)

    length = 64 * (1 + (prompts["input_ids"].shape[1] + 24 - 1) // 64)
    with torch.no_grad():
        decode = engine.static_decode(model, 12, length)
        decode.capture()
    assert len(decode.graph.calls) > 100
    monkeypatch.setattr(engine.StaticDecode, "forward", Mock(side_effect=AssertionError))
    for seed in range(2):
        u = random_numbers(seed)
        captured = engine.rollout(model, prompts, u, stops, 1.5, "static")
        assert_equal(captured, engine.rollout(model, prompts, u, stops, 1.5))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.05)


def test_finished_rows_leave_and_nothing_else_changes(model, prompts, stops, monkeypatch):
    sizes, step = [], engine.DynamicDecode.step

    def recorded(self, token, position):
        sizes.append(len(token))
        return step(self, token, position)

    monkeypatch.setattr(engine.DynamicDecode, "step", recorded)
    u = random_numbers(1, 64)
    roll = engine.rollout(model, prompts, u, stops, 1.5)
    assert sizes[0] == 12 and sizes[-1] <= 3 and len(sizes) < 63
    sizes.clear()
    monkeypatch.setattr(engine, "CHECK_EVERY", 1000)
    assert_equal(engine.rollout(model, prompts, u, stops, 1.5), roll)
    assert sizes == 63 * [12]


def test_what_follows_the_last_stop_is_cut(model, prompts, stops):
    """Whether all are finished is asked every 8 tokens; no completion is longer for that."""
    roll = engine.rollout(model, prompts, random_numbers(0, 64), stops, 1.0)
    assert roll.mask.any((0, 1)).all()
    assert (roll.tokens[~roll.mask] == 0).all()


@pytest.mark.parametrize("group", ["llm", "full"])
def test_packed_equals_plain_for_very_different_lengths(model, prompts, group):
    """Values and gradients, with rows of very different width in one part."""
    lengths = torch.tensor([[1, 40, 2, 7], [1, 1, 1, 1], [40, 39, 40, 38]])
    tokens = torch.randint(3, 400, (3, 4, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(40) < lengths[..., None]
    roll = engine.Rollout(prompts, tokens, mask, torch.ones(3, 4, dtype=torch.bool))
    trained = vlm.set_trainable(model, group)
    weight = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1)) * mask
    results = []
    for score in (grpo.plain_logprobs, engine.packed_logprobs):
        logp = score(model, roll, 0.7)
        (logp * weight).sum().backward()
        results.append((logp.detach(), [p.grad.clone() for p in trained.values()]))
        model.zero_grad()
    (plain, plain_gradients), (packed, gradients) = results
    assert torch.allclose(plain * mask, packed, atol=2e-5)
    assert (packed[~mask] == 0).all()
    for one, other in zip(plain_gradients, gradients, strict=True):
        assert (one - other).norm() <= 1e-4 * one.norm() + 1e-6


def test_a_packed_row_holds_the_sampled_tokens_alone(model, prompts, monkeypatch):
    widths, forward = [], type(model).forward

    def recorded(self, input_ids, **given):
        widths.append(input_ids.shape[1] - prompts["input_ids"].shape[1])
        return forward(self, input_ids, **given)

    monkeypatch.setattr(type(model), "forward", recorded)
    mask = torch.arange(9) < torch.tensor([[1, 9], [2, 2], [3, 4]])[..., None]
    roll = engine.Rollout(prompts, torch.ones(3, 2, 9).long(), mask, mask.any(2))
    with torch.no_grad():
        whole = engine.packed_logprobs(model, roll, 1.0)
        for b in range(3):
            part = engine.packed_logprobs(model, roll.rows(slice(b, b + 1)), 1.0)
            assert torch.allclose(part, whole[b : b + 1], atol=2e-5)
    assert widths == [10, 10, 4, 7]
