"""Where the time of a step goes, measured without waiting for the device."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

Item = TypeVar("Item")


class Stopwatch:
    """Seconds by part of a step.

    The CPU computes while it is called, so its clock tells. An accelerator computes later: there the wait for data is
    the host's, and the other parts are told by events around the latest step, read when the host waits anyway.

    Args:
        device: Where the parts are computed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host: dict[str, float] = {}
        self._calls: dict[str, int] = {}
        self._events: dict[str, tuple[torch.Event, torch.Event]] = {}

    def reset(self) -> None:
        """Forget what has been measured."""
        self._host.clear()
        self._calls.clear()

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count the time inside towards a part."""
        events = self._begin(part) if self._device.type != "cpu" and part != "data" else None
        started = time.perf_counter()
        yield
        self._host[part] = self._host.get(part, 0.0) + time.perf_counter() - started
        self._calls[part] = self._calls.get(part, 0) + 1
        if events is not None:
            events[1].record()

    def _begin(self, part: str) -> tuple[torch.Event, torch.Event]:
        if part not in self._events:
            self._events[part] = tuple(torch.Event(self._device, enable_timing=True) for _ in range(2))  # type: ignore[assignment]
        self._events[part][0].record()
        return self._events[part]

    def each(self, part: str, items: Iterable[Item]) -> Iterator[Item]:
        """Count the time in which an iterable makes its items towards a part."""
        iterator = iter(items)
        while True:
            with self(part):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def shares(self, seconds: float) -> dict[str, float]:
        """Give each part its share of the time since the last reset, once the device has been waited for.

        Args:
            seconds: That time by the clock.
        """
        if self._device.type == "cpu":
            return {part: spent / seconds for part, spent in self._host.items()}
        data = self._host.get("data", 0.0) / seconds
        # The latest call stands for all of a part; a teacher that works beside the student counts in full.
        spans = {
            part: begin.elapsed_time(end) * self._calls[part]
            for part, (begin, end) in self._events.items()
            if part in self._calls
        }
        total = sum(spans.values()) or 1.0
        return {"data": data, **{part: span / total * (1 - data) for part, span in spans.items()}}
