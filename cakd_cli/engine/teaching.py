"""How a run is taught: where its teacher's answers are kept, and in which form the teacher computes."""

import shutil
from collections.abc import Callable
from pathlib import Path

from rich.filesize import decimal
from torch import Tensor

from cakd_cli.data import ImageDataSet, Views
from cakd_cli.engine import teacher_forms, teacher_memory
from cakd_cli.engine.answers import Answers
from cakd_cli.engine.hardware import Hardware
from cakd_cli.engine.teacher import Teacher
from cakd_cli.engine.teacher_forms import Form
from cakd_cli.engine.teacher_memory import Identity, TeacherMemory
from cakd_cli.errors import RecipeError
from cakd_cli.recipe.schema import EngineOptions, Recipe


def settle_memory(
    options: EngineOptions, teacher: Teacher, data: ImageDataSet, hardware: Hardware
) -> tuple[EngineOptions, str]:
    """Settle where answers are kept and how exactly.

    Returns:
        The options without ``auto``, and why where it was not asked for.

    Raises:
        RecipeError: If a memory is asked for, and training has no end of views.
    """
    where, stored = options.teacher_memory, options.teacher_memory_precision
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
        known = _identity(teacher, data, views, hardware, stored)
        size = known.num_bytes
        room = f"{decimal(size)} for {views.per_sample} views of {views.samples:,} images"
        if size > options.teacher_memory_gb * 1e9:
            where, reason = "off", f"{room} are more than engine.teacher_memory_gb={options.teacher_memory_gb:g}"
        elif where == "auto":
            free = shutil.disk_usage(_existing(teacher_memory.root())).free
            enough = size - teacher_memory.used_bytes(known) < free
            where, reason = ("disk", f"at most {room}") if enough else ("off", f"{room}, {decimal(free)} free")
        else:
            reason = ""
    update = {"teacher_memory": where, "teacher_memory_precision": stored}
    return options.model_copy(update=update), reason


def identity(options: EngineOptions, teacher: Teacher, data: ImageDataSet, hardware: Hardware) -> Identity | None:
    """Say what the run's answers depend on; none without a memory."""
    views = data.train.views
    if options.teacher_memory == "off" or views is None:
        return None
    return _identity(teacher, data, views, hardware, options.teacher_memory_precision)


def open_answers(
    recipe: Recipe,
    identity: Identity | None,
    teacher: Teacher,
    data: ImageDataSet,
    hardware: Hardware,
    note: Callable[[str], None],
) -> tuple[Answers, str, str]:
    """Open the memory and put the teacher into its form.

    A memory on disk knows the form that its answers were computed in, and every run with it takes the same.

    Args:
        recipe: With its memory settled.
        identity: Of :func:`identity`.
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
    options, views = recipe.engine, data.train.views if identity else None
    folder = teacher_memory.folder_of(identity) if identity and options.teacher_memory == "disk" else None
    form: Form | None = None
    name, reason = str(options.teacher_form), ""
    if name == "auto" and folder is not None and folder.exists():
        name = teacher_memory.read_facts(folder)["form"]
        reason = "" if name == "plain" else "as its remembered answers were computed"
    if name == "auto":
        images = first_images(recipe, data, hardware)
        asks = _expected_asks(len(data.train), recipe.engine.epochs, views)
        form, reason = teacher_forms.choose(teacher, hardware, images, asks=asks, compiled=options.compile)
        name = form.name
    if form is None:
        try:
            form = Form(teacher, name, hardware)
        except Exception as error:
            # Tracing runs the code of anybody's network, which may fail with anything.
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise RecipeError(
                f"the teacher cannot take the form '{name}': {why}", hint="engine.teacher_form=plain"
            ) from error
    memory = None
    if identity is not None:
        facts = {"teacher": teacher.name, "data": data.name, "form": name}
        memory = TeacherMemory.open(identity, facts) if folder is not None else TeacherMemory(identity)
        known = len(memory.written())
        if known:
            note(f"teacher memory {identity.key}: {known:,} of {identity.rows:,} answers are known")
    return Answers(form, memory, hardware.device, note), name, reason


def _identity(teacher: Teacher, data: ImageDataSet, views: Views, hardware: Hardware, stored: str) -> Identity:
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
        stored=stored,
        width=data.num_classes,
    )


def _expected_asks(images: int, epochs: int, views: Views | None) -> int:
    if views is None:
        return images * epochs
    # Of V views an image has met V (1 - (1 - 1/V)^E) in E epochs.
    return round(images * views.per_sample * (1 - (1 - 1 / views.per_sample) ** epochs))


def first_images(recipe: Recipe, data: ImageDataSet, hardware: Hardware) -> Tensor:
    """Take the first training batch, to measure on."""
    batches = data.train.train_batches(
        batch_size=recipe.engine.batch_size, seed=recipe.seed, epoch=0, start=0, device=hardware.device
    )
    return next(iter(batches)).images


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)
