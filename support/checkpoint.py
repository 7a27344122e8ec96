"""Checkpoints: <out>/checkpoint-000050/ is a complete Hugging Face folder plus state.pt.

All randomness of a run derives from (seed, step), so exact resumption needs the weights, the
optimiser's state and the step alone.
"""

import argparse
import hashlib
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

import torch

from support import vlm
from support.distributed import World, like, whole
from support.files import BadInput, claim, digest, read_bytes, reading, write_atomic, writing

# Flags that may differ between a run and its resumption: where and how fast it runs, when it ends.
FREE = {"out", "resume", "overwrite", "steps", "micro_batch", "save_every", "shard"}
FREE |= {"gradient_checkpointing", "no_prefix_sharing", "decode"}
OUTPUTS = ("metrics.jsonl", "rollouts.jsonl", "config.json", "*.safetensors*", "checkpoint-*")


def open_run(args: argparse.Namespace, world: World) -> None:
    """Makes --out this run's: its settings go into run.json, or equal those there with --resume.

    Raises BadInput for another run's files, unless --overwrite, which deletes them.
    """
    if world.main:
        fixed = args.warmup_ratio == 0 and getattr(args, "schedule", None) == "constant"
        free = FREE if fixed else FREE - {"steps"}  # each step's learning rate depends on them
        settings = {key: value for key, value in vars(args).items() if key not in free}
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
            for place in (temporary, final):
                if os.path.lexists(place) and (place.is_symlink() or not place.is_dir()):
                    place.unlink()
            shutil.rmtree(temporary, ignore_errors=True)
            vlm.save_checkpoint(temporary, model, processor, weights)
            torch.save(state, temporary / "state.pt")
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            kept = [folder for folder in checkpoints(out) if step_of(folder) <= step][-keep:]
            for folder in checkpoints(out):
                if folder not in kept:  # older ones, and later ones that could not be read
                    shutil.rmtree(folder)
    world.wait()


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints under `out`, oldest first: folders proper, no links."""
    found = []
    for path in out.glob("checkpoint-*"):
        if re.fullmatch("checkpoint-[0-9]{6,15}", path.name) and not path.is_symlink():
            found += [path] if os.path.isdir(path) else []
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(folder.name.removeprefix("checkpoint-"))


def resume(out: Path, trained: dict, optimizer, world: World) -> int:
    """Restores weights and optimiser from the newest checkpoint that can be read.

    Rank 0 looks for it, the others follow. Returns the steps done, 0 without any checkpoint. Raises
    BadInput when checkpoints exist but none can be read.
    """
    state, steps = None, []
    for folder in reversed(checkpoints(out)) if world.main else ():
        try:
            state = read_state(folder, trained, world)
            steps = [state["step"]]
            break
        except BadInput as error:
            print(f"{error}; trying the checkpoint before it", file=sys.stderr)
    if world.main and checkpoints(out) and not steps:
        raise BadInput(f"{out}: no checkpoint can be read; start anew with --overwrite")
    steps = world.gather(steps)
    if not steps:
        return 0
    if not world.main:
        state = read_state(out / f"checkpoint-{steps[0]:06d}", trained, world)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(like(state["trained"][name], parameter))
    parameters = list(trained.values())
    for index, part in state["optimizer"]["state"].items():
        for key, value in part.items():
            part[key] = like(value, parameters[index])
    state["optimizer"]["param_groups"] = optimizer.state_dict()["param_groups"]  # from the flags
    optimizer.load_state_dict(state["optimizer"])
    return steps[0]


def read_state(folder: Path, trained: dict, world: World) -> dict:
    """The state.pt of a checkpoint: tensors and numbers, never code.

    Raises BadInput when it is damaged or not of this step and these parameters.
    """
    path = folder / "state.pt"
    with reading(path, Exception):  # there is nothing that torch.load could not raise
        if world.main:  # torch itself does not look at the checksums, and once is enough
            with zipfile.ZipFile(path) as file:
                if file.testzip() is not None:
                    raise ValueError("a checksum is wrong")
        # On a GPU the file is mapped, not read: all processes of a machine share its pages.
        mapped = world.device.type == "cuda"
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        if type(state["step"]) is not int or state["step"] != step_of(folder):
            raise ValueError("it is of another step")
        forms = {name: (parameter.shape, parameter.dtype) for name, parameter in trained.items()}
        if {name: _form(value) for name, value in state["trained"].items()} != forms:
            raise ValueError("it holds other parameters")
        moments, parameters = state["optimizer"]["state"], dict(enumerate(trained.values()))
        for index, part in moments.items():
            form = parameters[index].shape, parameters[index].dtype
            wanted = {"step": (torch.Size(), torch.float32), "exp_avg": form, "exp_avg_sq": form}
            if {key: _form(moment) for key, moment in part.items()} != wanted:
                raise ValueError("it holds other moments")
        if state["step"] and not moments:
            raise ValueError("it holds no moments")
    return state


def _form(tensor: torch.Tensor) -> tuple | None:
    """Shape and dtype; None of what has no plain numbers, as a sparse tensor."""
    plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
    return (tensor.shape, tensor.dtype) if plain else None


def finish(out: Path, step: int, world: World) -> None:
    """Makes `out` itself the Hugging Face folder of checkpoint `step`: the next script takes it."""
    if not world.main:
        return
    folder = out / f"checkpoint-{step:06d}"
    files = [file for file in folder.iterdir() if file.name != "state.pt"]
    for file in sorted(files, key=lambda file: file.name == "config.json"):  # which comes last
        write_atomic(out / file.name, lambda path, file=file: shutil.copyfile(file, path))


def digest_of(name: str) -> str:
    """Tells checkpoints apart: a hub id's commit, or a digest of a folder's content."""
    folder, parts = Path(name), []
    if not folder.is_dir():
        return str(vlm.load_config(name)._commit_hash)
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".json", ".jinja", ".txt") and file.is_file():
            with open(file, "rb") as content:
                parts.append([file.name, hashlib.file_digest(content, "blake2b").hexdigest()])
    return digest(parts)
