"""All figures of a trained network, alone and beside its teacher, in float32."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from cakd_cli.data import ImageDataSet, Split
from cakd_cli.errors import InputError, RecipeError
from cakd_cli.evaluation import cost, metrics
from cakd_cli.evaluation.predict import predict
from cakd_cli.machine.hardware import Hardware, choose_hardware
from cakd_cli.models import num_parameters, saving
from cakd_cli.models.normalisation import Normalisation
from cakd_cli.models.saving import SavedModel
from cakd_cli.recipe import class_map
from cakd_cli.recipe.schema import Recipe
from cakd_cli.teachers import Teacher, load_teacher

T = TypeVar("T")


class Measured(NamedTuple):
    """What was shown to whom, and what came back.

    Attributes:
        images: The split.
        shape: Of one image, (channels, height, width).
        logits: (samples, classes).
        labels: (samples,).
    """

    images: Split
    shape: tuple[int, int, int]
    logits: Tensor
    labels: Tensor


class Kept:
    """Data that were read and teachers that answered, for the next network that is measured on them."""

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}

    def get(self, key: str, make: Callable[[], T]) -> T:
        """Give what is known under a key, or make it."""
        if key not in self._known:
            self._known[key] = make()
        found: T = self._known[key]
        return found


def measure(
    run: Path,
    recipe: Recipe,
    *,
    split: str,
    with_teacher: bool,
    with_latency: bool = True,
    kept: Kept | None = None,
) -> dict[str, Any]:
    """Measure a trained network.

    Args:
        run: Its folder.
        recipe: On which data, where, how many images at a time, and beside which teacher.
        split: ``test``, ``val`` or ``train``.
        with_teacher: Compare with the recipe's teacher.
        with_latency: Measure the time of a forward pass as well, for about two seconds.
        kept: Of networks that were measured before this one.

    Raises:
        CakdError: If the run, the data or the teacher is missing or they do not fit.
    """
    saved, kept = saving.read(run), kept or Kept()
    machine = choose_hardware(recipe.engine.device, "fp32", channels_last=recipe.engine.channels_last)
    shown = saved.preprocessing
    spec = recipe.data.shown_as(shown.input_size[1:], shown.crop_pct)
    data = kept.get(spec.model_dump_json(), spec.load)
    check_fits(saved, data, str(run))
    images = choose_split(data, split)
    model = machine.place(saved.model).eval()
    size = recipe.engine.evaluation_batch_size
    answers = predict(model, images, Normalisation(shown.mean, shown.std, machine), machine, batch_size=size)
    check_finite(answers[0], str(run))
    measured = Measured(images, shown.input_size, *answers)
    report: dict[str, Any] = {
        "run": str(run),
        "model": saved.spec.label,
        "data": data.name,
        "split": split,
        "samples": len(measured.labels),
        "as_recorded": _as_recorded(saved, data, split),
        "quality": metrics.quality(measured.logits, measured.labels),
        "per_class": metrics.per_class(measured.logits, measured.labels, saved.class_names),
        "right": np.packbits(metrics.hits(measured.logits, measured.labels).numpy()).tobytes().hex(),
        "cost": {"parameters": num_parameters(model), "flops_per_image": cost.flops(model, shown.input_size)},
    }
    if with_latency:
        report["cost"]["latency"] = [cost.latency(model, shown.input_size, machine, batch) for batch in (1, 64)]
        report["cost"]["device"] = machine.name
    if with_teacher:
        assert recipe.teacher is not None
        options = recipe.teacher
        key = f"{spec.model_dump_json()} {split} {options.model_dump_json()} {recipe.class_map}"
        about, theirs = kept.get(key, lambda: _ask(_teacher(recipe, data, machine), measured, machine, size))
        if theirs.shape != measured.logits.shape:
            raise RecipeError(
                f"the teacher {about['name']} answers {theirs.shape[1]} classes, the run {measured.logits.shape[1]}"
            )
        report["teacher"] = {**about, "fidelity": metrics.fidelity(measured.logits, theirs)}
    return report


def _teacher(recipe: Recipe, data: ImageDataSet, machine: Hardware) -> Teacher:
    assert recipe.teacher is not None
    return load_teacher(recipe.teacher, data, machine, class_map=class_map.read(recipe.class_map))


def _ask(teacher: Teacher, measured: Measured, machine: Hardware, batch_size: int) -> tuple[dict[str, Any], Tensor]:
    """Measure a teacher on the same images; returns its figures and its logits."""
    normalisation = Normalisation(teacher.mean, teacher.std, machine)
    answers, _ = predict(teacher.model, measured.images, normalisation, machine, batch_size=batch_size)
    about = {
        "name": teacher.name,
        "quality": metrics.quality(answers, measured.labels),
        "cost": {
            "parameters": num_parameters(teacher.model),
            "flops_per_image": cost.flops(teacher.model, measured.shape),
        },
    }
    return about, answers


def check_finite(logits: Tensor, network: str) -> None:
    """Refuse a network that answers with something else than numbers.

    Raises:
        InputError: If an answer is not finite.
    """
    bad = ~logits.isfinite().all(1)
    if bad.any():
        raise InputError(
            f"{network}: the answers to {int(bad.sum())} of {len(bad)} images are not finite",
            hint="its weights hold NaN or infinity, or overflow; train it again",
        )


def _as_recorded(saved: SavedModel, data: ImageDataSet, split: str) -> bool | None:
    """Whether these are the images that the run recorded; none where it recorded nothing of them."""
    recorded = saved.facts.get("data", {}).get("fingerprints", {})
    part = split if split in data.fingerprints else "train"  # held out of the training images
    return recorded[part] == data.fingerprints.get(part) if part in recorded else None


def check_fits(saved: SavedModel, data: ImageDataSet, run: str) -> None:
    """Refuse data whose classes or images are not the network's.

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
    known, shown = saved.preprocessing.input_size, data.input.shape
    for what, own, given in (("channels", known[0], shown[0]), ("pixels", known[1:], shown[1:])):
        if own != given:
            raise RecipeError(f"{run} was trained on images of {own} {what}, those of {data.name} have {given}")


def choose_split(data: ImageDataSet, name: str) -> Split:
    """Pick the test, held-out or training images; training images come without augmentation.

    Raises:
        RecipeError: If nothing is held out, or training images have no labels.
    """
    if name == "train" and not data.labelled:
        raise RecipeError(f"the training images of {data.name} have no labels", hint="measure with --split test")
    if name == "val":
        if data.validation is None:
            raise RecipeError(f"{data.name} has no held-out images", hint="measure with --split test")
        return data.validation
    return data.test if name == "test" else data.train
