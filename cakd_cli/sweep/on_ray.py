"""A sweep on a Ray cluster that exists: a task a run, on whatever machine has room."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cakd_cli.errors import ExitCode, HardwareError, RecipeError, first_line
from cakd_cli.sweep.here import Outcome, Processes, train
from cakd_cli.sweep.plan import Unit

# How often a run is started again whose machine is gone.
_RETRIES = 20
# How long a run that is asked to stop may take to save itself.
_PATIENCE_SECONDS = 60.0


def run_all(
    units: Sequence[Unit], out: Path, *, jobs: int, started: Callable[[Unit], None], ended: Callable[[Outcome], None]
) -> int:
    """Carry out runs on the cluster at ``RAY_ADDRESS``, or the one that runs on this machine.

    The folder of the sweep, the data and the teacher must lie on a disk that all machines see. Ray decides how many
    runs are side by side: one a GPU, or one a core of the CPU; ``jobs`` is not asked.

    Returns:
        The number of the signal that stopped the sweep; 0 if all runs have been tried.

    Raises:
        RecipeError: If ray is not installed.
        HardwareError: If there is no cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise RecipeError("--on ray needs ray", hint="pip install 'cakd[ray]'") from error
    # What ray has to say is no result.
    with contextlib.redirect_stdout(sys.stderr):
        return _run_all(ray, units, out, started, ended)


def _run_all(
    ray: Any, units: Sequence[Unit], out: Path, started: Callable[[Unit], None], ended: Callable[[Outcome], None]
) -> int:
    try:
        ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=False, logging_level="error")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise HardwareError(
            f"no Ray cluster: {first_line(error)}", hint="ray start --head, or set RAY_ADDRESS"
        ) from error
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    # max_calls: a process a run, so that a device's memory is free again.
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_calls=1, max_retries=_RETRIES)(_one)
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        waiting = {task.remote(unit, str(out.resolve())): unit for unit in units}
        for unit in units:
            started(unit)
        while waiting and not stop.is_set():
            done, _ = ray.wait(list(waiting), timeout=0.5)
            for reference in done:
                ended(_outcome(ray, reference, waiting.pop(reference)))
        for reference in waiting:
            ray.cancel(reference)
        if waiting:  # until their processes have saved and ended
            ray.wait(list(waiting), num_returns=len(waiting), timeout=_PATIENCE_SECONDS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        ray.shutdown()
    return int(signal.SIGTERM) if stop.is_set() else 0


def _one(unit: Unit, out: str) -> Outcome:
    """Run in a worker process of the cluster."""
    return train(unit, Path(out), Processes())


def _outcome(ray: Any, reference: Any, unit: Unit) -> Outcome:
    try:
        outcome: Outcome = ray.get(reference)
    except Exception as error:  # whatever ray says of a task that it gave up
        return Outcome(unit, int(ExitCode.INTERNAL), 0.0, f"error: {first_line(error)}")
    return outcome
