"""Whether compiling the student's step pays in this run, by trying it on a copy."""

import copy
import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from cakd_cli.engine.hardware import Hardware
from cakd_cli.errors import HardwareError
from cakd_cli.evaluation.predict import Normalisation

# Steps that take less than this in all are not worth the trial: compiling takes half a minute or more.
WORTH_TRYING_SECONDS = 600.0
_ROUNDS = 3


def compiled(network: nn.Module, *, graphed: bool) -> Callable[[Tensor], Tensor]:
    """Compile a network; the compiler itself begins with the first images, and the network stays as it is.

    Args:
        network: On the device.
        graphed: Whether CUDA graphs launch its kernels, all of them at once, for which nets of this size would wait.
            All graphs of a device share their memory, so no two may run at the same time.
    """
    # It warns on machines without a GPU that they have none.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    return torch.compile(network, mode="reduce-overhead" if graphed else "default")


def compiled_student(network: nn.Module, device: torch.device, *, parts: int) -> Callable[[Tensor], Tensor]:
    """Compile what learns, with graphs where there are any.

    Args:
        network: On the device.
        device: The run's.
        parts: Into which a batch is cut; gradients of more than one pile up, which a graph's memory does not allow.
    """
    return compiled(network, graphed=device.type == "cuda" and parts == 1)


def choose(
    student: nn.Module,
    normalise: Normalisation,
    hardware: Hardware,
    images: Tensor,
    *,
    steps: int,
    parts: int,
    wanted: str,
) -> tuple[bool, str]:
    """Decide by measuring forward and backward of a copy; the student and the random numbers stay as they are.

    Args:
        student: The network that learns, on the device.
        normalise: From uint8 images to its input.
        hardware: The run's.
        images: As many uint8 images as a step sees at a time.
        steps: Steps of the run.
        parts: Into which each step's batch is cut.
        wanted: The recipe's ``engine.compile``, ``on`` or ``auto``.

    Returns:
        Whether to compile, and why.

    Raises:
        HardwareError: If it was asked for and cannot be done.
    """
    with torch.random.fork_rng(devices=[hardware.device] if hardware.device.type == "cuda" else []):
        network = copy.deepcopy(student).train()
        _seconds(network, normalise(images), hardware)  # the first call of a kernel is not like the others
        eager = min(_seconds(network, normalise(images), hardware) for _ in range(_ROUNDS))
        if wanted == "auto" and eager * steps * parts < WORTH_TRYING_SECONDS:
            return False, f"about {eager * steps * parts:.0f} s of steps would not pay for it"
        try:
            faster = compiled_student(network, hardware.device, parts=parts)
            started = time.perf_counter()
            _seconds(faster, normalise(images), hardware)
            spent = time.perf_counter() - started
            fast = min(_seconds(faster, normalise(images), hardware) for _ in range(_ROUNDS))
        except Exception as error:
            # A compiler is a world of its own, and may fail with anything.
            why = (str(error) or type(error).__name__).splitlines()[0]
            if wanted == "on":
                raise HardwareError(f"the student cannot be compiled: {why}", hint="engine.compile=off") from error
            return False, f"it cannot be compiled: {why}"
    saved = (eager - fast) * steps * parts
    figures = f"a step of {1000 * fast:.0f} ms instead of {1000 * eager:.0f}, {saved:+.0f} s over the run"
    return wanted == "on" or saved > spent, f"{figures}, {spent:.0f} s to compile"


def _seconds(network: Callable[[Tensor], Tensor], images: Tensor, hardware: Hardware) -> float:
    hardware.wait()
    started = time.perf_counter()
    with hardware.autocast():
        logits = network(images)
    # Gradients pile up in the copy, which costs what it costs in a step.
    logits.float().square().mean().backward()
    hardware.wait()
    return time.perf_counter() - started
