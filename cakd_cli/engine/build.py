"""From a recipe to a run that can begin: read everything and, once all is chosen, build the task."""

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cakd_cli.data import Batch, ImageDataSet, MemorySplit, MixedSplit
from cakd_cli.engine.distributed import ALONE, Ranks, is_launched, synchronise_batch_norms
from cakd_cli.engine.reuse import own_model, reuse_classifier
from cakd_cli.engine.task import Task, taps, teacher_looks
from cakd_cli.errors import HardwareError, InputError, RecipeError
from cakd_cli.losses import Term
from cakd_cli.machine.hardware import Hardware, choose_hardware
from cakd_cli.machine.sharding import shard
from cakd_cli.models.initial import check_takes, initial_network
from cakd_cli.models.int8 import train_in_int8
from cakd_cli.models.layers import stages
from cakd_cli.recipe import class_map
from cakd_cli.recipe.schema import Recipe
from cakd_cli.teachers import StoredLogits, Teacher, load_teacher, single_teachers
from cakd_cli.teachers.answers import AnswerSource
from cakd_cli.teachers.forms import make_form
from cakd_cli.teachers.memory import Identity, TeacherMemory, identify


@dataclass(frozen=True)
class Inputs:
    """What a run reads: everything is here and fits, nothing is chosen, built or written.

    Attributes:
        recipe: Engine keys may still be ``auto``.
        hardware: Where it runs.
        data: On the device where it has room.
        student: On the device.
        teacher: On the device, with the layers that the loss looks at; none if no term needs one.
        reasons: Why each automatic choice was made so far, by recipe key.
        to_fetch: What would be downloaded, where nothing was.
        ranks: The processes of the run.
    """

    recipe: Recipe
    hardware: Hardware
    data: ImageDataSet
    student: nn.Module
    teacher: Teacher | None
    reasons: dict[str, str]
    to_fetch: tuple[str, ...] = ()
    ranks: Ranks = ALONE

    def batches(self) -> Iterator[Batch]:
        """Yield this process's share of the first epoch's training batches, to measure on."""
        return self.data.train.train_batches(
            batch_size=self.recipe.engine.batch_size,
            seed=self.recipe.seed,
            epoch=0,
            start=0,
            device=self.hardware.device,
            share=self.ranks.share(self.recipe),
        )

    def first_images(self) -> Tensor:
        """Take the first training batch's images."""
        return next(iter(self.batches())).images

    @property
    def steps_per_epoch(self) -> int:
        """Steps in an epoch."""
        return self.ranks.share(self.recipe).steps(len(self.data.train), self.recipe.engine.batch_size)


def read_inputs(recipe: Recipe, *, fetch: bool = True, ranks: Ranks = ALONE) -> Inputs:
    """Read the data and the networks.

    Args:
        recipe: What to run.
        fetch: Whether what is not here may be downloaded; without it stand-ins of the same sizes take its place.
        ranks: The processes of the run.

    Raises:
        CakdError: If anything is missing or does not fit.
    """
    if is_launched() and ranks is ALONE:
        raise HardwareError("this command is one process", hint="start it without torchrun")
    engine = recipe.engine
    number = ranks.local if ranks.count > 1 else None
    machine = choose_hardware(engine.device, engine.precision, channels_last=engine.channels_last, number=number)
    spec, why = recipe.data.without_auto(ranks.local_count)
    recipe = recipe.model_copy(update={"data": spec, "model": own_model(recipe)})
    missing = _to_fetch(recipe)
    _check_ranks(recipe, ranks)
    with ranks.one_first(fetch and bool(missing)):
        data = _mixed(_on_device(_as_asked(spec.load(fetch=fetch), recipe), machine), recipe)
        _check_data(recipe, data)
        student, teacher = _read_networks(recipe, data, machine, fetch=fetch)
        if teacher is not None:
            recipe = recipe.model_copy(update={"loss": _between(recipe.loss, student, teacher)})
            teacher = teacher.with_taps(taps(teacher_looks(recipe.loss)), data, machine)
            recipe = recipe.model_copy(update={"model": reuse_classifier(recipe, student, teacher, data)})
    ranks.check_alike(images=dict(data.fingerprints), training_images=len(data.train), precision=machine.precision)
    reasons = {**machine.reasons, **{f"data.{key}": reason for key, reason in (why | dict(data.reasons)).items()}}
    if data.left_out:
        few = f"{', '.join(data.left_out[:3])}{', ...' if len(data.left_out) > 3 else ''}"
        reasons["data.bad_images"] = f"{len(data.left_out):,} images cannot be read and are left out: {few}"
    return Inputs(recipe, machine, data, machine.place(student), teacher, reasons, () if fetch else missing, ranks)


def _as_asked(data: ImageDataSet, recipe: Recipe) -> ImageDataSet:
    """Hold nothing out where the literature does not, and show what the loss looks at."""
    if recipe.protocol == "literature":
        data = replace(data, validation=None)
    if recipe.needs_second_view:
        data = replace(data, train=data.train.with_second_view())
    return data


def _mixed(data: ImageDataSet, recipe: Recipe) -> ImageDataSet:
    if recipe.data.mix == "none":
        return data
    return replace(data, train=MixedSplit(data.train, recipe.data.mix, recipe.data.mix_alpha))


def _read_networks(
    recipe: Recipe, data: ImageDataSet, machine: Hardware, *, fetch: bool
) -> tuple[nn.Module, Teacher | None]:
    example = data.input.example()
    torch.manual_seed(recipe.seed)
    student = initial_network(recipe.model, example, data.num_classes, fetch=fetch)
    check_takes(student, example, data.num_classes, recipe.model.label)
    if recipe.engine.quantize == "int8":
        train_in_int8(student, name=recipe.model.label)
    # After the probe, so that it draws no random numbers from the run.
    torch.manual_seed(recipe.seed)
    if recipe.teacher is None or not recipe.needs_teacher:
        return student, None
    return student, load_teacher(recipe.teacher, data, machine, fetch=fetch, class_map=class_map.read(recipe.class_map))


def _between(terms: Sequence[Term], student: nn.Module, teacher: Teacher) -> tuple[Term, ...]:
    """Name the layers that terms leave to the networks."""
    named = []
    for number, term in enumerate(terms):
        try:
            named.append(term.between(tuple(stages(student)), tuple(stages(teacher.model))))
        except ValueError as error:
            raise RecipeError(
                f"loss.{number}: {term.type} needs layers: {error}",
                hint=f"name them, as loss.{number}.layers=[{{student: layer3, teacher: layer4}}]",
            ) from error
    return tuple(named)


def _to_fetch(recipe: Recipe) -> tuple[str, ...]:
    teachers = single_teachers(recipe.teacher) if recipe.needs_teacher else []
    return tuple(filter(None, (part.missing_file() for part in (recipe.data, recipe.model, *teachers))))


def _check_data(recipe: Recipe, data: ImageDataSet) -> None:
    if len(data.train) < recipe.engine.batch_size:
        raise RecipeError(
            f"engine.batch_size is {recipe.engine.batch_size}, more than the {len(data.train)} training images "
            f"of {data.name}",
            hint=f"engine.batch_size={len(data.train)} at most",
        )
    for name in data.class_names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            what = f"the class name {name!r} of {data.name} cannot be written as text"
            raise InputError(what, hint="rename its folder") from error
    if not data.labelled:
        needing = [f"loss.{number}: {term.type}" for number, term in enumerate(recipe.loss) if term.needs_label]
        if needing:
            need = "need" if len(needing) > 1 else "needs"
            raise RecipeError(
                f"{', '.join(needing)} {need} labels, and the training images of {data.name} have none",
                hint="take terms that need none, as 'loss=[{type: kd}]', or cakd with grouping=top-k",
            )
    if data.multi_label:
        for number, term in enumerate(recipe.loss):
            if not term.takes_several_labels:
                raise RecipeError(
                    f"loss.{number}: {term.type} needs one label an image, and images of {data.name} may have several"
                )


def _check_ranks(recipe: Recipe, ranks: Ranks) -> None:
    if ranks.count > 1 and recipe.delta:
        raise RecipeError(
            f"optimizer.delta is {recipe.delta:g}, and two momenta are for one process; this run has {ranks.count}",
            hint="start it without torchrun, or set optimizer.delta=0",
        )
    if ranks.count > 1 and recipe.engine.quantize != "off":
        raise RecipeError(
            f"engine.quantize is {recipe.engine.quantize}, and one process measures the range of what it rounds; "
            f"this run has {ranks.count}",
            hint="start it without torchrun, or set engine.quantize=off",
        )
    whole = [f"loss.{number}: {term.type}" for number, term in enumerate(recipe.loss) if term.of_whole_weights]
    if ranks.count > 1 and recipe.engine.parallel == "fsdp" and whole:
        raise RecipeError(
            f"{whole[0]} needs the student's weights whole, and each of {ranks.count} processes holds a share of them",
            hint="set engine.parallel=ddp",
        )
    parts = ranks.count * recipe.engine.gradient_accumulation
    if recipe.engine.batch_size % parts:
        by = f"{ranks.count} processes" + (f" in {parts // ranks.count} parts each" if parts > ranks.count else "")
        raise RecipeError(
            f"engine.batch_size is {recipe.engine.batch_size}, which {by} cannot share equally",
            hint=f"engine.batch_size={recipe.engine.batch_size // parts * parts or parts}",
        )


def _on_device(data: ImageDataSet, machine: Hardware) -> ImageDataSet:
    """Put the images on an accelerator if they take less than half of its free memory."""
    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    in_memory = {name: split for name, split in parts.items() if isinstance(split, MemorySplit)}
    free = machine.free_bytes()
    if free is None or sum(split.num_bytes() for split in in_memory.values()) > free / 2:
        return data
    placed: dict[str, Any] = {name: split.to(machine.device) for name, split in in_memory.items()}
    return replace(data, **placed)


@dataclass(frozen=True)
class Job:
    """A run with everything chosen and built, and nothing begun.

    Attributes:
        recipe: Without anything automatic.
        hardware: Where it runs.
        data: What it looks at.
        task: What it trains.
        source: The teacher's answers to training batches; none without a teacher.
        ranks: The processes of the run.
        average: A copy of the student that becomes the average of its weights; none without one.
    """

    recipe: Recipe
    hardware: Hardware
    data: ImageDataSet
    task: Task
    source: AnswerSource | None
    ranks: Ranks = ALONE
    average: nn.Module | None = None

    def close(self) -> None:
        """Close files, and remove what was hooked into the networks."""
        self.task.close()
        if self.source is not None:
            self.source.close()


def make_job(inputs: Inputs, recipe: Recipe, source: AnswerSource | None) -> Job:
    """Build what is trained: compiled, or cut over the processes, where the recipe says so.

    Raises:
        RecipeError: If the student lacks a layer that a term names.
    """
    task = _make_task(inputs, recipe)
    average = copy.deepcopy(task.student) if recipe.engine.ema_decay else None
    if inputs.ranks.count > 1 and recipe.engine.parallel == "fsdp":
        for network in filter(None, (task.student, task, average)):
            shard(network)
    return Job(recipe, inputs.hardware, inputs.data, task, source, inputs.ranks, average)


def _make_task(inputs: Inputs, recipe: Recipe) -> Task:
    student, device = inputs.student, inputs.hardware.device
    together = inputs.ranks.count > 1 and recipe.engine.sync_batch_norm
    if together:
        student = synchronise_batch_norms(student, device)
    size = recipe.engine.batch_size // recipe.engine.gradient_accumulation // inputs.ranks.count
    task = Task(student, recipe.loss, inputs.data, inputs.hardware, inputs.teacher, size)
    if together:
        task.term_modules = synchronise_batch_norms(task.term_modules, device)  # type: ignore[assignment]
    if recipe.engine.compile == "on":
        task.compile_student(passes(recipe))
    return task


def passes(recipe: Recipe) -> int:
    """Count the student's passes in a step: one a part of the batch, two where each image has a second view."""
    return recipe.engine.gradient_accumulation * (2 if recipe.needs_second_view else 1)


def make_source(
    inputs: Inputs, recipe: Recipe, note: Callable[[str], None], *, memory: str | None = None, table: bool = False
) -> AnswerSource | None:
    """Put the teacher into its form and open the memory of its answers.

    Args:
        inputs: With the teacher; its taps are what the memory holds.
        recipe: Without anything automatic.
        note: Takes lines for the user.
        memory: ``off``, ``ram`` or ``disk`` instead of what the recipe says.
        table: Whether the device holds the memory's answers too.

    Raises:
        InputError: If the memory is damaged.
        RecipeError: If the teacher cannot take the form that was asked for.
    """
    teacher, data, engine = inputs.teacher, inputs.data, recipe.engine
    if teacher is None:
        return None
    if isinstance(teacher.model, StoredLogits):
        return AnswerSource(teacher.model, None, inputs.hardware.device, note)
    where = memory or engine.teacher_memory
    form = make_form(teacher, engine.teacher_form, inputs.hardware)
    if where == "off" and engine.parallel == "fsdp" and inputs.ranks.count > 1:
        # With a memory each process asks about what is unknown of its own share, at its own time.
        shard(form.network)
    identity = identify(
        teacher, data, inputs.hardware, form=engine.teacher_form, stored=engine.teacher_memory_precision
    )
    opened = None
    if where != "off" and identity is not None:
        facts = {"teacher": teacher.name, "data": data.name}
        opened = TeacherMemory.open(identity, facts) if where == "disk" else _in_ram(identity, facts, inputs.ranks)
        count = len(opened.written())
        if count:
            note(f"teacher memory {identity.key}: {count:,} of {identity.rows:,} answers are known")
    size = engine.batch_size // inputs.ranks.count
    return AnswerSource(form, opened, inputs.hardware.device, note, size, table=table)


def _in_ram(identity: Identity, facts: dict[str, str], ranks: Ranks) -> TeacherMemory:
    """Make a memory in RAM; the processes of one machine share it, as files that lose their names at once."""
    if ranks.count == 1:
        return TeacherMemory(identity)
    with contextlib.ExitStack() as stack:
        folder = ""
        if ranks.local == 0:
            ram_disk = "/dev/shm" if Path("/dev/shm").is_dir() else None
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="cakd-", dir=ram_disk))
        memory = TeacherMemory.open(identity, facts, Path(ranks.told_by_machine(folder)) / identity.key)
        ranks.gathered(None)  # until all have opened it
    return memory
