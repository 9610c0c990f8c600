"""The processes of one run, as torchrun and other launchers start them: who is who, and what they tell each other.

A launcher sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Rank 0 decides, writes and speaks.
Without them everything here does nothing, and costs nothing.

Shape suffixes: N samples, C classes.
"""

import contextlib
import hashlib
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from cakd_cli.data import Share, Split
from cakd_cli.errors import CakdError, HardwareError, RecipeError, first_line
from cakd_cli.evaluation.predict import predict
from cakd_cli.machine.hardware import Hardware
from cakd_cli.machine.sharding import is_cut
from cakd_cli.models.normalisation import Normalisation
from cakd_cli.recipe.schema import Recipe

T = TypeVar("T")
_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Buffers are exchanged when they are needed, not in every step. torch 2.14 has a new name for that.
_NEW_NAME = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
_NO_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _NEW_NAME else "broadcast_buffers": False}
# What gloo and NCCL say when another process is gone.
_LOST = ("gloo", "nccl", "connection closed by peer", "connection reset", "socket")


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run.

    Attributes:
        rank: Its number.
        count: Processes of the run.
        local: Its number on this machine.
        local_count: Processes of the run on this machine.
        restarted: Whether the launcher has started the run before.
    """

    rank: int = 0
    count: int = 1
    local: int = 0
    local_count: int = 1
    restarted: bool = False

    @property
    def first(self) -> bool:
        """Whether this process decides, writes and speaks."""
        return self.rank == 0

    def share(self, recipe: Recipe) -> Share:
        """What is this process's of each batch."""
        parts = recipe.engine.gradient_accumulation
        return Share(self.rank, self.count, parts, incomplete=recipe.protocol == "literature")

    def told(self, value: T) -> T:
        """Give every process the value of rank 0: anything that torch can send from one to another."""
        if self.count == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def told_by_machine(self, value: T) -> T:
        """Give every process the value of the first one on its machine."""
        found = self.gathered((socket.gethostname(), self.local, value))
        return next(told for host, local, told in found if host == socket.gethostname() and local == 0)

    def by_first(self, work: Callable[[], T]) -> T | None:
        """Let rank 0 do something, and end every process if it fails.

        Returns:
            What came out on rank 0, and none elsewhere.
        """
        result, error = None, None
        if self.first:
            try:
                result = work()
            except Exception as raised:
                error = raised
        error = self.told(error)
        if error is not None:
            raise error
        return result

    def gathered(self, value: T) -> list[T]:
        """Give every process the values of all, in the order of their ranks."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value)
        return values

    def mean(self, tensor: Tensor) -> Tensor:
        """Average a tensor over the processes."""
        if self.count == 1:
            return tensor
        total = tensor.clone()
        distributed.all_reduce(total)
        return total / self.count

    def largest(self, tensor: Tensor) -> Tensor:
        """Take the largest value over the processes."""
        if self.count > 1:
            tensor = tensor.clone()
            distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)
        return tensor

    def agreed(self, *numbers: int) -> list[int]:
        """Agree on the largest of each number, on the host."""
        return self.largest(torch.tensor(numbers)).tolist() if self.count > 1 else list(numbers)

    def share_buffers(self, network: nn.Module) -> None:
        """Give every process the buffers of rank 0: without synchronised batch norms each has counted its own."""
        if self.count > 1:
            for buffer in network.buffers():
                distributed.broadcast(buffer, src=0)

    def wrap(self, task: nn.Module) -> nn.Module:
        """Average the gradients of a task over the processes, and begin with the weights of rank 0.

        One that is cut over the processes does so by itself.
        """
        if self.count == 1 or any(map(is_cut, task.parameters())):
            return task
        # 1 x 1 convolutions in channels last: a copy of a few numbers, and nothing that a user could change.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        # With a static graph parameters may stay unused. It is learnt in the first pass, which must exchange.
        return DistributedDataParallel(task, static_graph=True, **_NO_BUFFERS)

    def predict(
        self, model: nn.Module, split: Split, normalisation: Normalisation, hardware: Hardware, *, batch_size: int
    ) -> tuple[Tensor, Tensor]:
        """Ask a network about every sample of a split once, each process about its own, and give all answers to all.

        Returns:
            Logits (samples, classes) in float32 and labels (samples,), both on the CPU, in the order of the split.
        """
        if len(split) < self.count or self.count == 1:
            return predict(model, split, normalisation, hardware, batch_size=batch_size)
        own_N = torch.arange(self.rank, len(split), self.count)
        # All ask about as many, because a network that is cut answers all processes at once.
        most = -(-len(split) // self.count)
        asked = split.subset(torch.cat([own_N, own_N[:1]])[:most])
        logits_NC, labels_N = predict(model, asked, normalisation, hardware, batch_size=batch_size)
        parts = self.gathered((logits_NC[: len(own_N)], labels_N[: len(own_N)]))
        order_N = torch.cat([torch.arange(rank, len(split), self.count) for rank in range(self.count)]).argsort()
        return torch.cat([logits for logits, _ in parts])[order_N], torch.cat([labels for _, labels in parts])[order_N]

    def check_alike(self, **facts: Any) -> None:
        """Refuse processes that see different things.

        Raises:
            HardwareError: With what differs.
        """
        found = self.gathered(facts)
        for name in facts:
            values = [of_rank[name] for of_rank in found]
            if any(value != values[0] for value in values):
                different = ", ".join(sorted({str(value) for value in values}))
                raise HardwareError(
                    f"the processes of this run differ in {name.replace('_', ' ')}: {different}",
                    hint="give all of them the same files and settings",
                )

    @contextlib.contextmanager
    def one_first(self, needed: bool) -> Iterator[None]:
        """Let one process of each machine do what is inside before the others, if any of them needs it."""
        wait = self.count > 1 and bool(self.agreed(int(needed))[0])
        if wait and self.local:
            distributed.barrier()
        yield
        if wait and not self.local:
            distributed.barrier()

    def describe(self) -> dict[str, Any]:
        """What run.json says of the processes; empty for one alone."""
        return (
            {"ranks": self.count, "hosts": sorted(set(self.gathered(socket.gethostname())))} if self.count > 1 else {}
        )


ALONE = Ranks()


def is_launched() -> bool:
    """Whether a launcher has started several processes."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


@contextlib.contextmanager
def opened() -> Iterator[Ranks]:
    """Meet the other processes of the run, and let one of them speak for all when they fail alike.

    Raises:
        HardwareError: If the launcher's variables are incomplete, or another process is gone.
    """
    if not is_launched():
        yield ALONE
        return
    store, ranks = _meet()
    try:
        yield ranks
    except CakdError as error:
        _leave_it_to_one(store, error)
        raise
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in _LOST):
            raise
        lost = HardwareError(
            f"another process of this run is gone: {first_line(error).split('. This is')[0]}",
            hint="the same command with --resume goes on; torchrun --max-restarts 3 does so by itself",
        )
        _leave_it_to_one(store, lost)
        raise lost from error
    distributed.destroy_process_group()


def _meet() -> tuple[Store, Ranks]:
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise HardwareError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and {', '.join(missing)} is not set",
            hint="torchrun sets them: torchrun --nproc-per-node 2 -m cakd_cli distill ...",
        )
    try:
        rank, count, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        local_count = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1))
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        backend = "cpu:gloo"
        if accelerator is not None and accelerator.type != "mps":
            backend += f",{accelerator.type}:{distributed.get_default_backend_for_device(accelerator)}"
        store, rank, count = next(rendezvous("env://", rank, count))
        # On one machine torchrun keeps its store when it starts again, with the addresses of processes that are gone;
        # on several it makes a new one, and each counts its own restarts.
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
            store = PrefixStore(_start(), store)
        distributed.init_process_group(backend, store=store, rank=rank, world_size=count)
    except (ValueError, RuntimeError) as error:
        raise HardwareError(
            f"the processes of this run do not find each other: {first_line(error)}",
            hint="MASTER_ADDR must be the first machine's, with MASTER_PORT free there",
        ) from error
    # Each machine's torchrun counts for itself: what one has restarted, all go on with.
    restarted = torch.tensor(int(_start() != "0"))
    distributed.all_reduce(restarted, op=distributed.ReduceOp.MAX)
    return store, Ranks(rank, count, local, local_count, restarted=bool(restarted))


def _start() -> str:
    """How often torchrun has started this process again."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def _leave_it_to_one(store: Store, error: CakdError) -> None:
    """Leave without a word if another process says the same."""
    key = f"cakd/{_start()}/{hashlib.sha256(error.message.encode()).hexdigest()}"
    try:
        is_first = store.add(key, 1) == 1
    except RuntimeError:  # its host is gone as well
        return
    if not is_first:
        raise SystemExit(int(error.exit_code)) from error


def synchronise_batch_norms(network: nn.Module, device: torch.device) -> nn.Module:
    """Let the batch norms of a network take their statistics from the batch of all processes together.

    Names and shapes of the state stay as they are. torch's own layer works on accelerators alone.

    Raises:
        RecipeError: If a layer does more than a batch norm, as timm's that hold an activation, which would be lost.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    other = next((type(norm).__name__ for norm in norms if type(norm) not in _PLAIN_NORMS), None)
    if other is not None:
        raise RecipeError(
            f"batch norms of the kind {other} cannot see the batch of all processes",
            hint="engine.sync_batch_norm=false",
        )
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-any-return]
    for norm in norms:
        norm.__class__ = _Synchronised
    return network


_PLAIN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class _Sum(torch.autograd.Function):
    """The sum over the processes; the loss is their mean, so each one's gradient is a sum as well."""

    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        total = tensor.detach().clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        distributed.all_reduce(total)
        return total


def _sum_of_all(tensor: Tensor) -> Tensor:
    return _Sum.apply(tensor)  # type: ignore[no-any-return]


class _Synchronised(nn.modules.batchnorm._BatchNorm):
    """A batch norm over the batch of all processes, on the CPU: two exchanges in each pass."""

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - torch's name
        """Take any number of dimensions."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        if not self.training:
            return super().forward(input)
        # Sums of 16 bits would lose digits.
        given, input = input, input.to(torch.promote_types(input.dtype, torch.float32))  # noqa: A001
        others = [dim for dim in range(input.ndim) if dim != 1]
        shape = [1, -1] + [1] * (input.ndim - 2)
        count = input.numel() // input.shape[1] * distributed.get_world_size()
        mean = _sum_of_all(input.sum(others)) / count
        centred = input - mean.view(shape)
        variance = _sum_of_all(centred.square().sum(others)) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            factor = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.detach(), factor)
            self.running_var.lerp_(variance.detach() * count / (count - 1), factor)
        scale = (variance + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        output: Tensor = centred * scale.view(shape)
        output = output if self.bias is None else output + self.bias.view(shape)
        return output.to(given.dtype)
