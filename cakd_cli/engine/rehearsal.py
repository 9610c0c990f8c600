"""How long a run will take, measured on a few of its steps; nothing that it uses is changed, and nothing written."""

import contextlib
import copy
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from cakd_cli.data import Batch
from cakd_cli.engine.build import Inputs, make_job, make_source
from cakd_cli.engine.choices import Choices, expected_asks
from cakd_cli.engine.loop import Trainer
from cakd_cli.engine.progress import Silent
from cakd_cli.engine.run import torch_errors
from cakd_cli.engine.run_directory import RunDirectory
from cakd_cli.engine.stopping import StopRequest
from cakd_cli.models.layers import Answers

# Steps that are timed after the first, and seconds after which no other begins.
_STEPS, _SECONDS = 20, 4.0


@dataclass(frozen=True)
class Timing:
    """Seconds of training, without what follows an epoch: validation and checkpoints.

    Attributes:
        steps: That were timed.
        first_epoch: In which the teacher is asked about every image.
        later_epochs: The mean of each of the others, which ask about what is not remembered yet.
        epochs: Of the run.
    """

    steps: int
    first_epoch: float
    later_epochs: float
    epochs: int

    @property
    def total(self) -> float:
        """Of the whole run."""
        return self.first_epoch + (self.epochs - 1) * self.later_epochs

    def as_dict(self) -> dict[str, Any]:
        """What JSON holds, in seconds."""
        seconds = {"total": self.total, "first_epoch": self.first_epoch, "later_epochs": self.later_epochs}
        return {"steps": self.steps} | {name: round(value, 3) for name, value in seconds.items()}


def rehearse(choices: Choices) -> Timing:
    """Take a few steps on a copy of the student; the teacher is plain and nothing is compiled.

    Raises:
        RecipeError: If a term of the loss cannot be built, or the batch is too small for a batch norm.
        DeviceFullError: If the device has no room for a step.
    """
    inputs, engine = choices.inputs, choices.recipe.engine
    form = "plain" if engine.teacher_form == "auto" else engine.teacher_form
    settled = engine.model_copy(update={"compile": "off", "teacher_form": form})
    recipe = choices.recipe.model_copy(update={"engine": settled})
    inputs = replace(inputs, recipe=recipe, student=copy.deepcopy(inputs.student))
    with torch_errors(recipe):
        source = make_source(inputs, recipe, Silent().note, memory="off")
        with contextlib.closing(make_job(inputs, recipe, source)) as job:
            trainer = Trainer(job, RunDirectory(Path()), Silent(), StopRequest())
            trainer.task.train()
            trainer.hardware.keep_freed_memory()
            if source is None:
                asked = _timed(trainer, ((batch, None) for batch in _batches(inputs)))
            else:
                asked = _timed(trainer, source.beside(_batches(inputs), trainer.task.watch))
            remembered = asked
            if engine.teacher_memory != "off" and not recipe.needs_second_view and not asked.slow:
                # What is read from a memory costs hardly more than what is at hand already.
                remembered = _timed(trainer, ((batch, asked.answers) for batch in _batches(inputs)))
    return _of_the_run(inputs, asked, min(remembered.seconds, asked.seconds))


def _batches(inputs: Inputs) -> Iterator[Batch]:
    """Give the full batches of the first epoch."""
    return islice(inputs.batches(), len(inputs.data.train) // inputs.recipe.engine.batch_size)


class _Step(NamedTuple):
    """What a step takes.

    Attributes:
        seconds: Of a step, in the mean.
        timed: Steps that the mean is of.
        slow: Whether the first took all the time that there is, and is the one that was timed.
        answers: The teacher's to the last batch.
    """

    seconds: float
    timed: int
    slow: bool
    answers: Answers | None


def _timed(trainer: Trainer, batches: Generator[tuple[Batch, Answers | None], None, None]) -> _Step:
    """Take steps; the first, which warms up, is not timed where others follow."""
    begun = now = warm = time.perf_counter()
    number, answers = 0, None
    with contextlib.closing(batches):
        for number, (batch, answers) in enumerate(batches):
            trainer.train_step(batch, answers)
            trainer.hardware.wait()
            now = time.perf_counter()
            warm = now if number == 0 else warm
            if number == _STEPS or now - begun > _SECONDS:
                break
    if number == 0:
        return _Step(now - begun, 1, now - begun > _SECONDS, answers)
    return _Step((now - warm) / number, number, False, answers)


def _of_the_run(inputs: Inputs, asked: _Step, remembered: float) -> Timing:
    engine = inputs.recipe.engine
    first, known = asked.seconds * inputs.steps_per_epoch, remembered * inputs.steps_per_epoch
    epochs_of_asking = expected_asks(inputs, engine) / len(inputs.data.train)
    total = engine.epochs * known + epochs_of_asking * (first - known)
    later = (total - first) / (engine.epochs - 1) if engine.epochs > 1 else first
    return Timing(asked.timed, first, later, engine.epochs)
