"""How a run is taught: where its teacher's answers are kept, and in which form the teacher computes."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace

import torch
from rich.filesize import decimal
from torch import Tensor

from cakd_cli.data import ImageDataSet, Views
from cakd_cli.engine import teacher_forms, teacher_memory
from cakd_cli.engine.answers import Answers
from cakd_cli.engine.ensemble import Ensemble
from cakd_cli.engine.hardware import Hardware
from cakd_cli.engine.taps import Tap, locate
from cakd_cli.engine.teacher import Teacher
from cakd_cli.engine.teacher_forms import Form
from cakd_cli.engine.teacher_memory import Identity, TeacherMemory
from cakd_cli.errors import RecipeError
from cakd_cli.recipe.schema import EngineOptions, Recipe


def settle_memory(
    options: EngineOptions, teacher: Teacher, data: ImageDataSet, hardware: Hardware
) -> tuple[EngineOptions, str, Teacher]:
    """Settle what of a teacher's answers is kept, where, and how exactly.

    A memory on disk holds the input of the teacher's classifier beside the logits if there is room for both, whatever
    this run needs: so the teacher is asked once by students that learn from logits and those that learn from features.

    Returns:
        The options without ``auto``, why where it was not asked for, and the teacher whose answers hold all that.

    Raises:
        RecipeError: If a memory is asked for, and training has no end of views.
    """
    wide = _with_features(teacher, data, hardware) if options.teacher_memory in ("auto", "disk") else None
    if wide is not None:
        settled, reason = _settle_memory(options, wide, data, hardware)
        if settled.teacher_memory == "disk":
            return settled, reason, wide
    return *_settle_memory(options, teacher, data, hardware), teacher


def _with_features(teacher: Teacher, data: ImageDataSet, hardware: Hardware) -> Teacher | None:
    if teacher.taps or isinstance(teacher.model, Ensemble):
        return None
    image = torch.zeros(1, data.channels, *data.image_size, device=hardware.device)
    try:
        taps, sizes = locate(teacher.model, [Tap("")], data.num_classes, image, name=teacher.name)
    except RecipeError:
        return None  # it has no linear classifier
    return replace(teacher, taps=taps, sizes=sizes)


def _settle_memory(
    options: EngineOptions, teacher: Teacher, data: ImageDataSet, hardware: Hardware
) -> tuple[EngineOptions, str]:
    where, stored = str(options.teacher_memory), str(options.teacher_memory_precision)
    if stored == "auto":
        # bf16 has fewer digits than fp16, and logits are far from the ends of its range.
        stored = "fp16" if hardware.precision == "bf16" else "fp32"
    views = data.train.views
    if where == "off":
        reason = ""
    elif views is None:
        if where != "auto":
            raise RecipeError(
                f"engine.teacher_memory is {where}, but every epoch draws new views of {data.name}",
                hint="data.views=8 draws 8 views of each image and replays them",
            )
        where, reason = "off", "every epoch draws new views; data.views=8 would replay 8 of each image"
    else:
        memory = _identity(teacher, data, views, hardware, str(options.teacher_form), stored)
        room = f"{decimal(memory.num_bytes)} for {views.per_sample} views of {views.samples:,} images"
        if memory.num_bytes > options.teacher_memory_gb * 1e9:
            where, reason = "off", f"{room} are more than engine.teacher_memory_gb={options.teacher_memory_gb:g}"
        elif where == "auto":
            where, reason = _where_there_is_room(memory, room)
        else:
            reason = ""
    update = {"teacher_memory": where, "teacher_memory_precision": stored}
    return options.model_copy(update=update), reason


def _where_there_is_room(memory: Identity, room: str) -> tuple[str, str]:
    try:
        folder = next(path for path in (teacher_memory.root(), *teacher_memory.root().parents) if path.exists())
        form = teacher_memory.known_form(memory, compiled=True) if memory.form == "auto" else memory.form
        missing = memory.num_bytes - (teacher_memory.used_bytes(replace(memory, form=form)) if form else 0)
        free = shutil.disk_usage(folder).free
        writable = folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
    except (OSError, RuntimeError) as error:
        # RuntimeError is how Python says that there is no home directory.
        return "ram", f"nothing can be kept on disk: {error}"
    if not writable:
        return "ram", f"nothing can be kept on disk: {folder} cannot be written"
    # A tenth stays free for checkpoints, and for others.
    return ("disk", f"at most {room}") if missing < 0.9 * free else ("off", f"{room}, {decimal(free)} free")


def identity(
    options: EngineOptions, teacher: Teacher, data: ImageDataSet, hardware: Hardware, form: str
) -> Identity | None:
    """Say what the answers of a run in this form depend on; none without a memory."""
    views = data.train.views
    if options.teacher_memory == "off" or views is None:
        return None
    return _identity(teacher, data, views, hardware, form, options.teacher_memory_precision)


def known_form(options: EngineOptions, teacher: Teacher, data: ImageDataSet, hardware: Hardware) -> str | None:
    """Name the form that the run takes without measuring: that of the recipe, or of a memory on disk."""
    if options.teacher_form != "auto":
        return options.teacher_form
    any_form = identity(options, teacher, data, hardware, "plain")
    if any_form is None or options.teacher_memory != "disk":
        return None
    return teacher_memory.known_form(any_form, compiled=options.compile != "off")


def open_answers(
    recipe: Recipe, teacher: Teacher, data: ImageDataSet, hardware: Hardware, note: Callable[[str], None]
) -> tuple[Answers, str, str]:
    """Put the teacher into its form and open the memory of its answers.

    A memory holds the answers of one form. Unless the recipe names another, a run takes that of the memory on disk,
    and measures only where there is none.

    Args:
        recipe: With its memory settled.
        teacher: Who answers.
        data: Its training views are asked about.
        hardware: The run's.
        note: Takes lines for the user.

    Returns:
        The answers, the form, and why it was taken, empty if that is not worth a line.

    Raises:
        InputError: If the memory is damaged.
        RecipeError: If the teacher cannot take the form that was asked for.
    """
    options = recipe.engine
    name = known_form(options, teacher, data, hardware)
    if name is None:
        form, reason = teacher_forms.choose(
            teacher,
            hardware,
            first_images(recipe, data, hardware),
            asks=_expected_asks(recipe, data),
            compiled=options.compile,
            # What float32 answers lose in fp16 would change the run.
            float32=options.teacher_memory == "off" or options.teacher_memory_precision == "fp32",
        )
    else:
        remembered = options.teacher_form == "auto" and name != "plain"
        reason = "as its remembered answers were computed" if remembered else ""
        form = _form(teacher, name, hardware)
    known = identity(options, teacher, data, hardware, form.name)
    memory = None
    if known is not None:
        facts = {"teacher": teacher.name, "data": data.name}
        memory = TeacherMemory.open(known, facts) if options.teacher_memory == "disk" else TeacherMemory(known)
        count = len(memory.written())
        if count:
            note(f"teacher memory {known.key}: {count:,} of {known.rows:,} answers are known")
    return Answers(form, memory, hardware.device, note), form.name, reason


def _form(teacher: Teacher, name: str, hardware: Hardware) -> Form:
    try:
        return Form(teacher, name, hardware)
    except Exception as error:
        # Tracing runs the code of anybody's network, which may fail with anything.
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise RecipeError(
            f"the teacher cannot take the form '{name}': {why}", hint="engine.teacher_form=plain"
        ) from error


def _identity(
    teacher: Teacher, data: ImageDataSet, views: Views, hardware: Hardware, form: str, stored: str
) -> Identity:
    return Identity(
        teacher=teacher.weights_hash,
        architecture=teacher.architecture,
        mean=teacher.mean,
        std=teacher.std,
        data=data.fingerprint,
        views=views.identity,
        samples=views.samples,
        per_sample=views.per_sample,
        computed=f"{hardware.device.type} {hardware.precision}",
        form=form,
        stored=stored,
        says=", ".join(["logits", *map(str, teacher.taps)]),
        width=sum(teacher.sizes),
    )


def _expected_asks(recipe: Recipe, data: ImageDataSet) -> int:
    images, epochs, views = len(data.train), recipe.engine.epochs, data.train.views
    if recipe.engine.teacher_memory == "off" or views is None:
        return images * epochs
    # Of V views an image has met V (1 - (1 - 1/V)^E) in E epochs.
    return round(images * views.per_sample * (1 - (1 - 1 / views.per_sample) ** epochs))


def first_images(recipe: Recipe, data: ImageDataSet, hardware: Hardware) -> Tensor:
    """Take the first training batch, to measure on."""
    batches = data.train.train_batches(
        batch_size=recipe.engine.batch_size, seed=recipe.seed, epoch=0, start=0, device=hardware.device
    )
    return next(iter(batches)).images
