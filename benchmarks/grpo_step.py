r"""One GRPO step of trl's GRPOTrainer and of 04_grpo.py on the same work: seconds by part, memory,
and their ratio.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python -m benchmarks.grpo_step                               CPU, the tiny shape, two minutes
    python -m benchmarks.grpo_step --lengths varied              completions of unequal length
    python -m benchmarks.grpo_step --shape 3b --device cuda --image 512 --text-tokens 100 \
        --tokens 200 --trl-micro-batch 1

Both sides get the same random weights, noise pictures, prompts, lengths and threads, AdamW and a
reference model; nothing is downloaded. Each side is a process of its own and the two step in turn,
so that a busy machine slows both alike. The first steps warm up; the table holds medians of the
others. README.md says what is made equal, and how.
"""

import argparse
import copy
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import (
    AutoModelForImageTextToText,
    LogitsProcessor,
    LogitsProcessorList,
    Qwen2_5_VLConfig,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from assets import build_tiny_vlm
from support import distributed, vlm

PARTS = ("whole", "rollout", "reference", "forward", "backward", "rest")
TEXT = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
TEXT += ("num_key_value_heads", "vocab_size", "tie_word_embeddings")
SPECIAL = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
TINY_VISION = {"hidden_size": 128, "depth": 4, "intermediate_size": 344, "num_heads": 4}
TINY_VISION |= {"fullatt_block_indexes": [3]}
# TEXT, mrope_section, vision tower. "tiny" has the proportions of the 3B: 5.7 M parameters; "micro"
# is for checks that look at no time. None: as many words as the tiny tokenizer has.
SHAPES = {
    "micro": ((128, 2, 384, 4, 2, None, True), [4, 6, 6], TINY_VISION),
    "tiny": ((256, 4, 1152, 8, 2, None, True), [4, 6, 6], TINY_VISION),
    "3b": ((2048, 36, 11008, 16, 2, 151936, True), [16, 24, 24], {"hidden_size": 1280}),
    "7b": ((3584, 28, 18944, 28, 4, 152064, False), [16, 24, 24], {"hidden_size": 1280}),
}
# GRPOConfig's settings that make trl compute what 04_grpo.py computes.
ALGORITHM = {"loss_type": "grpo", "scale_rewards": "group", "use_bias_correction_kl": False}
ALGORITHM |= {"epsilon": 0.2, "beta": 0.04, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
ALGORITHM |= {"shuffle_dataset": False, "gradient_checkpointing": False, "bf16": False}
ALGORITHM |= {"lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 1.0}
SILENCE = {"output_dir": tempfile.gettempdir(), "save_strategy": "no", "logging_strategy": "no"}
SILENCE |= {"report_to": "none", "disable_tqdm": True}


def build_model(
    shape: str, tokenizer, device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    """A Qwen2.5-VL of a shape in SHAPES: random weights, the tiny tokenizer's special ids."""
    numbers, sections, vision = SHAPES[shape]
    tiny = build_tiny_vlm.build_config(tokenizer)
    text = dict(zip(TEXT, numbers, strict=True))
    text["vocab_size"] = text["vocab_size"] or tiny.text_config.vocab_size
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    text |= {"rope_parameters": rope, "bos_token_id": tiny.text_config.bos_token_id}
    text |= {"eos_token_id": tiny.text_config.eos_token_id}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config={**vision, "out_hidden_size": text["hidden_size"]},
        tie_word_embeddings=text["tie_word_embeddings"],
        **{name: getattr(tiny, name) for name in SPECIAL},
    )
    torch.manual_seed(0)
    build = AutoModelForImageTextToText.from_config
    with device:
        return build(config, dtype=dtype, attn_implementation="sdpa").eval()


def trl_trainer(
    model, reference, processor: vlm.Processor, rows: list[dict], reward, optimizer=None, **settings
):
    """trl's GRPOTrainer as 04_grpo.py would configure it; rows hold a `prompt` and an `image`.

    `settings` are GRPOConfig's. `reward` is trl's reward function. trl would read the reference
    from disk: here it is given (None without KL), and nothing is reported to the hub.
    """
    from datasets import Dataset
    from transformers import PrinterCallback
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
    from trl import GRPOConfig, GRPOTrainer

    class ImageProcessor(Qwen2_5_VLProcessor):  # without the video processor: it needs torchvision
        def __init__(self, image_processor=None, tokenizer=None):
            super().__init__(image_processor, tokenizer, chat_template=tokenizer.chat_template)

    config = GRPOConfig(**{**ALGORITHM, **SILENCE, **settings})
    tokenizer = copy.deepcopy(processor.tokenizer)
    # As trl loads it: its image-token marks follow this side, its prompts are always padded so.
    tokenizer.padding_side = "left"
    chats = []
    for row in rows:
        turns = [{"role": "user", "content": row["prompt"]}]
        chats.append({"prompt": turns, "image": row["image"]})
    load = "trl.trainer.grpo_trainer.create_model_from_path"
    with patch(load, lambda *_, **__: reference), patch.object(GRPOTrainer, "_send_telemetry"):
        trainer = GRPOTrainer(
            model,
            reward,
            config,
            Dataset.from_list(chats),
            processing_class=ImageProcessor(processor.image_processor, tokenizer),
            optimizers=(optimizer, None),
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


class Side:
    """A worker's end of the conversation: it waits for the parent's word, times a step and its
    parts, and answers in JSON."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, Counter()
        self.answers, sys.stdout = sys.stdout, sys.stderr  # other prints go past the parent

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def time(self, owner, name: str, part) -> None:
        """Replaces owner.name by itself with a clock.

        `part` names the row, or is a function of the call's first argument.
        """
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            start = self.now()
            result = function(*args, **kwargs)
            name = part(args[0]) if callable(part) else part
            self.seconds[name] += self.now() - start
            return result

        setattr(owner, name, timed)

    def wait(self) -> None:
        if not sys.stdin.readline():
            sys.exit()
        self.seconds.clear()
        self.start = self.now()

    def answer(self) -> None:
        whole = self.now() - self.start if self.seconds else 0.0
        if self.device.type == "cuda":
            held, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
            torch.cuda.empty_cache()  # the other side needs the memory now
        else:  # Linux counts resident pages in kB
            status = Path("/proc/self/status").read_text()
            held = 1024 * int(status.split("VmRSS:")[1].split()[0])
            peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
        row = {"whole": whole, **self.seconds, "rest": whole - sum(self.seconds.values())}
        row |= {"held": held / 1e9, "peak": peak / 1e9}
        print(json.dumps(row), file=self.answers, flush=True)


def draw_lengths(args, step: int) -> np.ndarray:
    """The tokens of each completion of a step, EOS counted, [prompts, samples].

    "varied": a skewed draw whose longest has --tokens and whose mean is about 0.4 of that.
    """
    if args.lengths == "fixed":
        return np.full((args.prompts, args.samples), args.tokens)
    share = np.random.default_rng(step).beta(1.5, 3, (args.prompts, args.samples))
    return np.ceil(args.tokens * share / share.max()).astype(int)


def run_04(args, side: Side, model, processor, prompts: list[str], images: list, rng) -> None:
    """The functions of 04_grpo.py in the order of its main loop."""
    grpo = importlib.import_module("04_grpo")
    flags = ["--model", str(vlm.TINY), "--train", args.train, "--inner-epochs", "1"]
    flags += ["--micro-batch", str(args.micro_batch), "--group-size", str(args.samples)]
    flags += ["--max-new-tokens", str(args.tokens), "--decode", args.decode, "--lr", "1e-6"]
    flags = grpo.parse_args(flags)
    world = distributed.World(0, 1, side.device, model.dtype)
    stop = model.config.text_config.vocab_size - 1
    with patch.object(vlm, "load_model", lambda *_: model):
        model, trained = distributed.load_for_training(flags, world)
        twin = distributed.load_twin(flags, model, trained, world)
        reference = distributed.load_reference(flags, model, world)
    fused = side.device.type == "cuda" or None
    optimizer = torch.optim.AdamW(trained.values(), lr=flags.lr, weight_decay=0.0, fused=fused)
    side.time(grpo, "rollout", "rollout")
    side.time(grpo, "packed_logprobs", lambda used: "forward" if used is model else "reference")
    side.time(torch.Tensor, "backward", "backward")
    side.answer()
    for step in range(args.warmup + args.steps):
        side.wait()
        batch = vlm.to_device(vlm.encode(processor, images, prompts), side.device)
        # The last word ends a completion. Only 1 draws it: it is less probable than 0.1.
        u = 0.9 * grpo.draw_uniforms(list(range(args.prompts)), step, flags)
        lengths = torch.from_numpy(draw_lengths(args, step))
        u.scatter_(2, lengths[..., None] - 1, 1.0)
        distributed.refresh(twin, trained)
        twin.eval()
        with distributed.autocast(side.device):
            u = u.to(side.device)
            roll = grpo.rollout(twin, batch, u, [stop], flags.temperature, flags.decode)
        assert torch.equal(roll.mask.sum(2).cpu(), lengths)
        for tokens in roll.tokens.flatten(0, 1).tolist():
            vlm.decode(processor, tokens, [])
        reward = torch.from_numpy(rng.integers(0, 5, (args.prompts, args.samples))).float()
        A = grpo.advantages(reward.to(side.device))
        model.train()
        cuts = [slice(b, b + flags.micro_batch) for b in range(0, args.prompts, flags.micro_batch)]
        parts = [roll.rows(cut) for cut in cuts]
        grpo.update(model, reference, parts, [A[c] for c in cuts], world, optimizer, flags)
        side.answer()


class EndAt(LogitsProcessor):
    """Makes each row's completion end with EOS after its number of tokens."""

    def __init__(self, lengths: torch.Tensor, eos: int):
        self.lengths, self.eos, self.tokens = lengths, eos, 0

    def __call__(self, input_ids, scores):
        self.tokens += 1
        ends = self.lengths == self.tokens
        scores[ends] = -torch.inf
        scores[ends, self.eos] = 0.0
        return scores


def run_trl(args, side: Side, model, processor, prompts: list[str], images: list, rng) -> None:
    """trl's own training loop, held up before every step until the parent says go."""
    from transformers import TrainerCallback

    class InTurn(TrainerCallback):
        def on_step_begin(self, *_, **__):
            side.wait()

        def on_step_end(self, *_, **__):
            side.answer()

    trl_utils = importlib.import_module("trl.trainer.utils")
    # Asked there only to choose: the output layer on the completion's positions, or on all.
    trl_utils._use_triton = lambda device: True
    reference = copy.deepcopy(model).requires_grad_(False)  # in the checkpoint's dtype, as 04's
    vlm.set_trainable(model, args.train)
    distributed.make_masters(model)
    special = processor.tokenizer.convert_tokens_to_ids(build_tiny_vlm.SPECIAL)
    special = {*vlm.stop_ids(model, processor), *special}
    rows = []
    for prompt, image in zip(prompts, images, strict=True):
        rows.append({"prompt": prompt, "image": image})

    def reward(completions, completion_ids, **_) -> list[float]:
        lengths = draw_lengths(args, trainer.state.global_step)
        assert list(map(len, completion_ids)) == lengths.flatten().tolist()
        return rng.integers(0, 5, len(completions)).astype(float).tolist()

    trainer = trl_trainer(
        model,
        reference,
        processor,
        rows,
        reward,
        max_steps=args.warmup + args.steps,
        learning_rate=1e-6,
        per_device_train_batch_size=args.trl_micro_batch * args.samples,
        gradient_accumulation_steps=args.prompts // args.trl_micro_batch,
        num_generations=args.samples,
        max_completion_length=args.tokens,
        generation_kwargs={"suppress_tokens": sorted(special)},
        use_cpu=side.device.type == "cpu",
        bf16=side.device.type == "cuda",
    )

    generate = model.generate

    def generate_lengths(*given, **options):
        lengths = torch.from_numpy(draw_lengths(args, trainer.state.global_step)).flatten()
        end = EndAt(lengths.to(side.device), processor.tokenizer.eos_token_id)
        return generate(*given, logits_processor=LogitsProcessorList([end]), **options)

    def part(used) -> str:
        return "reference" if used is trainer.ref_model else "forward"

    model.generate = generate_lengths
    trainer.add_callback(InTurn())
    side.time(trainer, "_generate_single_turn", "rollout")
    side.time(trainer, "_get_per_token_logps_and_entropies", part)
    side.time(torch.Tensor, "backward", "backward")
    side.answer()
    trainer.train()


def work(args) -> None:
    """One side, in its own process: loads, answers with its memory, then steps when told to."""
    device = torch.device(args.device)
    side = Side(device)
    torch.set_num_threads(args.threads)
    processor = vlm.load_processor(str(vlm.TINY))
    images = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=2048 * 2048)
    processor.image_processor = images
    # In bf16 the trained weights become fp32 masters.
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = build_model(args.shape, processor.tokenizer, device, dtype)
    rng = np.random.default_rng(0)
    size = (args.prompts, args.image, args.image, 3)
    noise = rng.integers(0, 256, size, dtype=np.uint8)
    images = [Image.fromarray(picture) for picture in noise]
    word = " lesion"  # one token, repeated until the prompt has as many tokens as asked for
    text = int((vlm.encode(processor, images[:1], [word])["mm_token_type_ids"] == 0).sum())
    prompts = [word * (args.text_tokens - text + 1)] * args.prompts
    run = run_04 if args.side == "04" else run_trl
    run(args, side, model, processor, prompts, images, rng)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="tiny", help="architecture, random weights (tiny)")
    add("--train", choices=vlm.GROUPS, default="llm", help="what is trained (04's default: llm)")
    add("--device", default="cpu", help="cpu or cuda (cpu)")
    add("--threads", type=int, default=1, help="CPU threads per side (1)")
    add("--image", type=int, default=224, help="side of the square pictures in px (224)")
    add("--prompts", type=int, default=8, help="prompts per step (8)")
    add("--samples", type=int, default=5, help="completions per prompt (5)")
    add("--tokens", type=int, default=64, help="tokens per completion, the most if varied (64)")
    add("--lengths", choices=("fixed", "varied"), default="fixed", help="of completions (fixed)")
    add("--decode", choices=("dynamic", "static"), default="dynamic", help="04's flag (dynamic)")
    add("--text-tokens", type=int, default=50, help="a prompt's tokens but for its picture (50)")
    add("--micro-batch", type=int, default=1, help="04's flag: groups per training pass (1)")
    add("--trl-micro-batch", type=int, help="the same for trl (all of a step at once)")
    add("--steps", type=int, default=8, help="measured steps (8)")
    add("--warmup", type=int, default=2, help="steps before those (2)")
    add("--side", choices=("trl", "04"), help=argparse.SUPPRESS)  # what a worker is started with
    args = parser.parse_args(argv)
    args.trl_micro_batch = args.trl_micro_batch or args.prompts
    return args


def start_worker(side: str, argv: list[str], threads: int) -> subprocess.Popen:
    quiet = {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore::FutureWarning"}
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.grpo_step", *argv, "--side", side],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **quiet},
        cwd=Path(__file__).resolve().parent.parent,
    )


def print_table(args, loaded: dict[str, dict], rows: dict[str, list[dict]]) -> None:
    """Medians of both sides' measured steps, and their ratios."""

    def medians(key: str) -> list[float]:
        measured = [rows[side][args.warmup :] for side in ("trl", "04")]
        return [statistics.median(row.get(key, 0.0) for row in part) for part in measured]

    names = {"whole": "whole step", "rest": "rest: patches, rewards, loss, optimiser"}
    table = [(f"{names.get(key, key)}, s", *medians(key)) for key in PARTS]
    held = [loaded[side]["held"] for side in ("trl", "04")]
    peak = [rows[side][-1]["peak"] for side in ("trl", "04")]
    table += [("memory after loading, GB", *held), ("memory at the peak, GB", *peak)]
    versions = [f"{package} {version(package)}" for package in ("trl", "transformers", "torch")]
    size = f"{args.image} px, {args.prompts} x {args.samples} x {args.tokens} tokens"
    print(f"{args.shape}, training {args.train}, {size}, {args.device}, threads: {args.threads}")
    steps = range(args.warmup, args.warmup + args.steps)
    mean = statistics.mean(draw_lengths(args, step).mean() for step in steps)
    print(f"lengths {args.lengths}, mean {mean:.1f}; --decode {args.decode}")
    print(", ".join(versions))
    print("\n| | trl | 04_grpo.py | ratio |\n| --- | --- | --- | --- |")
    for name, theirs, ours in table:
        print(f"| {name} | {theirs:.2f} | {ours:.2f} | {theirs / max(ours, 1e-9):.2f} |")
    step, memory = table[0][1] / table[0][2], peak[0] / peak[1]
    print(f"\nratio: step {step:.2f}, peak memory {memory:.2f}")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    if args.side:
        return work(args)
    workers = {side: start_worker(side, argv, args.threads) for side in ("trl", "04")}

    def listen(side: str) -> dict:
        line = workers[side].stdout.readline()
        if not line:
            sys.exit(f"error: the {side} side ended early; its messages are above")
        return json.loads(line)

    loaded = {side: listen(side) for side in workers}
    rows = {side: [] for side in workers}
    for step in tqdm(range(args.warmup + args.steps), unit="pair of steps"):
        for side in list(workers)[:: -1 if step % 2 else 1]:
            print("go", file=workers[side].stdin, flush=True)
            rows[side].append(listen(side))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    print_table(args, loaded, rows)


if __name__ == "__main__":
    main()
