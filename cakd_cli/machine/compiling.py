"""Whether compiling a network's training pass pays in a run, by trying it."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cakd_cli.errors import HardwareError, first_line
from cakd_cli.machine.hardware import Hardware

# Steps that take less than this in all are not worth the trial: compiling takes half a minute or more.
WORTH_TRYING_SECONDS = 600.0
_ROUNDS = 3


def compiled(network: nn.Module, *, graphed: bool) -> Callable[[Tensor], Any]:
    """Compile a network; the compiler itself begins with the first images, and the network stays as it is.

    Args:
        network: On the device.
        graphed: Whether CUDA graphs launch its kernels, all of them at once, for which nets of this size would wait.
            All graphs of a device share their memory, so no two may run at the same time.
    """
    # It warns on machines without a GPU that they have none.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # Each size of a batch is compiled for itself: after a second size, kernels for any would serve the first as well.
    return torch.compile(network, mode="reduce-overhead" if graphed else "default", dynamic=False)


def compiled_student(network: nn.Module, device: torch.device, *, parts: int) -> Callable[[Tensor], Any]:
    """Compile what is trained, with graphs where there are any.

    Args:
        network: On the device.
        device: The run's.
        parts: Passes of a step; gradients of more than one pile up, which a graph's memory does not allow.
    """
    return compiled(network, graphed=device.type == "cuda" and parts == 1)


@dataclass(frozen=True)
class Trial:
    """What a run would compile.

    Attributes:
        network: Maps a prepared batch to a tensor, or to several by name; on the device. It is used up: its running
            statistics and gradients change.
        images: Input of the network, as many as a step sees at a time.
        steps: Steps of the run.
        parts: Passes of each step.
    """

    network: nn.Module
    images: Tensor
    steps: int
    parts: int


def worth_compiling(trial: Trial, hardware: Hardware, *, asked_for: bool) -> tuple[bool, str]:
    """Measure forward and backward; the random numbers stay as they are.

    Args:
        trial: What would be compiled.
        hardware: The run's.
        asked_for: Compile in any case.

    Returns:
        Whether to compile, and why.

    Raises:
        HardwareError: If it was asked for and cannot be done.
    """
    calls = trial.steps * trial.parts
    with hardware.same_random_numbers():
        network = trial.network.train()
        _seconds(network, trial.images, hardware)  # the first call of a kernel is not like the others
        eager = min(_seconds(network, trial.images, hardware) for _ in range(_ROUNDS))
        if not asked_for and eager * calls < WORTH_TRYING_SECONDS:
            return False, f"about {eager * calls:.0f} s of steps would not pay for it"
        try:
            faster = compiled_student(network, hardware.device, parts=trial.parts)
            started = time.perf_counter()
            _seconds(faster, trial.images, hardware)
            spent = time.perf_counter() - started
            fast = min(_seconds(faster, trial.images, hardware) for _ in range(_ROUNDS))
        except Exception as error:
            # A compiler is a world of its own, and may fail with anything.
            if asked_for:
                raise HardwareError(
                    f"the student cannot be compiled: {first_line(error)}", hint="engine.compile=off"
                ) from error
            return False, f"it cannot be compiled: {first_line(error)}"
    saved = (eager - fast) * calls
    figures = f"a step of {1000 * fast:.0f} ms instead of {1000 * eager:.0f}, {saved:+.0f} s over the run"
    return asked_for or saved > spent, f"{figures}, {spent:.0f} s to compile"


def _seconds(network: Callable[[Tensor], Any], images: Tensor, hardware: Hardware) -> float:
    hardware.wait()
    started = time.perf_counter()
    with hardware.autocast():
        answers = network(images)
    total = torch.zeros((), device=images.device)
    for answer in answers.values() if isinstance(answers, dict) else (answers,):
        total = total + answer.float().square().mean()
    # Gradients pile up, which costs what it costs in a step.
    total.backward()
    hardware.wait()
    return time.perf_counter() - started
