"""Runs of a sweep on this machine, so many side by side, each a process of its own."""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from cakd_cli.engine import run_directory
from cakd_cli.errors import ExitCode
from cakd_cli.sweep.plan import Unit

# How often a run that another process trains is looked at again.
_WAIT_SECONDS = 2.0
# How often a run is looked at, whether it has ended.
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        unit: Which.
        code: Of its process; 0 if it is finished.
        seconds: That it took in this start of the sweep; 0 if it was finished before.
        said: The last line of its error; empty where there is none.
    """

    unit: Unit
    code: int
    seconds: float = 0.0
    said: str = ""


class Processes:
    """The processes that train, which a signal to the sweep asks to stop."""

    def __init__(self) -> None:
        self.stopped_by = 0
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Pass the signals that end a process on to all."""
        numbers = [
            getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
        ]
        # One that is ignored, as nohup does, stays so.
        heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._pass_on) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.stopped_by = number
        for process in list(self._running):
            process.send_signal(signal.SIGTERM)

    def call(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
        """Run a process to its end, with all that it says in a file."""
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the sweep alone, which passes it on
            )
            with self._lock:
                self._running.add(process)
            if self.stopped_by:
                process.send_signal(signal.SIGTERM)
            try:
                # A cluster interrupts a task between two steps of Python, and so not within a wait without end.
                while process.poll() is None:
                    time.sleep(_POLL_SECONDS)
                return process.wait()
            except BaseException:  # as a cluster interrupts a task
                process.send_signal(signal.SIGTERM)
                process.wait()
                raise
            finally:
                with self._lock:
                    self._running.discard(process)


def train(unit: Unit, out: Path, processes: Processes, device: str = "", threads: int = 1) -> Outcome:
    """Carry out one run, or wait for whoever does.

    Args:
        unit: Which.
        out: The sweep's folder, on a disk that every machine of the sweep sees.
        processes: That it becomes one of.
        device: Where; empty leaves it to the run.
        threads: Of the CPU.
    """
    began = time.monotonic()
    log = out / "logs" / f"{unit.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    while run_directory.holder(out / unit.name) and not processes.stopped_by:
        time.sleep(_WAIT_SECONDS)
    command = [sys.executable, "-m", "cakd_cli", *unit.command(out), *(["--device", device] if device else [])]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    code = int(ExitCode.STOPPED) if processes.stopped_by else processes.call(command, environment, log)
    return Outcome(unit, code, time.monotonic() - began, _last_error(log) if code else "")


def _last_error(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "")


def devices() -> list[str]:
    """Name the devices that runs are divided over; empty on a CPU or one device, which runs find by themselves."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if accelerator is not None else 0
    return [f"{accelerator.type}:{i}" for i in range(count)] if accelerator is not None and count > 1 else []


def run_all(
    units: Sequence[Unit], out: Path, *, jobs: int, started: Callable[[Unit], None], ended: Callable[[Outcome], None]
) -> int:
    """Carry out runs, so many side by side; one that fails stops no other.

    Args:
        units: What is left to do.
        out: The sweep's folder.
        jobs: How many at a time.
        started: Is told of each beginning, in a thread of its own.
        ended: Is told of each end, in this one.

    Returns:
        The number of the signal that stopped the sweep; 0 if all runs have been tried.
    """
    jobs = min(jobs, max(1, len(units)))
    places: queue.SimpleQueue[str] = queue.SimpleQueue()
    found = devices() or [""]
    for i in range(jobs):
        places.put(found[i % len(found)])
    threads = max(1, (os.cpu_count() or 1) // jobs)
    processes = Processes()

    def one(unit: Unit) -> Outcome:
        if processes.stopped_by:
            return Outcome(unit, int(ExitCode.STOPPED))
        place = places.get()
        try:
            started(unit)
            return train(unit, out, processes, place, threads)
        finally:
            places.put(place)

    with processes.listening(), ThreadPoolExecutor(jobs) as pool:
        left: set[Future[Outcome]] = {pool.submit(one, unit) for unit in units}
        while left:
            done, left = wait(left, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in done:
                ended(future.result())
    return processes.stopped_by
