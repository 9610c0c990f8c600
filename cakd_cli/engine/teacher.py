"""The frozen teacher: read, and checked before an hour is spent on it."""

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cakd_cli.data import ImageDataSet, Split
from cakd_cli.engine import saved_model
from cakd_cli.engine.ensemble import Ensemble
from cakd_cli.engine.hardware import Hardware
from cakd_cli.engine.taps import Tap, locate
from cakd_cli.errors import InputError, RecipeError
from cakd_cli.evaluation import metrics
from cakd_cli.evaluation.predict import Normalisation, predict
from cakd_cli.models import ExternalSpec, ModelSpec, TimmSpec, TorchvisionSpec, load_but_head, load_state, read_state
from cakd_cli.recipe.schema import EnsembleTeacher, RunTeacher

# Answers that differ this much, in top-1, from what the teacher's own run recorded mean that something does not fit.
_TOLERANCE = 0.02
# Enough to tell a working teacher from a broken one.
_CHECKED_SAMPLES = 2048


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
        facts: What its own run recorded; may be empty.
        taps: Layers whose features its answers hold beside the logits.
        sizes: Of an answer's parts: logits, then the elements of each tap, and again for their importance.
    """

    model: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str
    architecture: str
    weights_hash: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    taps: tuple[Tap, ...] = ()
    sizes: tuple[int, ...] = ()


def load_teacher(
    spec: RunTeacher | ModelSpec | EnsembleTeacher,
    data: ImageDataSet,
    hardware: Hardware,
    layers: tuple[Tap, ...] = (),
) -> Teacher:
    """Read a teacher and check that its classes are the data's, and that it has the layers to be tapped.

    Raises:
        InputError: If its files are missing or damaged.
        RecipeError: If its classes or channels are not the data's.
    """
    if not isinstance(spec, EnsembleTeacher):
        return _load_one(spec, data, hardware, layers)
    assert not layers, "a recipe with features of several teachers is refused"
    members = [_load_one(member, data, hardware, ()) for member in spec.members]
    weights = spec.weights or (1.0,) * len(members)
    model = Ensemble(
        [member.model for member in members],
        weights,
        spec.combine,
        mean=data.mean,
        std=data.std,
        normalisations=[(member.mean, member.std) for member in members],
    )
    architecture = [[member.architecture, list(member.mean), list(member.std)] for member in members]
    return Teacher(
        model=hardware.place(model).eval(),
        mean=data.mean,
        std=data.std,
        name=" and ".join(member.name for member in members),
        architecture=json.dumps([spec.combine, list(weights), architecture]),
        weights_hash=" ".join(member.weights_hash for member in members),
        sizes=(data.num_classes,),
    )


def _load_one(spec: RunTeacher | ModelSpec, data: ImageDataSet, hardware: Hardware, layers: tuple[Tap, ...]) -> Teacher:
    facts: Mapping[str, Any] = {}
    mean, std = data.mean, data.std
    if isinstance(spec, RunTeacher):
        saved = saved_model.read(Path(spec.path).expanduser())
        network: ModelSpec = saved.spec
        model, mean, std, facts = saved.model, saved.mean, saved.std, saved.facts
        name = f"{saved.spec.label} of {spec.path}"
        _check_classes(saved.class_names, data, spec.path)
        shown, known = ([*x] for x in ((data.channels, *data.image_size), (saved.channels, *saved.image_size)))
        if shown != known:
            raise RecipeError(
                f"the teacher {spec.path} was trained on images of {_size(known)}, "
                f"those of {data.name} are {_size(shown)}",
                hint="train both on images of one size",
            )
    else:
        name, network = spec.label, spec
        model = initial_model(spec, data)
        check_takes(model, data, f"the teacher {name}")
        if isinstance(spec, ExternalSpec) and spec.pretrained:
            mean, std = spec.normalisation()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    digest = saved_model.weights_hash(model.state_dict())
    model = hardware.place(model).eval()
    architecture = network.model_dump_json(exclude={"weights", "pretrained"})
    if isinstance(network, TorchvisionSpec | TimmSpec):
        architecture += f" of {network.type} {importlib.metadata.version(network.type)}"
    image = torch.zeros(1, data.channels, *data.image_size, device=hardware.device)
    taps, sizes = locate(model, layers, data.num_classes, image, name=f"the teacher {name}")
    return Teacher(model, mean, std, name, architecture, digest, facts, taps, sizes)


def _size(shape: list[int]) -> str:
    return " x ".join(map(str, shape))


def initial_model(spec: ModelSpec, data: ImageDataSet) -> nn.Module:
    """Make a network for the data: fresh, from a file, or from its library's published weights."""
    sizes = {"in_channels": data.channels, "num_classes": data.num_classes}
    if isinstance(spec, ExternalSpec) and spec.pretrained and spec.weights is None:
        return spec.published(**sizes)
    model = spec.build(**sizes)
    if spec.weights is not None:
        # Published weights from a file may have another head; weights that somebody trained must fit.
        load = load_but_head if isinstance(spec, ExternalSpec) and spec.pretrained else load_state
        load(model, read_state(Path(spec.weights).expanduser()), source=spec.weights)
    return model


def check_takes(model: nn.Module, data: ImageDataSet, name: str) -> None:
    """Show a network, on the CPU, one image of the data's size.

    Raises:
        RecipeError: If it cannot take it, or does not answer with a logit a class.
    """
    try:
        # Not in inference mode: what a network computes once and keeps must serve training too.
        with torch.no_grad():
            answer = model.eval()(torch.zeros(1, data.channels, *data.image_size))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # Other people's networks refuse with whatever they like.
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise RecipeError(
            f"{name} cannot take images of {_size([data.channels, *data.image_size])}: {why}",
            hint="another network; or, for a folder's images, another size: data.image_size=224",
        ) from error
    if not isinstance(answer, torch.Tensor) or answer.shape != (1, data.num_classes):
        raise RecipeError(f"{name} does not answer with one logit for each of {data.num_classes} classes")


def _check_classes(names: tuple[str, ...], data: ImageDataSet, path: str) -> None:
    if len(names) != data.num_classes:
        raise RecipeError(
            f"the teacher {path} knows {len(names)} classes, {data.name} has {data.num_classes}",
            hint="train a teacher on this data: cakd train-teacher",
        )
    if names != data.class_names:
        i = next(i for i, pair in enumerate(zip(names, data.class_names, strict=True)) if pair[0] != pair[1])
        raise RecipeError(
            f"the teacher {path} and {data.name} name their classes differently: "
            f"class {i} is '{names[i]}' to the teacher, '{data.class_names[i]}' in the data",
            hint="the logits must mean the same classes in the same order",
        )


def check_teacher(
    teacher: Teacher, data: ImageDataSet, facts: Mapping[str, Any], hardware: Hardware, *, batch_size: int
) -> dict[str, float]:
    """Measure the teacher on held-out images before an hour is spent on it, in float32 as its own run did.

    Args:
        teacher: Who is measured.
        data: On what.
        facts: What the run to come records of the data; the comparison needs a teacher that recorded the same.
        hardware: Where.
        batch_size: Images at a time.

    Returns:
        Its top-1 and the number of samples it was measured on.

    Raises:
        InputError: If it answers near chance, or not as its own run recorded on the same data.
    """
    split: Split = data.validation or data.train
    part = len(split) > _CHECKED_SAMPLES
    if part:
        split = split.subset(torch.linspace(0, len(split) - 1, _CHECKED_SAMPLES).round().long())
    logits_NC, labels_N = predict(
        teacher.model,
        split,
        Normalisation(teacher.mean, teacher.std, hardware),
        hardware.full_precision(),
        batch_size=batch_size,
    )
    if logits_NC.shape[1] != data.num_classes:
        raise RecipeError(
            f"the teacher {teacher.name} answers {logits_NC.shape[1]} classes, {data.name} has {data.num_classes}"
        )
    top1 = metrics.brief(logits_NC, labels_N)["top1"]
    where = "held-out" if data.validation else "training"
    if metrics.near_chance(top1, metrics.chance(labels_N, data.num_classes)):
        raise InputError(
            f"the teacher {teacher.name} is near chance: top-1 {top1:.1%} on {len(split)} {where} images "
            f"of {data.num_classes} classes",
            hint="check that it was trained on these classes, in this order, with this normalisation",
        )
    recorded = teacher.facts.get("metrics", {}).get("validation", {}).get("top1")
    same_data = teacher.facts.get("data") == facts
    # One answer may always tip; on a part of the split the share also varies by chance: three standard deviations.
    slack = _TOLERANCE + 1 / len(split) + (3 * (top1 * (1 - top1) / len(split)) ** 0.5 if part else 0)
    if recorded is not None and same_data and abs(recorded - top1) > slack:
        raise InputError(
            f"the teacher {teacher.name} answers {top1:.1%} of {len(split)} held-out images, "
            f"its run recorded {recorded:.1%}",
            hint="its files or the data have changed since it was trained",
        )
    return {"top1": top1, "samples": len(split)}
