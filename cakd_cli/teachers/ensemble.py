"""Several teachers that answer as one.

Shape suffixes: M members, B batch, C classes.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from cakd_cli.data import ImageDataSet
from cakd_cli.machine.hardware import Hardware
from cakd_cli.models import ModelOptions
from cakd_cli.models.layers import LOGITS
from cakd_cli.options import Options, mistakes
from cakd_cli.teachers.classes import ClassMap
from cakd_cli.teachers.hub import HubTeacher
from cakd_cli.teachers.logits_file import LogitsTeacher
from cakd_cli.teachers.network import RunTeacher, Teacher, load_network
from cakd_cli.teachers.onnx_file import OnnxTeacher
from cakd_cli.teachers.probe import ProbeTeacher
from cakd_cli.teachers.zero_shot import ZeroShotTeacher

OneTeacher = Annotated[
    RunTeacher | HubTeacher | OnnxTeacher | LogitsTeacher | ProbeTeacher | ZeroShotTeacher | ModelOptions,
    Field(discriminator="type"),
]


class EnsembleTeacher(Options):
    """Several teachers that answer as one; a list of teachers is short for it."""

    type: Literal["ensemble"] = "ensemble"
    members: tuple[OneTeacher, ...] = Field(strict=False, min_length=2, description="teachers, as one would be given")
    weights: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (), strict=False, description="of the members in their order; none = all the same"
    )
    combine: Literal["probabilities", "logits", "confidence"] = Field(
        "probabilities", description="what is averaged; confidence trusts whoever is sure of a sample"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.weights and len(self.weights) != len(self.members):
            wrong = f"there are {len(self.members)} members and {len(self.weights)} weights"
            raise mistakes([(("weights",), wrong)], self)
        for place, member in enumerate(self.members):
            if isinstance(member, LogitsTeacher):
                wrong = "is a file of logits, which answers alone; average the files into one"
                raise mistakes([(("members", place), wrong)], self)
        return self


class Ensemble(nn.Module):
    """Networks whose answers are averaged; the result stands for logits like any other teacher's.

    ``probabilities``: the logarithm of the weighted mean of the members' probabilities.
    ``logits``: the weighted mean of their logits.
    ``confidence``: as probabilities, with each member's weight multiplied, sample by sample, by its largest
    probability, so that a sample trusts whoever is sure of it.

    Probabilities are those at temperature 1; a loss's temperature then softens their mean.

    Args:
        members: Networks in eval mode.
        weights: Of each, > 0; only their ratios count.
        combine: See above.
        mean: Of the normalisation that images come with.
        std: Likewise.
        normalisations: Mean and standard deviation that each member expects.
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        weights: Sequence[float],
        combine: str,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        normalisations: Sequence[tuple[Sequence[float], Sequence[float]]],
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.combine = combine
        # By the largest, so that their sum stays finite.
        shares_M = torch.tensor(weights, dtype=torch.float64) / max(weights)
        self.register_buffer("log_share_M", (shares_M / shares_M.sum()).log().float(), persistent=False)
        for number, (own_mean, own_std) in enumerate(normalisations):
            scale, shift = (torch.empty(1, len(mean), 1, 1, dtype=torch.float64) for _ in range(2))
            for channel in range(len(mean)):
                scale[:, channel] = std[channel] / own_std[channel]
                shift[:, channel] = (mean[channel] - own_mean[channel]) / own_std[channel]
            self.register_buffer(f"scale_{number}", scale.float(), persistent=False)
            self.register_buffer(f"shift_{number}", shift.float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map images, normalised as the data's are, to float32 logits (batch, classes)."""
        answers = []
        for number, member in enumerate(self.members):
            scale, shift = self.get_buffer(f"scale_{number}"), self.get_buffer(f"shift_{number}")
            answers.append(member(images * scale.to(images.dtype) + shift.to(images.dtype)).float())
        logits_MBC = torch.stack(answers)
        log_share_M11 = self.get_buffer("log_share_M").float().view(-1, 1, 1)
        if self.combine == "logits":
            return (log_share_M11.exp() * logits_MBC).sum(0)
        log_MBC = logits_MBC.log_softmax(2)
        if self.combine == "confidence":
            log_share_M11 = (log_share_M11 + log_MBC.amax(2, keepdim=True)).log_softmax(0)
        return (log_share_M11 + log_MBC).logsumexp(0)


def load_ensemble(
    spec: EnsembleTeacher,
    data: ImageDataSet,
    hardware: Hardware,
    *,
    fetch: bool = True,
    class_map: ClassMap | None = None,
) -> Teacher:
    """Read the members and let them answer as one; arguments and errors as of :func:`load_network`."""
    members = [load_network(member, data, hardware, fetch=fetch, class_map=class_map) for member in spec.members]
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
        shapes={LOGITS: (data.num_classes,)},
        is_ensemble=True,
        classes={member.name: member.classes for member in members if member.classes},
        notes=tuple(note for member in members for note in member.notes),
    )
