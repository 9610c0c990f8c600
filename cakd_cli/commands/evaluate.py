"""cakd eval."""

from pathlib import Path
from typing import Any

from torch import Tensor

from cakd_cli.console import Console
from cakd_cli.data import FolderSpec, ImageDataSet, Split
from cakd_cli.engine import hardware as hardware_module
from cakd_cli.engine import run_directory, saved_model
from cakd_cli.engine.hardware import Hardware
from cakd_cli.engine.saved_model import SavedModel
from cakd_cli.engine.teacher import Teacher, load_teacher
from cakd_cli.errors import CheckFailedError, InputError, RecipeError
from cakd_cli.evaluation import cost, metrics
from cakd_cli.evaluation.predict import Normalisation, predict
from cakd_cli.recipe.resolve import resolve
from cakd_cli.report import tables


def run(
    run: str,
    *,
    data: str | None,
    data_root: str | None,
    split: str,
    teacher: str | None,
    min_top1: float | None,
    device: str | None,
    batch_size: int | None,
    console: Console,
) -> None:
    """Measure, show, and fail where the bar is not reached."""
    report = measure(
        run, data=data, data_root=data_root, split=split, teacher=teacher, device=device, batch_size=batch_size
    )
    failed = min_top1 is not None and report["quality"]["top1"] < min_top1
    if not (failed and console.json_mode):
        console.result(report, lambda stdout: tables.show_evaluation(stdout, report))
    if failed:
        raise CheckFailedError(
            f"top-1 is {report['quality']['top1']:.4f}, below --min-top1 {min_top1:g}", document=report
        )


def measure(
    run: str,
    *,
    data: str | None = None,
    data_root: str | None = None,
    split: str = "test",
    teacher: str | None = None,
    device: str | None = None,
    batch_size: int | None = None,
    with_latency: bool = True,
) -> dict[str, Any]:
    """Measure a trained network in float32.

    Raises:
        CakdError: If the run, the data or the teacher is missing or they do not fit.
    """
    path = Path(run).expanduser()
    saved = saved_model.read(path)
    flags = {
        "data": data,
        "data.root": data_root,
        "teacher": teacher,
        "engine.device": device,
        "engine.evaluation_batch_size": batch_size,
    }
    recipe_file = path / "recipe.yaml"
    if not recipe_file.is_file() and data is None:
        raise InputError(f"{path} does not say on which data to measure", hint="give --data")
    if recipe_file.is_file():
        run_directory.read_recipe(path)  # a damaged file is told apart from a wrong flag
    else:
        flags["model"] = "resnet8"  # never built: the folder's own network is measured
    recipe = resolve(
        ["engine.device=auto", "engine.precision=fp32"],
        flags,
        file=recipe_file if recipe_file.is_file() else None,
        flag_names={"engine.evaluation_batch_size": "--batch-size"},
    )
    machine = hardware_module.choose(recipe.engine)
    spec = recipe.data
    if isinstance(spec, FolderSpec):
        # Files have no size of their own: they are shown as the network saw them.
        spec = spec.model_copy(update={"image_size": saved.image_size[0], "test_crop": saved.crop_pct})
    image_data = spec.load()
    check_fits(saved, image_data, run)
    images = choose_split(image_data, split)

    model = machine.place(saved.model).eval()
    normalisation = Normalisation(saved.mean, saved.std, machine)
    size = recipe.engine.evaluation_batch_size
    logits, labels = predict(model, images, normalisation, machine, batch_size=size)
    image_shape = (saved.channels, *saved.image_size)
    report: dict[str, Any] = {
        "run": run,
        "model": saved.spec.label,
        "data": image_data.name,
        "split": split,
        "samples": len(labels),
        "quality": metrics.quality(logits, labels),
        "per_class": metrics.per_class(logits, labels, saved.class_names),
        "cost": {
            "parameters": cost.num_parameters(model),
            "flops_per_image": cost.flops(model, image_shape),
        },
    }
    if with_latency:
        report["cost"]["latency"] = [cost.latency(model, image_shape, machine, batch) for batch in (1, 64)]
        report["cost"]["device"] = hardware_module.describe(machine.device)
    if teacher is not None:
        assert recipe.teacher is not None
        other = load_teacher(recipe.teacher, image_data, machine)
        report["teacher"] = _against_teacher(logits, labels, other, images, machine, size, image_shape)
    return report


def _against_teacher(
    logits: Tensor,
    labels: Tensor,
    teacher: Teacher,
    images: Split,
    machine: Hardware,
    size: int,
    shape: tuple[int, int, int],
) -> dict[str, Any]:
    answers, _ = predict(
        teacher.model, images, Normalisation(teacher.mean, teacher.std, machine), machine, batch_size=size
    )
    if answers.shape != logits.shape:
        raise RecipeError(f"the teacher {teacher.name} answers {answers.shape[1]} classes, the run {logits.shape[1]}")
    return {
        "name": teacher.name,
        "quality": metrics.quality(answers, labels),
        "cost": {"parameters": cost.num_parameters(teacher.model), "flops_per_image": cost.flops(teacher.model, shape)},
        "fidelity": metrics.fidelity(logits, answers),
    }


def check_fits(saved: SavedModel, data: ImageDataSet, run: str) -> None:
    """Refuse data whose classes or channels are not the network's.

    Raises:
        RecipeError: If they differ.
    """
    if saved.class_names != data.class_names:
        only = [name for name in data.class_names if name not in saved.class_names]
        detail = f"; unknown to the run: {', '.join(only[:5])}" if only else "; in another order"
        raise RecipeError(
            f"{run} knows {len(saved.class_names)} classes, {data.name} has {data.num_classes}{detail}",
            hint="measure it on the data that it was trained for",
        )
    for what, known, shown in (
        ("channels", saved.channels, data.channels),
        ("pixels", saved.image_size, data.image_size),
    ):
        if known != shown:
            raise RecipeError(f"{run} was trained on images of {known} {what}, those of {data.name} have {shown}")


def choose_split(data: ImageDataSet, name: str) -> Split:
    """Pick the test, held-out or training images; training images come without augmentation.

    Raises:
        RecipeError: If nothing is held out.
    """
    if name == "val":
        if data.validation is None:
            raise RecipeError(f"{data.name} has no held-out images", hint="measure with --split test")
        return data.validation
    return data.test if name == "test" else data.train
