r"""One GRPO step of trl's GRPOTrainer and of 04_grpo.py on the same work: seconds by part, memory, and their ratio.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python -m benchmarks.grpo_step                                              CPU, the tiny shape, two minutes
    python -m benchmarks.grpo_step --shape 3b --device cuda --image 512 --text-tokens 100 --tokens 200 \
        --trl-micro-batch 1

Both sides get the same random weights, noise pictures, prompts, lengths and threads, AdamW and a reference model;
nothing is downloaded. Each side is a process of its own and the two step in turn, so that a busy machine slows both
alike. The first steps warm up; the table holds medians of the others. README.md says what is made equal, and how.
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
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from support import tiny_vlm, train, vlm

PARTS = ("whole", "rollout", "reference", "forward", "backward", "rest")
TEXT = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "tie_word_embeddings")  # fmt: skip
# The text model, its mrope_section, the vision tower. "tiny" has the proportions of the 3B: 5.7 M parameters.
SHAPES = {
    "tiny": ((256, 4, 1152, 8, 2, 560, True), [4, 6, 6],
             {"hidden_size": 128, "depth": 4, "intermediate_size": 344, "num_heads": 4, "fullatt_block_indexes": [3]}),
    "3b": ((2048, 36, 11008, 16, 2, 151936, True), [16, 24, 24], {"hidden_size": 1280}),
    "7b": ((3584, 28, 18944, 28, 4, 152064, False), [16, 24, 24], {"hidden_size": 1280}),
}  # fmt: skip


def build_model(shape: str, tokenizer, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A Qwen2.5-VL of a shape in SHAPES with random weights; its special tokens are the tiny tokenizer's."""
    numbers, sections, vision = SHAPES[shape]
    tokens, text = tiny_vlm.build_config(tokenizer), dict(zip(TEXT, numbers, strict=True))
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    text |= {name: getattr(tokens.text_config, name) for name in ("bos_token_id", "eos_token_id")}
    special = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config={**vision, "out_hidden_size": text["hidden_size"]},
        tie_word_embeddings=text["tie_word_embeddings"],
        **{name: getattr(tokens, name) for name in special},
    )
    torch.manual_seed(0)
    with device:
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def trl_trainer(model, reference, processor: vlm.Processor, rows: list[dict], reward, optimizer=None, **settings):
    """trl's GRPOTrainer as 04_grpo.py would configure it; rows hold a `prompt` text and an `image`.

    `settings` are GRPOConfig's. `reward` is trl's reward function. trl would read the reference from disk: here it is
    given (None without KL), and nothing is reported to the hub.
    """
    from datasets import Dataset
    from transformers import PrinterCallback
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
    from trl import GRPOConfig, GRPOTrainer

    class ImageProcessor(Qwen2_5_VLProcessor):  # without the video processor, which needs torchvision
        def __init__(self, image_processor=None, tokenizer=None):
            super().__init__(image_processor, tokenizer, chat_template=tokenizer.chat_template)

    algorithm = {"loss_type": "grpo", "scale_rewards": "group", "use_bias_correction_kl": False, "epsilon": 0.2,
                 "beta": 0.04, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "shuffle_dataset": False}  # fmt: skip
    update = {"gradient_checkpointing": False, "bf16": False, "lr_scheduler_type": "constant", "weight_decay": 0.0,
              "max_grad_norm": 1.0}  # fmt: skip
    silence = {"output_dir": tempfile.gettempdir(), "save_strategy": "no", "logging_strategy": "no",
               "report_to": "none", "disable_tqdm": True}  # fmt: skip
    config = GRPOConfig(**{**algorithm, **update, **silence, **settings})
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.padding_side = "left"  # as trl loads it: its image-token marks follow this, its prompts are always so
    chats = [{"prompt": [{"role": "user", "content": row["prompt"]}], "image": row["image"]} for row in rows]
    halves = ImageProcessor(processor.image_processor, tokenizer)
    load = "trl.trainer.grpo_trainer.create_model_from_path"
    with patch(load, lambda *_, **__: reference), patch.object(GRPOTrainer, "_send_telemetry"):
        trainer = GRPOTrainer(model, reward, config, Dataset.from_list(chats), processing_class=halves,
                              optimizers=(optimizer, None))  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


class Side:
    """A worker's end of the conversation: waits for the parent's word, times a step and its parts, answers in JSON."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, Counter()
        self.answers, sys.stdout = sys.stdout, sys.stderr  # whatever else is printed goes past the parent

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def time(self, owner, name: str, part) -> None:
        """Replaces owner.name by itself with a clock; `part` names the row, or is a function of the first argument."""
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            start = self.now()
            result = function(*args, **kwargs)
            self.seconds[part(args[0]) if callable(part) else part] += self.now() - start
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
            status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
            held, peak = (1024 * int(status[key].split()[0]) for key in ("VmRSS", "VmHWM"))
        rest = whole - sum(self.seconds.values())
        row = {"whole": whole, **self.seconds, "rest": rest, "held": held / 1e9, "peak": peak / 1e9}
        print(json.dumps(row), file=self.answers, flush=True)


def run_04(args, side: Side, model, processor, prompts: list[str], images: list[Image.Image], rng) -> None:
    """The functions of 04_grpo.py in the order of its main loop."""
    grpo = importlib.import_module("04_grpo")
    flags = grpo.parser().parse_args(["--micro-batch", str(args.micro_batch)])
    world, trained = train.World(0, 1, side.device), vlm.set_trainable(model, args.train)
    reference = vlm.frozen_copy(model)
    optimizer = torch.optim.AdamW(trained.values(), lr=flags.lr, weight_decay=0.0)
    side.time(grpo, "rollout", "rollout")
    side.time(grpo, "packed_logprobs", lambda scored: "forward" if scored is model else "reference")
    side.time(torch.Tensor, "backward", "backward")
    side.answer()
    for step in range(args.warmup + args.steps):
        side.wait()
        batch = vlm.to_device(vlm.encode(processor, images, prompts), side.device)
        B, N, L = args.prompts, args.samples, args.tokens
        u = torch.from_numpy(np.stack([[grpo.uniforms(0, step, b, n, L) for n in range(N)] for b in range(B)]))
        model.eval()
        with train.autocast(side.device):
            roll = grpo.rollout(model, batch, u.to(side.device), [], flags.temperature)
        for tokens in roll.tokens.flatten(0, 1).tolist():
            vlm.decode(processor, tokens, [])
        A = grpo.advantages(torch.from_numpy(rng.integers(0, 5, (B, N))).float().to(side.device))
        model.train()
        cuts = [slice(b, b + flags.micro_batch) for b in range(0, B, flags.micro_batch)]
        parts = [grpo.Rollout(vlm.select(roll.prompts, cut), roll.tokens[cut], roll.mask[cut], roll.finished[cut])
                 for cut in cuts]  # fmt: skip
        grpo.update(model, reference, parts, [A[cut] for cut in cuts], world, optimizer, flags)
        side.answer()


def run_trl(args, side: Side, model, processor, prompts: list[str], images: list[Image.Image], rng) -> None:
    """trl's own training loop, held up before every step until the parent says go."""
    from transformers import TrainerCallback

    class InTurn(TrainerCallback):
        def on_step_begin(self, *_, **__):
            side.wait()

        def on_step_end(self, *_, **__):
            side.answer()

    trl_utils = importlib.import_module("trl.trainer.utils")
    trl_utils._use_triton = lambda device: True  # asked there only to choose: score the completion's positions or all
    reference = copy.deepcopy(model).requires_grad_(False)  # in the dtype of the checkpoint, as 04's
    vlm.set_trainable(model, args.train)
    special = {*vlm.stop_ids(model, processor), *processor.tokenizer.convert_tokens_to_ids(tiny_vlm.SPECIAL)}
    trainer = trl_trainer(
        model,
        reference,
        processor,
        [{"prompt": prompt, "image": image} for prompt, image in zip(prompts, images, strict=True)],
        lambda completions, **_: rng.integers(0, 5, len(completions)).astype(float).tolist(),
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
    trainer.add_callback(InTurn())
    side.time(trainer, "_generate_single_turn", "rollout")
    side.time(trainer, "_get_per_token_logps_and_entropies",
              lambda scored: "reference" if scored is trainer.ref_model else "forward")  # fmt: skip
    side.time(torch.Tensor, "backward", "backward")
    side.answer()
    trainer.train()


def work(args) -> None:
    """One side, in its own process: loads, answers with its memory, then steps whenever the parent says so."""
    device = torch.device(args.device)
    side = Side(device)
    torch.set_num_threads(args.threads)
    processor = vlm.load_processor(str(tiny_vlm.DEFAULT))
    processor.image_processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=2048 * 2048)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16  # trained weights become fp32 masters
    model = build_model(args.shape, processor.tokenizer, device, dtype)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (args.prompts, args.image, args.image, 3), dtype=np.uint8)
    images = [Image.fromarray(picture) for picture in noise]
    word = " lesion"  # one token, repeated until the prompt has as many tokens as asked for
    text = int((vlm.encode(processor, images[:1], [word])["mm_token_type_ids"] == 0).sum())
    prompts = [word * (args.text_tokens - text + 1)] * args.prompts
    (run_04 if args.side == "04" else run_trl)(args, side, model, processor, prompts, images, rng)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="architecture, random weights (%(default)s)")
    parser.add_argument("--train", choices=vlm.GROUPS, default="llm", help="what is trained; 04's default: llm")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each side (%(default)s)")
    parser.add_argument("--image", type=int, default=224, help="side of the square pictures, pixels (%(default)s)")
    parser.add_argument("--prompts", type=int, default=8, help="prompts a step (%(default)s)")
    parser.add_argument("--samples", type=int, default=5, help="completions a prompt (%(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens a completion (%(default)s)")
    parser.add_argument("--text-tokens", type=int, default=50, help="tokens of a prompt beside its picture's (50)")
    parser.add_argument("--micro-batch", type=int, default=1, help="04's flag: groups a training pass (%(default)s)")
    parser.add_argument("--trl-micro-batch", type=int, help="the same for trl (all of a step at once)")
    parser.add_argument("--steps", type=int, default=8, help="measured steps (%(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before those (%(default)s)")
    parser.add_argument("--side", choices=("trl", "04"), help=argparse.SUPPRESS)  # what a worker is started with
    return parser


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    args.trl_micro_batch = args.trl_micro_batch or args.prompts
    if args.side:
        return work(args)
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "PYTHONWARNINGS": "ignore::FutureWarning"}
    workers = {
        side: subprocess.Popen(
            [sys.executable, "-m", "benchmarks.grpo_step", *argv, "--side", side],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            cwd=Path(__file__).resolve().parent.parent,
        )
        for side in ("trl", "04")
    }  # fmt: skip

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

    def median(side: str, key: str) -> float:
        return statistics.median(row.get(key, 0.0) for row in rows[side][args.warmup :])

    names = {"whole": "whole step", "rest": "rest: patches, rewards, loss, optimiser"}
    versions = ", ".join(f"{package} {version(package)}" for package in ("trl", "transformers", "torch"))
    print(f"{args.shape}, training {args.train}, {args.image} px, {args.prompts} x {args.samples} x {args.tokens} "
          f"tokens, {args.device}, threads: {args.threads}; {versions}")  # fmt: skip
    print("\n| | trl | 04_grpo.py | ratio |\n| --- | --- | --- | --- |")
    table = [(f"{names.get(key, key)}, s", *(median(side, key) for side in workers)) for key in PARTS]
    table.append(("memory after loading, GB", *(loaded[side]["held"] for side in workers)))
    table.append(("memory at the peak, GB", *(rows[side][-1]["peak"] for side in workers)))
    for name, theirs, ours in table:
        print(f"| {name} | {theirs:.2f} | {ours:.2f} | {theirs / max(ours, 1e-9):.2f} |")
    print(f"\nratio: step {table[0][1] / table[0][2]:.2f}, peak memory {table[-1][1] / table[-1][2]:.2f}")


if __name__ == "__main__":
    main()
