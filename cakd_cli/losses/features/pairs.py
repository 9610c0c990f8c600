"""What losses that compare layers share: checks, one size, unit length, and the sum over pairs.

Shape suffixes: B batch, D channels, H and W height and width.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cakd_cli.losses.base import Lesson, LossOutput
from cakd_cli.losses.features.layers import MapsTerm
from cakd_cli.losses.features.maps import check_maps, precise, to_smaller

# Below this norm a vector has no direction.
SMALLEST_NORM = 1e-12


def check_vectors(student_BD: Tensor, teacher_BD: Tensor) -> None:
    """Refuse what is not one vector a sample of each network.

    Raises:
        ValueError: If a tensor is not two-dimensional or the batches differ.
    """
    if student_BD.ndim != 2 or teacher_BD.ndim != 2 or len(student_BD) != len(teacher_BD):
        raise ValueError(
            "needs two tensors (batch, elements) of one batch, "
            f"got {tuple(student_BD.shape)} and {tuple(teacher_BD.shape)}"
        )


def check_stages(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> None:
    """Refuse what cannot be compared from one stage to the next.

    Raises:
        ValueError: If there are fewer than two stages, their numbers differ, or a pair is not of maps of one batch.
    """
    if len(students) != len(teachers) or len(students) < 2:
        raise ValueError(f"needs two stages or more of each network, got {len(students)} and {len(teachers)}")
    for student_BDHW, teacher_BDHW in zip(students, teachers, strict=True):
        check_maps(student_BDHW, teacher_BDHW)


def matched(student_BDHW: Tensor, teacher_BDHW: Tensor) -> tuple[Tensor, Tensor]:
    """Check a pair of maps and bring it to one size, in float32 at least; the teacher's is constant.

    Raises:
        ValueError: If shapes do not fit.
    """
    check_maps(student_BDHW, teacher_BDHW)
    return to_smaller(precise(student_BDHW), precise(teacher_BDHW.detach()))


def shrink(values: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Divide by the largest magnitude over some dimensions where it is above 1, for what is free of scale.

    Powers and products of the result do not overflow.
    """
    return values / values.detach().abs().amax(dim, keepdim=True).clamp(min=1)


def unit(values: Tensor, dim: int) -> Tensor:
    """Scale to an l2 norm of 1 along a dimension; what is shorter than 1e-12 becomes 0, without a gradient.

    The usual ``normalize`` divides by 1e-12 there, and its gradient is 1e12 times too large to learn from.
    """
    values = shrink(values, dim)
    norm = torch.linalg.vector_norm(values, dim=dim, keepdim=True)
    return torch.where(norm <= SMALLEST_NORM, 0, values / norm.clamp(min=SMALLEST_NORM))


class PairwiseTerm(MapsTerm):
    """The sum over pairs of maps of a function of two maps.

    Attributes:
        function: Takes the student's map, the teacher's, and the settings by name.
    """

    function: ClassVar[Callable[..., LossOutput]]

    def __call__(self, lesson: Lesson, module: nn.Module | None = None) -> LossOutput:
        settings: dict[str, Any] = {
            name: getattr(self, name) for name in type(self).model_fields if name not in MapsTerm.model_fields
        }
        total = lesson.student_BC.new_zeros(())
        for student_BDHW, teacher_BDHW in self.maps(lesson):
            total = total + type(self).function(student_BDHW, teacher_BDHW, **settings).total
        return LossOutput(total, {self.type: total})
