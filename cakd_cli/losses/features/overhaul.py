"""OFD: Heo et al., A Comprehensive Overhaul of Feature Distillation, arXiv 1904.01866.

Shape suffixes: B batch, D channels, H and W height and width.
"""

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cakd_cli.losses.base import Lesson, LossOutput, Objectives, Shapes
from cakd_cli.losses.features.layers import LayerPair, MapsTerm
from cakd_cli.losses.features.maps import check_maps, precise, to_size

# Where fewer than this share of a channel is negative, its margin is three standard deviations below 0.
_LEAST_NEGATIVE = 0.001


def ofd(students: Sequence[Tensor], teachers: Sequence[Tensor], margins: Sequence[Tensor]) -> LossOutput:
    """Squared difference to the teacher's maps before their activation, where it matters (partial L2 distance).

    The target is t where t > 0 and else max(t, margin); elements count where t > 0 or the student is above the target:
    what both have below 0 is cut off by the activation anyway. Summed over elements, mean over the batch, and weighed
    2^(i - n + 1) for stage i of n, so that the last one has 1.

    Args:
        students: A map of each stage before its activation, shallow to deep, through a connector to the teacher's
            channels.
        teachers: The teacher's maps; treated as constant, and averaged to the height and width of the student's.
        margins: For each stage the margin of each channel, see :func:`ofd_margins`.

    Returns:
        ``total`` with the part ``ofd``.

    Raises:
        ValueError: If numbers of stages differ, or channels or batches of a stage.
    """
    if not len(students) == len(teachers) == len(margins) > 0:
        raise ValueError(f"needs as many of each, got {len(students)}, {len(teachers)} and {len(margins)}")
    stages = [_partial(*stage) for stage in zip(students, teachers, margins, strict=True)]
    total = torch.stack([stage * 2.0 ** (i + 1 - len(stages)) for i, stage in enumerate(stages)]).sum()
    return LossOutput(total, {"ofd": total})


def _partial(student_BDHW: Tensor, teacher_BDHW: Tensor, margin_D: Tensor) -> Tensor:
    check_maps(student_BDHW, teacher_BDHW)
    channels = student_BDHW.shape[1]
    if teacher_BDHW.shape[1] != channels or margin_D.shape != (channels,):
        raise ValueError(
            f"needs {channels} channels and as many margins of the teacher, "
            f"got {teacher_BDHW.shape[1]} and margins of shape {tuple(margin_D.shape)}"
        )
    student_BDHW = precise(student_BDHW)
    teacher_BDHW = to_size(precise(teacher_BDHW).detach(), (student_BDHW.shape[2], student_BDHW.shape[3]))
    active_BDHW = teacher_BDHW > 0
    margin_D11 = margin_D.detach().to(teacher_BDHW.dtype).view(-1, 1, 1)
    target_BDHW = torch.where(active_BDHW, teacher_BDHW, teacher_BDHW.maximum(margin_D11))
    counts_BDHW = active_BDHW | (student_BDHW > target_BDHW)
    return torch.where(counts_BDHW, student_BDHW - target_BDHW, 0).square().sum() / len(student_BDHW)


def ofd_margins(weight_D: Tensor, bias_D: Tensor) -> Tensor:
    """What a channel is on average where it is negative, by the batch norm that gives it.

    The expectation of a normal variable of mean ``bias`` and deviation abs(weight) where it is negative; three
    deviations below 0 where less than a thousandth of it is.

    Args:
        weight_D: Weight of the teacher's batch norm before the activation.
        bias_D: Its bias.

    Raises:
        ValueError: If the shapes differ.
    """
    if weight_D.shape != bias_D.shape or weight_D.ndim != 1:
        raise ValueError(f"needs a weight and a bias a channel, got {tuple(weight_D.shape)} and {tuple(bias_D.shape)}")
    # A channel that never changes has no deviation, and what is left of it are its limits.
    deviation_D = precise(weight_D).detach().abs().clamp(min=1e-12)
    mean_D = precise(bias_D).detach()
    ratio_D = mean_D / deviation_D
    negative_D = torch.special.ndtr(-ratio_D)
    density_D = (-ratio_D.square() / 2).exp() / math.sqrt(2 * math.pi)
    expected_D = mean_D - deviation_D * density_D / negative_D.clamp(min=_LEAST_NEGATIVE)
    return torch.where(negative_D > _LEAST_NEGATIVE, expected_D, -3 * deviation_D)


class MarginConnectors(nn.Module):
    """A 1x1 convolution and batch norm a stage, and the teacher's margins; trained and never saved with the student.

    Args:
        channels: The student's and the teacher's number a stage.
        margins: The teacher's of each stage.
    """

    def __init__(self, channels: Sequence[tuple[int, int]], margins: Sequence[Tensor]) -> None:
        super().__init__()
        self.connectors = nn.ModuleList(
            nn.Sequential(nn.Conv2d(mine, theirs, 1, bias=False), nn.BatchNorm2d(theirs)) for mine, theirs in channels
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for number, margin_D in enumerate(margins):
            self.register_buffer(f"margin_{number}", margin_D, persistent=False)

    @property
    def margins(self) -> list[Tensor]:
        """Margins of each stage."""
        return [self.get_buffer(f"margin_{number}") for number in range(len(self.connectors))]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Bring the student's maps to the teacher's channels."""
        return [connector(one) for connector, one in zip(self.connectors, maps, strict=True)]


class OFDTerm(MapsTerm):
    """Maps of all stages before their activation, as far as it does not cut them off."""

    paper = "Heo et al. 2019, arXiv 1904.01866"
    formula = "sum_stages 2^(i-n+1) mean_batch sum [t > 0 or s > target] (bn(conv(map_student)) - max(t, margin))^2"
    # 0.001 is mdistiller's and RepDistiller's common weight.
    objectives: ClassVar[Objectives] = {"ofd": ({"type": "cross-entropy"}, {"type": "ofd", "weight": 0.001})}
    form: ClassVar[Literal["map", "preactivation"]] = "preactivation"

    type: Literal["ofd"] = "ofd"
    layers: tuple[LayerPair, ...] = Field(
        (), strict=False, description="pairs of stages, shallow to deep; none = the stages of both networks"
    )

    def module(self, shapes: Shapes) -> MarginConnectors:
        """Make the connectors.

        Raises:
            ValueError: If a stage of the teacher does not end in a batch norm.
        """
        margins = []
        for _, look in self.pairs:
            if look not in shapes.norms:
                raise ValueError(f"the teacher's {look.layer} has no batch norm before its activation")
            margins.append(ofd_margins(*shapes.norms[look]))
        return MarginConnectors([(mine[0], theirs[0]) for mine, theirs in self.shapes(shapes)], margins)

    def __call__(self, lesson: Lesson, module: nn.Module | None = None) -> LossOutput:
        assert isinstance(module, MarginConnectors)
        students, teachers = zip(*self.maps(lesson), strict=True)
        return ofd(module(students), teachers, module.margins)
