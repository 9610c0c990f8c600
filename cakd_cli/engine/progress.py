"""What the engine tells whoever watches."""

from collections.abc import Mapping
from typing import Any, Protocol


class Progress(Protocol):
    """Receives plain numbers that have already left the device."""

    def note(self, text: str) -> None:
        """Say one line: a choice that was made, and why."""

    def warn(self, text: str) -> None:
        """Say one line that the user should act on."""

    def start(self, *, epochs: int, steps_per_epoch: int, done: int, title: str) -> None:
        """Training begins; ``done`` steps have been done before."""

    def tick(self, *, epoch: int, step: int) -> None:
        """A step has been handed to the device."""

    def step(self, *, epoch: int, step: int, images_per_second: float, parts: Mapping[str, float]) -> None:
        """A logging interval has passed."""

    def epoch(self, line: Mapping[str, Any]) -> None:
        """An epoch has ended; ``line`` is what metrics.jsonl gets."""

    def end(self) -> None:
        """Training has ended, for whatever reason."""


class Silent:
    """Tells nobody."""

    def note(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def start(self, **settings: Any) -> None: ...
    def tick(self, **where: int) -> None: ...
    def step(self, **figures: Any) -> None: ...
    def epoch(self, line: Mapping[str, Any]) -> None: ...
    def end(self) -> None: ...
