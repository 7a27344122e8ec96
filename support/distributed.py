"""The world of torchrun: ranks, sums over them, signals, and weights sharded with FSDP2.

Losses are divided by global counts before backward, and gradients are summed over ranks by one
all-reduce after a step's last micro-batch. So a gradient does not depend on the number of ranks or
micro-batches.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from support import vlm
from support.files import BadInput


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
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def share(self, items: list) -> list:
        """This rank's part of a global batch."""
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
    device = torch.device("cpu")
    if torch.cuda.is_available():
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if here > torch.cuda.device_count():
            raise BadInput(f"{here} processes but {torch.cuda.device_count()} GPUs on this machine")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        # Two hours: the others wait while rank 0 writes a checkpoint, maybe to a slow disk.
        timeout = timedelta(hours=2)
        if device.type == "cuda":
            dist.init_process_group("nccl", timeout=timeout, device_id=device)
        else:
            dist.init_process_group("gloo", timeout=timeout)
    return World(rank, size, device)


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
    import resource  # POSIX only: absent on Windows

    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


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


def load_for_training(name: str, world: World, shard: bool) -> torch.nn.Module:
    """The model, bf16 on GPUs and fp32 on CPUs; one to be sharded is loaded into CPU memory."""
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    model = vlm.load_model(name, torch.device("cpu") if shard else world.device, dtype)
    # Autocast leaves an embedding as it is: fp32 masters would make the whole residual stream and
    # the KV cache fp32, too.
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, inputs, output: output.to(dtype))
    return model


def shard(model: torch.nn.Module, world: World) -> dict[str, torch.nn.Parameter]:
    """Spreads a model over all ranks with FSDP2; returns its trained parameters' shards by name.

    Trained shards are fp32 masters; a gathered layer is bf16 on a GPU. Only the root's forward may
    be called from now on.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy()
    if world.device.type == "cuda":
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    layers = [part for part in model.modules() if type(part).__name__ in model._no_split_modules]
    for module in [*layers, model]:
        # By default the root would stay gathered after its first use.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)  # summed, not averaged
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sums
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


@contextmanager
def gathered(model: torch.nn.Module) -> Iterator[None]:
    """Within, a sharded model's layers stay gathered after their first use.

    A rollout would otherwise gather every weight again for each token, and ranks could not run
    different numbers of decode steps.
    """
    if not hasattr(model, "set_reshard_after_forward"):  # it is not sharded
        yield
        return
    model.set_reshard_after_forward(False)
    yield
    model.set_reshard_after_forward(True)
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def is_sharded(value: object) -> bool:
    """Whether `value` is a DTensor, whose module takes a second to import."""
    return hasattr(value, "full_tensor")


def to_float(norm: torch.Tensor) -> float:
    """A gradient norm as a number, sharded or not."""
    return (norm.full_tensor() if is_sharded(norm) else norm).item()


def whole(value: object, world: World) -> object:
    """A sharded tensor in one piece on rank 0's CPU, None elsewhere; other values as they are.

    All ranks must call it.
    """
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
