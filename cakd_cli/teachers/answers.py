"""A teacher's answers to the batches of an epoch: remembered where it has been asked before, else asked now.

Shape suffixes: B batch, N views of a window, D numbers in all answers to a view.
"""

from collections.abc import Callable, Generator, Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from cakd_cli.data import Batch
from cakd_cli.machine.stopwatch import Stopwatch
from cakd_cli.models.layers import LOGITS, SECOND_LOGITS, Answers
from cakd_cli.teachers.memory import TeacherMemory
from cakd_cli.teachers.recorder import Recorder
from cakd_cli.teachers.table import AnswerTable, upload

Answered = Generator[tuple[Batch, Answers], None, None]

# Unknown views of so many images are asked together, so that few unknown ones still make a batch worth its overhead.
_WINDOW_IMAGES = 512
_WINDOW_BYTES = 4 * 2**20


class Answering(Protocol):
    """Whoever answers: a network in one of its forms, or anything else."""

    def answer(self, batch: Batch) -> Answers:
        """Answer about a batch, by its images or by the numbers of its samples and views.

        Returns:
            float32 answers by name, without gradient, where the images are.
        """

    def close(self) -> None:
        """Let go of what it holds."""


class AnswerSource:
    """Gives each batch its teacher's answers.

    Args:
        teacher: Who is asked.
        memory: Of views asked before; none asks about every batch.
        device: Where batches and answers live.
        note: Takes a line for the user when the memory is in trouble.
        batch_size: Images of a full batch; the batches given may end with a smaller one.
        table: Whether the device holds the memory's answers too, once they have been met.

    Attributes:
        asked: Images that the teacher was asked about.
        remembered: Images that it need not be shown.
    """

    def __init__(
        self,
        teacher: Answering,
        memory: TeacherMemory | None,
        device: torch.device,
        note: Callable[[str], None],
        batch_size: int = 1,
        *,
        table: bool = False,
    ) -> None:
        self._teacher = teacher
        self.memory = memory
        self._device = device
        self._note = note
        self._batch_size = batch_size
        self._noted: set[str] = set()
        self._table = AnswerTable(memory, device) if table and memory is not None else None
        # On the CPU a thread has no core of its own: it made small steps slower, not faster.
        self._recorder = Recorder(self._record) if table or device.type != "cpu" else None
        self._side: torch.cuda.Stream | None = None
        self.asked = 0
        self.remembered = 0

    def take_counts(self) -> dict[str, int]:
        """Give the images asked about and remembered since the last call."""
        counts = {"asked": self.asked, "remembered": self.remembered}
        self.asked = self.remembered = 0
        return counts

    def close(self) -> None:
        """Close the memory's files, and let the teacher go."""
        self._teacher.close()
        if self.memory is not None:
            try:
                self.flush()
            finally:
                self.memory.close()

    def beside(self, batches: Iterator[Batch], watch: Stopwatch) -> Answered:
        """Yield each batch with the teacher's answers in float32, by name.

        What the teacher was asked has been recorded when the last batch has been yielded.
        """
        if self.memory is None:
            yield from self._live(batches, watch)
            return
        try:
            for window in _windows(batches):
                with watch("teacher"):
                    rows_ND = self._remembered(window, self.memory)
                for batch, rows_BD in zip(window, rows_ND.split([len(b.labels) for b in window]), strict=True):
                    yield batch, self.memory.unpack(rows_BD) | self._second(batch, watch)
        finally:
            # Also where the run stops within an epoch.
            self.flush()

    def _live(self, batches: Iterator[Batch], watch: Stopwatch) -> Answered:
        if self._device.type == "cuda":
            yield from self._ahead(batches, watch)
            return
        for batch in batches:
            self.asked += len(batch.labels)
            with watch("teacher"):
                answers = self._teacher.answer(batch)
            yield batch, answers | self._second(batch, watch)

    def _second(self, batch: Batch, watch: Stopwatch) -> Answers:
        """Ask about the second view of each image, of which there is no end: it is never remembered."""
        if batch.strong is None:
            return {}
        self.asked += len(batch.labels)
        with watch("teacher"):
            return {SECOND_LOGITS: self._teacher.answer(_unnamed(batch.strong))[LOGITS]}

    def _ahead(self, batches: Iterator[Batch], watch: Stopwatch) -> Answered:
        """Ask on a stream of its own, a batch ahead of the student, so that both may fill the device."""
        # One for all epochs: what is freed on a stream is used again by the same stream alone.
        side = self._side = self._side or torch.cuda.Stream(self._device)
        main = torch.cuda.current_stream(self._device)
        before: tuple[Batch, Answers, torch.cuda.Event] | None = None
        while True:
            batch = next(batches, None)
            ahead = None
            if batch is not None:
                self.asked += len(batch.labels)
                side.wait_stream(main)
                with torch.cuda.stream(side):
                    with watch("teacher"):
                        answers = self._teacher.answer(batch)
                    answers |= self._second(batch, watch)
                # Both cross streams: their memory may be used again only when the other stream is done with it.
                for images in (batch.images, batch.strong):
                    if images is not None:
                        images.record_stream(side)
                for answer in answers.values():
                    answer.record_stream(main)
                ahead = batch, answers, side.record_event()
            if before is not None:
                main.wait_event(before[2])
                yield before[:2]
            if ahead is None:
                return
            before = ahead

    def _remembered(self, window: list[Batch], memory: TeacherMemory) -> Tensor:
        views_N = torch.cat([batch.views for batch in window if batch.views is not None])
        rows_ND, known_N = self._recall(views_N, memory)
        unknown_N = (~known_N).nonzero().squeeze(1)
        self.asked += len(unknown_N)
        self.remembered += len(views_N) - len(unknown_N)
        if len(unknown_N):
            images = torch.cat([batch.images for batch in window])
            chosen_N = upload(unknown_N, self._device)
            # A run that goes on may begin with the incomplete batch, which its first start asked about among others.
            size = max(self._batch_size, len(window[0].labels))
            fresh_ND = self._ask_in_batches(images[chosen_N], size, memory)
            # What a later run will read is what this one uses.
            rows_ND[chosen_N] = memory.rounded(fresh_ND)
            self._keep(views_N[unknown_N], fresh_ND.to(memory.identity.dtype))
        self._say_troubles(memory)
        return rows_ND

    def _ask_in_batches(self, images: Tensor, size: int, memory: TeacherMemory) -> Tensor:
        """Ask about batches of one size, filled up with black images.

        Kernels may sum in another order for another size: so an answer does not depend on which others were unknown.
        """
        missing = -len(images) % size
        filled = functional.pad(images, [0] * 7 + [missing])
        parts = [memory.pack(self._teacher.answer(_unnamed(part))) for part in filled.split(size)]
        return torch.cat(parts)[: len(images)]

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

    def _recall(self, views_N: Tensor, memory: TeacherMemory) -> tuple[Tensor, Tensor]:
        """Look up answers, for the device, and which are known."""
        if self._table is not None:
            return self._table.recall(views_N)
        rows_ND, known_N = memory.recall(views_N)
        return upload(rows_ND, self._device), known_N

    def _keep(self, views_N: Tensor, rows_ND: Tensor) -> None:
        if self._table is not None:
            self._table.put(views_N, rows_ND)
        if self._recorder is not None:
            self._recorder.give(views_N, rows_ND)
        else:
            self._record(views_N, rows_ND)

    def _record(self, views_N: Tensor, rows_ND: Tensor) -> None:
        """Take answers that have arrived on the host."""
        assert self.memory is not None
        if self._table is not None:
            self._table.confirm(views_N, rows_ND)
        self.memory.record(views_N, rows_ND)

    def flush(self) -> None:
        """Wait until all that the teacher was asked has been recorded."""
        if self.memory is not None:
            if self._recorder is not None:
                self._recorder.flush()
            self._say_troubles(self.memory)


def _unnamed(images: Tensor) -> Batch:
    """Make a batch of images of which nothing else is known."""
    return Batch(images, torch.full((len(images),), -1, device=images.device))


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
