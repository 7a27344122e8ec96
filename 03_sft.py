"""Stage I: supervised fine-tuning of Qwen2.5-VL on direct answers, MLP layers only (paper, Section 3.3).

The model learns to name the lesion's class under the direct prompt: `<answer>Emphysema</answer>`. The loss is the mean
negative log-likelihood of the answer's tokens (end of turn included, prompt excluded),

    L_SFT = - 1/|answer tokens| * sum_t log pi_theta(y_t | picture, prompt, y_<t).

Only MLP layers are trained, so that what the pretrained model can do otherwise, reasoning above all, stays intact.
The paper does not say which MLPs; our default is the merger, the MLP between vision and language (see --train).

    python 03_sft.py                                                    the tiny demo model, half a minute on 2 cores
    python 03_sft.py --model Qwen/Qwen2.5-VL-7B-Instruct                one GPU
    torchrun --nproc-per-node 8 03_sft.py --model Qwen/Qwen2.5-VL-7B-Instruct --data data/real_zoom --out runs/real_sft

Writes to --out: the checkpoint (a complete Hugging Face folder), metrics.jsonl, curves.png, checkpoint-*/ for --resume.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import rewards
from support import train, vlm
from support.files import BadInput
from support.tiny_vlm import DEFAULT as TINY

# Used instead of the defaults when --model is the tiny demo checkpoint (or descends from it); explicit flags win.
DEMO = {"train": "mlp", "max_steps": 60, "batch_size": 32, "micro_batch": 32, "lr": 5e-4}


def encode(records: list[dict], processor: vlm.Processor) -> dict:
    """One micro-batch under the direct prompt, its answers' tokens as labels."""
    prompts = [rewards.prompt(record["question"], "direct") for record in records]
    return vlm.encode(processor, train.pictures(records), prompts, [rewards.target(r["label"]) for r in records])


def sum_loss(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    """Negative log-likelihood summed over a micro-batch's answer tokens; the caller divides by the global count.

    The head runs only on the columns that can predict an answer token: with 152,000 words in the vocabulary, logits of
    the whole prompt would be the largest tensor in memory.
    """
    batch = dict(batch)
    labels = batch.pop("labels")  # [B, T]
    first = int((labels >= 0).any(0).nonzero()[0])  # the first column that holds an answer token
    columns = torch.arange(first - 1, labels.shape[1] - 1, device=labels.device)  # column t predicts token t + 1
    logits = model(**batch, logits_to_keep=columns, use_cache=False).logits  # [B, T - first, V]
    targets = labels[:, first:].flatten()
    return F.cross_entropy(logits.float().flatten(0, 1), targets, ignore_index=-100, reduction="sum")


def sft_step(model, micro_batches: list[dict], world: train.World) -> tuple[float, int]:
    """Leaves this rank's part of the global mean loss's gradient in `.grad`; returns (global mean loss, tokens)."""
    tokens = int(world.sum(sum(int((batch["labels"] >= 0).sum()) for batch in micro_batches))[0])
    total = 0.0
    for batch in micro_batches:
        with train.autocast(world.device):
            loss = sum_loss(model, vlm.to_device(batch, world.device)) / tokens
        loss.backward()
        total += loss.item()
    return world.sum(total)[0], tokens


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data and model")
    data.add_argument("--data", type=Path, default=Path("data/ct_rate_vqa_zoom"), help="02's folder (%(default)s)")
    data.add_argument("--model", default=str(TINY), help="folder or hub id (the paper: Qwen/Qwen2.5-VL-7B-Instruct; "
                      "default: the shipped tiny model)")  # fmt: skip
    data.add_argument("--out", type=Path, default=Path("runs/sft"), help="where the checkpoint goes (%(default)s)")
    data.add_argument("--train", choices=vlm.GROUPS, default="merger", help="what is trained: the MLP between vision "
                      "and language, the language model's MLPs, both, the language model, everything (the paper: \"MLP "
                      "layers\"; %(default)s)")  # fmt: skip
    size = parser.add_argument_group("optimisation")
    size.add_argument("--epochs", type=float, default=2, help="passes over the training split (the paper: 2)")
    size.add_argument("--max-steps", type=int, help="optimiser steps in all, instead of --epochs")
    size.add_argument("--lr", type=float, default=1e-5, help="AdamW's peak learning rate (the paper: 1e-5)")
    size.add_argument("--warmup-ratio", type=float, default=0.1, help="share of steps that warm up, then a cosine to "
                      "0 (the paper: 0.1)")  # fmt: skip
    size.add_argument("--batch-size", type=int, default=64, help="samples a step over all GPUs (not in the paper)")
    size.add_argument("--micro-batch", type=int, default=4, help="samples in one forward pass of one GPU; lower it "
                      "when memory runs out, the result stays the same (%(default)s)")  # fmt: skip
    size.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations: less memory")
    run = parser.add_argument_group("run")
    run.add_argument("--shard", action="store_true", help="FSDP2: spread weights, gradients, optimiser over all GPUs")
    run.add_argument("--save-every", type=int, default=200, help="steps between checkpoints; the last two are kept")
    run.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out, bit for bit")
    run.add_argument("--overwrite", action="store_true", help="delete the run that --out holds")
    run.add_argument("--seed", type=int, default=0, help="order of the samples (%(default)s)")
    return parser


def sft(argv: list[str] | None = None) -> None:
    args = train.parse(parser(), argv, DEMO)
    for flag in ("batch_size", "micro_batch", "lr", "epochs", "save_every"):
        if not getattr(args, flag) > 0:
            raise BadInput(f"--{flag.replace('_', '-')} must be above 0")
    if args.max_steps is not None and args.max_steps < 1 or args.seed < 0:
        raise BadInput("--max-steps must be above 0, --seed at least 0")
    world = train.start(args.seed)
    records = train.load_split(args.data, "train")
    train.check_batch("--batch-size", args.batch_size, world, args.shard)
    train.open_run(args, world)
    steps = args.max_steps or math.ceil(args.epochs * len(records) / args.batch_size)

    # ---- model: everything frozen but the chosen MLPs ----
    model, processor = train.load_model(args.model, world, args.shard), vlm.load_processor(args.model)
    trained = vlm.set_trainable(model, args.train)
    count, total = sum(p.numel() for p in trained.values()), sum(p.numel() for p in model.parameters())
    model.train()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if args.shard:
        trained = train.shard(model, world)
    optimizer = torch.optim.AdamW(trained.values(), lr=args.lr, weight_decay=0.0,
                                  fused=world.device.type == "cuda" or None)  # fmt: skip
    done = train.resume(args.out, trained, optimizer, world) if args.resume else 0
    log = train.Log(args.out / "metrics.jsonl", done, world)
    if world.main:
        print(f"training {args.train}: {count:,} of {total:,} parameters ({100 * count / total:.1f} %)")
        print(f"{len(records)} samples, {steps} steps of {args.batch_size} = {world.size} processes x "
              f"{args.batch_size / world.size:g}, at most {args.micro_batch} at a time")  # fmt: skip

    # ---- the loop ----
    def load(step: int) -> list[dict]:
        mine = world.share(train.batch_indices(len(records), args.batch_size, step, args.seed))
        chunks = [mine[i : i + args.micro_batch] for i in range(0, len(mine), args.micro_batch)]
        return [encode([records[i] for i in chunk], processor) for chunk in chunks]

    signals = train.defer_signals(world)
    bar = tqdm(total=steps, initial=done, desc="SFT", unit="step", disable=not world.main)
    for step, micro_batches in enumerate(train.ahead(load, range(done, steps)), start=done + 1):
        began = time.perf_counter()
        loss, tokens = sft_step(model, micro_batches, world)
        lr = args.lr * train.warmup_cosine(step - 1, steps, args.warmup_ratio)
        norm = train.apply_gradients(world, optimizer, lr)
        if not math.isfinite(loss + norm):
            train.save(args.out, step - 1, model, processor, trained, optimizer, world)
            raise BadInput(f"step {step}: loss or gradient is not finite; step {step - 1} is saved; lower --lr")
        seconds = time.perf_counter() - began
        log.write({"step": step, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": tokens, "seconds": seconds,
                   "peak_memory_gib": train.peak_memory(world)})  # fmt: skip
        bar.set_postfix_str(f"loss {loss:.3f}")
        bar.update()
        stop = train.asked_to_stop(signals, world)
        if step % args.save_every == 0 or step == steps or stop:
            train.save(args.out, step, model, processor, trained, optimizer, world)
        if stop:
            bar.close()
            raise stop(f"stopped and saved after step {step}; --resume goes on")
    bar.close()

    # ---- the checkpoint becomes --out itself ----
    train.finish(args.out, world)
    if world.main:
        train.plot_curves(args.out, ["loss", "grad_norm", "lr"])
        print(f"{args.out}: SFT checkpoint, metrics.jsonl, curves.png; next: 04_grpo.py --model {args.out}")


def main(argv: list[str] | None = None) -> None:
    """Runs the stage; bad input ends in one line and exit code 1."""
    train.run(sft, argv)


if __name__ == "__main__":
    main()
