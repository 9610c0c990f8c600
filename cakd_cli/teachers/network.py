"""A network that answers: a run of cakd, or one of another library, fitted to the data that it is asked about."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from cakd_cli.data import ImageDataSet, Split
from cakd_cli.errors import RecipeError
from cakd_cli.machine.hardware import Hardware
from cakd_cli.models import ExternalSpec, ModelSpec, hub, saving
from cakd_cli.models.initial import count_logits, initial_network
from cakd_cli.models.layers import LOGITS, Tap, locate
from cakd_cli.models.normalisation import Normalisation
from cakd_cli.options import Options
from cakd_cli.teachers.classes import ClassMap, Mapped, map_classes
from cakd_cli.teachers.fitted import fitted
from cakd_cli.teachers.weights_file import weights_alone

_BATCH_SIZE = 64


@dataclass(frozen=True)
class Found:
    """A network as its file or library gives it, before it is fitted to any data.

    Attributes:
        model: On the CPU.
        mean: Of each channel, as it expects images to be normalised, for pixels in [0, 1].
        std: Likewise.
        name: As a person would say it.
        architecture: Everything but the weights that decides what it computes.
        class_names: In the order of its logits; none where they are not known.
        input_size: Channels, height and width of the images that it was made for; none where any will do.
        facts: What its own run recorded; may be empty.
        notes: What a user should know of how it was found.
    """

    model: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str
    architecture: str
    class_names: tuple[str, ...] | None = None
    input_size: tuple[int, int, int] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class TeacherSpec(Options):
    """A teacher that is no network of a recipe's ``model:``, and how it is found."""

    @property
    def label(self) -> str:
        """What a person calls this teacher."""
        raise NotImplementedError

    @property
    def origin(self) -> str:
        """Where its weights come from, in words."""
        return "trained"

    def missing_file(self) -> str | None:
        """Say what would be downloaded before it can be read; none if all is here."""
        return None

    def find(self, data: ImageDataSet, hardware: Hardware, *, fetch: bool) -> Found:
        """Read it.

        Args:
            data: What it will be asked about; a file that does not say how images are normalised is given the data's.
            hardware: Where, if anything is to be computed.
            fetch: Whether anything may be downloaded.

        Raises:
            InputError: If its files are missing or damaged.
        """
        raise NotImplementedError


class RunTeacher(TeacherSpec):
    """A teacher trained by cakd, or a folder in the layout of timm or of transformers."""

    type: Literal["run"] = "run"
    path: str = Field(description="run directory, exported folder, or a folder with config.json and model.safetensors")

    @property
    def label(self) -> str:
        return self.path

    def find(self, data: ImageDataSet, hardware: Hardware, *, fetch: bool) -> Found:
        folder = Path(self.path).expanduser()
        if folder.is_file():
            raise weights_alone(folder, self.path)
        config = hub.read_config(folder)
        if config is not None:
            return of_hub(hub.read_folder(folder, config), self.path)
        saved = saving.read(folder)
        shown = saved.preprocessing
        return Found(
            model=saved.model,
            mean=shown.mean,
            std=shown.std,
            name=f"{saved.spec.label} of {self.path}",
            architecture=saved.spec.architecture,
            class_names=saved.class_names,
            input_size=shown.input_size,
            facts=saved.facts,
        )


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
        mapped: Its own classes of each of the data's; none where they are the same.
        classes: The whole of that by names, as a run records it; empty where they are the same.
        notes: What a user should know of how it was fitted to the data.
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
    mapped: Mapped | None = None
    classes: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def with_taps(self, taps: tuple[Tap, ...], data: ImageDataSet, hardware: Hardware) -> "Teacher":
        """Return the same teacher that answers with these layers as well.

        Raises:
            RecipeError: If it lacks one of them, or is to give maps of classes that are not the data's.
        """
        if self.mapped is not None and any(tap.form == "class maps" for tap in taps):
            raise RecipeError(
                f"the teacher {self.name} tells other classes apart than those of {data.name}, and the loss compares "
                "maps of each class",
                hint="take a teacher of these classes, or a loss on logits alone, as --loss dkd",
            )
        example = data.input.example(hardware.device)
        own = data.num_classes if self.mapped is None else self.mapped.total
        found = locate(self.model, taps, own, example, name=f"the teacher {self.name}")
        return replace(self, taps=found.taps, shapes={**found.shapes, LOGITS: (data.num_classes,)})


def load_network(
    spec: TeacherSpec | ModelSpec,
    data: ImageDataSet,
    hardware: Hardware,
    *,
    fetch: bool = True,
    class_map: ClassMap | None = None,
) -> Teacher:
    """Read a teacher that is one network.

    Arguments and errors are those of :func:`cakd_cli.teachers.load_teacher`.
    """
    found = (
        of_library(spec, data, fetch=fetch) if isinstance(spec, ModelSpec) else spec.find(data, hardware, fetch=fetch)
    )
    teacher = fit(found, data, class_map)
    for parameter in teacher.model.parameters():
        parameter.requires_grad_(False)
    digest = saving.weights_hash(teacher.model.state_dict())
    return replace(teacher, model=hardware.place(teacher.model).eval(), weights_hash=digest)


def fit(found: Found, data: ImageDataSet, class_map: ClassMap | None = None) -> Teacher:
    """Let a network answer about the data: images are resized to its own size, its classes become the data's.

    Args:
        found: Its module is changed where its images or classes are not the data's.
        data: What it will be asked about.
        class_map: What a file says of its classes.

    Raises:
        RecipeError: If its channels are not the data's, it cannot take images, or a class of the data is none of its.
    """
    name, shown = f"the teacher {found.name}", data.input.shape
    size = found.input_size or shown
    if size[0] != shown[0]:
        raise RecipeError(
            f"{name} takes images of {size[0]} channels, those of {data.name} have {shown[0]}",
            hint="take a teacher of such images: cakd train-teacher",
        )
    total = count_logits(found.model, torch.zeros(1, *size), name)
    mapped = map_classes(found.class_names, total, data, class_map, teacher=name)
    resized = size[1:] if size != shown else None
    notes = [*found.notes]
    if resized is not None:
        notes.append(f"{name} sees images of {_size(size)}, resized from {_size(shown)}")
    if mapped is not None:
        notes.append(f"{name}: {mapped}")
    changed = resized is not None or mapped is not None
    groups = None if mapped is None else mapped.groups
    return Teacher(
        model=fitted(found.model, resized, groups) if changed else found.model,
        mean=found.mean,
        std=found.std,
        name=found.name,
        # Of what the network answers, the memory keeps what comes of it.
        architecture=json.dumps([found.architecture, resized, groups]) if changed else found.architecture,
        weights_hash="",
        shapes={LOGITS: (data.num_classes,)},
        facts=found.facts,
        mapped=mapped,
        classes={} if mapped is None else mapped.document(found.class_names, data),
        notes=tuple(notes),
    )


@torch.no_grad()
def outputs_on(split: Split, model: nn.Module, shown: Found, hardware: Hardware) -> tuple[Tensor, Tensor]:
    """Show a network each image of a split once, in float32 and as the teacher that is made of it will see them.

    Args:
        split: In its own order, undistorted.
        model: From normalised images to numbers; on the CPU, before and after.
        shown: How its images are normalised, and their size.
        hardware: Where it computes.

    Returns:
        Its outputs (samples, numbers) and the labels (samples,), both on the CPU.
    """
    machine = hardware.full_precision()
    normalise = Normalisation(shown.mean, shown.std, machine)
    model = machine.place(model).eval()
    outputs, labels = [], []
    for batch in split.ordered_batches(batch_size=_BATCH_SIZE, device=machine.device):
        images = normalise(batch.images)
        if shown.input_size is not None and images.shape[1:] != shown.input_size:
            images = functional.interpolate(images, shown.input_size[1:], mode="bilinear", antialias=True)
        outputs.append(model(images).float().cpu())
        labels.append(batch.labels.cpu())
    model.cpu()
    return torch.cat(outputs), torch.cat(labels)


def of_library(spec: ModelSpec, data: ImageDataSet, *, fetch: bool) -> Found:
    """Take a network of a recipe's ``model:``; one with published weights answers about the classes of these."""
    if not (isinstance(spec, ExternalSpec) and spec.pretrained):
        model = initial_network(spec, data.input.example(), data.num_classes, fetch=fetch)
        return Found(model, data.mean, data.std, spec.label, spec.architecture)
    published = spec.published_form()
    # Of data that only stands for what is not here, the classes are not known.
    count = spec.count_classes(published.num_classes) if data.fingerprint else data.num_classes
    # Classes that are but numbered, as those of noise, have no names to be found by.
    named = count == published.num_classes and data.class_names != tuple(map(str, range(count)))
    return Found(
        model=initial_network(spec, torch.zeros(1, *published.input_size), count, fetch=fetch),
        mean=published.mean,
        std=published.std,
        name=spec.published_label,
        architecture=spec.architecture,
        class_names=published.class_names if named else None,
        input_size=published.input_size,
    )


def of_hub(network: hub.HubNetwork, place: str) -> Found:
    """Take a network in the layout of timm or of transformers.

    Args:
        network: As it was read.
        place: Where it comes from, as a person says it.
    """
    form = network.form
    return Found(
        model=network.model,
        mean=form.mean,
        std=form.std,
        name=f"{network.name} of {place}",
        architecture=network.architecture,
        class_names=form.class_names,
        input_size=form.input_size,
    )


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape[1:]))
