"""04's mathematics against hand-worked numbers and float64.

Its sampler is held to the model's own distribution, its packed scoring to the plain one.
"""

import copy
import importlib
import math
import shutil

import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

import rewards
from benchmarks import kill_resume
from support import engine, vlm
from support.log import read_log
from support.records import pictures

grpo = importlib.import_module("04_grpo")


def random_numbers(B: int, N: int, L: int) -> torch.Tensor:
    """The samples' random numbers u [B, N, L] in step 1 with seed 0."""
    u = torch.empty(B, N, L, dtype=torch.float64)
    for b in range(B):
        for n in range(N):
            u[b, n] = torch.from_numpy(grpo.uniforms(0, 1, b, n, L))
    return u


@pytest.fixture
def roll(model, processor, records):
    """Three prompts of unequal length and picture size, four samples each."""
    sizes = [(140, 140), (300, 70), (180, 180)]
    images = pictures(records[:3])
    images = [image.resize(size) for image, size in zip(images, sizes, strict=True)]
    modes = ["think", "direct", "think"]
    texts = [rewards.prompt(rewards.QUESTION, mode) for mode in modes]
    prompts = vlm.encode(processor, images, texts)
    stops = vlm.stop_ids(model, processor)
    return engine.rollout(model, prompts, random_numbers(3, 4, 24), stops, 1.0)


def test_advantages_by_hand():
    A = grpo.advantages(torch.tensor([[4.0, 0, 0, 0, 1], [2, 2, 2, 2, 2]]))
    std = math.sqrt((9 + 1 + 1 + 1 + 0) / 4)  # the mean is 1, ddof 1
    expected = torch.tensor([3.0, -1, -1, -1, 0]) / (std + 1e-4)
    assert torch.allclose(A[0], expected, atol=1e-6)
    assert (A[1] == 0).all()


@pytest.mark.parametrize(
    ("rho", "A", "loss", "slope"),
    [
        (1.5, 1.0, -1.2, 0.0),  # too far up on a good sample: clipped, no gradient
        (0.5, 1.0, -0.5, -0.5),  # moved away from a good sample: not clipped, pulled back
        (1.5, -1.0, 1.5, 1.5),  # too probable and bad: not clipped, pushed down
        (0.5, -1.0, 0.8, 0.0),  # already pushed down far enough: clipped
        (1.1, 1.0, -1.1, -1.1),
    ],
)
def test_clip_for_both_signs(rho, A, loss, slope):
    logp = torch.tensor([[[math.log(rho)]]], requires_grad=True)
    one, advantage = torch.ones(1, 1, 1), torch.tensor([[A]])
    value, clipped = grpo.grpo_loss(
        logp, 0 * one, None, advantage, one.bool(), one, 0.2, 0, "token"
    )
    value.backward()
    assert value.item() == pytest.approx(loss, abs=1e-6)
    assert logp.grad.item() == pytest.approx(slope, abs=1e-6)
    assert clipped.item() == (slope == 0)


def test_k3_value_gradient_and_overflow():
    logp = torch.tensor([0.0, -1.0], requires_grad=True)
    value = grpo.k3(logp, torch.tensor([0.0, -0.5]))
    assert value.tolist() == pytest.approx([0, math.exp(0.5) - 1.5], abs=1e-6)
    value.sum().backward()
    assert logp.grad.tolist() == pytest.approx(
        [0, 1 - math.exp(0.5)], abs=1e-6
    )  # d k3 / d logp = 1 - exp(d)
    assert torch.isfinite(grpo.k3(torch.tensor([-500.0]), torch.zeros(1))).all()


@pytest.mark.parametrize("norm", ["sequence", "token"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_loss_against_float64_equations(norm, ratio):
    rng = np.random.default_rng(0)
    logp, old, ref = (rng.normal(-1, 0.3, (2, 3, 5)) for _ in range(3))
    A, lengths = rng.normal(size=(2, 3)), np.array([[5, 2, 1], [3, 4, 5]])
    expected, count = 0.0, (6 if norm == "sequence" else lengths.sum())
    for b in range(2):
        for n in range(3):
            T = lengths[b, n]
            for t in range(T):
                log_rho = logp[b, n, t] - old[b, n, t]
                if ratio == "sequence":
                    log_rho = (logp[b, n, :T] - old[b, n, :T]).sum()
                rho = math.exp(log_rho)
                d = ref[b, n, t] - logp[b, n, t]
                clipped = min(max(rho, 0.8), 1.2)
                term = -min(rho * A[b, n], clipped * A[b, n])
                term += 0.04 * (math.exp(d) - d - 1)
                expected += term / count / (T if norm == "sequence" else 1)
    mask = torch.arange(5)[None, None] < torch.from_numpy(lengths)[..., None]
    weights = grpo.token_weights(mask, norm, count).double()
    tensors = (torch.from_numpy(x) for x in (logp, old, ref, A))
    got, _ = grpo.grpo_loss(*tensors, mask, weights, 0.2, 0.04, ratio)
    assert got.item() == pytest.approx(expected, abs=1e-6)
    assert weights.sum().item() == pytest.approx(1, abs=1e-6)


def test_block_mask_picture():
    block = torch.tensor([[1, 1, 2, 2], [1, 1, 2, 2]])
    seen = engine.block_mask(torch.tensor([[1, 1], [0, 1]]), block).int()[:, 0]
    assert seen[0].tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]
    assert seen[1, :, 0].tolist() == [1, 0, 0, 0, 0, 0]  # padding is seen by itself alone


def test_packed_equals_plain_and_every_row_alone(model, roll):
    """Prefix sharing, padding and batch composition change nothing: values and gradients."""
    trained = vlm.set_trainable(model, "llm")
    gradients = []
    for score in (grpo.plain_logprobs, engine.packed_logprobs):
        logp = score(model, roll, 0.7)
        (logp * roll.mask).sum().backward()
        gradients.append((logp.detach() * roll.mask, [p.grad.clone() for p in trained.values()]))
        model.zero_grad()
    assert torch.allclose(gradients[0][0], gradients[1][0], atol=2e-5)
    for one, other in zip(gradients[0][1], gradients[1][1], strict=True):
        assert (one - other).norm() <= 1e-4 * one.norm() + 1e-6
    for b in range(3):
        part = slice(b, b + 1)
        with torch.no_grad():
            logp = engine.packed_logprobs(model, roll.rows(part), 0.7) * roll.mask[part]
        assert torch.allclose(logp, gradients[1][0][part], atol=2e-5)


def test_rollout_is_what_an_uncached_model_samples(model, roll):
    """Token by token, with the same random numbers and no cache, the same completions come out.

    So pictures are not mixed up among samples (AABB), positions go on after the picture, and left
    padding is harmless.
    """
    with torch.no_grad():
        prompts = vlm.repeat(roll.prompts, 4)
        for row in (0, 5, 11):
            b, n = divmod(row, 4)
            one = vlm.select(prompts, slice(row, row + 1))
            u = torch.from_numpy(grpo.uniforms(0, 1, b, n, 24))
            ids, types = one["input_ids"], one["mm_token_type_ids"]
            for t in range(int(roll.mask[b, n].sum())):
                mask = torch.cat([one["attention_mask"], torch.ones(1, t).long()], 1)
                batch = {**one, "input_ids": ids}
                batch |= {"attention_mask": mask, "mm_token_type_ids": types}
                logits = model(**batch, use_cache=False).logits[:, -1]
                token = engine.sample_tokens(logits, u[t : t + 1])
                assert token.item() == roll.tokens[b, n, t].item()
                ids = torch.cat([ids, token[None]], 1)
                types = torch.cat([types, torch.zeros(1, 1).int()], 1)


def test_a_frozen_tower_runs_once_a_step(model, processor, records, roll):
    """Its output, kept from the rollout, scores as the pictures themselves do.

    In both layouts, and for any part of the rollout.
    """
    vlm.set_trainable(model, "llm")
    calls = []
    model.model.visual.register_forward_hook(lambda *call: calls.append(1))
    stops = vlm.stop_ids(model, processor)
    kept = engine.rollout(model, roll.prompts, random_numbers(3, 4, 24), stops, 1.0)
    assert torch.equal(kept.tokens, roll.tokens) and kept.features is not None
    with torch.no_grad():
        scores = [
            score(model, kept, 1.0) for score in (grpo.plain_logprobs, engine.packed_logprobs)
        ]
        last = engine.packed_logprobs(model, kept.rows(slice(2, 3)), 1.0)
        scores.append(torch.cat([scores[0][:2], last]))
        assert len(calls) == 1
        expected = grpo.plain_logprobs(model, roll, 1.0)
    for score in scores:
        assert torch.allclose(score * kept.mask, expected * kept.mask, atol=2e-5)


def test_logprobs_in_chunks_against_float64():
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, 300, 11, generator=generator)).requires_grad_()
    tokens = torch.randint(11, (2, 300), generator=generator)
    got = engine.gather_logprobs(logits, tokens, 0.7)
    exact = logits.detach().double().requires_grad_()
    expected = (exact / 0.7).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    assert torch.allclose(got.double(), expected, atol=1e-5)
    got.square().sum().backward()
    expected.square().sum().backward()
    assert torch.allclose(logits.grad.double(), exact.grad, atol=1e-4)


def test_a_sampled_picture_placeholder_is_harmless(model, roll):
    """It would otherwise ask for a picture that is not there and stop the run."""
    roll.tokens[0, 0, 0] = model.config.image_token_id
    with torch.no_grad():
        plain = grpo.plain_logprobs(model, roll, 1.0) * roll.mask
        packed = engine.packed_logprobs(model, roll, 1.0) * roll.mask
    assert torch.isfinite(plain).all() and torch.allclose(plain, packed, atol=2e-5)


def test_mask_counts_eos_and_nothing_after(roll, model, processor):
    stops = vlm.stop_ids(model, processor)
    parts = roll.tokens.flatten(0, 1), roll.mask.flatten(0, 1), roll.finished.flatten()
    for tokens, mask, finished in zip(*parts, strict=True):
        ends = [t for t, token in enumerate(tokens.tolist()) if token in stops]
        assert bool(finished) == bool(ends)
        length = int(mask.sum())
        assert length == (ends[0] + 1 if ends else len(tokens))
        assert mask[:length].all()


def test_sampler_follows_the_distribution():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, -30.0]])
    u = torch.from_numpy(np.random.default_rng(0).random(20_000))
    counts = torch.bincount(engine.sample_tokens(logits.expand(20_000, 5), u), minlength=5).double()
    expected = logits[0].double().softmax(0) * 20_000
    chi_squared = ((counts - expected) ** 2 / expected.clamp(min=1))[:4].sum()
    assert chi_squared < 16.3  # 3 degrees of freedom: p = 0.001
    assert counts[4] == 0
    assert engine.sample_tokens(logits, torch.tensor([0.0], dtype=torch.float64)).item() == 0


def test_sample_seeds_differ_and_repeat():
    keys = [(0, 1, 2, 3), (1, 1, 2, 3), (0, 2, 2, 3), (0, 1, 3, 3), (0, 1, 2, 4)]
    draws = {tuple(grpo.uniforms(*key, 3)) for key in keys}
    assert len(draws) == 5 and tuple(grpo.uniforms(0, 1, 2, 3, 3)) in draws


def test_a_prompt_that_a_batch_holds_twice_is_sampled_anew():
    flags = "--group-size 2 --max-new-tokens 3 --seed 7 --model".split()
    u = grpo.draw_uniforms([4, 9, 4], 5, grpo.parse_args([*flags, str(vlm.TINY)]))
    assert u.shape == (3, 2, 3) and len(u.unique()) == 18
    for b, (prompt, first) in enumerate([(4, 0), (9, 0), (4, 2)]):
        for n in range(2):
            assert u[b, n].tolist() == grpo.uniforms(7, 5, prompt, first + n, 3).tolist()


def test_update_does_not_depend_on_micro_batches_or_order(processor, records, roll, model, world):
    """One part or three, in any order, give the same weights; the frozen tower stays as it was."""
    reward = torch.tensor([[4.0, 0, 2, 1], [0, 0, 0, 4], [2, 2, 2, 2]])
    args = grpo.parse_args(["--model", str(vlm.TINY), "--inner-epochs", "2", "--lr", "1e-3"])
    results = []
    thirds = [slice(0, 1), slice(1, 2), slice(2, 3)]
    for cuts in ([slice(0, 3)], thirds, [slice(2, 3), slice(0, 2)]):
        policy = copy.deepcopy(model)
        trained = vlm.set_trainable(policy, "llm")
        reference = vlm.frozen_copy(policy)
        parts = [roll.rows(cut) for cut in cuts]
        A = grpo.advantages(reward)
        A = [A[cut] for cut in cuts]
        optimizer = torch.optim.SGD(trained.values(), lr=1e-3)
        metrics = grpo.update(policy, reference, parts, A, world, optimizer, args)
        assert metrics["kl"] > 0  # the second epoch has moved away from the reference
        results.append((metrics, {n: p.detach() for n, p in policy.named_parameters()}))
    for other in results[1:]:
        for name, one in results[0][1].items():
            assert torch.allclose(one, other[1][name], atol=1e-6), name
            moved = not torch.equal(one, dict(model.named_parameters())[name])
            assert moved <= (not name.startswith("model.visual")), name
        assert results[0][0]["loss"] == pytest.approx(other[0]["loss"], abs=1e-6)


def test_reference_shares_frozen_tensors_and_stays(model):
    trained = vlm.set_trainable(model, "llm_mlp")
    reference = dict(vlm.frozen_copy(model).named_parameters())
    for name, parameter in model.named_parameters():
        assert (reference[name].data_ptr() == parameter.data_ptr()) == (name not in trained), name
        assert not reference[name].requires_grad


def test_the_loop_runs_a_frozen_tower_once_a_step(data, tmp_path, monkeypatch):
    """The reference and both inner epochs' passes over both micro-batches share the rollout's."""
    tower = modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel
    calls, forward = [], tower.forward

    def counted(self, *args, **kwargs):
        calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(tower, "forward", counted)
    flags = ["--data", str(data), "--model", str(vlm.TINY), "--out", str(tmp_path)]
    flags += "--steps 2 --prompts-per-step 4 --micro-batch 2 --inner-epochs 2".split()
    grpo.main([*flags, "--max-new-tokens", "4"])
    assert len(calls) == 1 + 2  # in the trial, and once a step


# ==== The schedule and the prompt ====


def test_defaults_are_a_constant_rate_and_the_think_prompt(monkeypatch):
    monkeypatch.setattr(vlm, "is_demo", lambda name: False)
    args = grpo.parse_args([])
    assert (args.prompt, args.warmup_ratio, args.schedule) == ("think", 0, "constant")
    assert (args.lr, args.steps) == (1e-6, 1500)


@pytest.mark.parametrize(("mode", "form"), [("think", 0.0), ("direct", 1.0)])
def test_the_format_is_that_of_the_prompt(processor, records, roll, model, monkeypatch, mode, form):
    monkeypatch.setattr(vlm, "decode", lambda *_: rewards.target(rewards.CLASSES[0]))
    args = grpo.parse_args(["--model", str(vlm.TINY), "--prompt", mode])
    stops = vlm.stop_ids(model, processor)
    truths = [record["label"] for record in records[:3]]
    for group in grpo.score_samples(1, records[:3], truths, roll, processor, stops, args):
        for sample in group:
            right = sample.label == rewards.CLASSES[0]
            assert (sample.format, sample.validity, sample.correctness) == (form, 1.0, right)
            assert sample.reward == form + 1 + 2 * right


@pytest.fixture
def scheduled(data, tmp_path, monkeypatch):
    """Runs 04 with a schedule and the direct prompt; gives what it asked and its updates' rates."""
    asked, rates = set(), []
    prompt, step = rewards.prompt, torch.optim.AdamW.step

    def noted_prompt(question, mode, task):
        asked.add(mode)
        return prompt(question, mode, task)

    def noted_step(optimizer, *args, **kwargs):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(rewards, "prompt", noted_prompt)
    monkeypatch.setattr(torch.optim.AdamW, "step", noted_step)
    monkeypatch.setattr(grpo, "plot_curves", lambda *_: None)

    def start(out, *flags):
        asked.clear()
        rates.clear()
        given = "--steps 4 --prompts-per-step 2 --micro-batch 2 --max-new-tokens 8 --lr 1e-3"
        given += " --inner-epochs 2 --save-every 2 --prompt direct"
        given += " --warmup-ratio 0.5 --schedule cosine"
        paths = ["--data", str(data), "--model", str(vlm.TINY), "--out", str(tmp_path / out)]
        grpo.main([*paths, *given.split(), *flags])
        return tmp_path / out, set(asked), list(rates)

    return start


def test_scheduled_and_resumed_equals_uninterrupted(scheduled):
    """Both updates of a step have its rate; only the direct prompt is asked."""
    out, asked, rates = scheduled("whole")
    assert asked == {"direct"}
    assert rates == pytest.approx([5e-4] * 2 + [1e-3] * 4 + [5e-4] * 2)
    assert [row["lr"] for row in read_log(out / "metrics.jsonl")] == rates[::2]
    for row in read_log(out / "rollouts.jsonl"):
        assert row["format"] == rewards.format_reward(row["text"], "direct")
    part = shutil.copytree(out, out.with_name("part"))
    shutil.rmtree(part / "checkpoint-000004")
    _, _, rest = scheduled("part", "--resume")
    assert rest == rates[4:]
    assert kill_resume.results(part) == kill_resume.results(out)
    for flag, value, was in (
        ("--schedule", "constant", "cosine"),
        ("--warmup-ratio", "0.25", "0.5"),
        ("--prompt", "think", "direct"),
        ("--steps", "6", "4"),  # under a schedule the rate of each step depends on it
    ):
        with pytest.raises(SystemExit, match=f"{flag} was {was} and is {value} now"):
            scheduled("part", "--resume", flag, value)
