"""Stage I: supervised fine-tuning of Qwen2.5-VL on direct answers.

Paper, Section 3.2. The model learns to name the lesion's class under the direct prompt:
`<answer>Emphysema</answer>`. The loss is the mean negative log-likelihood of the answer's tokens
(end of turn included, prompt excluded),

    L_SFT = - 1/|answer tokens| * sum_t log pi_theta(y_t | picture, prompt, y_<t).

The paper trains MLP layers only, so that what the pretrained model can do otherwise, reasoning
above all, stays intact. It does not say which MLPs; our default is the merger, the MLP between
vision and language (see --train). With the tiny model DEMO below replaces the defaults.

    python 03_sft.py                                              the tiny model, half a minute
    python 03_sft.py --model Qwen/Qwen2.5-VL-7B-Instruct --data data/real_zoom          one GPU
    torchrun --nproc-per-node 8 03_sft.py --model Qwen/Qwen2.5-VL-7B-Instruct \\
        --data data/real_zoom --out runs/real_sft                                       eight

Writes to --out: the checkpoint (a complete Hugging Face folder), curves.png, run.json (the settings
that --resume must match), checkpoint-*/ for --resume, and metrics.jsonl with one line per step:

    step, lr           from 1; the step's learning rate
    loss, tokens       mean negative log-likelihood of the step's answer tokens; how many there were
    grad_norm          norm of the summed gradient before it is clipped to 1
    seconds            wall clock of the step
    peak_memory_gib    the most memory that rank 0 has held so far: of its GPU, or of the machine

Ctrl-C and SIGTERM let the step end, save it and exit with 130 or 143 (torchrun itself with 1);
--resume then goes on, bit for bit on a CPU, with another number of processes up to rounding. After
a signal torchrun kills its processes within its --shutdown-timeout (30 s): give it, and Slurm's
KillWait, what a step and a checkpoint take.

Several machines that share a disk (04 and 05 alike):

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        03_sft.py ...
    srun --nodes 4 --ntasks-per-node 1 --cpus-per-task 64 --gpus-per-node 8 bash -c 'torchrun \\
        --nnodes $SLURM_NNODES --nproc-per-node 8 --rdzv-backend c10d --rdzv-id $SLURM_JOB_ID \\
        --rdzv-endpoint $(scontrol show hostnames | head -n 1):29500 03_sft.py --resume ...'

A checkpoint of your own, or the authors': any Qwen2.5-VL, Qwen3-VL or Qwen3.5 folder or hub id goes
into --model. On a small GPU --train lora trains adapters on the language model, which the saved
checkpoints have merged (about ten times the --lr; it needs the package peft).

Your own pictures: --data is a folder with dataset_info.json holding {"stage": "02"} and
{train,test}/metadata.jsonl, per line file_name, id, label (one of rewards.CLASSES), question
(rewards.QUESTION), answer and box.
"""

from support.stage import run_stage  # isort: skip  (first, see support/__init__.py)
import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import rewards
from support import checkpoint, distributed, vlm
from support.distributed import World
from support.files import BadInput
from support.grounding import questions
from support.log import Log, plot_curves
from support.records import ahead, batch_indices, load_split
from support.stage import (
    Interrupted,
    bounded,
    fraction,
    lora_rank,
    lr_factor,
    natural,
    parse_flags,
    positive,
    positive_int,
)

# Used instead of the defaults when --model descends from the tiny demo checkpoint.
DEMO = {"train": "mlp", "max_steps": 30, "batch_size": 32, "micro_batch": 32, "lr": 5e-4}
CLIP_NORM = 1.0  # of the gradient; the paper does not say


# ==== 1. Batches ====


def encode(records: list[dict], processor: vlm.Processor, task: str = "diagnose") -> dict:
    """One micro-batch under the direct prompt, its answers' tokens as labels."""
    images, prompts, truths = questions(records, processor, "direct", task)
    answers = [rewards.target(one, task) for one in truths]
    ids = [record["id"] for record in records]
    return vlm.encode(processor, images, prompts, answers, ids)


# ==== 2. Loss ====


def sum_loss(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    """Negative log-likelihood summed over a micro-batch's answer tokens.

    The head runs only on the columns that can predict an answer token: with 152,000 words in the
    vocabulary, logits of the whole prompt would be the largest tensor in memory.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    labels = batch["labels"]  # [B, T]
    first = int((labels >= 0).any(0).nonzero()[0])  # the first column that holds an answer token
    # Column t predicts token t + 1.
    columns = torch.arange(first - 1, labels.shape[1] - 1, device=labels.device)
    logits = model(**inputs, logits_to_keep=columns, use_cache=False).logits  # [B, T - first, V]
    targets = labels[:, first:].flatten()
    return F.cross_entropy(
        logits.float().flatten(0, 1), targets, ignore_index=-100, reduction="sum"
    )


def add_gradients(model, micro_batches: list[dict], world: World) -> tuple[float, int]:
    """Adds this rank's part of the gradient of the global mean loss to `.grad`.

    Each micro-batch's sum is divided by the tokens of all ranks' micro-batches: so neither their
    number nor their size changes the gradient. Returns the global mean loss and its tokens.
    """
    tokens = sum(int((batch["labels"] >= 0).sum()) for batch in micro_batches)
    tokens = int(world.sum(tokens)[0])
    total = 0.0
    for batch in micro_batches:
        with distributed.autocast(world.device):
            loss = sum_loss(model, vlm.to_device(batch, world.device)) / tokens
        loss.backward()
        total += loss.item()
    return world.sum(total)[0], tokens


# ==== 3. Flags ====


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument_group("data and model").add_argument
    add("--data", type=Path, default=Path("data/ct_rate_vqa_zoom"), help="02's folder")
    add("--task", choices=rewards.TASKS, default="diagnose", help="locate: --data is 02 --clean's")
    add("--model", default=str(vlm.TINY), help="folder or hub id; default: the shipped tiny model")
    add("--out", type=Path, default=Path("runs/sft"), help="where the checkpoint goes")
    add("--train", choices=vlm.TRAIN, default="merger", help="what is trained (merger)")
    add("--lora-rank", type=lora_rank, default=16, help="of --train lora's adapters (16)")
    add = parser.add_argument_group("optimisation").add_argument
    epochs = bounded(float, 1e-9, 1e9, "a number from 1e-9 to 1e9")
    add("--epochs", type=epochs, default=2, help="passes over the training split (paper: 2)")
    add("--max-steps", type=positive_int, help="optimiser steps in all, instead of --epochs")
    add("--lr", type=positive, default=1e-5, help="AdamW's peak learning rate (paper: 1e-5)")
    add("--warmup-ratio", type=fraction, default=0.1, help="share of steps to warm up (paper: 0.1)")
    add("--batch-size", type=positive_int, default=64, help="samples per step over all GPUs (64)")
    add("--micro-batch", type=positive_int, default=4, help="samples per pass: memory only (4)")
    add("--gradient-checkpointing", action="store_true", help="recompute activations: less memory")
    add = parser.add_argument_group("run").add_argument
    add("--shard", action="store_true", help="FSDP2: spread weights and optimiser over all GPUs")
    add("--save-every", type=positive_int, default=200, help="steps between checkpoints (200)")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    add("--overwrite", action="store_true", help="delete the run that --out holds")
    add("--seed", type=natural, default=0, help="order of the samples (0)")
    return parse_flags(parser, argv, DEMO)


# ==== 4. The stage ====


def sft(args: argparse.Namespace) -> None:
    """Trains what --train names, everything else frozen, and leaves the checkpoint in --out."""
    world = distributed.start()
    records = load_split(args.data, "train", args.task)
    distributed.check_batch("--batch-size", args.batch_size, world, args.shard)
    checkpoint.open_run(args, world)
    steps = args.max_steps or math.ceil(args.epochs * len(records) / args.batch_size)

    # ---- model and optimiser ----
    model, trained = distributed.load_for_training(args, world)
    processor = vlm.load_processor(args.model)
    trial = vlm.try_out(model, processor, records, "direct", args.task, world.device)
    vlm.check_room(model, trial, args.batch_size / world.size)
    count = sum(parameter.numel() for parameter in trained.values())
    total = sum(parameter.numel() for parameter in model.parameters())
    model.train()
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
    parameters = list(trained.values())
    fused = world.device.type == "cuda" or None
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0, fused=fused)
    done = checkpoint.resume(args.out, trained, optimizer, world) if args.resume else 0
    log = Log(args.out / "metrics.jsonl", done, world)
    if world.main:
        share = 100 * count / total
        print(f"training {args.train}: {count:,} of {total:,} parameters ({share:.1f} %)")
        ranks = f"{world.size} processes x {args.batch_size / world.size:g}"
        batch = f"{args.batch_size} = {ranks}, at most {args.micro_batch} at a time"
        print(f"{len(records)} samples, {steps} steps of {batch}")

    def load(step: int) -> list[dict]:
        """This rank's micro-batches of one step."""
        batch = batch_indices(len(records), args.batch_size, step, args.seed)
        indices = world.share(batch)
        micro_batches = []
        for first in range(0, len(indices), args.micro_batch):
            chunk = indices[first : first + args.micro_batch]
            micro_batches.append(encode([records[i] for i in chunk], processor, args.task))
        return micro_batches

    # ---- the loop ----
    signals = distributed.defer_signals(world)
    bar = tqdm(total=steps, initial=done, desc="SFT", unit="step", disable=not world.main)
    for step, micro_batches in enumerate(ahead(load, range(done, steps)), start=done + 1):
        began = time.perf_counter()
        distributed.seed_step(args.seed, step, world)
        loss, tokens = add_gradients(model, micro_batches, world)
        world.sum_gradients(parameters)
        norm = distributed.to_float(torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM))
        if not math.isfinite(loss + norm):
            checkpoint.save(args.out, step - 1, model, processor, trained, optimizer, world)
            saved = f"step {step - 1} is saved; lower --lr"
            raise BadInput(f"step {step}: loss or gradient is not finite; {saved}")
        lr = args.lr * lr_factor(step - 1, steps, args.warmup_ratio, "cosine")
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        row = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": tokens}
        row["seconds"] = time.perf_counter() - began
        row["peak_memory_gib"] = distributed.peak_memory(world)
        log.write(row)
        bar.set_postfix_str(f"loss {loss:.3f}")
        bar.update()
        stop = distributed.asked_to_stop(signals, world)
        if step % args.save_every == 0 or step == steps or stop:
            checkpoint.save(args.out, step, model, processor, trained, optimizer, world)
        if stop:
            raise Interrupted(stop, f"stopped and saved after step {step}; --resume goes on")
    bar.close()

    # ---- the checkpoint becomes --out itself ----
    if done >= steps:  # nothing was left to do; of its files only state.pt has been checked
        checkpoint.save(args.out, done, model, processor, trained, optimizer, world)
    checkpoint.finish(args.out, max(done, steps), world)
    if world.main:
        plot_curves(args.out, ["loss", "grad_norm", "lr"])
        print(f"{args.out}: SFT checkpoint, metrics.jsonl, curves.png")
        print(f"next: 04_grpo.py --model {args.out}")
    world.close()


def main(argv: list[str] | None = None) -> None:
    """Runs the stage; bad input ends in one line and exit code 1, Ctrl-C in 130, SIGTERM in 143."""
    run_stage(lambda: sft(parse_args(argv)))


if __name__ == "__main__":
    main()
