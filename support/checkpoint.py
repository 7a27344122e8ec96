"""Checkpoints: <out>/checkpoint-000050/ is a complete Hugging Face folder plus state.pt.

All randomness of a run derives from (seed, step), so exact resumption needs the weights, the
optimiser's state and the step alone.
"""

import argparse
import hashlib
import os
import pickle
import re
import shutil
import sys
import zipfile
import zlib
from pathlib import Path

import torch

from support import vlm
from support.distributed import World, like, whole
from support.files import BadInput, claim, read_bytes, write_atomic, writing

# Flags that may differ between a run and its resumption: where and how fast it runs, when it ends.
FREE = {"out", "resume", "overwrite", "steps", "micro_batch", "save_every", "shard"}
FREE |= {"gradient_checkpointing", "no_prefix_sharing"}
OUTPUTS = ("metrics.jsonl", "rollouts.jsonl", "config.json", "*.safetensors*", "checkpoint-*")
UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, KeyError, zlib.error)
UNREADABLE += (zipfile.BadZipFile, pickle.UnpicklingError)


def open_run(args: argparse.Namespace, world: World) -> None:
    """Makes --out this run's: its settings go into run.json, or equal those there with --resume.

    Raises BadInput for another run's files, unless --overwrite, which deletes them.
    """
    if world.main:
        settings = {key: value for key, value in vars(args).items() if key not in FREE}
        files = [args.data / name for name in ("train/metadata.jsonl", "dataset_info.json")]
        data = b"".join(read_bytes(file) for file in files)
        settings["data"] = hashlib.sha256(data).hexdigest()
        overwrite = args.overwrite and not args.resume
        claim(args.out, settings, OUTPUTS, "run.json", go_on=args.resume, overwrite=overwrite)
    world.wait()


def save(
    out: Path, step: int, model, processor, trained: dict, optimizer, world: World, keep: int = 2
) -> None:
    """Writes checkpoint `step` under a temporary name and renames it; the last `keep` stay."""
    weights = {name: whole(tensor, world) for name, tensor in model.state_dict().items()}
    moments = optimizer.state_dict()
    for index, part in moments["state"].items():
        moments["state"][index] = {key: whole(value, world) for key, value in part.items()}
    if world.main:
        temporary, final = out / ".checkpoint.tmp", out / f"checkpoint-{step:06d}"
        masters = {name: weights[name] for name in trained}
        state = {"step": step, "trained": masters, "optimizer": moments}
        with writing(out):
            shutil.rmtree(temporary, ignore_errors=True)
            vlm.save_checkpoint(temporary, model, processor, weights)
            torch.save(state, temporary / "state.pt")
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            for old in checkpoints(out)[:-keep]:
                shutil.rmtree(old)
    world.wait()


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints under `out`, oldest first."""
    folders = out.glob("checkpoint-*")
    return sorted(path for path in folders if re.fullmatch(r"checkpoint-\d{6,}", path.name))


def resume(out: Path, trained: dict, optimizer, world: World) -> int:
    """Restores weights and optimiser from the newest checkpoint that can be read.

    Returns the steps done, 0 without any checkpoint. Raises BadInput when checkpoints exist but
    none can be read, or when they hold other parameters.
    """
    folders, state = checkpoints(out), None
    for folder in reversed(folders):
        try:
            state = read_state(folder / "state.pt", world)
            break
        except UNREADABLE:
            if world.main:
                fallback = "trying the checkpoint before it"
                print(f"{folder}/state.pt cannot be read; {fallback}", file=sys.stderr)
    steps = world.gather([state["step"] if state else 0])
    if len(set(steps)) > 1:
        raise BadInput(f"{out}: the ranks read different checkpoints; all must share the disk")
    if state is None:
        if folders:
            raise BadInput(f"{out}: no checkpoint can be read; start anew with --overwrite")
        return 0
    saved = state["trained"]
    shapes = {name: tensor.shape for name, tensor in saved.items()}
    if shapes != {name: parameter.shape for name, parameter in trained.items()}:
        remedy = "resume with the first run's --model and --train"
        raise BadInput(f"{folder}: holds other trained parameters; {remedy}")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(like(saved[name], parameter))
    parameters = list(trained.values())
    for index, part in state["optimizer"]["state"].items():
        for key, value in part.items():
            part[key] = like(value, parameters[index])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def read_state(path: Path, world: World) -> dict:
    """A state.pt: tensors and numbers, never code. Raises one of UNREADABLE when it is damaged."""
    with zipfile.ZipFile(path) as file:  # torch itself does not look at the checksums
        if file.testzip() is not None:
            raise zipfile.BadZipFile
    # On a GPU the file is mapped, not read: all processes of a machine share its pages.
    mapped = world.device.type == "cuda"
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def finish(out: Path, world: World) -> None:
    """Makes `out` itself the last checkpoint's Hugging Face folder: the next script takes it."""
    if not world.main:
        return
    files = [file for file in checkpoints(out)[-1].iterdir() if file.name != "state.pt"]
    for file in sorted(files, key=lambda file: file.name == "config.json"):  # which comes last
        write_atomic(out / file.name, lambda path, file=file: shutil.copyfile(file, path))
