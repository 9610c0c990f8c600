"""A whole run, from a recipe to a finished folder; train-teacher and distill differ only in the recipe."""

import contextlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cakd_cli import __version__
from cakd_cli.data import ImageDataSet, MemorySplit
from cakd_cli.engine import compiling, run_directory, saved_model, taps, teacher_memory, teaching
from cakd_cli.engine import hardware as hardware_module
from cakd_cli.engine.answers import Answers
from cakd_cli.engine.hardware import Hardware
from cakd_cli.engine.loop import Trainer
from cakd_cli.engine.progress import Progress
from cakd_cli.engine.run_directory import Checkpoint, RunDirectory
from cakd_cli.engine.stopping import StopRequest
from cakd_cli.engine.stopwatch import Stopwatch
from cakd_cli.engine.task import Task
from cakd_cli.engine.teacher import Teacher, check_takes, check_teacher, initial_model, load_teacher
from cakd_cli.errors import CakdError, HardwareError, InputError, RecipeError
from cakd_cli.evaluation import cost, metrics
from cakd_cli.evaluation.predict import Normalisation, predict
from cakd_cli.losses.emphasis import Emphasis
from cakd_cli.recipe.schema import Recipe

# What a run that asks no teacher has settled about it.
_WITHOUT_TEACHER = {"teacher_form": "plain", "teacher_memory": "off", "teacher_memory_precision": "fp32"}
# What run.json says of each time that the run was started.
_BEGINNING = ("command", "versions", "hardware", "started_at")
# Settled by measuring when the run begins, and as it was then when it goes on.
_MEASURED = ("compile", "teacher_form", "teacher_memory")
_BEFORE = {"compile": "off", "teacher_form": "plain", "teacher_memory": "off"}


@dataclass(frozen=True)
class Prepared:
    """A run with everything built and nothing begun."""

    recipe: Recipe
    data: ImageDataSet
    hardware: Hardware
    task: Task
    teacher: Teacher | None
    reasons: dict[str, str]  # of what was settled automatically, by recipe key

    @property
    def student(self) -> nn.Module:
        """The network that learns."""
        return self.task.student

    def settled(self, **engine: Any) -> "Prepared":
        """Return the same run with these keys of ``engine`` settled."""
        options = self.recipe.engine.model_copy(update=engine)
        return replace(self, recipe=self.recipe.model_copy(update={"engine": options}))


def prepare(recipe: Recipe) -> Prepared:
    """Read the data, build the networks and settle what was automatic; writes nothing.

    Raises:
        CakdError: If anything is missing or does not fit.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise HardwareError("several processes are not supported", hint="start one process, without torchrun")
    machine = hardware_module.choose(recipe.engine)
    data = recipe.data.load()
    if len(data.train) < recipe.engine.batch_size:
        raise RecipeError(
            f"engine.batch_size is {recipe.engine.batch_size}, more than the {len(data.train)} training images "
            f"of {data.name}",
            hint="give a smaller --batch-size",
        )
    if data.multi_label:
        for number, term in enumerate(recipe.loss):
            if not term.takes_several_labels:
                raise RecipeError(
                    f"loss.{number}: {term.type} needs one label an image, and images of {data.name} may have several"
                )
    data = _place(data, machine)
    torch.manual_seed(recipe.seed)
    student = initial_model(recipe.model, data)
    check_takes(student, data, recipe.model.label)
    # After the probe, so that it draws no random numbers from the run.
    torch.manual_seed(recipe.seed)
    teacher = None
    if recipe.teacher is not None and recipe.needs_teacher:
        teacher = load_teacher(recipe.teacher, data, machine, taps.teacher_layers(recipe.loss))
    engine = recipe.engine.model_copy(update={"device": str(machine.device), "precision": machine.precision})
    reasons = dict(machine.reasons)
    if teacher is None:
        engine = engine.model_copy(update=_WITHOUT_TEACHER)
    else:
        engine, why, teacher = teaching.settle_memory(engine, teacher, data, machine)
        if why:
            reasons["engine.teacher_memory"] = why
    recipe = recipe.model_copy(update={"engine": engine})
    task = Task(machine.place(student), recipe.loss, data, machine, teacher)
    return Prepared(recipe, data, machine, task, teacher, reasons)


def _place(data: ImageDataSet, machine: Hardware) -> ImageDataSet:
    """Put the images on an accelerator if they take less than half of its free memory."""
    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    in_memory = {name: split for name, split in parts.items() if isinstance(split, MemorySplit)}
    free = hardware_module.free_bytes(machine.device)
    if free is None or sum(split.num_bytes() for split in in_memory.values()) > free / 2:
        return data
    placed = {name: split.to(machine.device) for name, split in in_memory.items()}
    return ImageDataSet(**{**vars(data), **placed})


def run(prepared: Prepared, out: Path, *, resume: bool, overwrite: bool, progress: Progress) -> dict[str, Any]:
    """Train, or go on training, and leave a finished folder.

    Returns:
        What run.json holds.

    Raises:
        CakdError: If the run cannot begin, diverges or is stopped.
    """
    facts = _facts(prepared)
    directory = RunDirectory.open(out, resume=resume, overwrite=overwrite)
    try:
        before = directory.facts()
        if (out / "recipe.yaml").is_file():
            begun = run_directory.read_recipe(out)
            prepared = _as_it_was(prepared, begun)
            run_directory.check_same_recipe(begun, prepared.recipe, out)
        whole = "metrics" in before and all((out / name).is_file() for name in ("config.json", "model.safetensors"))
        if before.get("ended") == "completed" and whole:
            progress.note(f"{out} is already finished")
            return before
        checkpoint = directory.latest_checkpoint()
        if checkpoint is not None:
            _check_same_inputs(before, facts, out)
            facts = _gone_on(before, facts)
        prepared.hardware.keep_freed_memory()
        with _torch_errors(prepared.recipe):
            _say_what_was_chosen(prepared, progress)
            prepared, answers = _open_answers(prepared, facts, progress)
            prepared = settle_compile(prepared, progress)
        directory.write_recipe(prepared.recipe)
        try:
            with StopRequest().listening() as stop, _torch_errors(prepared.recipe):
                trainer = Trainer(prepared.task, answers, prepared.data, prepared.recipe, directory, progress, stop)
                return _train(prepared, trainer, checkpoint, facts)
        except BaseException as error:
            # The first error is the one to report, also where the disk is too full to note it.
            with contextlib.suppress(OSError):
                directory.write_facts(facts | {"ended": _reason(error), "finished_at": _now()})
            raise
    finally:
        directory.close()


def _train(
    prepared: Prepared, trainer: Trainer, checkpoint: Checkpoint | None, facts: dict[str, Any]
) -> dict[str, Any]:
    recipe, directory, progress = prepared.recipe, trainer.run, trainer.progress
    directory.write_facts(facts | {"ended": "running"})
    if checkpoint is not None:
        trainer.restore(checkpoint)
        progress.note(f"resumed after epoch {trainer.epoch}, step {trainer.step}")
    directory.keep_metrics(trainer.epoch)
    progress.start(
        epochs=recipe.engine.epochs,
        steps_per_epoch=trainer.steps_per_epoch,
        batch_size=recipe.engine.batch_size,
        done_epochs=trainer.epoch,
        title=recipe.model.label,
    )
    try:
        trainer.fit()
    finally:
        progress.end()
    return _finish(prepared, trainer, directory, facts)


def _say_what_was_chosen(prepared: Prepared, progress: Progress) -> None:
    for key, reason in prepared.reasons.items():
        progress.note(f"{key}: {_value(prepared.recipe, key)} ({reason})")
    for number, term in enumerate(prepared.recipe.loss):
        k = getattr(getattr(term, "grouping", term), "k", 0)
        if k >= prepared.data.num_classes:
            progress.note(
                f"warning: loss.{number}: the top {k} are all {prepared.data.num_classes} classes, and leave no rest"
            )
    if prepared.data.validation is None:
        progress.note("no image is held out: the last epoch's network is kept, not the best one's")


def _as_it_was(prepared: Prepared, begun: Recipe) -> Prepared:
    """Take over what an earlier start of the run has measured, so that it goes on in the same way."""
    before, now = dict(begun.engine), dict(prepared.recipe.engine)
    open_keys = [key for key in _MEASURED if now[key] == "auto" or f"engine.{key}" in prepared.reasons]
    # A version that did not know a key did what these say.
    known = {key: before[key] if before[key] != "auto" else _BEFORE[key] for key in open_keys}
    reasons = {key: why for key, why in prepared.reasons.items() if key.removeprefix("engine.") not in known}
    return replace(prepared, reasons=reasons).settled(**known)


def _open_answers(prepared: Prepared, facts: dict[str, Any], progress: Progress) -> tuple[Prepared, Answers | None]:
    """Check the teacher, open its memory and settle its form; a teacher that cannot teach ends the run here."""
    teacher, data, recipe, machine = prepared.teacher, prepared.data, prepared.recipe, prepared.hardware
    if teacher is None:
        return prepared, None
    known = teaching.known_form(recipe.engine, teacher, data, machine)
    shared = teaching.identity(recipe.engine, teacher, data, machine, known) if known else None
    # Two runs on the same data by the same teacher need one check.
    checked = shared and teacher_memory.read_check(shared, facts["data"])
    if not checked:
        size = recipe.engine.evaluation_batch_size
        checked = check_teacher(teacher, data, facts["data"], machine, batch_size=size)
    images = "held-out" if data.validation else "training"
    progress.note(f"teacher {teacher.name}: top-1 {checked['top1']:.1%} of {checked['samples']} {images} images")
    answers, form, why = teaching.open_answers(recipe, teacher, data, machine, progress.note)
    if why:
        progress.note(f"engine.teacher_form: {form} ({why})")
    if answers.memory is not None and answers.memory.folder is not None:
        teacher_memory.write_check(answers.memory.identity, facts["data"], checked)
    return prepared.settled(teacher_form=form), answers


def fill_memory(prepared: Prepared, progress: Progress) -> tuple[str, int]:
    """Ask the teacher about every view that the run would meet, and train nothing.

    Args:
        prepared: With a memory on disk.
        progress: Hears of every epoch.

    Returns:
        The memory's key, and the images that the teacher was shown.
    """
    asked = 0
    with _torch_errors(prepared.recipe):
        prepared, answers = _open_answers(prepared, _facts(prepared), progress)
        assert answers is not None
        assert answers.memory is not None
        recipe, device = prepared.recipe, prepared.hardware.device
        for epoch in range(recipe.engine.epochs):
            batches = prepared.data.train.train_batches(
                batch_size=recipe.engine.batch_size, seed=recipe.seed, epoch=epoch, start=0, device=device
            )
            for _ in answers.alongside(batches, Stopwatch(device)):
                pass
            counts = answers.take_counts()
            asked += counts["asked"]
            if answers.memory.stopped:
                raise InputError(f"answers are not kept: {answers.memory.stopped}", hint="make room, then fill again")
            progress.note(
                f"epoch {epoch + 1}/{recipe.engine.epochs}: {counts['asked']:,} asked about, "
                f"{counts['remembered']:,} known"
            )
    return answers.memory.identity.key, asked


def settle_compile(prepared: Prepared, progress: Progress) -> Prepared:
    """Compile the student's step where that was asked for or pays."""
    recipe, data = prepared.recipe, prepared.data
    engine = recipe.engine
    compiled = engine.compile == "on"
    if engine.compile != "off":
        images = teaching.first_images(recipe, data, prepared.hardware)
        compiled, why = compiling.choose(
            prepared.task.network,
            prepared.task.normalisation,
            prepared.hardware,
            images[: -(-len(images) // engine.gradient_accumulation)],
            steps=len(data.train) // engine.batch_size * engine.epochs,
            parts=engine.gradient_accumulation,
            wanted=engine.compile,
        )
        progress.note(f"engine.compile: {'on' if compiled else 'off'} ({why})")
    if compiled:
        prepared.task.compile(engine.gradient_accumulation)
    return prepared.settled(compile="on" if compiled else "off")


def _check_same_inputs(before: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    """Refuse to continue a run on other data or under another teacher.

    Raises:
        InputError: If either is not what the run began with.
    """
    for what, key in (("data", "fingerprint"), ("teacher", "weights_hash")):
        old, new = ((facts.get(what) or {}).get(key) for facts in (before, now))
        if old is not None and old != new:
            raise InputError(
                f"{out} cannot be resumed: its {what} has changed since it began ({key} {old}, now {new})",
                hint="put it back, or start another run with another --out",
            )


def _reason(error: BaseException) -> str:
    if isinstance(error, CakdError):
        return error.code
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"


def _finish(prepared: Prepared, trainer: Trainer, directory: RunDirectory, facts: dict[str, Any]) -> dict[str, Any]:
    """Measure the chosen network in float32, look at the test set for the first and only time, and write the folder."""
    recipe, data = prepared.recipe, prepared.data
    machine = prepared.hardware.full_precision()
    prepared.student.load_state_dict(trainer.best_state)
    normalisation = Normalisation(data.mean, data.std, machine)
    figures = {}
    for name, split in (("validation", data.validation), ("test", data.test)):
        if split is not None:
            logits, labels = predict(
                prepared.student, split, normalisation, machine, batch_size=recipe.engine.evaluation_batch_size
            )
            figures[name] = metrics.quality(logits, labels)
    facts |= {
        "ended": "completed",
        "finished_at": _now(),
        "best": trainer.best or {"epoch": recipe.engine.epochs},
        "metrics": figures,
        "images_per_second": [line["images_per_second"] for line in directory.metrics()],
    }
    saved = saved_model.SavedModel(
        model=prepared.student.cpu().eval(),
        spec=recipe.model,
        class_names=data.class_names,
        channels=data.channels,
        image_size=data.image_size,
        mean=data.mean,
        std=data.std,
        crop_pct=data.crop_pct,
        facts={key: facts[key] for key in ("data", "loss", "seed", "metrics", "teacher") if facts.get(key) is not None},
    )
    saved_model.write(directory.path, saved)
    facts["weights_hash"] = saved_model.weights_hash(saved.model.state_dict())
    directory.write_facts(facts)
    directory.drop_checkpoints()
    return facts


def _facts(prepared: Prepared) -> dict[str, Any]:
    recipe, data, teacher = prepared.recipe, prepared.data, prepared.teacher
    return {
        "command": ["cakd", *sys.argv[1:]],
        "versions": versions(),
        "hardware": {
            "device": str(prepared.hardware.device),
            "name": hardware_module.describe(prepared.hardware.device),
            "precision": prepared.hardware.precision,
        },
        "started_at": _now(),
        "seed": recipe.seed,
        "data": {
            "name": data.name,
            "fingerprint": data.fingerprint,
            "image": [data.channels, *data.image_size],
            "validation_fraction": recipe.data.validation_fraction,
            "split_seed": recipe.data.split_seed,
            "train": len(data.train),
            "validation": len(data.validation) if data.validation else 0,
            "test": len(data.test),
        },
        "model": {"name": recipe.model.label, "parameters": cost.num_parameters(prepared.student)},
        "loss": " + ".join(f"{_number(term.weight)} {term.type}" for term in recipe.loss),
        "teacher": teacher and {"name": teacher.name, "weights_hash": teacher.weights_hash},
    }


def _gone_on(before: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Leave on record how the run began, and add that it went on."""
    began = {key: before[key] for key in _BEGINNING if key in before}
    again = {key: facts[key] for key in _BEGINNING}
    return facts | began | {"resumed": [*before.get("resumed", []), again]}


@contextlib.contextmanager
def _torch_errors(recipe: Recipe) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise HardwareError(
            f"the memory of {recipe.engine.device} is full: {str(error).splitlines()[0]}",
            hint=f"cut the batch of {recipe.engine.batch_size} into parts: "
            f"engine.gradient_accumulation={2 * recipe.engine.gradient_accumulation}",
        ) from error
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise RecipeError(
            f"batch norm has nothing to average over: images this small need more than "
            f"{recipe.engine.batch_size // recipe.engine.gradient_accumulation} at a time",
            hint="give a larger --batch-size, or a smaller engine.gradient_accumulation",
        ) from error


def _number(weight: float | Emphasis) -> str:
    return f"{weight.type} weight of" if isinstance(weight, Emphasis) else f"{weight:g}"


def versions() -> dict[str, str]:
    """Versions of everything that may change a result."""
    packages = ("torch", "torchvision", "safetensors", "torchmetrics", "timm", "onnx", "onnxruntime")
    found = {"cakd": __version__, "python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _value(recipe: Recipe, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(recipe, section), name)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
