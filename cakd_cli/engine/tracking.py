"""A run's figures in TensorBoard, Weights & Biases or trackio, beside metrics.jsonl; none of them by default."""

import contextlib
import hashlib
import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cakd_cli.errors import RecipeError, first_line
from cakd_cli.recipe.schema import Recipe

# Takes numbers by name, and the step that they are of.
Sink = Callable[[dict[str, float], int], None]


class Tracker:
    """Passes figures on; a service that fails costs the run nothing but a warning.

    Args:
        sink: Who takes them; none takes nothing.
        warn: Takes a line for the user.
    """

    def __init__(self, sink: Sink | None = None, warn: Callable[[str], None] = lambda text: None) -> None:
        self._sink, self._warn = sink, warn
        self._step = 0

    def epoch(self, line: Mapping[str, Any]) -> None:
        """Pass on a line of metrics.jsonl."""
        self._step = line["step"]
        self._send(dict(_numbers(line)))

    def end(self, figures: Mapping[str, Any]) -> None:
        """Pass on what the finished network was measured to be."""
        self._send(dict(_numbers(figures)))

    def _send(self, numbers: dict[str, float]) -> None:
        if self._sink is None:
            return
        try:
            self._sink(numbers, self._step)
        except Exception as error:  # whatever another library fails with
            self._sink = None
            self._warn(f"figures are not tracked any more: {first_line(error)}")


def _numbers(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in line.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key not in ("epoch", "step"):
            yield prefix + key, value


@contextlib.contextmanager
def tracked(kind: str, recipe: Recipe, path: Path, warn: Callable[[str], None]) -> Iterator[Tracker]:
    """Open what a run's figures go to, and close it at its end.

    Args:
        kind: As ``engine.tracking`` says it.
        recipe: That is shown beside the figures.
        path: The run's folder, whose name is the run's there.
        warn: Takes a line for the user.

    Raises:
        RecipeError: If it is not installed, or cannot begin.
    """
    if kind == "off":
        yield Tracker()
        return
    # What these have to say is no result.
    with contextlib.redirect_stdout(sys.stderr):
        sink, close = _begin(kind, recipe, path)
        try:
            yield Tracker(sink, warn)
        finally:
            try:
                close()
            except Exception as error:  # whatever another library fails with
                warn(f"{kind} could not be closed: {first_line(error)}")


def _begin(kind: str, recipe: Recipe, path: Path) -> tuple[Sink, Callable[[], None]]:
    open_sink = _tensorboard if kind == "tensorboard" else _hosted
    try:
        return open_sink(kind, recipe, path)
    except ImportError as error:
        raise RecipeError(f"engine.tracking: {kind} is not installed", hint=f"pip install 'cakd[{kind}]'") from error
    except Exception as error:  # whatever another library fails with
        raise RecipeError(
            f"engine.tracking: {kind} cannot begin: {first_line(error)}", hint="engine.tracking=off"
        ) from error


def _tensorboard(kind: str, recipe: Recipe, path: Path) -> tuple[Sink, Callable[[], None]]:
    from torch.utils.tensorboard import SummaryWriter

    writers: list[SummaryWriter] = []

    def sink(numbers: dict[str, float], step: int) -> None:
        if not writers:
            # What a killed start has written of this step and later ones is left out.
            writers.append(SummaryWriter(str(path / "tensorboard"), purge_step=step))
        (writer,) = writers
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def close() -> None:
        for writer in writers:
            writer.close()

    return sink, close


def _hosted(kind: str, recipe: Recipe, path: Path) -> tuple[Sink, Callable[[], None]]:
    """Weights & Biases, and trackio, which is called in the same way; both read their own environment variables."""
    library = importlib.import_module(kind)
    config = recipe.model_dump(mode="json")
    # The same run when it goes on, and another one for a folder of the same name elsewhere.
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = f"{re.sub('[^A-Za-z0-9._-]+', '-', path.resolve().name)}-{place}"
    own = {"id": name, "dir": str(path)} if kind == "wandb" else {}
    library.init(project="cakd", name=name, config=config, resume="allow", **own)
    return lambda numbers, step: library.log(numbers, step=step), library.finish
