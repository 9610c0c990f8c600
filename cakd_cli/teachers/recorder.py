"""Keeping what a teacher has answered while training goes on: no step waits for a disk.

Shape suffixes: N answers, D numbers of each.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

# Answers to so many windows may be under way. Who is given more waits: what the disk cannot take must not fill the RAM.
_MOST_UNDER_WAY = 8


class Recorder:
    """Hands answers to one thread, which records them in the order in which they are given.

    There is a thread from the first answers to :meth:`flush` alone, so none while the next epoch's loaders are forked.

    Args:
        record: Takes names of views (N,) and answers (N, D), both on the CPU.
    """

    def __init__(self, record: Callable[[Tensor, Tensor], None]) -> None:
        self._record = record
        self._thread: ThreadPoolExecutor | None = None
        self._under_way: deque[Future[None]] = deque()

    def give(self, views_N: Tensor, rows_ND: Tensor) -> None:
        """Have answers recorded; a CUDA device is not waited for.

        Args:
            views_N: Names of views, int64 on the CPU.
            rows_ND: Answers on the device, which nobody changes any more.

        Raises:
            Exception: What recording earlier ones has raised.
        """
        if len(self._under_way) == _MOST_UNDER_WAY:
            self._under_way.popleft().result()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "teacher-memory")
        self._under_way.append(self._thread.submit(self._once_arrived, views_N, *_to_host(rows_ND)))

    def flush(self) -> None:
        """Wait until all is recorded that was given, and end the thread.

        Raises:
            Exception: What recording has raised.
        """
        if self._thread is None:
            return
        under_way, self._under_way = self._under_way, deque()
        with self._thread:
            self._thread = None
            for recording in under_way:
                recording.result()

    def _once_arrived(self, views_N: Tensor, rows_ND: Tensor, arrived: torch.Event | None) -> None:
        if arrived is not None:
            arrived.synchronize()
        self._record(views_N, rows_ND)


def _to_host(rows_ND: Tensor) -> tuple[Tensor, torch.Event | None]:
    """Copy rows to the CPU, and say when they will have arrived; none where they have."""
    if rows_ND.device.type != "cuda":
        return rows_ND.cpu(), None
    on_host = torch.empty(rows_ND.shape, dtype=rows_ND.dtype, pin_memory=True)
    on_host.copy_(rows_ND, non_blocking=True)
    arrived = torch.Event(rows_ND.device)
    arrived.record()
    return on_host, arrived
