"""AB: Heo et al., Knowledge Transfer via Distillation of Activation Boundaries, arXiv 1811.03233.

The paper trains by the boundaries first and distils afterwards; this term adds them to cross-entropy.

Shape suffixes: B batch, D channels, H and W height and width.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from cakd_cli.losses.base import Lesson, LossOutput, Objectives, Shapes
from cakd_cli.losses.features.fitnet import MapConnector
from cakd_cli.losses.features.layers import MapsTerm
from cakd_cli.losses.features.maps import precise

# RepDistiller's, which brings a sum over a whole map to the size of cross-entropy.
SCALE = 3 / 1000


def activation_boundaries(students: Sequence[Tensor], teachers: Sequence[Tensor], *, margin: float) -> LossOutput:
    """Squares of how far the student's neurons are from the side of 0 on which the teacher's are, and from a margin.

    A neuron of the student costs (s - margin)^2 where the teacher's is active and s <= margin, and (s + margin)^2 where
    it is not and s > -margin. Costs are summed over a map, mean over the batch, times 3 / 1000, and halved with each
    stage before the last.

    Args:
        students: The student's maps before the activation, shallow to deep, each brought to the shape of the teacher's;
            any float type, computed in float32 at least.
        teachers: The teacher's; treated as constant.
        margin: >= 0; the paper uses 1 or 2.

    Returns:
        ``total`` with the part ``activation_boundaries``.

    Raises:
        ValueError: If numbers of stages or shapes differ, there is no stage, or the margin is negative.
    """
    if len(students) != len(teachers) or not students:
        raise ValueError(f"needs as many stages of each network, got {len(students)} and {len(teachers)}")
    if not margin >= 0:
        raise ValueError(f"margin must not be negative, got {margin}")
    costs = [_cost(student, teacher.detach(), margin) for student, teacher in zip(students, teachers, strict=True)]
    total = SCALE * torch.stack([cost / 2**before for before, cost in enumerate(reversed(costs))]).sum()
    return LossOutput(total, {"activation_boundaries": total})


def _cost(student_BDHW: Tensor, teacher_BDHW: Tensor, margin: float) -> Tensor:
    if student_BDHW.shape != teacher_BDHW.shape or student_BDHW.ndim < 2:
        raise ValueError(
            f"both maps must have one shape, got {tuple(student_BDHW.shape)} and {tuple(teacher_BDHW.shape)}"
        )
    # Away from the boundary, and 0 beyond the margin.
    distance_BDHW = torch.where(teacher_BDHW > 0, margin - precise(student_BDHW), margin + precise(student_BDHW))
    return distance_BDHW.relu().square().sum() / len(student_BDHW)


class BoundaryConnector(MapConnector):
    """Brings a student's map before the activation to the shape of the teacher's: no ReLU follows."""

    def forward(self, map_BDHW: Tensor) -> Tensor:
        """Map (batch, channels, height, width) of the student to the teacher's shape."""
        return cast(Tensor, self.bn(self.conv(map_BDHW)))


class BoundaryConnectors(nn.Module):
    """One connector a pair of layers of different shapes; trained with the student and never saved with it."""

    def __init__(self, shapes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
        super().__init__()
        self.connectors = nn.ModuleList(
            nn.Identity() if mine == theirs else BoundaryConnector(mine, theirs) for mine, theirs in shapes
        )


class ABTerm(MapsTerm):
    """On which side of 0 neurons are before the activation."""

    paper = "Heo et al. 2019, arXiv 1811.03233"
    formula = "0.003 sum_i 2^(i-n+1) sum relu(margin - sign s)^2 / B,  sign = 1 where the teacher's map > 0, else -1"
    # RepDistiller weighs it by 1 and trains by it before the labels.
    objectives: ClassVar[Objectives] = {
        "activation-boundaries": ({"type": "cross-entropy"}, {"type": "activation-boundaries"})
    }
    summaries: ClassVar[Mapping[str, str]] = {
        "activation-boundaries": "On which side of 0 neurons are before the activation."
    }
    form = "preactivation"

    type: Literal["activation-boundaries"] = "activation-boundaries"
    margin: float = Field(1.0, ge=0, le=100, description="how far beyond 0 neurons of the student shall be")

    def module(self, shapes: Shapes) -> BoundaryConnectors:
        """Make the connectors."""
        return BoundaryConnectors(self.shapes(shapes))

    def __call__(self, lesson: Lesson, module: nn.Module | None = None) -> LossOutput:
        assert isinstance(module, BoundaryConnectors)
        students, teachers = zip(*self.maps(lesson), strict=True)
        connected = [connector(map_BDHW) for connector, map_BDHW in zip(module.connectors, students, strict=True)]
        return activation_boundaries(connected, teachers, margin=self.margin)
