"""What the engine tells whoever watches."""

from collections.abc import Mapping
from typing import Any, Protocol


class Progress(Protocol):
    """Receives plain numbers that have already left the device."""

    def note(self, text: str) -> None:
        """Say one line: a choice that was made, and why."""

    def start(self, *, epochs: int, steps_per_epoch: int, batch_size: int, done_epochs: int, title: str) -> None:
        """Training begins."""

    def step(self, *, epoch: int, step: int, images_per_second: float, parts: Mapping[str, float]) -> None:
        """A logging interval has passed."""

    def epoch(self, line: Mapping[str, Any]) -> None:
        """An epoch has ended; ``line`` is what metrics.jsonl gets."""

    def end(self) -> None:
        """Training has ended, for whatever reason."""
