"""Stage II: Group Relative Policy Optimisation from the SFT checkpoint (paper, Section 3.3).

One step, in the order of the code below, for each prompt x of a batch:

    1. rollout      y_1 .. y_N ~ pi_theta_old( . | x) under the think prompt                      N = 5
    2. rewards      R_i = 1 * format + 1 * validity + 2 * correctness                             rewards.py
    3. advantages   A_i = (R_i - mean(R)) / (std(R) + 1e-4)                                       std with ddof 1
    4. loss         rho = pi_theta(y_t) / pi_theta_old(y_t)
                    L   = - min(rho A, clip(rho, 1 - delta, 1 + delta) A) + beta_kl * k3
                    k3  = exp(d) - d - 1,  d = log pi_ref - log pi_theta                          reference = SFT
    5. update       one AdamW step (--inner-epochs of them on the same rollouts)

Departures from a textbook GRPO, each exact and each one short function: the prompt and its picture are prefilled once
and their cache is expanded to the N samples (`rollout`); scoring packs a prompt and its N completions into one row
under a block mask (`packed_logprobs`; --no-prefix-sharing takes the plain path); old log-probs are the first pass's own
values, since rollout and first pass use the same weights.

    python 04_grpo.py                                       the tiny demo, two to three minutes on 2 cores
    torchrun --nproc-per-node 8 04_grpo.py --data data/real_zoom --model runs/real_sft --out runs/real_grpo

Writes to --out: the checkpoint, metrics.jsonl, curves.png, rollouts.jsonl (every sample with its reward parts and
advantage), checkpoint-*/ for --resume.
"""

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import rewards
from support import train, vlm
from support.files import BadInput

# Used instead of the defaults when --model descends from the tiny demo checkpoint; explicit flags win.
DEMO = {"steps": 150, "prompts_per_step": 16, "micro_batch": 16, "lr": 4e-4, "inner_epochs": 2, "max_new_tokens": 40}


@dataclass
class Rollout:
    """B prompts with N completions each. `mask` comes from the sampler: EOS counts, what follows it does not; it is
    never derived from pad ids, which may equal EOS."""

    prompts: dict  # a left-padded batch of B prompts, see vlm.encode; `features` [tokens, hidden] a picture: `rollout`
    tokens: torch.Tensor  # [B, N, L] sampled ids
    mask: torch.Tensor  # [B, N, L] bool
    finished: torch.Tensor  # [B, N] bool, False where --max-new-tokens cut the sample off


# ==== 1. rollout ====


def uniforms(seed: int, step: int, prompt: int, sample: int, length: int) -> np.ndarray:
    """The random numbers of one sample, [length]: they depend on these four alone, not on batch or world size."""
    return np.random.default_rng([seed, step, prompt, sample]).random(length)


def sample_tokens(logits: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Draws from softmax(logits) by inverting its distribution function at u in [0, 1): [R, V], [R] -> [R]."""
    cdf = logits.double().softmax(-1).cumsum(-1)  # float64: 152,000 small numbers are added up
    return torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)


def as_input(tokens: torch.Tensor, config) -> torch.Tensor:
    """Sampled tokens as the model may read them: nothing forbids sampling the picture's placeholder, but fed back it
    would ask for a picture that is not there, so it is read as token 0, in rollout and scoring alike."""
    return tokens.masked_fill((tokens == config.image_token_id) | (tokens == config.video_token_id), 0)


@torch.no_grad()
def rollout(model, prompts: dict, u: torch.Tensor, stops: list[int], temperature: float) -> Rollout:
    """Samples N completions a prompt; u [B, N, L] are the samples' random numbers, L the most tokens of a completion.

    Sampling and scoring use the same distribution: softmax(logits / temperature), no top-k, no top-p, no penalty,
    whatever the checkpoint's generation_config says. Where the vision tower is frozen, its output is kept for scoring.
    """
    B, N, L = u.shape
    stop = torch.tensor(stops, device=u.device)
    position = vlm.positions(model, prompts)  # [3, B, P]
    tower, seen = model.model.visual, []
    hook = tower.register_forward_hook(lambda module, inputs, output: seen.append(output.pooler_output))
    out = model(**prompts, position_ids=position, use_cache=True, logits_to_keep=1)  # each prompt and picture once
    hook.remove()
    if not any(parameter.requires_grad for parameter in tower.parameters()):
        sizes = prompts["image_grid_thw"].prod(1) // model.config.vision_config.spatial_merge_size**2
        prompts = {key: value for key, value in prompts.items() if key != "pixel_values"}
        prompts["features"] = list(seen[0].split(sizes.tolist()))  # B pictures' tokens, [tokens, hidden] each
    cache = out.past_key_values
    cache.batch_repeat_interleave(N)  # AABB: row b * N + i is sample i of prompt b
    logits = out.logits[:, -1].repeat_interleave(N, 0)  # [B * N, V]
    mask = prompts["attention_mask"].repeat_interleave(N, 0)  # [B * N, P]
    following = position.amax((0, 2)).repeat_interleave(N) + 1  # [B * N] a picture's text goes on after its longer side
    done = torch.zeros(B * N, dtype=torch.bool, device=u.device)
    tokens, alive = [], []
    for t in range(L):
        token = sample_tokens(logits.float() / temperature, u[:, :, t].flatten())
        tokens.append(token)
        alive.append(~done)
        done = done | torch.isin(token, stop)
        if done.all() or t + 1 == L:
            break
        mask = torch.cat([mask, mask.new_ones(B * N, 1)], 1)
        step = (following + t).expand(3, -1)[..., None]  # [3, B * N, 1]
        logits = model(input_ids=as_input(token, model.config)[:, None], attention_mask=mask, position_ids=step,
                       past_key_values=cache, use_cache=True).logits[:, -1]  # fmt: skip
    tokens, alive = torch.stack(tokens, 1), torch.stack(alive, 1)
    return Rollout(prompts, tokens.view(B, N, -1), alive.view(B, N, -1), done.view(B, N))


# ==== log-probs of given completions ====


def gather_logprobs(logits: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    """log softmax(logits / temperature) at `tokens`, in fp32: [B, T, V], [B, T] -> [B, T].

    In chunks of columns whose fp32 copies are made again in the backward pass: with 152,000 words in the vocabulary
    they would be the largest tensors in memory.
    """

    def one(logits, tokens):
        logits = logits.float() / temperature
        return logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(-1)

    chunks = zip(logits.split(128, 1), tokens.split(128, 1), strict=True)
    return torch.cat([checkpoint(one, *chunk, use_reentrant=False) for chunk in chunks], 1)


def plain_logprobs(model, roll: Rollout, temperature: float) -> torch.Tensor:
    """One row a sample, the prompt and picture repeated N times (AABB): [B, N, L]."""
    B, N, L = roll.tokens.shape
    prompts = vlm.repeat(roll.prompts, N)
    position = vlm.positions(model, prompts)  # [3, B * N, P]
    offsets = torch.arange(1, L + 1, device=position.device)
    position = torch.cat([position, (position.amax((0, 2))[:, None] + offsets).expand(3, -1, -1)], 2)
    tokens, mask = roll.tokens.flatten(0, 1), roll.mask.flatten(0, 1)
    inputs = {
        "input_ids": torch.cat([prompts["input_ids"], as_input(tokens, model.config)], 1),
        "attention_mask": torch.cat([prompts["attention_mask"], mask.long()], 1),
        **vlm.picture_inputs(prompts),
    }
    logits = model(**inputs, position_ids=position, logits_to_keep=L + 1, use_cache=False).logits[:, :-1]
    return gather_logprobs(logits, tokens, temperature).view(B, N, L)


def block_mask(prompt_mask: torch.Tensor, N: int, L: int) -> torch.Tensor:
    """Who attends to whom in a row [prompt | completion 1 | .. | completion N]: bool [B, 1, T, T], T = P + N * L.

    Causal, and a completion sees the prompt and itself but no other completion. With P = 2, N = 2, L = 2:

        p p . . . .        prompt
        p p a . . .        completion 1
        p p a a . .
        p p . . b .        completion 2
        p p . . b b
    """
    B, P = prompt_mask.shape
    block = torch.cat([torch.zeros(P), torch.arange(1, N + 1).repeat_interleave(L)]).to(prompt_mask.device)  # [T]
    seen = (block[:, None] == block[None]) | (block[None] == 0)  # own block or the prompt
    seen = seen.tril()[None].repeat(B, 1, 1)  # [B, T, T]
    seen[:, :, :P] &= prompt_mask.bool()[:, None]  # not the padding
    seen |= torch.eye(P + N * L, dtype=torch.bool, device=seen.device)  # a padding row must see something, or it is NaN
    return seen[:, None]


def packed_logprobs(model, roll: Rollout, temperature: float) -> torch.Tensor:
    """One row a group, prompt and picture once: the same [B, N, L] as `plain_logprobs`, for a fraction of the work."""
    B, N, L = roll.tokens.shape
    prompts, P = roll.prompts, roll.prompts["input_ids"].shape[1]
    position = vlm.positions(model, prompts)  # [3, B, P]
    offsets = torch.arange(1, L + 1, device=position.device).repeat(N)  # each completion's positions start anew
    position = torch.cat([position, (position.amax((0, 2))[:, None] + offsets).expand(3, -1, -1)], 2)
    tokens = roll.tokens.flatten(1)  # [B, N * L]
    # A completion's first token is predicted by the prompt's last column, its token j by its own token j - 1.
    columns = P - 1 + torch.arange(N * L, device=tokens.device)
    columns[::L] = P - 1
    inputs = {
        "input_ids": torch.cat([prompts["input_ids"], as_input(tokens, model.config)], 1),
        "attention_mask": block_mask(prompts["attention_mask"], N, L),
        **vlm.picture_inputs(prompts),
    }
    logits = model(**inputs, position_ids=position, logits_to_keep=columns, use_cache=False).logits  # [B, N * L, V]
    return gather_logprobs(logits, tokens, temperature).view(B, N, L)


# ==== 3. advantages ====


def advantages(reward: torch.Tensor) -> torch.Tensor:
    """A_i = (R_i - mean) / (std + 1e-4) within each group, std with ddof 1: [B, N] -> [B, N].

    A group of equal rewards has A = 0: it teaches nothing and is counted in the metrics.
    """
    return (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)


# ==== 4. loss ====


def token_weights(mask: torch.Tensor, norm: str, total: float) -> torch.Tensor:
    """What each token counts in the loss, [B, N, L]; the weights of all ranks and micro-batches sum to 1.

    norm "sequence": mean over a sequence's tokens, then over sequences (GRPO); total = sequences.
    norm "token": mean over all tokens (DAPO); total = tokens.
    """
    mask = mask.float()
    return mask / total if norm == "token" else mask / mask.sum(2, keepdim=True).clamp(min=1) / total


def k3(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    """Schulman's third estimator of KL(pi_theta || pi_ref), a token: exp(d) - d - 1, d = log pi_ref - log pi_theta.

    d is clamped: exp of a large one overflows.
    """
    d = (ref_logp - logp).clamp(-20, 20)
    return d.exp() - d - 1


def grpo_loss(logp, old_logp, ref_logp, A, mask, weights, delta: float, beta_kl: float, ratio: str):
    """This part's share of the loss and the weighted share of clipped tokens.

    logp, old_logp, ref_logp (None when beta_kl is 0), mask, weights: [B, N, L]; A: [B, N]. `ratio` "token": rho a
    token; "sequence": one rho a completion, as the paper's equation is written; the KL stays a token's.
    """
    log_rho = (logp - old_logp) * mask
    if ratio == "sequence":
        log_rho = log_rho.sum(2, keepdim=True).expand_as(logp)
    rho, A = log_rho.exp(), A[..., None]
    clipped = rho.clamp(1 - delta, 1 + delta)
    loss = -torch.min(rho * A, clipped * A)
    if beta_kl:
        loss = loss + beta_kl * k3(logp, ref_logp)
    bites = ((rho < 1 - delta) & (A < 0)) | ((rho > 1 + delta) & (A > 0))  # where the minimum takes the clipped term
    return (loss * weights).sum(), (bites * weights).sum().detach()


# ==== 5. the update ====


def update(model, reference, parts: list[Rollout], A: list[torch.Tensor], world, optimizer, args) -> dict:
    """--inner-epochs optimiser steps on one batch of rollouts; returns the metrics of the update (global)."""
    score = plain_logprobs if args.no_prefix_sharing else packed_logprobs
    kept = [p.mask & p.finished[..., None] if args.mask_truncated else p.mask for p in parts]
    sequences, tokens = world.sum(
        sum(int(k.any(2).sum()) for k in kept), sum(int(k.sum()) for k in kept)
    )  # global denominators, known before any backward
    total = max(1.0, tokens if args.loss_norm == "token" else sequences)
    weights = [token_weights(k, args.loss_norm, total) for k in kept]
    refs, olds = [None] * len(parts), [None] * len(parts)
    if args.kl:
        with torch.no_grad(), train.autocast(world.device):
            refs = [score(reference, part, args.temperature) for part in parts]
    sums = np.zeros(3)  # loss, clip fraction, KL
    for epoch in range(args.inner_epochs):
        for i, part in enumerate(parts):
            with train.autocast(world.device):
                logp = score(model, part, args.temperature)  # [B, N, L]
            if epoch == 0:
                olds[i] = logp.detach()  # same weights as the rollout's: no extra pass for the old log-probs
            loss, clip = grpo_loss(logp, olds[i], refs[i], A[i], kept[i], weights[i], args.clip, args.kl, args.ratio)
            loss.backward()
            kl = (k3(logp.detach(), refs[i]) * weights[i]).sum() if args.kl else torch.zeros(())
            sums += [loss.item(), clip.item(), kl.item()]
        norm = train.apply_gradients(world, optimizer, args.lr)
        if not math.isfinite(norm):
            break
    loss, clip, kl = (value / args.inner_epochs for value in world.sum(*sums))
    entropy = -sum((old * weight).sum() for old, weight in zip(olds, weights, strict=True))
    return {"loss": loss, "clip_fraction": clip, "kl": kl, "entropy": world.sum(float(entropy))[0], "grad_norm": norm}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data and model")
    data.add_argument("--data", type=Path, default=Path("data/ct_rate_vqa_zoom"), help="02's folder (%(default)s)")
    data.add_argument("--model", default="runs/sft", help="the SFT checkpoint, also the KL's reference (%(default)s)")
    data.add_argument("--out", type=Path, default=Path("runs/grpo"), help="where the checkpoint goes (%(default)s)")
    data.add_argument("--train", choices=vlm.GROUPS, default="llm", help="what is trained (not in the paper; llm)")
    grpo = parser.add_argument_group("GRPO")
    grpo.add_argument("--group-size", type=int, default=5, help="N, completions a prompt (the paper: 5)")
    grpo.add_argument("--prompts-per-step", type=int, default=8, help="prompts a step over all GPUs (not in the paper)")
    grpo.add_argument("--steps", type=int, default=1500, help="rollout-and-update steps (the paper: 1,500)")
    grpo.add_argument("--clip", type=float, default=0.2, help="delta, the ratio's clipping range (not in the paper)")
    grpo.add_argument("--kl", type=float, default=0.04, help="beta_kl, weight of k3; 0 loads no reference (0.04)")
    grpo.add_argument("--reward-weights", type=float, nargs=3, default=rewards.WEIGHTS, metavar=("FORMAT", "VALIDITY",
                      "CORRECTNESS"), help="alpha, beta, gamma (the paper: 1 1 2)")  # fmt: skip
    grpo.add_argument("--temperature", type=float, default=1.0, help="of sampling and of scoring (not in the paper; 1)")
    grpo.add_argument("--max-new-tokens", type=int, default=512, help="tokens at which a completion is cut off (512)")
    grpo.add_argument("--inner-epochs", type=int, default=1, help="updates a rollout; with 1 the ratio is 1 throughout")
    grpo.add_argument("--loss-norm", choices=("sequence", "token"), default="sequence", help="see token_weights")
    grpo.add_argument("--ratio", choices=("token", "sequence"), default="token", help="one rho a token or a completion")
    grpo.add_argument("--mask-truncated", action="store_true", help="leave cut-off completions out of the loss")
    grpo.add_argument("--lr", type=float, default=1e-6, help="AdamW's learning rate, constant (not in the paper; 1e-6)")
    run = parser.add_argument_group("run")
    run.add_argument("--micro-batch", type=int, default=1, help="prompt groups in a training pass of one GPU; lower it "
                     "when memory runs out, the result stays the same (%(default)s)")  # fmt: skip
    run.add_argument("--no-prefix-sharing", action="store_true", help="score one row a sample: slower, for comparison")
    run.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations: less memory, slower")
    run.add_argument("--shard", action="store_true", help="FSDP2: spread weights, gradients, optimiser over all GPUs")
    run.add_argument("--save-every", type=int, default=100, help="steps between checkpoints; the last two are kept")
    run.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out, bit for bit")
    run.add_argument("--overwrite", action="store_true", help="delete the run that --out holds")
    run.add_argument("--seed", type=int, default=0, help="order of the prompts and sampling (%(default)s)")
    return parser


def grpo(argv: list[str] | None = None) -> None:
    args = train.parse(parser(), argv, DEMO)
    for flag in ("prompts_per_step", "steps", "micro_batch", "lr", "temperature", "max_new_tokens", "inner_epochs",
                 "save_every"):  # fmt: skip
        if not getattr(args, flag) > 0:
            raise BadInput(f"--{flag.replace('_', '-')} must be above 0")
    if args.seed < 0:
        raise BadInput("--seed must be at least 0")
    if args.group_size < 2:
        raise BadInput("--group-size must be at least 2: an advantage compares the completions of one prompt")
    world = train.start(args.seed)
    train.check_batch("--prompts-per-step", args.prompts_per_step, world, args.shard)
    records = train.load_split(args.data, "train")
    train.open_run(args, world)

    # ---- policy, frozen reference, optimiser ----
    model, processor = train.load_model(args.model, world, args.shard), vlm.load_processor(args.model)
    trained, stops = vlm.set_trainable(model, args.train), vlm.stop_ids(model, processor)
    reference = vlm.frozen_copy(model) if args.kl else None  # before --resume moves the policy
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    count = sum(p.numel() for p in trained.values())
    if args.shard:
        trained = train.shard(model, world)
        if reference is not None:
            train.shard(reference, world)
    optimizer = torch.optim.AdamW(trained.values(), lr=args.lr, weight_decay=0.0,
                                  fused=world.device.type == "cuda" or None)  # fmt: skip
    done = train.resume(args.out, trained, optimizer, world) if args.resume else 0
    log = train.Log(args.out / "metrics.jsonl", done, world)
    rollout_log = train.Log(args.out / "rollouts.jsonl", done, world)
    if world.main:
        print(f"training {args.train}: {count:,} parameters; {len(records)} prompts")
        print(f"{args.steps} steps of {args.prompts_per_step} prompts x {args.group_size} = {world.size} processes x "
              f"{args.prompts_per_step / world.size:g} prompts, {args.micro_batch} groups at a time")  # fmt: skip

    def load(step: int) -> tuple[list[int], dict]:
        mine = world.share(train.batch_indices(len(records), args.prompts_per_step, step, args.seed))
        prompts = [rewards.prompt(records[i]["question"], "think") for i in mine]
        return mine, vlm.encode(processor, train.pictures([records[i] for i in mine]), prompts)

    signals = train.defer_signals(world)
    bar = tqdm(total=args.steps, initial=done, desc="GRPO", unit="step", disable=not world.main)
    for step, (mine, prompts) in enumerate(train.ahead(load, range(done, args.steps)), start=done + 1):
        began = time.perf_counter()

        # ---- 1. rollout: N completions of every prompt in one batch ----
        N, L = args.group_size, args.max_new_tokens
        u = np.stack([[uniforms(args.seed, step, i, n, L) for n in range(N)] for i in mine])  # [B, N, L]
        model.eval()
        with train.autocast(world.device), train.gathered(model):
            prompts = vlm.to_device(prompts, world.device)
            roll = rollout(model, prompts, torch.from_numpy(u).to(world.device), stops, args.temperature)
        texts = [[vlm.decode(processor, t[m].tolist(), stops) for t, m in zip(*group, strict=True)]
                 for group in zip(roll.tokens, roll.mask, strict=True)]  # fmt: skip
        sampled = time.perf_counter()

        # ---- 2. rewards ----
        scores = [[rewards.reward(text, records[i]["label"], args.reward_weights) for text in group]
                  for i, group in zip(mine, texts, strict=True)]  # fmt: skip
        R = torch.tensor([[s.total for s in group] for group in scores], device=world.device)  # [B, N]

        # ---- 3. advantages ----
        A = advantages(R)

        # ---- 4. and 5. loss and update ----
        model.train()
        cuts = [slice(b, b + args.micro_batch) for b in range(0, len(mine), args.micro_batch)]
        parts = [Rollout(vlm.select(roll.prompts, c), roll.tokens[c], roll.mask[c], roll.finished[c]) for c in cuts]
        metrics = update(model, reference, parts, [A[cut] for cut in cuts], world, optimizer, args)
        if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
            # With several inner epochs these may be the weights between two of them.
            train.save(args.out, step - 1, model, processor, trained, optimizer, world)
            raise BadInput(f"step {step}: loss or gradient is not finite; the last finite weights are saved as "
                           f"checkpoint {step - 1}; lower --lr")  # fmt: skip

        # ---- log ----
        rows = [[{"step": step, "id": records[i]["id"], "sample": n, "text": texts[b][n], "label": records[i]["label"],
                  "predicted": scores[b][n].predicted, "format": scores[b][n].format, "validity": scores[b][n].validity,
                  "correctness": scores[b][n].correctness, "reward": scores[b][n].total, "advantage": A[b, n].item(),
                  "tokens": int(roll.mask[b, n].sum()), "truncated": not bool(roll.finished[b, n])}
                 for n in range(N)] for b, i in enumerate(mine)]  # fmt: skip
        flat = int((R.amax(1) == R.amin(1)).sum())
        rows, flat = [row for group in world.gather(rows) for row in group], world.sum(flat)[0]
        means = {key: float(np.mean([row[key] for row in rows]))
                 for key in ("reward", "format", "validity", "correctness", "tokens", "truncated")}  # fmt: skip
        now = time.perf_counter()
        log.write({"step": step, **means, **metrics, "zero_variance_groups": flat, "lr": args.lr,
                   "seconds_rollout": sampled - began, "seconds_update": now - sampled,
                   "peak_memory_gib": train.peak_memory(world)})  # fmt: skip
        rollout_log.write(*rows)
        bar.set_postfix_str(f"reward {means['reward']:.2f} correct {means['correctness']:.2f}")
        bar.update()
        stop = train.asked_to_stop(signals, world)
        if step % args.save_every == 0 or step == args.steps or stop:
            train.save(args.out, step, model, processor, trained, optimizer, world)
        if stop:
            bar.close()
            raise stop(f"stopped and saved after step {step}; --resume goes on")
    bar.close()

    train.finish(args.out, world)
    if world.main:
        train.plot_curves(args.out, ["reward", "format", "validity", "correctness", "kl", "clip_fraction", "entropy",
                                     "tokens", "grad_norm"])  # fmt: skip
        history = train.read_log(args.out / "metrics.jsonl")
        tenth = max(1, min(10, len(history) // 2))
        print(f"sampled answers, mean of the first and of the last {tenth} steps:")
        for key in ("reward", "format", "validity", "correctness", "clip_fraction"):
            first, last = (float(np.mean([row[key] for row in part])) for part in (history[:tenth], history[-tenth:]))
            print(f"  {key:<14}{first:7.3f} -> {last:.3f}")
        print(f"{args.out}: RL checkpoint, metrics.jsonl, rollouts.jsonl, curves.png; next: 05_eval.py")


def main(argv: list[str] | None = None) -> None:
    """Runs the stage; bad input ends in one line and exit code 1."""
    train.run(grpo, argv)


if __name__ == "__main__":
    main()
