"""04_grpo.py against trl's GRPOTrainer: the same tokens through its training loop and through ours.

trl's `generate` is handed the completions that our sampler drew; padding, end-of-turn masking,
log-probs, advantages, loss, gradient clipping and optimiser step are its own, on its own batch.
Everything in fp32.
"""

import copy
import importlib

import numpy as np
import pytest
import torch
from PIL import Image

import rewards
from benchmarks import grpo_step
from support import engine, vlm

pytest.importorskip("trl", reason="trl is missing: pip install -r benchmarks/requirements.txt")

grpo = importlib.import_module("04_grpo")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is deprecated and will be removed:FutureWarning"
)  # trl's own

# Rewards; the last group teaches nothing but its KL.
R = torch.tensor([[4.0, 0, 2, 1], [0, 0, 0, 4], [2, 2, 2, 2]])
LR = 0.02  # of plain gradient descent: one step moves some tokens' ratio out of the clipping range


@pytest.fixture
def rows():
    """Three prompts of unequal length, with pictures of unequal size."""
    rng, rows = np.random.default_rng(0), []
    for size, mode in (((140, 140), "think"), ((70, 300), "direct"), ((200, 120), "think")):
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        rows.append({"prompt": rewards.prompt(rewards.QUESTION, mode), "image": image})
    return rows


@pytest.fixture
def roll(model, processor, rows):
    """Four sampled completions per prompt: of unequal length, some of them cut off."""
    images = [row["image"] for row in rows]
    batch = vlm.encode(processor, images, [row["prompt"] for row in rows])
    u = torch.empty(3, 4, 18, dtype=torch.float64)
    for b in range(3):
        for n in range(4):
            u[b, n] = torch.from_numpy(grpo.uniforms(0, 1, b, n, 18))
    stops = vlm.stop_ids(model, processor)
    roll = engine.rollout(model, batch, u, stops, temperature=1.5)  # for the variety
    assert len(batch["image_grid_thw"].unique(dim=0)) == 3 and len(roll.mask.sum(2).unique()) > 4
    assert roll.finished.any() and not roll.finished.all()
    return roll


@pytest.fixture
def reference(model):
    """Another model, so that the KL term is not 0."""
    other = copy.deepcopy(model).requires_grad_(False)
    torch.manual_seed(0)
    for parameter in other.parameters():
        parameter += 0.05 * parameter.std() * torch.randn_like(parameter)
    return other


def optimiser(model) -> tuple[torch.optim.Optimizer, list[torch.Tensor]]:
    """Gradient descent on all of a model, and the (clipped) gradient of every step it takes."""
    optimizer, gradients = torch.optim.SGD(vlm.set_trainable(model, "full").values(), lr=LR), []

    def record(*_):
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))

    optimizer.register_step_pre_hook(record)
    return optimizer, gradients


def train_with_trl(model, reference, processor, rows, roll, beta: float, epochs: int, old=None):
    """trl's loop over one batch; returns its batch, and the loss and gradient of every epoch.

    `old` [B, N, L] replaces trl's old log-probs.
    """
    B, N, L = roll.tokens.shape
    optimizer, gradients = optimiser(model)
    trainer = grpo_step.trl_trainer(
        model,
        reference if beta else None,
        processor,
        rows,
        lambda completions, **_: R.flatten().tolist(),
        optimizer,
        beta=beta,
        num_iterations=epochs,
        max_steps=epochs,
        num_generations=N,
        per_device_train_batch_size=B * N,
        max_completion_length=L,
        use_cpu=True,
    )
    batches, losses = [], []
    score, compute_loss = trainer._generate_and_score_completions, trainer.compute_loss

    def recorded_batch(inputs):
        batches.append(score(inputs))
        if old is not None:
            batches[-1]["old_per_token_logps"] = old.flatten(0, 1)
        return batches[-1]

    def recorded_loss(*args, **kwargs):
        losses.append(compute_loss(*args, **kwargs))
        return losses[-1]

    trainer._generate_and_score_completions, trainer.compute_loss = recorded_batch, recorded_loss
    model.generate = lambda input_ids, **_: torch.cat([input_ids, roll.tokens.flatten(0, 1)], 1)
    trainer.train()
    assert len(batches) == 1 and len(losses) == len(gradients) == epochs
    return batches[0], [loss.item() for loss in losses], gradients


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    """Whether the largest absolute difference is within the tolerance."""
    return (one.detach() - other.detach()).abs().max().item() <= tolerance


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / one.norm()).item()


@pytest.mark.parametrize(
    ("beta", "epochs"),
    [
        pytest.param(0.0, 1, marks=pytest.mark.slow),
        (0.04, 2),
        pytest.param(0.04, 1, marks=pytest.mark.slow),
        pytest.param(0.0, 2, marks=pytest.mark.slow),
    ],
)
def test_update(model, reference, processor, rows, roll, world, monkeypatch, beta, epochs):
    theirs, ours = copy.deepcopy(model), copy.deepcopy(model)
    done = train_with_trl(theirs, reference, processor, rows, roll, beta, epochs)
    batch, their_losses, their_gradients = done

    # the same tokens, the same mask: EOS counts, what follows it does not
    assert torch.equal(batch["prompt_ids"], roll.prompts["input_ids"].repeat_interleave(4, 0))
    mask = roll.mask.flatten(0, 1)
    assert torch.equal(batch["completion_mask"].bool(), mask)
    assert torch.equal(batch["completion_ids"][mask], roll.tokens.flatten(0, 1)[mask])
    A = grpo.advantages(R)
    assert close(A.flatten(), batch["advantages"], 1e-6)

    # log-probs, by one row per group and by one row per sample
    for scored, key in ((model, "old_per_token_logps"), (reference, "ref_per_token_logps")):
        assert (key in batch) == (epochs == 2 if scored is model else beta > 0)
        for score in (engine.packed_logprobs, grpo.plain_logprobs) if key in batch else ():
            with torch.no_grad():
                logp = score(scored, roll, 1.0)
            torch.testing.assert_close(logp[roll.mask], batch[key][mask], rtol=1e-5, atol=1e-5)

    # our update, in two micro-batches
    flags = ["--model", str(vlm.TINY), "--kl", str(beta), "--inner-epochs", str(epochs)]
    optimizer, gradients = optimiser(ours)
    cuts = [slice(0, 2), slice(2, 3)]
    parts = [roll.rows(cut) for cut in cuts]
    shares, grpo_loss = [], grpo.grpo_loss

    def recorded(*args):
        shares.append(grpo_loss(*args))
        return shares[-1]

    monkeypatch.setattr(grpo, "grpo_loss", recorded)
    args = grpo.parse_args([*flags, "--lr", str(LR)])
    metrics = grpo.update(ours, reference, parts, [A[cut] for cut in cuts], world, optimizer, args)
    losses = torch.tensor([loss.item() for loss, _ in shares]).view(epochs, 2).sum(1)
    assert close(losses, torch.tensor(their_losses), 1e-6)
    assert all(relative(*pair) <= 1e-5 for pair in zip(their_gradients, gradients, strict=True))
    if epochs == 2:
        assert metrics["clip_fraction"] > 0
        assert relative(gradients[0], gradients[1]) > 0.01  # a step has been taken
    for one, other in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert close(one, other, 1e-5)


@pytest.mark.parametrize("beta", [0.04, pytest.param(0.0, marks=pytest.mark.slow)])
def test_stale_old_log_probs(model, reference, processor, rows, roll, beta):
    """Old log-probs far from the policy's: for both signs of A the clip bites, and is idle."""
    with torch.no_grad():
        logp = engine.packed_logprobs(model, roll, 1.0)
        old = logp + 0.4 * torch.randn(logp.shape, generator=torch.Generator().manual_seed(0))
        ref_logp = engine.packed_logprobs(reference, roll, 1.0)
    A = grpo.advantages(R)
    rho, sign = (logp - old).exp(), A[..., None].expand_as(logp)
    for far in (rho > 1.2, rho < 0.8):
        assert (far & (sign > 0) & roll.mask).any() and (far & (sign < 0) & roll.mask).any()

    theirs, ours = copy.deepcopy(model), copy.deepcopy(model)
    done = train_with_trl(theirs, reference, processor, rows, roll, beta, 1, old)
    _, (their_loss,), (their_gradient,) = done
    optimizer, gradients = optimiser(ours)
    weights = grpo.token_weights(roll.mask, "sequence", 12)
    logp = engine.packed_logprobs(ours, roll, 1.0)
    loss, clipped = grpo.grpo_loss(logp, old, ref_logp, A, roll.mask, weights, 0.2, beta, "token")
    loss.backward()
    torch.nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
    optimizer.step()
    assert loss.item() == pytest.approx(their_loss, abs=1e-6) and clipped > 0.1
    assert relative(their_gradient, gradients[0]) <= 1e-5
