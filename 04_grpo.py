"""Stage II: Group Relative Policy Optimisation from the SFT checkpoint.

Paper, Section 2.2. One step, in the order of the code below, for each prompt x of a batch:

    1. rollout      y_1 .. y_N ~ pi_theta_old( . | x) under the prompt of --prompt      N = 5
    2. rewards      R_i = 1 * format + 1 * validity + 2 * correctness (or IoU)          rewards.py
    3. advantages   A_i = (R_i - mean(R)) / (std(R) + 1e-4)                             ddof 1
    4. loss         rho = pi_theta(y_t) / pi_theta_old(y_t)
                    L   = - min(rho A, clip(rho, 1 - delta, 1 + delta) A) + beta_kl * k3
                    k3  = exp(d) - d - 1,  d = log pi_ref - log pi_theta                ref = SFT
    5. update       one AdamW step (--inner-epochs of them on the same rollouts)

Departures from a textbook GRPO, each exact up to rounding: sampling prefills a prompt once, and
scoring packs a prompt and its N completions into one row (support/engine.py; --no-prefix-sharing
takes the plain path below). Old log-probs are the first pass's own values, since rollout and first
pass use the same weights: on a GPU the rollout's are a bf16 twin of the policy, its fp32 masters
rounded as the matrix products of a pass round them, and whole where the policy is sharded.

    python 04_grpo.py                                      the tiny demo, 3 to 5 minutes
    torchrun --nproc-per-node 8 04_grpo.py --data data/real_zoom --model runs/real_sft --shard \\
        --gradient-checkpointing --out runs/real_grpo

Writes to --out: the checkpoint, curves.png, run.json (the settings that --resume must match),
checkpoint-*/ for --resume, rollouts.jsonl (every sample: text, class read, reward parts, advantage,
length), and metrics.jsonl with one line per step, means over the whole global batch:

    step, lr                              from 1; the learning rate
    reward, format, validity, correctness mean weighted reward and its unweighted parts
    tokens, truncated                     mean length, EOS counted; share cut off
    loss                                  over inner epochs; near 0: a group's advantages sum to 0
    kl                                    k3 estimate of KL(policy, reference), weighted like the
                                          loss, as are the next two
    clip_fraction                         share of tokens where the clipped term is the minimum
    entropy                               mean of -log pi of the sampled tokens
    grad_norm                             before it is clipped to 1, of the last inner epoch
    zero_variance_groups                  groups of equal rewards: they teach nothing
    seconds_rollout, seconds_update       wall clock of the two halves of a step
    peak_memory_gib                       the most that rank 0 has held, of its GPU or the machine

Ctrl-C and SIGTERM let the step end, save it and exit with 130 or 143 (torchrun itself with 1);
--resume then goes on, bit for bit on a CPU; with another number of processes up to rounding.
"""

from support.stage import run_stage  # isort: skip  (first, see support/__init__.py)
import argparse
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import rewards
from support import checkpoint, distributed, vlm
from support.distributed import World
from support.engine import Rollout, as_input, can_pack, gather_logprobs, packed_logprobs, rollout
from support.files import BadInput
from support.grounding import questions
from support.log import Log, numbers, plot_curves, read_log
from support.records import ahead, batch_indices, load_split
from support.stage import (
    Interrupted,
    at_least,
    finite,
    fraction,
    lora_rank,
    lr_factor,
    natural,
    non_negative,
    parse_flags,
    positive,
    positive_int,
)

# Used instead of the defaults when --model descends from the tiny demo checkpoint.
DEMO = {"steps": 200, "micro_batch": 8, "inner_epochs": 2, "max_new_tokens": 60}
DEMO |= {"lr": 2e-4, "warmup_ratio": 0.1, "schedule": "cosine"}
CLIP_NORM = 1.0  # of the gradient; the paper does not say
CURVES = ["reward", "format", "validity", "correctness", "kl", "clip_fraction", "entropy", "tokens"]
CURVES += ["grad_norm"]


# ==== 1. Rollout: what is sampled ====


def uniforms(seed: int, step: int, prompt: int, sample: int, length: int) -> np.ndarray:
    """The random numbers of one sample, [length].

    They depend on these four alone, not on batch, micro-batch or world size.
    """
    return np.random.default_rng([seed, step, prompt, sample]).random(length)


def draw_uniforms(batch: list[int], step: int, args: argparse.Namespace) -> torch.Tensor:
    """The random numbers of a step's samples, [B, N, L], for the prompts of these indices.

    A prompt that the batch holds again (an epoch ends in it, or data are few) has others there.
    """
    N, L = args.group_size, args.max_new_tokens
    groups = []
    for b, i in enumerate(batch):
        first = N * batch[:b].count(i)
        group = [uniforms(args.seed, step, i, first + n, L) for n in range(N)]
        groups.append(np.stack(group))
    return torch.from_numpy(np.stack(groups))


def plain_logprobs(model, roll: Rollout, temperature: float) -> torch.Tensor:
    """The definition of a completion's log-probs, [B, N, L]: one row per sample.

    The prompt and its picture stand N times (AABB). `packed_logprobs` gives the same for a fraction
    of the work.
    """
    B, N, L = roll.tokens.shape
    prompts = vlm.repeat(roll.prompts, N)
    tokens, mask = roll.tokens.flatten(0, 1), roll.mask.flatten(0, 1)  # [B * N, L]
    position = vlm.positions(model, prompts)  # [3, B * N, P]
    offsets = torch.arange(1, L + 1, device=position.device)
    following = (position.amax((0, 2))[:, None] + offsets).expand(3, -1, -1)  # [3, B * N, L]
    logits = model(
        input_ids=torch.cat([prompts["input_ids"], as_input(tokens, model.config)], 1),
        attention_mask=torch.cat([prompts["attention_mask"], mask.long()], 1),
        position_ids=torch.cat([position, following], 2),
        **roll.picture_inputs(N),
        logits_to_keep=L + 1,
        use_cache=False,
    ).logits[:, :-1]  # [B * N, L, V]: column t predicts token t + 1
    return gather_logprobs(logits, tokens, temperature).view(B, N, L)


# ==== 2. Rewards ====


@dataclass
class Sample:
    """One completion: a line of rollouts.jsonl."""

    step: int
    id: str
    sample: int
    text: str
    label: str
    predicted: str | list[int] | None  # to locate: a box on the model's grid
    format: float
    validity: float
    correctness: float
    reward: float
    advantage: float
    tokens: int
    truncated: bool


def score_samples(
    step: int, records: list[dict], truths: list, roll: Rollout, processor, stops: list[int], args
) -> list[list[Sample]]:
    """The samples of each record's group with their rewards; advantages are filled in later."""
    groups, opening = [], vlm.opening(processor, roll.prompts)
    for b, record in enumerate(records):
        group = []
        for n in range(roll.tokens.shape[1]):
            mask = roll.mask[b, n]
            text = opening + vlm.decode(processor, roll.tokens[b, n][mask].tolist(), stops)
            parts = rewards.reward(text, truths[b], args.reward_weights, args.prompt, args.task)
            sample = Sample(
                step=step,
                id=record["id"],
                sample=n,
                text=text,
                label=record["label"],
                predicted=parts.predicted,
                format=parts.format,
                validity=parts.validity,
                correctness=parts.correctness,
                reward=parts.total,
                advantage=0.0,
                tokens=int(mask.sum()),
                truncated=not bool(roll.finished[b, n]),
            )
            group.append(sample)
        groups.append(group)
    return groups


# ==== 3. Advantages ====


def advantages(reward: torch.Tensor) -> torch.Tensor:
    """A_i = (R_i - mean) / (std + 1e-4) within each group, std with ddof 1: [B, N] -> [B, N].

    A group of equal rewards has A = 0: it teaches nothing and is counted in the metrics.
    """
    mean, std = reward.mean(1, keepdim=True), reward.std(1, keepdim=True)
    return (reward - mean) / (std + 1e-4)


# ==== 4. Loss ====


def token_weights(mask: torch.Tensor, norm: str, total: float) -> torch.Tensor:
    """What each token counts in the loss, [B, N, L]; all ranks' and micro-batches' sum to 1.

    norm "sequence": mean over a sequence's tokens, then over sequences (GRPO); total = sequences.
    norm "token": mean over all tokens (DAPO); total = tokens.
    """
    mask = mask.float()
    if norm == "token":
        return mask / total
    return mask / mask.sum(2, keepdim=True).clamp(min=1) / total


def k3(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    """Schulman's third estimator of KL(pi_theta || pi_ref), one value per token.

    k3 = exp(d) - d - 1 with d = log pi_ref - log pi_theta, clamped: exp of a large d overflows.
    """
    d = (ref_logp - logp).clamp(-20, 20)
    return d.exp() - d - 1


def grpo_loss(logp, old_logp, ref_logp, A, mask, weights, delta: float, beta_kl: float, ratio: str):
    """This part's share of the loss and the weighted share of clipped tokens.

    logp, old_logp, ref_logp (None when beta_kl is 0), mask, weights: [B, N, L]; A: [B, N]. `ratio`
    "token": one rho per token; "sequence": one per completion, as the paper's equation is written.
    The KL stays per token.
    """
    log_rho = (logp - old_logp) * mask
    if ratio == "sequence":
        log_rho = log_rho.sum(2, keepdim=True).expand_as(logp)
    rho, A = log_rho.exp(), A[..., None]  # [B, N, L], [B, N, 1]
    clipped = rho.clamp(1 - delta, 1 + delta)
    loss = -torch.min(rho * A, clipped * A)
    if beta_kl:
        loss = loss + beta_kl * k3(logp, ref_logp)
    # Where the minimum takes the clipped term, the gradient is 0.
    bites = ((rho < 1 - delta) & (A < 0)) | ((rho > 1 + delta) & (A > 0))
    return (loss * weights).sum(), (bites * weights).sum().detach()


# ==== 5. Update ====


def update(
    model, reference, parts: list[Rollout], A: list[torch.Tensor], world: World, optimizer, args
) -> dict:
    """--inner-epochs optimiser steps on one batch of rollouts; returns the update's global metrics.

    `parts` are the micro-batches and `A` their advantages. A gradient that is not finite ends the
    update before its optimiser step.
    """
    plain = args.no_prefix_sharing or not can_pack(model.config)
    score = plain_logprobs if plain else packed_logprobs
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    # ---- the denominators of all ranks and micro-batches, known before any backward ----
    masks = [part.mask for part in parts]
    if args.mask_truncated:
        masks = [part.mask & part.finished[..., None] for part in parts]
    sequences = sum(int(mask.any(2).sum()) for mask in masks)
    tokens = sum(int(mask.sum()) for mask in masks)
    sequences, tokens = world.sum(sequences, tokens)
    total = max(1.0, tokens if args.loss_norm == "token" else sequences)
    weights = [token_weights(mask, args.loss_norm, total) for mask in masks]

    # ---- log pi_ref, once per rollout ----
    ref_logps, old_logps = [None] * len(parts), [None] * len(parts)
    if args.kl:
        with torch.no_grad(), distributed.autocast(world.device), vlm.adapters_off(reference):
            ref_logps = [score(reference, part, args.temperature) for part in parts]

    sums = np.zeros(3)  # loss, clip fraction, KL
    for epoch in range(args.inner_epochs):
        for i, part in enumerate(parts):
            with distributed.autocast(world.device):
                logp = score(model, part, args.temperature)  # [B, N, L]
            if epoch == 0:  # the rollout's weights: these are the old log-probs, too
                old_logps[i] = logp.detach()
            given = (old_logps[i], ref_logps[i], A[i], masks[i], weights[i])
            loss, clip = grpo_loss(logp, *given, args.clip, args.kl, args.ratio)
            loss.backward()
            kl = 0.0
            if args.kl:
                kl = (k3(logp.detach(), ref_logps[i]) * weights[i]).sum().item()
            sums += [loss.item(), clip.item(), kl]
        world.sum_gradients(parameters)
        norm = distributed.to_float(torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM))
        if not math.isfinite(norm):
            break
        optimizer.step()
        optimizer.zero_grad()
    entropy = -sum((old * weight).sum() for old, weight in zip(old_logps, weights, strict=True))
    loss, clip, kl, entropy = world.sum(*(sums / args.inner_epochs), float(entropy))
    metrics = {"loss": loss, "clip_fraction": clip, "kl": kl, "entropy": entropy}
    return metrics | {"grad_norm": norm}


# ==== 6. Flags ====


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument_group("data and model").add_argument
    add("--data", type=Path, default=Path("data/ct_rate_vqa_zoom"), help="02's folder")
    add("--task", choices=rewards.TASKS, default="diagnose", help="locate: --data is 02 --clean's")
    add("--model", default="runs/sft", help="the SFT checkpoint, also the KL's reference")
    add("--out", type=Path, default=Path("runs/grpo"), help="where the checkpoint goes")
    add("--train", choices=vlm.TRAIN, default="llm", help="what is trained (llm; paper: nothing)")
    add("--lora-rank", type=lora_rank, default=16, help="of --train lora's adapters (16)")
    add = parser.add_argument_group("GRPO").add_argument
    add("--group-size", type=at_least(2), default=5, help="N, completions per prompt (paper: 5)")
    add("--prompts-per-step", type=positive_int, default=8, help="prompts per step, all GPUs (8)")
    add("--steps", type=positive_int, default=1500, help="rollouts and updates (paper: 1,500)")
    add("--clip", type=fraction, default=0.2, help="delta, the ratio's clipping range (0.2)")
    add("--kl", type=non_negative, default=0.04, help="beta_kl; 0 loads no reference (0.04)")
    add("--prompt", choices=(*rewards.MODES,), default="think", help="what is asked (paper: think)")
    names = ("FORMAT", "VALIDITY", "CORRECTNESS")
    add("--reward-weights", type=finite, nargs=3, default=rewards.WEIGHTS, metavar=names)
    add("--temperature", type=positive, default=1.0, help="of sampling and of scoring (1)")
    add("--max-new-tokens", type=positive_int, default=512, help="most tokens per completion (512)")
    add("--inner-epochs", type=positive_int, default=1, help="updates per rollout (1: rho is 1)")
    add("--loss-norm", choices=("sequence", "token"), default="sequence", help="see token_weights")
    add("--ratio", choices=("token", "sequence"), default="token", help="one rho per such")
    add("--mask-truncated", action="store_true", help="leave cut-off completions out of the loss")
    add("--lr", type=positive, default=1e-6, help="AdamW's peak learning rate (1e-6)")
    add("--warmup-ratio", type=fraction, default=0, help="share of steps to warm up (0)")
    add("--schedule", choices=("constant", "cosine"), default="constant", help="after the warm-up")
    add = parser.add_argument_group("run").add_argument
    add("--micro-batch", type=positive_int, default=1, help="groups per pass: memory only (1)")
    add("--decode", choices=("dynamic", "static"), default="dynamic", help="static: graph on a GPU")
    add("--no-prefix-sharing", action="store_true", help="score one row per sample: slower")
    add("--gradient-checkpointing", action="store_true", help="recompute activations: less memory")
    add("--shard", action="store_true", help="FSDP2: spread weights and optimiser over all GPUs")
    add("--save-every", type=positive_int, default=100, help="steps between checkpoints (100)")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    add("--overwrite", action="store_true", help="delete the run that --out holds")
    add("--seed", type=natural, default=0, help="order of the prompts and sampling (0)")
    return parse_flags(parser, argv, DEMO)


# ==== 7. The stage ====


def grpo(args: argparse.Namespace) -> None:
    """Trains the policy and leaves its checkpoint in --out."""
    world = distributed.start()
    distributed.check_batch("--prompts-per-step", args.prompts_per_step, world, args.shard)
    records = load_split(args.data, "train", args.task)
    checkpoint.open_run(args, world)

    # ---- policy, its twin for the rollout, frozen reference, optimiser ----
    model, trained = distributed.load_for_training(args, world)
    twin = distributed.load_twin(args, model, trained, world)
    processor = vlm.load_processor(args.model)
    trial = vlm.try_out(twin, processor, records, args.prompt, args.task, world.device)
    rows = args.prompts_per_step / world.size
    vlm.check_room(twin, trial, rows, rows * args.group_size, args.max_new_tokens)
    stops = vlm.stop_ids(model, processor)
    # Before --resume moves the policy:
    reference = distributed.load_reference(args, model, world) if args.kl else None
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
    count = sum(parameter.numel() for parameter in trained.values())
    fused = world.device.type == "cuda" or None
    optimizer = torch.optim.AdamW(trained.values(), lr=args.lr, weight_decay=0.0, fused=fused)
    done = checkpoint.resume(args.out, trained, optimizer, world) if args.resume else 0
    log = Log(args.out / "metrics.jsonl", done, world)
    rollout_log = Log(args.out / "rollouts.jsonl", done, world)
    if world.main:
        if not can_pack(model.config):
            print("not only full attention: scoring takes one row per sample, not one per prompt")
        print(f"training {args.train}: {count:,} parameters; {len(records)} prompts")
        size = f"{args.prompts_per_step} prompts x {args.group_size} completions"
        print(f"{args.steps} steps of {size}; processes: {world.size}")

    def load(step: int) -> tuple[list[int], list, dict]:
        """One step's indices on all ranks; of this rank's prompts what is right, and the input."""
        batch = batch_indices(len(records), args.prompts_per_step, step, args.seed)
        chosen = [records[i] for i in world.share(batch)]
        images, prompts, truths = questions(chosen, processor, args.prompt, args.task)
        ids = [record["id"] for record in chosen]
        return batch, truths, vlm.encode(processor, images, prompts, names=ids)

    signals = distributed.defer_signals(world)
    bar = tqdm(total=args.steps, initial=done, desc="GRPO", unit="step", disable=not world.main)
    loaded = ahead(load, range(done, args.steps))
    for step, (batch, truths, prompts) in enumerate(loaded, start=done + 1):
        began = time.perf_counter()
        distributed.seed_step(args.seed, step, world)

        # ---- 1. rollout: N completions of every prompt in one batch ----
        u = world.share(draw_uniforms(batch, step, args)).to(world.device)
        prompts = vlm.to_device(prompts, world.device)
        distributed.refresh(twin, trained)
        twin.eval()
        with distributed.autocast(world.device):
            roll = rollout(twin, prompts, u, stops, args.temperature, args.decode)
        sampled = time.perf_counter()

        # ---- 2. rewards ----
        chosen = [records[i] for i in world.share(batch)]
        groups = score_samples(step, chosen, truths, roll, processor, stops, args)
        R = torch.tensor([[s.reward for s in group] for group in groups], device=world.device)

        # ---- 3. advantages ----
        A = advantages(R)  # [B, N]

        # ---- 4. and 5. loss and update ----
        lr = args.lr * lr_factor(step - 1, args.steps, args.warmup_ratio, args.schedule)
        optimizer.param_groups[0]["lr"] = lr
        model.train()
        cuts = [slice(b, b + args.micro_batch) for b in range(0, len(chosen), args.micro_batch)]
        parts = [roll.rows(cut) for cut in cuts]
        metrics = update(model, reference, parts, [A[c] for c in cuts], world, optimizer, args)
        if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
            # With several inner epochs these may be the weights between two of them.
            checkpoint.save(args.out, step - 1, model, processor, trained, optimizer, world)
            saved = f"the last finite weights are saved as checkpoint {step - 1}; lower --lr"
            raise BadInput(f"step {step}: loss or gradient is not finite; {saved}")

        # ---- log ----
        for b, group in enumerate(groups):
            for n, sample in enumerate(group):
                sample.advantage = A[b, n].item()
        rows = []
        for group in world.gather([[asdict(sample) for sample in group] for group in groups]):
            rows.extend(group)
        row = {"step": step}
        for key in ("reward", "format", "validity", "correctness", "tokens", "truncated"):
            row[key] = float(np.mean([sample[key] for sample in rows]))
        row |= metrics
        row["zero_variance_groups"] = world.sum(int((R.amax(1) == R.amin(1)).sum()))[0]
        row["lr"] = lr
        row["seconds_rollout"] = sampled - began
        row["seconds_update"] = time.perf_counter() - sampled
        row["peak_memory_gib"] = distributed.peak_memory(world)
        log.write(row)
        rollout_log.write(*rows)
        bar.set_postfix_str(f"reward {row['reward']:.2f} correct {row['correctness']:.2f}")
        bar.update()
        stop = distributed.asked_to_stop(signals, world)
        if step % args.save_every == 0 or step == args.steps or stop:
            checkpoint.save(args.out, step, model, processor, trained, optimizer, world)
        if stop:
            raise Interrupted(stop, f"stopped and saved after step {step}; --resume goes on")
    bar.close()

    # ---- the checkpoint becomes --out itself ----
    if done >= args.steps:  # nothing was left to do; of its files only state.pt has been checked
        checkpoint.save(args.out, done, model, processor, trained, optimizer, world)
    checkpoint.finish(args.out, max(done, args.steps), world)
    if world.main:
        plot_curves(args.out, CURVES)
        print_progress(read_log(args.out / "metrics.jsonl"))
        print(f"{args.out}: RL checkpoint, logs, curves.png; next: 05_eval.py")
    world.close()


def print_progress(history: list[dict]) -> None:
    """Prints what sampling earned in the run's first and last steps."""
    tenth = max(1, min(10, len(history) // 2))
    print(f"sampled answers, mean of the first and of the last {tenth} steps:")
    for key in ("reward", "format", "validity", "correctness", "clip_fraction"):
        values = [value for _, value in numbers(history, key)] or [math.nan]
        first, last = np.mean(values[:tenth]), np.mean(values[-tenth:])
        print(f"  {key:<14}{first:7.3f} -> {last:.3f}")


def main(argv: list[str] | None = None) -> None:
    """Runs the stage; bad input ends in one line and exit code 1, Ctrl-C in 130, SIGTERM in 143."""
    run_stage(lambda: grpo(parse_args(argv)))


if __name__ == "__main__":
    main()
