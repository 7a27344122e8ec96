"""Does a GPU compute what the tests hold on CPUs, and how fast? One table, pass or fail per line.

    python -m benchmarks.gpu_check                             one GPU, at most eight minutes
    torchrun --nproc-per-node 2 -m benchmarks.gpu_check        and --shard against one process
    python -m benchmarks.gpu_check --memory                    README.md's memory table alone

Nothing is downloaded: the model has the 3B's shape and random weights, the pictures are noise. The
table is for benchmarks/README.md; the exit code is 1 when a line fails. Without a GPU the same
checks run in emulation (bf16 weights and autocast, fp32 masters) on a tiny shape, in a minute;
speed and memory are then measured but not judged. trl is compared where it is installed.
"""

import argparse
import gc
import importlib
import importlib.util
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import rewards
from benchmarks import grpo_step
from support import checkpoint, distributed, engine, vlm
from support.distributed import World
from support.log import read_log

ROOT = Path(__file__).resolve().parent.parent
sft, grpo = map(importlib.import_module, ("03_sft", "04_grpo"))
SPARE = 1.1  # how far a measured peak may lie above the table's sum


@dataclass
class Line:
    """A line of the table: what was checked, what came out, what was wanted, whether it did."""

    check: str
    measured: str
    wanted: str
    passed: bool


@dataclass
class Setup:
    """Where the checks run and on what: B prompts with N completions of L tokens each."""

    world: World
    folder: Path  # of all files
    shape: str = "3b"
    image: int = 512  # px
    B: int = 8
    N: int = 5
    L: int = 200
    train: str = "llm"

    @property
    def gpu(self) -> bool:
        return self.world.device.type == "cuda"

    @property
    def files(self) -> list[str]:
        """The flags that 03 and 04 share."""
        return ["--data", str(self.folder / "data"), "--model", str(self.folder / "base")]


def setup(world: World, folder: Path) -> Setup:
    """The 3B on a GPU, with that part trained which its memory holds; a tiny shape on a CPU."""
    if world.device.type == "cpu":
        return Setup(world, folder, "micro", image=56, B=2, N=3, L=12)
    memory = torch.cuda.get_device_properties(world.device).total_memory
    groups = {"llm": 90e9, "llm_mlp": 75e9, "merger": 0}
    return Setup(world, folder, train=next(name for name in groups if memory > groups[name]))


def make_files(at: Setup) -> None:
    """A checkpoint of random weights, and questions on pictures of noise."""
    processor = vlm.load_processor(str(vlm.TINY))
    pixels = {"min_pixels": 28 * 28, "max_pixels": 2048 * 2048}
    processor.image_processor = Qwen2VLImageProcessorPil(**pixels)
    dtype = torch.bfloat16
    model = grpo_step.build_model(at.shape, processor.tokenizer, at.world.device, dtype)
    # Random attention is almost uniform, so that a wrong mask would hardly show: make it choose.
    factor = (4000 / model.config.text_config.hidden_size) ** 0.5
    for name, parameter in model.named_parameters():
        if "q_proj.weight" in name or "k_proj.weight" in name:
            parameter.data *= factor
    vlm.save_checkpoint(at.folder / "base", model, processor)

    train, rng = at.folder / "data" / "train", np.random.default_rng(0)
    train.mkdir(parents=True)
    (at.folder / "data" / "dataset_info.json").write_text('{"stage": "02"}')
    lines = []
    for i in range(at.B):
        noise = rng.integers(0, 256, (at.image, at.image, 3), dtype=np.uint8)
        Image.fromarray(noise).save(train / f"{i}.png")
        label = rewards.CLASSES[i % len(rewards.CLASSES)]
        record = {"file_name": f"{i}.png", "id": str(i), "label": label, "box": [1, 1, 20, 20]}
        record |= {"question": rewards.QUESTION, "answer": label}
        lines.append(json.dumps(record))
    (train / "metadata.jsonl").write_text("\n".join(lines))


@contextmanager
def stages_in(at: Setup) -> Iterator[None]:
    """Within, 03 and 04 run in this process as `at.world`; without a GPU they compute as on one.

    Only state.pt is written of a checkpoint, and no curves are drawn. The rewards are 0, 1, ..
    N - 1 in each group, so that there is something to learn.
    """
    count = itertools.count()

    def reward(text: str, *_) -> rewards.Reward:
        return rewards.Reward(0.0, 0.0, 0.0, total=float(next(count) % at.N), predicted=None)

    with ExitStack() as stack:
        for owner, name, value in (
            (distributed, "start", lambda: at.world),
            (distributed.World, "close", lambda self: None),
            (vlm, "save_checkpoint", lambda folder, *_: folder.mkdir()),
            (sft, "plot_curves", lambda *_: None),
            (grpo, "plot_curves", lambda *_: None),
            (rewards, "reward", reward),
        ):
            stack.enter_context(patch.object(owner, name, value))
        if not at.gpu:
            stack.enter_context(patch.object(distributed, "autocast", emulated_autocast))
        yield


def emulated_autocast(device: torch.device):
    return torch.autocast(device.type, torch.bfloat16)


# ==== 1. Equal log-probs and equal tokens ====


def load_policy(at: Setup) -> tuple[torch.nn.Module, dict]:
    """The model as the rollout's twin, and the prompts of one step."""
    model = vlm.load_model(str(at.folder / "base"), at.world.device, torch.bfloat16)
    processor = vlm.load_processor(str(at.folder / "base"))
    images = []
    for i in range(at.B):
        images.append(Image.open(at.folder / "data" / "train" / f"{i}.png"))
    prompts = vlm.encode(processor, images, at.B * [rewards.prompt(rewards.QUESTION, "think")])
    return model.requires_grad_(False), vlm.to_device(prompts, at.world.device)


def sample(model, prompts: dict, at: Setup, L: int, decode: str) -> tuple:
    """A rollout without stops, and the log-probs that its sampler saw, [B, N, L]."""
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(at.B, at.N, L, generator=generator, dtype=torch.float64).to(at.world.device)
    seen, draw = [], engine.sample_tokens

    def watched(logits, u):
        token = draw(logits, u)
        seen.append(logits.log_softmax(-1).gather(-1, token[:, None]))
        return token

    with patch.object(engine, "sample_tokens", watched), distributed.autocast(at.world.device):
        roll = engine.rollout(model, prompts, u, [], 1.0, decode)
    return roll, torch.cat(seen, 1).view(at.B, at.N, L)


@torch.no_grad()
def score(function: Callable, model, roll, at: Setup) -> torch.Tensor:
    """Log-probs [B, N, L] by the engine's or 04's function, one group at a time."""
    with distributed.autocast(at.world.device):
        parts = [function(model, roll.rows(slice(b, b + 1)), 1.0) for b in range(at.B)]
    return torch.cat(parts)


def check_equality(at: Setup) -> Iterator[Line]:
    model, prompts = load_policy(at)
    roll, seen = sample(model, prompts, at, at.L, "dynamic")
    again, static = sample(model, prompts, at, at.L, "static")
    engine.static_decode.cache_clear()  # it would keep the model
    packed = score(engine.packed_logprobs, model, roll, at)
    plain = score(grpo.plain_logprobs, model, roll, at)
    rescored = score(engine.packed_logprobs, model, again, at)
    right = engine.block_mask

    def wrong(prompt_mask, block):  # completions see those before them
        return right(prompt_mask, torch.ones_like(block))

    with patch.object(engine, "block_mask", wrong):
        error = score(engine.packed_logprobs, model, roll, at) - packed
    with patch.object(distributed, "autocast", lambda device: nullcontext()):
        exact = score(grpo.plain_logprobs, model.float(), roll, at)
    limit = 2 * (plain - exact).abs().mean().item()
    wanted = f"below {limit:.1e}, twice what bf16 itself changes"

    def line(check: str, difference: torch.Tensor, more: str = "") -> Line:
        mean = difference.abs().mean().item()
        return Line(check, f"mean difference {mean:.1e}{more}", wanted, mean < limit)

    more = f"; with a wrong mask {error[:, 1:].abs().mean():.1e}"
    yield line("packed = plain log-probs", packed - plain, more)
    yield line("rollout = scoring log-probs", seen - packed)
    agree = (again.tokens == roll.tokens).long().cumprod(2).bool()  # up to the first difference
    more = f"; {int(agree.all(2).sum())} of {at.B * at.N} rows equal to the end"
    yield line("static = dynamic decode", (static - seen)[agree], more)
    yield line("static decode = scoring log-probs", static - rescored)


# ==== 2. Decoding against the bandwidth of memory ====


def synchronized(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.randn(2**28 if device.type == "cuda" else 2**24, device=device)
    target, times = torch.empty_like(source), []
    for _ in range(6):
        began = synchronized(device)
        target.copy_(source)
        times.append(synchronized(device) - began)
    return 2 * source.nbytes / min(times)


def launches(work: Callable[[], object], gpu: bool) -> tuple[int, int]:
    """The kernels that `work` runs and the launches by the host; on a CPU operators, twice."""
    activities = [ProfilerActivity.CPU]
    if gpu:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as record:
        work()
    events = record.events()
    if not gpu:
        count = sum(event.name.startswith("aten::") for event in events)
        return count, count
    kernels = sum(event.device_type == DeviceType.CUDA for event in events)
    calls = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch")
    return kernels, sum(event.name.startswith(calls) for event in events)


def check_decode(at: Setup) -> Iterator[Line]:
    model, prompts = load_policy(at)
    weights = sum(p.nbytes for p in model.parameters())
    weights -= sum(p.nbytes for p in model.model.visual.parameters())
    floor = weights / bandwidth(at.world.device)
    short, long = at.L // 4, at.L // 2  # their difference is decoding alone

    for decode in ("dynamic", "static"):

        def run(L: int, decode: str = decode) -> float:
            began = synchronized(at.world.device)
            sample(model, prompts, at, L, decode)
            return synchronized(at.world.device) - began

        for L in (short, long):  # warms up, and captures
            run(L)
        seconds = [min(run(L) for _ in range(3 if at.gpu else 1)) for L in (short, long)]
        seconds = max(seconds[1] - seconds[0], 1e-9) / (long - short)
        counts = []
        for L in (4, 12):  # few: reading a profile of many tokens takes minutes
            run(L)
            counts.append(launches(lambda L=L: run(L), at.gpu))
        kernels, calls = ((b - a) / 8 for a, b in zip(*counts, strict=True))
        share = floor / seconds
        measured = f"{1000 * seconds:.2f} ms, {kernels:.0f} kernels, {calls:.0f} launches; "
        measured += f"reading the weights takes {1000 * floor:.2f} ms"
        if at.gpu:
            measured += f", {share:.0%} of it"
        judged = at.gpu and decode == "static"
        wanted = "at least 60 %" if judged else "measured"
        yield Line(f"{decode} decode, per token", measured, wanted, not judged or share >= 0.6)
    engine.static_decode.cache_clear()  # it would keep the model


# ==== 3. Three steps of 03 and 04, and their memory ====


def check_sft(at: Setup) -> Iterator[Line]:
    out = at.folder / "sft"
    flags = [*at.files, "--out", str(out), "--batch-size", str(at.B), "--micro-batch", "2"]
    flags += "--max-steps 3 --save-every 2 --lr 1e-4 --warmup-ratio 0".split()
    sft.main(flags)
    rows = read_log(out / "metrics.jsonl")
    losses = [row["loss"] for row in rows]
    finite = all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    measured = "loss " + ", ".join(f"{loss:.3f}" for loss in losses)
    yield Line("three steps of 03", measured, "finite, falling", finite and losses[2] < losses[0])
    shutil.rmtree(out / "checkpoint-000003")
    sft.main([*flags, "--resume"])
    again = read_log(out / "metrics.jsonl")[2]["loss"]
    difference = abs(again / losses[2] - 1)
    wanted = "below 1e-3"
    yield Line("03 resumed before its last step", f"{difference:.1e}", wanted, difference < 1e-3)


def tensor_bytes(tensors: list[torch.Tensor]) -> int:
    """What they hold, one that several models share counted once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def held(frozen: float, trained: float) -> float:
    """Bytes of weights, masters, gradients, AdamW, twin and reference of 04 on one GPU."""
    return 2 * frozen + (4 + 4 + 8 + 2 + 2) * trained


def one_pass(config, trained: float, B: int, N: int, P: int, L: int) -> float:
    """Bytes beside `held`, as README.md counts them: the rollout's cache, or what a group's pass
    leaves for its backward, with the logits and the bf16 copies of the trained weights."""
    text = config.text_config
    layers, head = text.num_hidden_layers, text.hidden_size // text.num_attention_heads
    cache = B * N * (P + L) * 2 * layers * text.num_key_value_heads * head * 2
    activations = 8 * text.intermediate_size + 33 * text.hidden_size  # per token and layer
    group = (P + N * L) * layers * activations
    return max(cache, group + 2 * N * L * text.vocab_size * 2 + 2 * trained)


def check_grpo(at: Setup) -> Iterator[Line]:
    out, parts = at.folder / "grpo", {}

    def rollout(twin, *rest):
        parts["twin"] = twin
        return engine.rollout(twin, *rest)

    def update(model, reference, rolls, A, world, optimizer, args, true=grpo.update):
        metrics = true(model, reference, rolls, A, world, optimizer, args)
        tensors = [*model.parameters(), *reference.parameters(), *parts["twin"].parameters()]
        for state in optimizer.state.values():
            tensors.extend(state.values())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        parts["held"] = tensor_bytes(tensors) + 4 * trained  # the gradients, which are gone by now
        parts["table"] = held(total - trained, trained)
        P = rolls[0].prompts["input_ids"].shape[1]
        parts["pass"] = one_pass(model.config, trained, at.B, at.N, P, at.L)
        return metrics

    flags = grpo_flags(at, out)
    watch = patch.multiple(grpo, rollout=rollout, update=update)
    with watch, patch.multiple(checkpoint, save=lambda *_: None, finish=lambda *_: None):
        grpo.main(flags)
    rows = read_log(out / "metrics.jsonl")
    finite = all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    kl = [row["kl"] for row in rows]
    measured = "KL " + ", ".join(f"{value:.1e}" for value in kl)
    passed = finite and abs(kl[0]) < 1e-6 < kl[2]
    yield Line("three steps of 04", measured, "finite, KL 0 at first", passed)
    seconds = rows[2]["seconds_rollout"] + rows[2]["seconds_update"]
    measured = f"{seconds:.1f} s, {rows[2]['seconds_rollout']:.1f} of them the rollout"
    yield Line(f"a step of 04, --train {at.train}", measured, "measured", True)
    ratio = parts["held"] / parts["table"]
    measured = f"{parts['held'] / 1e9:.3g} GB, {ratio:.2f} of the memory table's sum"
    yield Line("weights, gradients, AdamW, twin", measured, "0.97 to 1.03", abs(ratio - 1) < 0.03)
    peak, table = rows[2]["peak_memory_gib"] * 2**30, parts["table"] + parts["pass"]
    measured = f"{peak / 1e9:.3g} GB; by the table {table / 1e9:.3g} GB"
    wanted = f"at most {SPARE} of that" if at.gpu else "measured"
    yield Line("a step's peak memory", measured, wanted, not at.gpu or peak < SPARE * table)


def grpo_flags(at: Setup, out: Path) -> list[str]:
    flags = [*at.files, "--out", str(out), "--steps", "3", "--lr", "1e-4"]
    flags += ["--prompts-per-step", str(at.B), "--group-size", str(at.N)]
    return [*flags, "--max-new-tokens", str(at.L), "--train", at.train]


# ==== 4. Against trl, and sharded against one process ====


def check_trl(at: Setup) -> Iterator[Line]:
    if importlib.util.find_spec("trl") is None:
        return
    flags = ["--shape", at.shape, "--device", at.world.device.type, "--image", str(at.image)]
    flags += ["--prompts", str(at.B), "--samples", str(at.N), "--tokens", str(at.L)]
    flags += ["--text-tokens", "100", "--trl-micro-batch", "1"]
    flags += ["--steps", "2" if at.gpu else "1", "--warmup", "1" if at.gpu else "0"]
    if at.gpu:  # both sides are on it at a time
        memory = torch.cuda.get_device_properties(at.world.device).total_memory
        flags += ["--train", "llm" if memory > 135e9 else "merger"]
    command = [sys.executable, "-m", "benchmarks.grpo_step", *flags]
    # A process of its own, none of torchrun's ranks.
    unset = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    output = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    for name, wanted in (("whole step, s", 4), ("memory at the peak, GB", 1)):
        row = next(line for line in output.splitlines() if name in line)
        theirs, ours, ratio = map(float, row.split("|")[2:5])
        measured = f"trl {theirs:.2f}, 04 {ours:.2f}: {ratio:.2f} times"
        judged = f"at least {wanted} times" if at.gpu else "measured"
        yield Line(f"trl: {name}", measured, judged, not at.gpu or ratio >= wanted)


def check_shards(at: Setup) -> Iterator[Line]:
    """All ranks together with --shard, then rank 0 alone."""
    together, alone = at.folder / "together", at.folder / "alone"
    # Each rank must have as many prompts.
    at = replace(at, B=at.world.size * math.ceil(at.B / at.world.size))
    with patch.multiple(checkpoint, save=lambda *_: None, finish=lambda *_: None):
        grpo.main([*grpo_flags(at, together), "--shard"])
        release(at.world.device)
        if not at.world.main:
            return
        with patch.object(distributed, "start", lambda: replace(at.world, size=1)):
            grpo.main(grpo_flags(at, alone))
    sharded, whole = (read_log(out / "metrics.jsonl")[0] for out in (together, alone))
    for key in ("entropy", "grad_norm"):
        difference = abs(sharded[key] / whole[key] - 1)
        check = f"--shard over {at.world.size} = one process, {key}"
        yield Line(check, f"{difference:.1e}", "below 5e-2", difference < 0.05)


# ==== The table ====


def release(device: torch.device) -> None:
    """Gives the memory of what is not used any more back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def run_check(check: Callable[[Setup], Iterator[Line]], at: Setup) -> Iterator[Line]:
    """Its lines; where a check on one GPU breaks off, a last one that says why."""
    began, lines = time.perf_counter(), check(at)
    while True:
        try:
            with redirect_stdout(sys.stderr):
                line = next(lines)
        except StopIteration:
            break
        except (Exception, SystemExit) as error:
            if at.world.size > 1:  # the others would wait for ever
                raise
            traceback.print_exc()
            reason = " ".join(str(error).split())[:120].replace("|", "/")
            name = check.__name__.replace("_", " ")
            yield Line(name, f"{type(error).__name__}: {reason}", "to its end", False)
            break
        yield line
    release(at.world.device)
    print(f"{check.__name__}: {time.perf_counter() - began:.0f} s", file=sys.stderr)


def memory_table() -> list[str]:
    """The rows of benchmarks/README.md: GB by what is held, per model and trained group."""
    tokenizer, rows = vlm.load_processor(str(vlm.TINY)).tokenizer, []
    for shape in ("3b", "7b"):
        model = grpo_step.build_model(shape, tokenizer, torch.device("meta"))
        total = sum(p.numel() for p in model.parameters())
        for group in ("merger", "llm_mlp", "llm"):
            trained = sum(p.numel() for p in vlm.set_trainable(model, group).values())
            frozen = total - trained
            cells = [2 * frozen, 4 * trained, 4 * trained, 8 * trained, 2 * trained, 2 * trained]
            shares = (2 * frozen + 16 * trained + 2 * total) / 8
            cells += [held(frozen, trained), shares + 2 * total]
            numbers = " | ".join(f"{cell / 1e9:.1f}" for cell in cells)
            name = f"{shape.upper()} ({total / 1e9:.2f} G), `{group}`"
            rows.append(f"| {name} | {trained / 1e9:.3f} G | {numbers} |")
    return rows


CHECKS = {"equality": check_equality, "decode": check_decode, "sft": check_sft}
CHECKS |= {"grpo": check_grpo, "trl": check_trl, "shards": check_shards}


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--only", choices=CHECKS, nargs="+", default=CHECKS, help="these alone")
    parser.add_argument("--memory", action="store_true", help="print the memory table and end")
    args = parser.parse_args(argv)
    if args.memory:
        print("\n".join(memory_table()))
        return
    began = time.perf_counter()
    world = replace(distributed.start(), dtype=torch.bfloat16)
    folders = world.gather([tempfile.mkdtemp() if world.main else ""])
    at, verdicts = setup(world, Path(folders[0])), []
    if world.main:
        make_files(at)
        release(world.device)
        device = torch.cuda.get_device_name(world.device) if at.gpu else "the CPU, in emulation"
        size = f"{at.image} px, {at.B} x {at.N} x {at.L} tokens"
        print(f"The {at.shape} shape on {device}, {size}; torch {torch.__version__}")
        print("\n| check | measured | wanted | |\n| --- | --- | --- | --- |")
    world.wait()
    for name in args.only:
        together = name == "shards"
        if together and world.size == 1 or not together and not world.main:
            continue
        here = at if together else replace(at, world=replace(world, size=1))
        with stages_in(here):
            for line in run_check(CHECKS[name], here):
                verdicts.append(line.passed)
                verdict = "pass" if line.passed else "fail"
                row = f"| {line.check} | {line.measured} | {line.wanted} | {verdict} |"
                print(row, flush=True)
    world.wait()
    if world.main:
        shutil.rmtree(at.folder)
        minutes = (time.perf_counter() - began) / 60
        print(f"\n{sum(verdicts)} of {len(verdicts)} pass; {minutes:.1f} minutes")
    world.close()
    if not all(verdicts):
        sys.exit(1)


if __name__ == "__main__":
    main()
