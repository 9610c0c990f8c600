"""A teacher's answers to the batches of an epoch: remembered where it has been asked before, else asked now.

Shape suffixes: B batch, N views of a window, C classes.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from cakd_cli.data import Batch
from cakd_cli.data.base import to_device
from cakd_cli.engine.stopwatch import Stopwatch
from cakd_cli.engine.teacher_memory import TeacherMemory

# Unknown views of so many images are asked together, so that few unknown ones still make a batch worth its overhead.
_WINDOW_IMAGES = 512
_WINDOW_BYTES = 4 * 2**20


class _Unwritten(NamedTuple):
    """Answers on their way from the device."""

    views: Tensor
    answers: Tensor
    arrived: torch.Event


class Answers:
    """Gives each batch its teacher logits.

    Args:
        ask: From uint8 images to float32 logits, without gradient.
        memory: Of views asked before; none asks about every batch.
        device: Where batches and answers live.
        note: Takes a line for the user when the memory is in trouble.

    Attributes:
        asked: Images that the teacher was shown.
        remembered: Images that it need not be shown.
    """

    def __init__(
        self,
        ask: Callable[[Tensor], Tensor],
        memory: TeacherMemory | None,
        device: torch.device,
        note: Callable[[str], None],
    ) -> None:
        self._ask = ask
        self.memory = memory
        self._device = device
        self._note = note
        self._noted: set[str] = set()
        self._unwritten: list[_Unwritten] = []
        self.asked = 0
        self.remembered = 0

    def take_counts(self) -> dict[str, int]:
        """Give the images asked about and remembered since the last call."""
        counts = {"asked": self.asked, "remembered": self.remembered}
        self.asked = self.remembered = 0
        return counts

    def alongside(self, batches: Iterator[Batch], watch: Stopwatch) -> Iterator[tuple[Batch, Tensor]]:
        """Yield each batch with the teacher's logits (batch, classes) in float32.

        What was recorded is on disk, or on its way there, when the last batch has been yielded.
        """
        if self.memory is None:
            yield from self._live(batches, watch)
            return
        try:
            for window in _windows(batches):
                with watch("teacher"):
                    answers_NC = self._remembered(window, self.memory)
                yield from zip(window, answers_NC.split([len(batch.labels) for batch in window]), strict=True)
        finally:
            # Also where the run stops within an epoch.
            self.flush()

    def _live(self, batches: Iterator[Batch], watch: Stopwatch) -> Iterator[tuple[Batch, Tensor]]:
        if self._device.type == "cuda":
            yield from self._ahead(batches, watch)
            return
        for batch in batches:
            self.asked += len(batch.labels)
            with watch("teacher"):
                answers_BC = self._ask(batch.images)
            yield batch, answers_BC

    def _ahead(self, batches: Iterator[Batch], watch: Stopwatch) -> Iterator[tuple[Batch, Tensor]]:
        """Ask on a stream of its own, a batch ahead of the student, so that both may fill the device."""
        main, side = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        before: tuple[Batch, Tensor, torch.cuda.Event] | None = None
        while True:
            batch = next(batches, None)
            ahead = None
            if batch is not None:
                self.asked += len(batch.labels)
                side.wait_stream(main)
                with torch.cuda.stream(side), watch("teacher"):
                    answers_BC = self._ask(batch.images)
                # Both cross streams: their memory may be used again only when the other stream is done with it.
                batch.images.record_stream(side)
                answers_BC.record_stream(main)
                ahead = batch, answers_BC, side.record_event()
            if before is not None:
                main.wait_event(before[2])
                yield before[:2]
            if ahead is None:
                return
            before = ahead

    def _remembered(self, window: list[Batch], memory: TeacherMemory) -> Tensor:
        self._write_arrived(memory)
        views_N = torch.cat([batch.views for batch in window if batch.views is not None])
        stored_NC, known_N = memory.recall(views_N)
        unknown_N = (~known_N).nonzero().squeeze(1)
        self.asked += len(unknown_N)
        self.remembered += len(views_N) - len(unknown_N)
        answers_NC = self._to_device(stored_NC)
        if len(unknown_N):
            images = torch.cat([batch.images for batch in window])
            chosen_N = self._to_device(unknown_N)
            fresh_NC = self._ask_in_batches(images[chosen_N], len(window[0].labels))
            # What a later run will read is what this one uses.
            answers_NC[chosen_N] = memory.rounded(fresh_NC)
            self._write(memory, views_N[unknown_N], fresh_NC)
        self._say_troubles(memory)
        return answers_NC

    def _ask_in_batches(self, images: Tensor, size: int) -> Tensor:
        """Ask about batches of one size, filled up with black images.

        Kernels may sum in another order for another size: so an answer does not depend on which others were unknown.
        """
        missing = -len(images) % size
        filled = functional.pad(images, [0] * 7 + [missing])
        return torch.cat([self._ask(part) for part in filled.split(size)])[: len(images)]

    def _say_troubles(self, memory: TeacherMemory) -> None:
        """Say each kind of trouble once: the run goes on as if the memory had known less."""
        troubles = {
            "damaged": memory.damaged and f"{memory.folder} holds answers that are not what was written: asked again",
            "stopped": memory.stopped and f"new answers are not kept: {memory.stopped}",
        }
        for kind, text in troubles.items():
            if text and kind not in self._noted:
                self._noted.add(kind)
                self._note(f"teacher memory: {text}")

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return to_device(tensor, self._device)

    def _write(self, memory: TeacherMemory, views: Tensor, answers: Tensor) -> None:
        if self._device.type != "cuda":
            memory.record(views, answers.cpu())
            return
        on_host = torch.empty(answers.shape, dtype=answers.dtype, pin_memory=True)
        on_host.copy_(answers, non_blocking=True)
        arrived = torch.Event(self._device)
        arrived.record()
        self._unwritten.append(_Unwritten(views, on_host, arrived))

    def _write_arrived(self, memory: TeacherMemory) -> None:
        while self._unwritten and self._unwritten[0].arrived.query():
            views, answers, _ = self._unwritten.pop(0)
            memory.record(views, answers)

    def flush(self) -> None:
        """Record what is still on its way from the device."""
        if self.memory is not None and self._unwritten:
            self._unwritten[-1].arrived.synchronize()
            self._write_arrived(self.memory)


def _windows(batches: Iterator[Batch]) -> Iterator[list[Batch]]:
    """Group batches so that a window has many images, but neither large ones nor a wait before the first step."""
    window: list[Batch] = []
    for batch in batches:
        window.append(batch)
        images = sum(len(part.labels) for part in window)
        if images >= _WINDOW_IMAGES or sum(part.images.nbytes for part in window) >= _WINDOW_BYTES:
            yield window
            window = []
    if window:
        yield window
