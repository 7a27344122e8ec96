"""The world of torchrun: ranks, sums over them, signals, and weights sharded with FSDP2.

Losses are divided by global counts before backward, and gradients are summed over ranks: after a
step's last micro-batch, or with --shard in each backward pass. So a gradient depends on the number
of ranks or micro-batches by rounding alone.
"""

import argparse
import itertools
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from support import vlm
from support.files import BadInput, digest, keep, kept


@dataclass(frozen=True)
class World:
    """This process among its peers: its rank, how many there are, its device, and the dtype that
    models are loaded and compute in: bf16 on a GPU, fp32 on a CPU."""

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype = torch.float32

    @property
    def main(self) -> bool:
        """Rank 0 alone prints and writes."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """The sum of each value over all ranks, in float64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def share(self, items: list | torch.Tensor) -> list | torch.Tensor:
        """This rank's part of a global batch, which is a list or a tensor's first dimension."""
        return items[self.rank :: self.size]

    def gather(self, items: list) -> list:
        """Every rank's items in one list, in the order that they had before `share`."""
        parts = [items]
        if self.size > 1:
            parts = [None] * self.size
            dist.all_gather_object(parts, items)
        return [part[i] for i in range(len(parts[0])) for part in parts if i < len(part)]

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            dist.barrier()

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replaces each gradient by its sum over all ranks; a rank without one adds zeros."""
        for parameter in parameters if self.size > 1 else ():
            if is_sharded(parameter):  # FSDP2 has summed it already
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def close(self) -> None:
        """Leaves the process group: at a good end only, since others may wait in a collective."""
        if self.size > 1:
            dist.destroy_process_group()


def start() -> World:
    """Joins torchrun's process group, if there is one. Raises BadInput for too few GPUs."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, dtype = torch.device("cpu"), torch.float32
    if torch.cuda.is_available():
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if here > torch.cuda.device_count():
            raise BadInput(f"{here} processes but {torch.cuda.device_count()} GPUs on this machine")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        dtype = torch.bfloat16
        torch.cuda.set_device(device)
        # cuDNN's attention, which torch prefers on the newest GPUs, plans anew for every shape. A
        # growing cache has a new one for every token, and so has every batch.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if size > 1 and not dist.is_initialized():
        # Two hours: the others wait while rank 0 writes a checkpoint, maybe to a slow disk.
        timeout = timedelta(hours=2)
        if device.type == "cuda":
            dist.init_process_group("nccl", timeout=timeout, device_id=device)
        else:
            dist.init_process_group("gloo", timeout=timeout)
    return World(rank, size, device, dtype)


def seed_step(seed: int, step: int, world: World) -> None:
    """Seeds torch for one step: a resumed run draws (dropout) what an undisturbed one draws."""
    torch.manual_seed(hash((seed, step, world.rank)) % 2**63)


def autocast(device: torch.device) -> AbstractContextManager:
    """bf16 arithmetic on a GPU, over fp32 masters and bf16 frozen weights; plain fp32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def peak_memory(world: World) -> float:
    """The most memory that this process has held so far, in GiB: of its GPU, or of the machine."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 2**30
    if sys.platform == "linux":  # ru_maxrss would begin with the parent's peak
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**20  # KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # macOS: bytes


def work_once(place: Path, items: list, size: int, work, world, desc: str, together=False) -> list:
    """One result per item, by `work` on batches of `size`, which are dealt out over ranks.

    A batch's results are a file of `place`, named by what was asked. So nothing is done twice, and
    results are the same for any number of ranks, which share the disk, and wherever a run was cut.
    `together`: each rank holds a part of the model, and all work on every batch.
    """
    batches = [items[i : i + size] for i in range(0, len(items), size)]
    files = [place / f"{digest(batch)}.json" for batch in batches]
    # Rank 0 alone looks: others may already be writing by then.
    missing = [i for i, file in enumerate(files) if world.main and kept(file) is None]
    missing = world.gather(missing)
    share = missing if together else world.share(missing)
    for i in tqdm(share, desc=desc, unit="batch", disable=not (world.main and missing)):
        results = work(batches[i])
        if world.main or not together:
            keep(files[i], results)
    world.wait()
    results = list(map(kept, files))
    if None in results:
        raise BadInput(f"{place}: answers were removed or damaged meanwhile; start again")
    return list(itertools.chain.from_iterable(results))


# ==== Signals ====


def defer_signals(world: World) -> list[int]:
    """From now on Ctrl-C and SIGTERM do not break a step in two: they appear in the returned list.

    A second one ends a single process at once. torchrun repeats a signal by itself, and kills after
    its --shutdown-timeout.
    """
    received, before = [], {}

    def note(number, frame):
        received.append(number)
        if world.size == 1:
            signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():  # only there may handlers be set
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    return received


def asked_to_stop(received: list[int], world: World) -> int:
    """The signal that any rank has received since `defer_signals`, or 0; the same on all ranks."""
    interrupts, terminations = world.sum(signal.SIGINT in received, signal.SIGTERM in received)
    if terminations:
        return signal.SIGTERM
    return signal.SIGINT if interrupts else 0


# ==== Models in training, sharded or not ====


def check_batch(flag: str, batch: int, world: World, shard: bool) -> None:
    """Raises BadInput for a global batch that does not give each rank a part, or an equal part
    under `shard`: ranks that gather weights from one another must run equally many passes."""
    if batch < world.size:
        raise BadInput(f"{flag} {batch} is less than one for each of {world.size} processes")
    if shard and world.size == 1:
        raise BadInput("--shard needs several processes; start with torchrun --nproc-per-node N")
    if shard and batch % world.size:
        raise BadInput(f"{flag} {batch} must be a multiple of {world.size} processes under --shard")


def load_for_training(args: argparse.Namespace, world: World) -> tuple[torch.nn.Module, dict]:
    """The policy, --model with what --train names trained, and its trained parameters by name.

    Frozen weights keep `world.dtype`, trained ones are fp32 masters. With --shard each process
    holds the checkpoint in CPU memory until it has taken its shards.
    """
    device = torch.device("cpu") if args.shard else world.device
    model = vlm.load_model(args.model, device, world.dtype)
    vlm.set_trainable(model, args.train, args.lora_rank)
    if args.shard:
        shard(model, world)
    else:
        make_masters(model)
        # Autocast leaves an embedding as it is: fp32 masters would make all that follows fp32.
        embedding = model.get_input_embeddings()
        embedding.register_forward_hook(lambda module, inputs, output: output.to(world.dtype))
    return model, {name: value for name, value in model.named_parameters() if value.requires_grad}


def load_reference(args: argparse.Namespace, model, world: World) -> torch.nn.Module:
    """The reference, --model before the policy `model` is trained: a copy, shards of its own, or
    the policy itself, whose adapters can be switched off (vlm.adapters_off)."""
    if vlm.has_adapters(model):
        return model
    if not args.shard:
        return vlm.frozen_copy(model)
    reference = vlm.load_model(args.model, torch.device("cpu"), world.dtype).requires_grad_(False)
    shard(reference, world)
    return reference


def load_twin(args: argparse.Namespace, model, trained: dict, world: World) -> torch.nn.Module:
    """The model that samples for the policy `model`: whole, in `world.dtype`, with its weights.

    So decoding neither casts masters nor gathers shards for each token. In fp32 an unsharded policy
    is its own twin. Else it is a copy, which shares frozen tensors unless those are shards.
    """
    if world.dtype == torch.float32 and not args.shard:
        return model
    if args.shard:
        twin = vlm.load_model(args.model, world.device, world.dtype)
        vlm.set_trainable(twin, args.train, args.lora_rank)
        return twin
    twin = vlm.frozen_copy(model)
    for name in trained:  # the engine reads from it what is trained
        twin.get_parameter(name).requires_grad_(True)
    return twin


@torch.no_grad()
def refresh(twin: torch.nn.Module, trained: dict[str, torch.nn.Parameter]) -> None:
    """Gives the twin the policy's present weights, in place. All ranks must call it."""
    for name, parameter in trained.items():
        copy = twin.get_parameter(name)
        if is_sharded(parameter):
            parameter = parameter.to(copy.dtype).full_tensor()
        copy.copy_(parameter)


def make_masters(module: torch.nn.Module) -> None:
    """Makes the module's trained parameters fp32: an update is too small a change for bf16."""
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def shard(model: torch.nn.Module, world: World) -> None:
    """Spreads a model over the GPUs of each machine with FSDP2, and copies that over the machines.

    Trained shards become fp32 masters, layer by layer: nowhere does the model lie whole in fp32. A
    gathered layer has `world.dtype`. Only the root's forward may be called from now on, and nothing
    may hold an original parameter, or all of them would stay on every GPU.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    here, dims = int(os.environ.get("LOCAL_WORLD_SIZE", world.size)), ("replicate", "shard")
    mesh = init_device_mesh(world.device.type, (world.size // here, here), mesh_dim_names=dims)
    mesh = mesh["shard"] if here == world.size else mesh
    # Inputs are not cast: bf16 would round the angles of the vision tower's rotary positions.
    policy = MixedPrecisionPolicy(world.dtype, torch.float32, cast_forward_inputs=False)
    layers = [part for part in model.modules() if type(part).__name__ in model._no_split_modules]
    for module in [*layers, model]:
        make_masters(module)
        # By default the root would stay gathered after its first use.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)  # summed, not averaged
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sums


def is_sharded(value: object) -> bool:
    """Whether `value` is a DTensor, whose module takes a second to import."""
    return hasattr(value, "full_tensor")


def to_float(norm: torch.Tensor) -> float:
    """A gradient norm as a number, sharded or not."""
    return (norm.full_tensor() if is_sharded(norm) else norm).item()


def whole(value: object, world: World) -> object:
    """A sharded tensor in one piece on rank 0's CPU, None elsewhere; other values as they are. All
    ranks must call it."""
    if not is_sharded(value):
        return value
    full = value.full_tensor()
    return full.cpu() if world.main else None


def like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor that every rank holds, sharded as `parameter` is, if it is."""
    if not is_sharded(parameter) or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor.to(parameter.device), mesh, placements, src_data_rank=None)
