"""What every training loop needs and no paper describes: torchrun set-up, order, schedule, checkpoints, curves.

All randomness of a run derives from (seed, step), so exact resumption needs only the weights, the optimiser's state and
the step. Gradients are summed over ranks by one all-reduce after a step's last micro-batch; losses are divided by
global counts beforehand, so a gradient does not depend on the number of ranks or micro-batches.
"""

import argparse
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from rewards import CLASSES
from support import vlm
from support.files import (
    BadInput,
    dataset_info,
    open_picture,
    read_bytes,
    read_json,
    read_records,
    write_atomic,
    writes,
    writing,
)
from support.pool import Terminated, run_stage


@dataclass(frozen=True)
class World:
    """This process among its peers: its rank, how many there are, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Rank 0 alone prints and writes."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """The sum of each value over all ranks, in float64."""
        total = torch.tensor(values, dtype=torch.float64, device="cpu" if self.device.type == "cpu" else self.device)
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, items: list) -> list:
        """Every rank's items in one list, in the order that dealing them out by `share` had."""
        parts = [items]
        if self.size > 1:
            parts = [None] * self.size
            dist.all_gather_object(parts, items)
        return [part[i] for i in range(len(parts[0])) for part in parts if i < len(part)]

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            dist.barrier()

    def share(self, items: list) -> list:
        """This rank's part of a global batch."""
        return items[self.rank :: self.size]

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replaces each gradient by its sum over all ranks; a rank without one contributes zeros. A sharded gradient
        has been summed by FSDP2 already."""
        if self.size == 1:
            return
        for parameter in parameters:
            if isinstance(parameter, DTensor):
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)


def start(seed: int) -> World:
    """Joins torchrun's process group, if there is one, and seeds torch. Raises BadInput for more ranks than GPUs."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise BadInput(f"{local + 1} processes on this machine but {torch.cuda.device_count()} GPUs")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        # An hour, since rank 0 reads whole checkpoints from slow disks while the others wait.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))
    torch.manual_seed(seed)
    return World(rank, size, device)


def run(stage: Callable[[list[str] | None], None], argv: list[str] | None) -> None:
    """Calls a stage within `run_stage`; a GPU without memory, too, ends in one line and exit code 1."""

    def work() -> None:
        try:
            stage(argv)
        except torch.OutOfMemoryError as error:
            raise BadInput("the GPU's memory is used up; lower --micro-batch, --batch-size or --max-new-tokens, or use "
                           f"--gradient-checkpointing or --shard: {str(error).splitlines()[0]}") from error  # fmt: skip
        finally:
            if dist.is_available() and dist.is_initialized():
                dist.destroy_process_group()

    run_stage(work)


def defer_signals(world: World) -> list[int]:
    """From now on Ctrl-C and SIGTERM do not break a step in two: their numbers appear in the returned list.

    A second one ends a single process at once; torchrun itself repeats a signal, and kills after half a minute.
    """
    came, before = [], {}

    def note(number: int, frame) -> None:
        came.append(number)
        if world.size == 1:
            signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():  # only there may handlers be set
        before.update({number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)})
    return came


def asked_to_stop(came: list[int], world: World) -> type[KeyboardInterrupt] | None:
    """What to raise when any rank has received a signal since `defer_signals`; the same answer on all ranks."""
    interrupts, terminations = world.sum(signal.SIGINT in came, signal.SIGTERM in came)
    return Terminated if terminations else KeyboardInterrupt if interrupts else None


def parse(parser: argparse.ArgumentParser, argv: list[str] | None, demo: dict) -> argparse.Namespace:
    """Parses the flags; for the tiny demo checkpoint `demo` replaces the defaults, and explicit flags still win."""
    args = parser.parse_args(argv)
    names = args.model if isinstance(args.model, list) else [args.model]
    if all(vlm.is_demo(str(name)) for name in names):
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"tiny demo checkpoint: defaults replaced by DEMO = {demo}", flush=True)
        parser.set_defaults(**demo)
        args = parser.parse_args(argv)
    return args


def autocast(device: torch.device) -> AbstractContextManager:
    """bf16 arithmetic on a GPU, where trained weights are fp32 masters and frozen ones bf16; plain fp32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def load_split(folder: Path, split: str) -> list[dict]:
    """The records of 02's folder. Raises BadInput for 01's: without the red box, a slice with two findings would be
    one picture with two right answers."""
    if dataset_info(folder)["stage"] != "02":
        raise BadInput(f"{folder}: has no red boxes; make its twin with 02_zoom_augment.py --data {folder}")
    records = read_records(folder, split)
    if not records:
        raise BadInput(f"{folder}/{split}/metadata.jsonl: holds no records")
    absent = sorted(set(CLASSES) - {record["label"] for record in records})
    if absent and int(os.environ.get("RANK", 0)) == 0:
        print(f"note: {folder}/{split} has no record of: {', '.join(absent)}", flush=True)
    return records


def pictures(records: list[dict]) -> list[Image.Image]:
    return [open_picture(record["image"]).convert("RGB") for record in records]


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


def batch_indices(count: int, batch: int, step: int, seed: int) -> list[int]:
    """The `batch` dataset indices of one step (from 0): each epoch is a fresh shuffle, and epochs follow seamlessly."""
    places = range(step * batch, (step + 1) * batch)
    return [_permutation(count, seed, place // count)[place % count] for place in places]


def ahead(function: Callable, items: Iterable) -> Iterator:
    """Yields function(item) for each item and prepares the next one in a thread meanwhile: pictures load while the
    model computes."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for item in items:
            following = pool.submit(function, item)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()


def peak_memory(world: World) -> float:
    """The most memory that this process has held so far, in GiB: of its GPU, or else of the machine."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 2**30
    import resource  # POSIX only: absent on Windows

    scale = 2**30 if sys.platform == "darwin" else 2**20  # ru_maxrss counts bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def warmup_cosine(step: int, steps: int, warmup_ratio: float) -> float:
    """The learning rate's factor at `step` (from 0): linear warm-up, then half a cosine to 0 after the last step."""
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def apply_gradients(world: World, optimizer: torch.optim.Optimizer, lr: float, clip: float = 1.0) -> float:
    """Sums gradients over ranks, clips their global norm, steps, and clears them. Returns the norm before clipping.

    A non-finite norm leaves the weights as they are and is returned, for the caller to stop.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    world.sum_gradients(parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad()
    return norm


# ---- sharding with FSDP2: each rank holds a part of every tensor and gathers a layer just when it runs ----


def check_batch(flag: str, batch: int, world: World, shard: bool) -> None:
    """Raises BadInput for a global batch that cannot be dealt out to all ranks, or not evenly where `shard` asks it:
    ranks that gather weights from one another must run equally many passes."""
    if batch < world.size:
        raise BadInput(f"{flag} {batch} is less than one for each of {world.size} processes")
    if shard and world.size == 1:
        raise BadInput("--shard spreads a model over several processes; start with torchrun --nproc-per-node N")
    if shard and batch % world.size:
        raise BadInput(f"{flag} {batch} must be a multiple of the {world.size} processes under --shard")


def load_model(name: str, world: World, shard: bool) -> torch.nn.Module:
    """bf16 on GPUs, fp32 on CPUs; a model that is to be sharded is loaded into CPU memory."""
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    return vlm.load_model(name, torch.device("cpu") if shard else world.device, dtype)


def shard(model: torch.nn.Module, world: World) -> dict[str, torch.nn.Parameter]:
    """Spreads a model that lies in CPU memory over all ranks' devices; returns its trained parameters' shards by name.

    Trained shards are fp32 masters; a gathered layer is bf16 on a GPU. Gradients are summed, not averaged, over ranks,
    since losses are divided by global counts. Only the root's forward may be called from now on.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    gpu = world.device.type == "cuda"
    policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32) if gpu else MixedPrecisionPolicy()
    layers = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    for module in [*layers, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sums
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def gathered(model: torch.nn.Module) -> Iterator[None]:
    """Within, a sharded model's layers stay gathered after their first use: a rollout would otherwise gather every
    weight again for each token. Ranks may then run different numbers of decode steps, too."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.set_reshard_after_forward(False)
    yield
    model.set_reshard_after_forward(True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor, world: World):
    """A sharded tensor in one piece on rank 0's CPU (None elsewhere; all ranks must call it); other values as is."""
    if not isinstance(tensor, DTensor):
        return tensor
    full = tensor.full_tensor()
    return full.cpu() if world.main else None


def like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor that every rank holds, sharded as `parameter` is, if it is."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor.to(parameter.device), mesh, placements, src_data_rank=None)


# ---- checkpoints: <out>/checkpoint-000050/ is a complete Hugging Face folder plus state.pt for --resume ----


@writes
def save(out: Path, step: int, model, processor, trained: dict, optimizer, world: World, keep: int = 2) -> None:
    """Writes checkpoint `step` under a temporary name and renames it; older ones but the last `keep` go."""
    weights = {name: whole(tensor, world) for name, tensor in model.state_dict().items()}
    masters = {name: whole(parameter.detach(), world) for name, parameter in trained.items()}
    moments = optimizer.state_dict()
    moments["state"] = {i: {k: whole(v, world) for k, v in part.items()} for i, part in moments["state"].items()}
    states = world.gather([random_state()])
    if world.main:
        out.mkdir(parents=True, exist_ok=True)
        temporary, final = out / ".checkpoint.tmp", out / f"checkpoint-{step:06d}"
        shutil.rmtree(temporary, ignore_errors=True)
        vlm.save_checkpoint(temporary, model, processor, weights)
        state = {"step": step, "trained": masters, "optimizer": moments, "rng": states}
        torch.save(state, temporary / "state.pt")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        for old in checkpoints(out)[:-keep]:
            shutil.rmtree(old)
    world.wait()


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints under `out`, oldest first."""
    return sorted(path for path in out.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{6,}", path.name))


# Flags that may differ between a run and its resumption: they change where and how fast it runs, or when it ends.
FREE = {"out", "resume", "overwrite", "steps", "micro_batch", "save_every", "shard", "gradient_checkpointing",
        "no_prefix_sharing"}  # fmt: skip
OWN = ("run.json", "metrics.jsonl", "rollouts.jsonl", "config.json", "*.safetensors", "checkpoint-*")


def open_run(args: argparse.Namespace, world: World) -> None:
    """Makes --out this run's: its settings go into run.json, or must equal those there under --resume.

    Raises BadInput for another run's files, unless --overwrite, which deletes them (files of other names stay).
    """
    path = args.out / "run.json"
    settings = {key: value for key, value in vars(args).items() if key not in FREE}
    made = [read_bytes(args.data / name) for name in ("train/metadata.jsonl", "dataset_info.json")]
    data = hashlib.sha256(b"".join(made)).hexdigest()
    settings = json.loads(json.dumps({**settings, "data": data}, default=str))
    known = read_json(path) if args.resume and path.exists() else None
    old = sorted(file for pattern in OWN for file in args.out.glob(pattern))
    world.wait()  # until all ranks have looked, before one changes what they see
    if known is not None:
        for key, value in settings.items():
            was = known.get(key) if isinstance(known, dict) else known
            if was != value:
                raise BadInput(f"{path}: --{key.replace('_', '-')} was {was} and is {value} now; --resume goes on with "
                               "the same settings only")  # fmt: skip
        return
    if old and not args.overwrite:
        raise BadInput(f"{args.out}: holds {old[0].name} of another run; choose another --out, go on with it by "
                       "--resume, or delete it by --overwrite")  # fmt: skip
    if world.main:
        for file in old:
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        args.out.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(settings, indent=1) + "\n")
    world.wait()


def resume(out: Path, trained: dict, optimizer, world: World) -> int:
    """Restores weights, optimiser and random states from the newest checkpoint that can be read; returns the steps
    done, 0 without any checkpoint.

    The file is read with `weights_only=True`: tensors and numbers, never code. Raises BadInput when checkpoints exist
    but none can be read.
    """
    found, state = checkpoints(out), None
    for folder in reversed(found):
        try:
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
            break
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError):
            if world.main:
                print(f"{folder}/state.pt cannot be read; trying the checkpoint before it", file=sys.stderr)
    if found and state is None:
        raise BadInput(f"{out}: no checkpoint can be read; start anew with --overwrite")
    if state is None:
        return 0
    if {n: p.shape for n, p in state["trained"].items()} != {n: p.shape for n, p in trained.items()}:
        raise BadInput(f"{folder}: holds other trained parameters; resume with the first run's --model and --train")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(like(state["trained"][name], parameter))
    parameters = list(trained.values())
    for i, part in state["optimizer"]["state"].items():
        part.update({key: like(value, parameters[i]) for key, value in part.items()})
    optimizer.load_state_dict(state["optimizer"])
    if world.rank < len(state["rng"]):
        set_random_state(state["rng"][world.rank])
    return state["step"]


def random_state() -> list[torch.Tensor]:
    """torch's random states of this process: the CPU's and, where there is one, its GPU's."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def set_random_state(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if torch.cuda.is_available() and len(states) > 1:
        torch.cuda.set_rng_state(states[1])


@writes
def finish(out: Path, world: World) -> None:
    """Makes `out` itself the last checkpoint's Hugging Face folder, so that the next script takes it by name."""
    if not world.main:
        return
    newest = checkpoints(out)[-1]
    for file in sorted(newest.iterdir(), key=lambda path: path.name == "config.json"):  # config.json comes last
        if file.name != "state.pt":
            temporary = out / f".{file.name}.tmp"
            shutil.copyfile(file, temporary)
            os.replace(temporary, out / file.name)


# ---- metrics: one JSON object a line, and the picture drawn from them ----


class Log:
    """Appends rows to <out>/<name>; on resume, rows after the resumed step are dropped first. Rank 0 only."""

    def __init__(self, path: Path, steps_done: int, world: World):
        self.path, self.world = path, world
        if world.main:
            kept = [row for row in read_log(path) if row["step"] <= steps_done] if steps_done else []
            write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, *rows: dict) -> None:
        if self.world.main:
            with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)


def read_log(path: Path) -> list[dict]:
    """The rows of a metrics or rollout file; a last line cut short by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


@writes
def plot_curves(out: Path, keys: list[str], smooth: int = 5) -> None:
    """Draws <out>/curves.png from <out>/metrics.jsonl: one panel a key, each step pale, the running mean dark."""
    from matplotlib.figure import Figure

    rows = read_log(out / "metrics.jsonl")
    columns = min(3, len(keys))
    lines = math.ceil(len(keys) / columns)
    figure = Figure(figsize=(4 * columns, 2.6 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis, key in zip(axes, keys, strict=False):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        steps, values = zip(*points, strict=True) if points else ((), ())
        means = [sum(values[max(0, i - smooth + 1) : i + 1]) / min(i + 1, smooth) for i in range(len(values))]
        axis.plot(steps, values, color="tab:blue", alpha=0.3)
        axis.plot(steps, means, color="tab:blue")
        axis.set_title(key.replace("_", " "), fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
    for axis in list(axes)[len(keys) :]:
        axis.axis("off")
    temporary = out / ".curves.tmp.png"
    figure.savefig(temporary, dpi=100)
    os.replace(temporary, out / "curves.png")
