"""A network that answers: a run of cakd, or one of another library."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import nn

from cakd_cli.data import ImageDataSet
from cakd_cli.errors import RecipeError
from cakd_cli.machine.hardware import Hardware
from cakd_cli.models import ExternalSpec, ModelSpec, saving
from cakd_cli.models.initial import check_takes, initial_network
from cakd_cli.models.layers import LOGITS, Tap, locate
from cakd_cli.options import Options


class RunTeacher(Options):
    """A teacher trained by cakd, or any folder with model.safetensors and config.json."""

    type: Literal["run"] = "run"
    path: str = Field(description="run directory or exported folder")

    @property
    def label(self) -> str:
        """What a person calls this teacher."""
        return self.path

    @property
    def origin(self) -> str:
        """Where its weights come from, in words."""
        return "trained"

    def missing_file(self) -> str | None:
        """Nothing would be downloaded."""
        return None


@dataclass(frozen=True)
class Teacher:
    """A network that only answers: eval mode, no gradients, its own normalisation.

    Attributes:
        model: The network, on the device.
        mean: Of each channel, as it expects images to be normalised.
        std: Likewise.
        name: As a person would say it.
        architecture: Everything but the weights, as its options say it.
        weights_hash: Identity of its weights.
        shapes: Of every answer without the batch, by name: the logits, and what its taps give.
        facts: What its own run recorded; may be empty.
        taps: Layers that it answers with beside the logits.
        is_ensemble: Whether it is several networks that answer as one.
    """

    model: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str
    architecture: str
    weights_hash: str
    shapes: Mapping[str, tuple[int, ...]]
    facts: Mapping[str, Any] = field(default_factory=dict)
    taps: tuple[Tap, ...] = ()
    is_ensemble: bool = False

    def with_taps(self, taps: tuple[Tap, ...], data: ImageDataSet, hardware: Hardware) -> "Teacher":
        """Return the same teacher that answers with these layers as well.

        Raises:
            RecipeError: If it lacks one of them.
        """
        example = data.input.example(hardware.device)
        found = locate(self.model, taps, data.num_classes, example, name=f"the teacher {self.name}")
        return replace(self, taps=found.taps, shapes=found.shapes)


def load_network(
    spec: RunTeacher | ModelSpec, data: ImageDataSet, hardware: Hardware, *, fetch: bool = True
) -> Teacher:
    """Read a teacher that is one network.

    Arguments and errors are those of :func:`cakd_cli.teachers.load_teacher`.
    """
    teacher = _of_run(spec, data) if isinstance(spec, RunTeacher) else _of_library(spec, data, fetch=fetch)
    for parameter in teacher.model.parameters():
        parameter.requires_grad_(False)
    digest = saving.weights_hash(teacher.model.state_dict())
    return replace(teacher, model=hardware.place(teacher.model).eval(), weights_hash=digest)


def _of_run(spec: RunTeacher, data: ImageDataSet) -> Teacher:
    saved = saving.read(Path(spec.path).expanduser())
    _check_classes(saved.class_names, data, spec.path)
    shown, known = data.input.shape, saved.preprocessing.input_size
    if shown != known:
        raise RecipeError(
            f"the teacher {spec.path} was trained on images of {_size(known)}, those of {data.name} are {_size(shown)}",
            hint="train both on images of one size",
        )
    return Teacher(
        model=saved.model,
        mean=saved.preprocessing.mean,
        std=saved.preprocessing.std,
        name=f"{saved.spec.label} of {spec.path}",
        architecture=saved.spec.architecture,
        weights_hash="",
        shapes={LOGITS: (data.num_classes,)},
        facts=saved.facts,
    )


def _of_library(spec: ModelSpec, data: ImageDataSet, *, fetch: bool) -> Teacher:
    example = data.input.example()
    model = initial_network(spec, example, data.num_classes, fetch=fetch)
    check_takes(model, example, data.num_classes, f"the teacher {spec.label}")
    mean, std = data.mean, data.std
    if isinstance(spec, ExternalSpec) and spec.pretrained:
        mean, std = spec.normalisation()
    return Teacher(model, mean, std, spec.label, spec.architecture, "", {LOGITS: (data.num_classes,)})


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _check_classes(names: tuple[str, ...], data: ImageDataSet, path: str) -> None:
    if len(names) != data.num_classes:
        raise RecipeError(
            f"the teacher {path} knows {len(names)} classes, {data.name} has {data.num_classes}",
            hint="train a teacher on this data: cakd train-teacher",
        )
    # Of data that only stands for what is not here the names are not known.
    if names != data.class_names and data.fingerprint:
        i = next(i for i, pair in enumerate(zip(names, data.class_names, strict=True)) if pair[0] != pair[1])
        raise RecipeError(
            f"the teacher {path} and {data.name} name their classes differently: "
            f"class {i} is '{names[i]}' to the teacher, '{data.class_names[i]}' in the data",
            hint="the logits must mean the same classes in the same order",
        )
