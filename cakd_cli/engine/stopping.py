"""Stopping on request: a signal sets a flag, the loop acts on it between two steps."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from cakd_cli.errors import ExitCode

# A scheduler signals every process, and a launcher passes the same on to its own.
_ONE_REQUEST_SECONDS = 0.5
_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")


def name_of(number: int) -> str:
    """Name a signal."""
    return signal.Signals(number).name


class StopRequest:
    """Whether somebody has asked the run to stop.

    Args:
        grace: Seconds between the first signal and the end of the process, whatever it is doing; none = as long as it
            takes.
        is_saved: Whether there is a checkpoint to go on from, asked where the grace is over.
    """

    def __init__(self, grace: float | None = None, is_saved: Callable[[], bool] = lambda: False) -> None:
        self.number = 0  # of the first signal
        self._heard_at = 0.0
        self._grace = grace
        self._is_saved = is_saved
        self._watchdog: threading.Timer | None = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number and time.monotonic() - self._heard_at > _ONE_REQUEST_SECONDS:
            raise KeyboardInterrupt
        if self.number:
            return
        self.number, self._heard_at = number, time.monotonic()
        if self._grace is not None:
            self._watchdog = threading.Timer(self._grace, self._leave)
            self._watchdog.daemon = True
            self._watchdog.start()

    def _leave(self) -> None:
        """End the process: what is being written is then absent, and what was written before is whole."""
        saved = self._is_saved()
        what = "the last checkpoint stays; run the same command with --resume" if saved else "there is no checkpoint"
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"error: {self._grace:g} s after {name_of(self.number)} the step was not done: {what}\n")
            sys.stderr.flush()
        os._exit(ExitCode.STOPPED if saved else ExitCode.INTERRUPTED)

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Handle the signals of people and schedulers while inside: the first is noted, the second leaves at once.

        A signal that the process was started to ignore, as nohup does with SIGHUP, stays ignored.
        """
        numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
        heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        previous = {number: signal.signal(number, self._note) for number in heard}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            if self._watchdog is not None:
                self._watchdog.cancel()
