"""A backbone and a linear classifier of its features, fitted to the training images when it is first asked for.

The backbone is frozen, and shown each image once, as it is. The classifier is kept under $CAKD_HOME/probes, by a hash
of everything that it depends on: a run that goes on, and a second student, have the very same teacher.

Shape suffixes: N samples, C classes, D elements of a feature.
"""

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from cakd_cli.data import ImageDataSet, Split
from cakd_cli.data.base import hold_out
from cakd_cli.errors import InputError, RecipeError
from cakd_cli.files import home, write_tensors
from cakd_cli.machine.hardware import Hardware
from cakd_cli.models import TimmSpec, TorchvisionSpec, hub, read_state, saving
from cakd_cli.models.initial import count_logits
from cakd_cli.models.layers import find_classifier, stages
from cakd_cli.models.linear import Labelled, best_linear
from cakd_cli.options import mistakes
from cakd_cli.teachers.hub import HubTeacher
from cakd_cli.teachers.network import Found, RunTeacher, TeacherSpec, of_hub, of_library, outputs_on

# Share of the training images that chooses the penalty, where the data holds nothing out itself.
_HELD_OUT = 0.1
_LIBRARIES = ("timm", "torchvision", "hf-hub")


class ProbeTeacher(TeacherSpec):
    """A linear classifier on a frozen backbone's features, fitted to the training images: probe:timm:NAME, ..."""

    shorthand: ClassVar[str | None] = "backbone"

    type: Literal["probe"] = "probe"
    backbone: str = Field(
        min_length=1, description="timm:NAME, torchvision:NAME, hf-hub:OWNER/NAME, or the folder of a network"
    )
    weights: str | None = Field(
        None,
        description="file of the backbone's weights, of a network that timm or torchvision names; none = published",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        library, colon, name = self.backbone.partition(":")
        if library in _LIBRARIES and not name:
            wrong = f"'{self.backbone}' lacks its name; write probe:{library}:NAME"
            raise mistakes([(("backbone",), wrong)], self)
        if self.weights is not None and not (library in ("timm", "torchvision") and colon):
            wrong = f"is for a network of timm or torchvision, and the backbone is {self.backbone}"
            raise mistakes([(("weights",), wrong)], self)
        return self

    @property
    def label(self) -> str:
        return f"probe:{self.backbone}"

    @property
    def origin(self) -> str:
        backbone = f"weights of {self.weights}" if self.weights else self._source().origin
        return f"{backbone}, and a linear classifier fitted to the training images"

    def missing_file(self) -> str | None:
        return self._source().missing_file()

    def _source(self) -> TimmSpec | TorchvisionSpec | HubTeacher | RunTeacher:
        library, _, name = self.backbone.partition(":")
        if library == "timm":
            return TimmSpec(name=name, pretrained=True, weights=self.weights)
        if library == "torchvision":
            name, _, published = name.partition("@")
            return TorchvisionSpec(name=name, pretrained=published or True, weights=self.weights)
        return HubTeacher(name=name) if library == "hf-hub" and name else RunTeacher(path=self.backbone)

    def find(self, data: ImageDataSet, hardware: Hardware, *, fetch: bool) -> Found:
        _check_data(data, self.label)
        source = self._source()
        backbone = _read(source, data, hardware, fetch=fetch)
        size = backbone.input_size or data.input.shape
        if size[0] != data.channels:
            raise RecipeError(
                f"{self.label} takes images of {size[0]} channels, those of {data.name} have {data.channels}",
                hint="take another backbone",
            )
        model = Probe(_without_classifier(backbone, size), data.num_classes)
        width = count_logits(model.backbone, torch.zeros(1, *size), self.label)
        model.classifier = nn.Linear(width, data.num_classes)
        notes: tuple[str, ...] = (f"{self.label}: its classifier is not fitted before the run begins",)
        if data.fingerprint:  # not for what stands for data that is not here
            fit = _Fit(model, backbone, data, hardware)
            with torch.random.fork_rng(devices=[]):  # whether it is fitted or read changes no random number of the run
                fitted = fit.kept() or (fit.made() if fetch else None)
            notes = notes if fitted is None else (f"{self.label}: {fitted}",)
        return Found(
            model=model,
            mean=backbone.mean,
            std=backbone.std,
            name=self.label,
            architecture=json.dumps(["probe", backbone.architecture]),
            class_names=data.class_names,
            input_size=size,
            notes=notes,
        )


class Probe(nn.Module):
    """A frozen backbone and a linear classifier.

    Args:
        backbone: From normalised images to features (batch, elements).
        classes: That the classifier tells apart.
    """

    classifier: nn.Linear

    def __init__(self, backbone: nn.Module, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(1, classes)
        # Names of the modules that end its stages, as those of any network whose features are compared.
        self.stages = tuple(f"backbone.{layer}" for layer in stages(backbone).values())

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images to logits (batch, classes)."""
        logits: Tensor = self.classifier(self.backbone(images))
        return logits


def _check_data(data: ImageDataSet, label: str) -> None:
    if data.multi_label or not data.labelled:
        why = "may have several" if data.multi_label else "have none"
        raise RecipeError(
            f"{label} learns from one label an image, and training images of {data.name} {why}",
            hint="take a teacher that is trained already",
        )


def _read(
    source: TimmSpec | TorchvisionSpec | HubTeacher | RunTeacher, data: ImageDataSet, hardware: Hardware, *, fetch: bool
) -> Found:
    """Read a backbone; one that has no classifier is as good."""
    if isinstance(source, TimmSpec):
        return _of_timm(source, fetch=fetch)
    if isinstance(source, TorchvisionSpec):
        return of_library(source, data, fetch=fetch)
    if isinstance(source, HubTeacher):
        folder = hub.snapshot(source.name, fetch=fetch)
    else:
        folder = Path(source.path).expanduser()
    config = hub.read_config(folder)
    if config is not None:
        return of_hub(hub.read_folder(folder, config, classifier=False), source.label)
    return source.find(data, hardware, fetch=fetch)


def _of_timm(spec: TimmSpec, *, fetch: bool) -> Found:
    form = spec.published_form(classifier=False)
    sizes = {"in_channels": form.input_size[0], "num_classes": 0}
    published = spec.weights is None and fetch
    model = spec.published(**sizes) if published else spec.build(**sizes)
    if spec.weights is not None:
        own, state = model.state_dict(), read_state(Path(spec.weights).expanduser())
        missing = [name for name in own if name not in state or state[name].shape != own[name].shape]
        if missing:
            raise InputError(
                f"{spec.weights}: the weights do not fit {spec.label}; missing or of another shape: {missing[0]}"
                + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""),
                hint="check the backbone's name",
            )
        model.load_state_dict({name: state[name] for name in own})
    return Found(model, form.mean, form.std, spec.label, spec.architecture, input_size=form.input_size)


def _without_classifier(found: Found, size: tuple[int, int, int]) -> nn.Module:
    """Cut the classifier off, so that the network answers with what it is given."""
    model: Any = found.model
    if hasattr(model, "reset_classifier"):  # of timm, whose networks may have more before it
        model.reset_classifier(0)
        return found.model
    name = f"the backbone {found.name}"
    total = count_logits(found.model, torch.zeros(1, *size), name)
    found.model.set_submodule(find_classifier(found.model, total, name=name), nn.Identity())
    return found.model


@dataclass(frozen=True)
class _Fitted:
    """How a classifier was fitted, and how good it is.

    Attributes:
        features: Elements of a feature.
        images: That it was fitted to.
        penalty: L2, of features of unit variance.
        held_out: Images that chose the penalty.
        top1: On these, in [0, 1].
    """

    features: int
    images: int
    penalty: float
    held_out: int
    top1: float

    def __str__(self) -> str:
        return (
            f"a linear classifier of {self.features:,} features, fitted to {self.images:,} training images: "
            f"top-1 {self.top1:.1%} of {self.held_out:,} held-out images, which chose its penalty {self.penalty:g}"
        )


class _Fit:
    """The classifier of one backbone and one data set: fitted, kept and read again.

    Args:
        model: Whose classifier it will be.
        shown: How the backbone's images are normalised, and their size.
        data: What it is fitted to.
        hardware: Where features are computed, in float32.
    """

    def __init__(self, model: Probe, shown: Found, data: ImageDataSet, hardware: Hardware) -> None:
        self._model, self._shown = model, shown
        self._data, self._hardware = data, hardware
        self._path = home() / "probes" / f"{self._key()}.safetensors"

    def _key(self) -> str:
        """Hash what the classifier depends on."""
        data, shown = self._data, self._shown
        parts = (data.train, data.validation)
        labels = {str(i): part.labels_by_number() for i, part in enumerate(parts) if part is not None}
        document = {
            "backbone": [shown.architecture, saving.weights_hash(self._model.backbone.state_dict())],
            "shown": [list(shown.mean), list(shown.std), list(shown.input_size or data.input.shape)],
            "data": [dict(data.fingerprints), list(data.input.shape), data.crop_pct, list(data.class_names)],
            "samples": saving.weights_hash({name: part for name, part in labels.items() if part is not None}),
        }
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]

    def kept(self) -> _Fitted | None:
        """Read the classifier that was fitted before; none where none was, or it is damaged."""
        try:
            state = read_state(self._path)
            classifier = {name: state[name] for name in ("weight", "bias")}
            figures = state["figures"].tolist()
            self._model.classifier.load_state_dict(classifier)
            return _Fitted(int(figures[0]), int(figures[1]), figures[2], int(figures[3]), figures[4])
        except (InputError, KeyError, IndexError, TypeError, ValueError, RuntimeError):
            return None

    def made(self) -> _Fitted:
        """Fit the classifier, and keep it where there is room for it.

        Raises:
            RecipeError: If too few images could be held out to choose the penalty.
        """
        train, held_out = self._features()
        if not len(held_out.labels):
            raise RecipeError(
                f"{self._data.name} has too few images of each class to hold any out, which choose the penalty",
                hint="take a teacher that is trained already",
            )
        classifier, penalty = best_linear(train, held_out, self._data.num_classes)
        self._model.classifier = classifier
        top1 = (classifier(held_out.features).argmax(1) == held_out.labels).double().mean().item()
        fitted = _Fitted(train.features.shape[1], len(train.labels), penalty, len(held_out.labels), top1)
        figures = torch.tensor([*vars(fitted).values()], dtype=torch.float64)
        with contextlib.suppress(OSError):  # a disk that is full costs another fit, and nothing else
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(self._path, {**classifier.state_dict(), "figures": figures})
        return fitted

    def _features(self) -> tuple[Labelled, Labelled]:
        """Features of the training images, and of those that choose the penalty."""
        data = self._data
        train = self._of_split(data.train)
        if data.validation is not None:
            held_out = self._of_split(data.validation)
        else:
            keep, out = hold_out(train.labels, _HELD_OUT, seed=0)
            train, held_out = (Labelled(train.features[part], train.labels[part]) for part in (keep, out))
        return train, held_out

    def _of_split(self, split: Split) -> Labelled:
        return Labelled(*outputs_on(split, self._model.backbone, self._shown, self._hardware))
