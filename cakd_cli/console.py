"""What reaches the user: results on stdout, everything else on stderr."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from cakd_cli.errors import CakdError

_BAR_SECONDS = 0.2


class Console:
    """One command's output: for people, as JSON, or quiet.

    Args:
        json_mode: One JSON document on stdout and nothing on stderr but errors.
        quiet: Results and errors only.
        verbose: More lines on stderr.
        bar: Draw a progress bar although quiet.
    """

    def __init__(
        self, *, json_mode: bool = False, quiet: bool = False, verbose: bool = False, bar: bool | None = None
    ) -> None:
        self.json_mode = json_mode
        self.quiet = quiet or json_mode
        self.verbose = verbose and not self.quiet
        self.bar = not self.quiet if bar is None else bar
        self.stdout = _console(stderr=False)
        self.stderr = _console(stderr=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._notes: list[str] = []
        self._warnings: list[str] = []
        self._epochs = 0
        self._steps_per_epoch = 0
        self._started = self._drawn = 0.0
        self._done = 0

    def result(self, document: Any, show: Callable[[RichConsole], None]) -> None:
        """Give the command's result: the document as JSON, or what ``show`` prints.

        In JSON what was said on the way, ``notes`` and ``warnings``, is part of a document that is an object.
        """
        if self.json_mode:
            if isinstance(document, dict):
                said = {"notes": self._notes, "warnings": self._warnings}
                document = {**document, **{key: lines for key, lines in said.items() if lines}}
            sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        else:
            show(self.stdout)

    def note(self, text: str) -> None:
        """Say one line on stderr."""
        self._notes.append(text)
        self._say(text, style="dim")

    def warn(self, text: str) -> None:
        """Say one line on stderr that the user should act on."""
        self._warnings.append(text)
        self._say(f"warning: {text}", style="yellow")

    def _say(self, text: str, *, style: str) -> None:
        if not self.quiet:
            # A stderr that is full or gone is no reason to end a run.
            with contextlib.suppress(OSError):
                (self._bar.console if self._bar else self.stderr).print(text, style=style, markup=False)

    def detail(self, text: str) -> None:
        """Say what only --verbose wants."""
        if self.verbose:
            self._say(text, style="dim")

    def start(self, *, epochs: int, steps_per_epoch: int, done: int, title: str) -> None:
        """Training begins; ``done`` steps have been done before."""
        self._epochs, self._steps_per_epoch, self._done = epochs, steps_per_epoch, done
        self._started = time.monotonic()
        if not self.bar or not self.stderr.is_terminal:
            return
        self._bar = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=10),
            TimeRemainingColumn(),
            # The only column that a narrow terminal may break, between words.
            TextColumn("{task.fields[status]}", table_column=Column(no_wrap=False)),
            console=self.stderr,
            refresh_per_second=4,
            transient=True,
        )
        self._task = self._bar.add_task(title, total=epochs * steps_per_epoch, completed=done, status="")
        self._bar.start()

    def tick(self, *, epoch: int, step: int) -> None:
        """A step is done: move the bar, a few times a second."""
        now = time.monotonic()
        if self._bar is not None and self._task is not None and now - self._drawn > _BAR_SECONDS:
            self._drawn = now
            self._bar.update(self._task, completed=epoch * self._steps_per_epoch + step)

    def step(self, *, epoch: int, step: int, images_per_second: float, parts: Mapping[str, float]) -> None:
        """A logging interval has passed."""
        if self._bar is not None and self._task is not None:
            status = f"{images_per_second:,.0f} images/s  {_parts(parts)}"
            self._bar.update(self._task, completed=epoch * self._steps_per_epoch + step, status=status)

    def epoch(self, line: Mapping[str, Any]) -> None:
        """An epoch has ended."""
        done = line["step"] - self._done
        left = (time.monotonic() - self._started) / done * (self._epochs * self._steps_per_epoch - line["step"])
        train = line["train"]
        head, text = f"epoch {line['epoch']}/{self._epochs}  ", ""
        for part, images in (("validation", "held-out"), ("test", "test")):
            if part in line:
                figures = line[part]
                name, value = ("mAP", figures["map"]) if "map" in figures else ("top-1", figures["top1"])
                text += f"  {images} {name} {value:.1%}"
        text += f"  {line['images_per_second']:,.0f} images/s  {duration(left)} left"
        # One line an epoch for a person; a file has room for all.
        room = self.stderr.width - len(head + text) if self.stderr.is_terminal else None
        text = head + _parts(train, room) + text
        if self._bar is not None and self._task is not None:
            status = f"{line['images_per_second']:,.0f} images/s  {_parts(train)}"
            self._bar.update(self._task, completed=line["epoch"] * self._steps_per_epoch, status=status)
        self.note(text)

    def end(self) -> None:
        """Training has ended."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class _Lasting(RichConsole):
    """Falls silent when nobody reads it any more: who only looked at the first lines must not end a run."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


def _console(*, stderr: bool) -> RichConsole:
    # Wrapped between words for a person, one line a message for a file or a pipe.
    stream = sys.stderr if stderr else sys.stdout
    kind = _Lasting if stderr else RichConsole
    return kind(stderr=stderr, highlight=False, emoji=False, soft_wrap=not stream.isatty())


def show_error(error: CakdError, *, json_mode: bool) -> None:
    """Say what went wrong and what to do, on stderr; in JSON mode on stdout as well."""
    stderr = _console(stderr=True)
    with contextlib.suppress(OSError):
        stderr.print("error:", style="bold red", end=" ")
        stderr.print(error.message, markup=False)
        if error.hint:
            stderr.print("\nhint:", style="bold cyan", end=" ")
            stderr.print(error.hint, markup=False)
    if json_mode:
        content = {"code": error.code, "message": error.message, "hint": error.hint}
        sys.stdout.write(json.dumps({**error.document, "error": content}, ensure_ascii=False) + "\n")


def _parts(train: Mapping[str, float], room: int | None = None) -> str:
    """Write the loss and what it is made of, before any weight; as many parts as there is room for."""
    parts = [f"{name} {value:.3f}" for name, value in train.items() if name not in ("loss", "top1")]
    text = f"loss {train['loss']:.3f} ({', '.join(parts)})"
    while room is not None and len(text) > room and parts:
        parts.pop()
        text = f"loss {train['loss']:.3f} ({', '.join([*parts, '...'])})" if parts else f"loss {train['loss']:.3f}"
    return text


def duration(seconds: float) -> str:
    """Write seconds as 1:02 or 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
