"""What a run leaves to cakd, decided once with its reason: form, memory, compiling, the length of the average.

The device and its precision are found before, because the networks are read onto it; the size of a folder's images by
the data itself. Their reasons come along.
"""

import contextlib
import copy
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rich.filesize import decimal

from cakd_cli.data import Views
from cakd_cli.data.checking import at_start
from cakd_cli.engine.build import Inputs, passes
from cakd_cli.engine.task import taps
from cakd_cli.errors import RecipeError
from cakd_cli.machine.compiling import Trial, worth_compiling
from cakd_cli.machine.hardware import Hardware
from cakd_cli.models.layers import Tap, Tapped, locate
from cakd_cli.models.normalisation import Normalisation
from cakd_cli.recipe.schema import EngineOptions, Recipe
from cakd_cli.teachers import StoredLogits, Teacher, forms, memory
from cakd_cli.teachers.forms import Form
from cakd_cli.teachers.memory import Identity, identify

# What of the average may still be the first step's weights.
_LEAST_FORGOTTEN = 0.05
# What a run that asks no teacher says of one.
_NO_TEACHER = {
    "teacher_form": "plain",
    "teacher_memory": "off",
    "teacher_memory_features": False,
    "teacher_memory_precision": "fp32",
}


@dataclass(frozen=True)
class Choices:
    """What a run does.

    Attributes:
        inputs: With the teacher that answers all that the memory holds.
        recipe: Without anything automatic.
        reasons: Why, by recipe key, of what was not asked for.
        warnings: What is done otherwise than asked for, and what will hardly work.
        table: Whether the device holds the teacher's remembered answers too; no result depends on it.
    """

    inputs: Inputs
    recipe: Recipe
    reasons: dict[str, str]
    warnings: tuple[str, ...]
    table: bool = False

    def lines(self) -> list[str]:
        """Say each choice with its reason."""
        return [f"{key}: {_value(self.recipe, key)} ({reason})" for key, reason in self.reasons.items()]


def _value(recipe: Recipe, key: str) -> Any:
    section, name = key.split(".")
    value = getattr(getattr(recipe, section), name)
    return str(value).lower() if isinstance(value, bool) else value


def as_begun(recipe: Recipe, begun: Recipe) -> Recipe:
    """Let a run go on as an earlier start of it chose: its choices take the place of ``auto``.

    The device may be another one.
    """
    engine = {key: getattr(begun.engine, key) for key, value in recipe.engine if value == "auto" and key != "device"}
    update: dict[str, Any] = {"engine": recipe.engine.model_copy(update=engine)}
    if recipe.data.type == begun.data.type:
        data = {key: getattr(begun.data, key) for key, value in recipe.data if value == "auto"}
        update["data"] = recipe.data.model_copy(update=data)
    return recipe.model_copy(update=update)


def decide(inputs: Inputs, *, measure: bool = True, student: bool = True) -> Choices:
    """Choose all that the recipe leaves open, before the run is built; nothing is written.

    Args:
        inputs: What the run reads.
        measure: Whether to measure the forms of the teacher and whether compiling pays; without it these stay
            ``auto``, for a plan that is not carried out.
        student: Whether a student is trained at all.

    Raises:
        RecipeError: If a memory is asked for, and training has no end of views.
        HardwareError: If compiling was asked for and cannot be done.
    """
    recipe, machine = inputs.recipe, inputs.hardware
    reasons = dict(inputs.reasons)
    engine = recipe.engine.model_copy(update={"device": str(machine.device), "precision": machine.precision})
    if not_compiled := _not_compiled(recipe):
        reasons |= {"engine.compile": not_compiled} if engine.compile != "off" else {}
        engine = engine.model_copy(update={"compile": "off"})
    decay, warnings = _average_decay(engine, inputs.steps_per_epoch * engine.epochs)
    engine = engine.model_copy(update={"ema_decay": decay})
    table = False
    if inputs.teacher is None or isinstance(inputs.teacher.model, StoredLogits):
        engine = engine.model_copy(update=_NO_TEACHER)
        if inputs.teacher is not None:
            reasons["engine.teacher_memory"] = "the answers are in a file"
    else:
        memory_choice = _MemoryChoice(inputs, engine, measure=measure)
        inputs = replace(inputs, teacher=memory_choice.teacher)
        engine, table = engine.model_copy(update=memory_choice.keys), memory_choice.table
        if memory_choice.reason:
            reasons["engine.teacher_memory"] = memory_choice.reason
        if inputs.recipe.engine.teacher_memory_features is True and not engine.teacher_memory_features:
            reasons["engine.teacher_memory_features"] = "there is no room on disk for both, or no linear classifier"
        if measure:
            form, why = _form(inputs, memory_choice.teacher, engine)
            if why:
                reasons["engine.teacher_form"] = why
            engine = engine.model_copy(update={"teacher_form": form})
    if measure and student and engine.compile != "off":
        compiled, reasons["engine.compile"] = _compiled(inputs, engine)
        engine = engine.model_copy(update={"compile": "on" if compiled else "off"})
    recipe = recipe.model_copy(update={"engine": engine})
    return Choices(replace(inputs, recipe=recipe), recipe, reasons, (*warnings, *_warnings(inputs)), table)


def _not_compiled(recipe: Recipe) -> str:
    """Why the student cannot be compiled; empty if it can."""
    if recipe.engine.parallel == "fsdp":
        return "what is cut over processes is not compiled"
    if recipe.delta:
        return "two momenta (optimizer.delta) go through the student's graph twice"
    return ""


def _average_decay(engine: EngineOptions, steps: int) -> tuple[float, list[str]]:
    """Shorten an average that would still hold the first steps' weights at the end of the run."""
    asked = engine.ema_decay
    if not asked or asked**steps <= _LEAST_FORGOTTEN:
        return asked, []
    decay = math.floor(1e6 * _LEAST_FORGOTTEN ** (1 / steps)) / 1e6
    return decay, [
        f"engine.ema_decay={asked:g} averages over {1 / (1 - asked):,.0f} steps, and the run has {steps:,}: "
        f"{decay:g} is taken instead"
    ]


def _warnings(inputs: Inputs) -> list[str]:
    lines = []
    for number, term in enumerate(inputs.recipe.loss):
        k = getattr(getattr(term, "grouping", term), "k", 0)
        if k >= inputs.data.num_classes:
            lines.append(f"loss.{number}: the top {k} are all {inputs.data.num_classes} classes, and leave no rest")
    if inputs.recipe.protocol == "literature":
        lines.append("protocol literature: nothing is held out; the best epoch on the test set is told beside the last")
    elif inputs.data.validation is None:
        lines.append("no image is held out: the last epoch's network is kept, not the best one's")
    if inputs.ranks.first:
        lines += at_start(inputs.data)
    return lines


class _MemoryChoice:
    """What of a teacher's answers is kept, where, and how exactly.

    A memory on disk holds the input of the teacher's classifier beside the logits if there is room for both, whatever
    this run needs: so the teacher is asked once by students that learn from logits and those that learn from features.
    """

    def __init__(self, inputs: Inputs, engine: EngineOptions, *, measure: bool) -> None:
        assert inputs.teacher is not None
        self._inputs, self._engine = inputs, engine
        wide = None
        if engine.teacher_memory_features is not False and engine.teacher_memory in ("auto", "disk"):
            wide = self._with_features(inputs.teacher)
        for teacher in filter(None, (wide, inputs.teacher)):
            self.teacher, stored = teacher, self._stored(teacher, measure=measure)
            where, self.reason = self._where(teacher, stored)
            if where == "disk":
                break
        self.table = False
        if where != "off":
            identity = _identity(inputs, self.teacher, engine.teacher_form, stored)
            self.table, why = fits_device(identity, inputs.hardware)
            self.reason = "; ".join(filter(None, (self.reason, why)))
        self.keys: Mapping[str, Any] = {
            "teacher_memory": where,
            "teacher_memory_precision": stored,
            "teacher_memory_features": any(tap.of_input and tap.form == "vector" for tap in self.teacher.taps),
        }

    def _stored(self, teacher: Teacher, *, measure: bool) -> str:
        """Half of the room where that loses nothing: decided by what the teacher says of real images."""
        asked, machine = self._engine.teacher_memory_precision, self._inputs.hardware
        if asked != "auto":
            return asked
        if not machine.is_half or self._engine.teacher_form == "folded-fp32" or teacher.is_ensemble:
            return "fp32"
        if not measure:
            return "fp16"
        with contextlib.closing(Form(teacher, "plain", machine)) as form:
            answers = form.answers_to(self._inputs.first_images()[:16])
        return "fp32" if forms.loses_digits_in_half(answers) else "fp16"

    def _with_features(self, teacher: Teacher) -> Teacher | None:
        if teacher.taps or teacher.is_ensemble:
            return None
        try:
            return teacher.with_taps((Tap(),), self._inputs.data, self._inputs.hardware)
        except RecipeError:
            return None  # it has no linear classifier

    def _where(self, teacher: Teacher, stored: str) -> tuple[str, str]:
        where, views = self._engine.teacher_memory, self._inputs.data.train.views
        if where == "off":
            return where, ""
        if views is None:
            if where != "auto":
                raise RecipeError(
                    f"engine.teacher_memory is {where}, but every epoch draws new views of {self._inputs.data.name}",
                    hint="data.views=8 draws 8 views of each image and replays them",
                )
            return "off", "every epoch draws new views; data.views=8 would replay 8 of each image"
        identity = _identity(self._inputs, teacher, self._engine.teacher_form, stored)
        room = _room(identity, views)
        if identity.num_bytes > self._engine.teacher_memory_gb * 1e9:
            return "off", f"{room} are more than engine.teacher_memory_gb={self._engine.teacher_memory_gb:g}"
        return self._on_disk(identity, room) if where == "auto" else (where, "")

    def _on_disk(self, identity: Identity, room: str) -> tuple[str, str]:
        try:
            folder = next(path for path in (memory.root(), *memory.root().parents) if path.exists())
            form: str | None = identity.form
            if form == "auto":
                form = memory.known_form(identity, compiled=self._engine.compile != "off")
            used = memory.used_bytes(replace(identity, form=form)) if form else 0
            free = shutil.disk_usage(folder).free
            writable = folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
        except (OSError, RuntimeError) as error:
            # RuntimeError is how Python says that there is no home directory.
            return "ram", f"nothing can be kept on disk: {error}"
        if not writable:
            return "ram", f"nothing can be kept on disk: {folder} cannot be written"
        # A tenth stays free for checkpoints, and for others.
        if identity.num_bytes - used < 0.9 * free:
            return "disk", f"at most {room}"
        return "off", f"{room}, {decimal(free)} free"


def fits_device(identity: Identity, machine: Hardware) -> tuple[bool, str]:
    """Whether an accelerator has room for a table of all answers, and what to say of it; empty without an accelerator.

    Half of what is free now is left to the steps to come. The CPU needs no table: there, the system keeps the files in
    RAM, and what it costs to read them again is hardly more.
    """
    free, needed = machine.free_bytes(), identity.rows * identity.row_bytes
    if free is None:
        return False, ""
    if needed <= free / 2:
        return True, f"those met are held on {machine.device} too"
    return False, f"not held on {machine.device}, where {decimal(free)} are free"


def _identity(inputs: Inputs, teacher: Teacher, form: str, stored: str) -> Identity:
    identity = identify(teacher, inputs.data, inputs.hardware, form=form, stored=stored)
    assert identity is not None
    return identity


def _room(identity: Identity, views: Views) -> str:
    return f"{decimal(identity.num_bytes)} for {views.per_sample} views of {views.samples:,} images"


def _form(inputs: Inputs, teacher: Teacher, engine: EngineOptions) -> tuple[str, str]:
    """Choose how the teacher computes, and say why; empty where that is not worth a line.

    A memory holds the answers of one form. Unless the recipe names another, a run takes that of the memory on disk,
    and measures only where there is none.
    """
    if engine.teacher_form != "auto":
        return engine.teacher_form, ""
    if engine.teacher_memory == "disk":
        any_form = _identity(inputs, teacher, "plain", engine.teacher_memory_precision)
        known = memory.known_form(any_form, compiled=engine.compile != "off")
        if known is not None:
            return known, "as its remembered answers were computed" if known != "plain" else ""
    return forms.fastest_form(
        teacher,
        inputs.hardware,
        inputs.first_images(),
        asks=expected_asks(inputs, engine),
        compiled=engine.compile,
        # What float32 answers lose in fp16 would change the run.
        float32=engine.teacher_memory == "off" or engine.teacher_memory_precision == "fp32",
    )


def expected_asks(inputs: Inputs, engine: EngineOptions) -> int:
    """Count the images that the teacher is asked about in the run, if nothing is remembered at its beginning."""
    images, views = len(inputs.data.train), inputs.data.train.views
    if engine.teacher_memory == "off" or views is None:
        return images * engine.epochs
    # Of V views an image has met V (1 - (1 - 1/V)^E) in E epochs.
    return round(images * views.per_sample * (1 - (1 - 1 / views.per_sample) ** engine.epochs))


def _compiled(inputs: Inputs, engine: EngineOptions) -> tuple[bool, str]:
    """Decide whether the student's pass is compiled, and say why."""
    looks = [look for term in inputs.recipe.loss for look in term.needs.student_layers]
    example = inputs.data.input.example(inputs.hardware.device)
    found = locate(inputs.student, taps(looks), inputs.data.num_classes, example, name="the student")
    normalise = Normalisation(inputs.data.mean, inputs.data.std, inputs.hardware)
    images = inputs.first_images()
    images = normalise(images[: -(-len(images) // engine.gradient_accumulation)])
    with contextlib.closing(Tapped(copy.deepcopy(inputs.student), found.taps)) as network:
        trial = Trial(network, images, inputs.steps_per_epoch * engine.epochs, passes(inputs.recipe))
        return worth_compiling(trial, inputs.hardware, asked_for=engine.compile == "on")
