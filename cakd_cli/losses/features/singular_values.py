"""KDSVD: Lee et al., Self-supervised Knowledge Distillation Using Singular Value Decomposition, arXiv 1807.06819.

Shape suffixes: B batch, M rows and N columns of a matrix, K leading singular vectors, R all of them, H and W height and
width, D channels.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import ClassVar, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from cakd_cli.losses.base import Lesson, LossOutput, Objectives, Shapes
from cakd_cli.losses.features.layers import MapsTerm
from cakd_cli.losses.features.maps import precise
from cakd_cli.losses.features.pairs import check_stages, shrink

Variant = Literal["columns", "channels"]

# The student's vectors among which the teacher's find their likes, beyond as many as the teacher has.
SPARE = 3


def kdsvd(
    students: Sequence[Tensor], teachers: Sequence[Tensor], *, k: int = 1, variant: Variant = "columns"
) -> LossOutput:
    """Squared difference of how singular vectors of stages that follow one another lie, summed, mean over the batch.

    Of each stage the teacher's k right singular vectors are taken, and for each the one of the student's k + 3 with the
    largest absolute cosine, with its sign; both are scaled by the teacher's normalised singular value. Two stages are
    compared by exp(-(a - b)^2 / 8) over all pairs of their vectors' elements.

    The loss depends on the signs of the teacher's vectors, which are arbitrary and which the official codes leave to
    their library: here a vector's largest element is positive. Gradients are those of the singular value decomposition,
    without the quotients of singular values that are equal, such as those of channels that are 0: the loss is finite.

    The decomposition (``torch.linalg.svd``) waits for the device on CUDA; no other loss does.

    Args:
        students: The student's maps (batch, channels, height, width), shallow to deep, any float type; computed in
            float32 at least.
        teachers: The teacher's; treated as constant.
        k: Vectors of the teacher, >= 1; fewer if a matrix has fewer.
        variant: What a sample's matrix is: ``columns`` has a row for each row of each channel and a column for each
            column of the map, as mdistiller's; ``channels`` has a row for each position and a column for each channel,
            as RepDistiller's.

    Returns:
        ``total`` with the part ``kdsvd``.

    Raises:
        ValueError: If there are fewer than two stages, numbers of stages or samples differ, matrices of a pair have
            not as many columns, or a setting is out of range.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if variant not in get_args(Variant):
        raise ValueError(f"variant must be one of {', '.join(get_args(Variant))}, got {variant!r}")
    check_stages(students, teachers)
    both = []
    for student_BDHW, teacher_BDHW in zip(students, teachers, strict=True):
        _check_columns(student_BDHW.shape[1:], teacher_BDHW.shape[1:], variant)
        both.append(_vectors(_matrix(student_BDHW, variant), _matrix(teacher_BDHW.detach(), variant), k))
    losses = [
        (_closeness(student, student_next) - _closeness(teacher, teacher_next)).square().sum()
        for (student, teacher), (student_next, teacher_next) in pairwise(both)
    ]
    total = torch.stack(losses).sum() / len(students[0])
    return LossOutput(total, {"kdsvd": total})


def _check_columns(student: Sequence[int], teacher: Sequence[int], variant: Variant) -> None:
    """Refuse matrices whose right singular vectors are of different lengths."""
    if variant == "columns" and student[-1] != teacher[-1]:
        raise ValueError(f"maps must have one width, got {student[-1]} and {teacher[-1]}")
    if variant == "channels" and student[0] != teacher[0]:
        raise ValueError(f"maps must have as many channels, got {student[0]} and {teacher[0]}")


def _matrix(map_BDHW: Tensor, variant: Variant) -> Tensor:
    matrix_BMN = map_BDHW.flatten(1, 2) if variant == "columns" else map_BDHW.flatten(2).mT
    # Neither the vectors nor the normalised values know the scale.
    return shrink(precise(matrix_BMN), (1, 2))


def _vectors(student_BMN: Tensor, teacher_BMN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scaled vectors of one stage, the student's like the teacher's."""
    with torch.autocast(student_BMN.device.type, enabled=False):
        values_BK, teacher_BNK = _decomposed(teacher_BMN, k)
        _, student_BNK = _decomposed(student_BMN, k + SPARE)
        teacher_BNK = _oriented(teacher_BNK)
        cosine_BKK = teacher_BNK.mT @ student_BNK.detach()
    best_BK1 = cosine_BKK.abs().argmax(2, keepdim=True)
    sign_B1K = cosine_BKK.gather(2, best_BK1).sign().mT
    chosen_BNK = student_BNK.gather(2, best_BK1.mT.expand(-1, student_BNK.shape[1], -1)) * sign_B1K
    values_B1K = values_BK.unsqueeze(1)
    return chosen_BNK * values_B1K, teacher_BNK * values_B1K


def _oriented(vectors_BNK: Tensor) -> Tensor:
    """Give each vector the sign by which its largest element is positive."""
    return vectors_BNK * vectors_BNK.gather(1, vectors_BNK.abs().argmax(1, keepdim=True)).sign()


def _decomposed(matrix_BMN: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Leading singular values, l2-normalised, and right singular vectors; gradients flow through the vectors alone."""
    # The decomposition raises an error of its own where a number is not finite: it shall show in the loss.
    finite_B11 = matrix_BMN.detach().isfinite().all(2, keepdim=True).all(1, keepdim=True)
    _, values_BR, vectors_BRN = torch.linalg.svd(torch.where(finite_B11, matrix_BMN.detach(), 0), full_matrices=False)
    vectors_BNK = torch.where(finite_B11, vectors_BRN[:, :count].mT, torch.nan)
    normalised_BK = functional.normalize(values_BR[:, :count], dim=1)
    if not matrix_BMN.requires_grad:
        return normalised_BK, vectors_BNK
    # The change of an eigenvector of M'M to first order: 0 by its value, and all of its gradient.
    product_BNK = matrix_BMN.mT @ (matrix_BMN @ vectors_BNK)
    change_BNK = product_BNK - product_BNK.detach()
    squares_BR = values_BR.square()
    squares_BK = squares_BR[:, :count]
    within_BRK = vectors_BRN @ change_BNK
    smallest_B1 = torch.finfo(squares_BR.dtype).eps * squares_BR[:, :1]
    moved_BNK = vectors_BRN.mT @ _quotient(within_BRK, squares_BK.unsqueeze(1) - squares_BR.unsqueeze(2), smallest_B1)
    if vectors_BRN.shape[1] < vectors_BRN.shape[2]:
        outside_BNK = change_BNK - vectors_BRN.mT @ within_BRK
        moved_BNK = moved_BNK + _quotient(outside_BNK, squares_BK.unsqueeze(1), smallest_B1)
    return normalised_BK, vectors_BNK + moved_BNK


def _quotient(change: Tensor, gap: Tensor, smallest_B1: Tensor) -> Tensor:
    """Divide by gaps between squared singular values; 0 where there is none."""
    apart = gap.abs() > smallest_B1.unsqueeze(2)
    return torch.where(apart, change / torch.where(apart, gap, 1), 0)


def _closeness(first_BNK: Tensor, second_BNK: Tensor) -> Tensor:
    """Radial basis function of all pairs of elements of two stages' vectors."""
    return (-(first_BNK.unsqueeze(2) - second_BNK.unsqueeze(1)).square() / 8).exp()


class KDSVDTerm(MapsTerm):
    """How the singular vectors of maps lie from stage to stage."""

    paper = "Lee et al. 2018, arXiv 1807.06819"
    formula = "sum_stages |exp(-(a-b)^2/8)_student - exp(-(a-b)^2/8)_teacher|^2 / B,  a, b = singular vectors"
    objectives: ClassVar[Objectives] = {"kdsvd": ({"type": "cross-entropy"}, {"type": "kdsvd"})}
    summaries: ClassVar[Mapping[str, str]] = {"kdsvd": "How the singular vectors of maps lie from stage to stage."}

    type: Literal["kdsvd"] = "kdsvd"
    k: int = Field(1, ge=1, le=64, description="singular vectors of each map of the teacher")
    variant: Variant = Field(
        "columns", description="what the vectors are over: the columns of the maps, or their channels"
    )

    def module(self, shapes: Shapes) -> None:
        """Make nothing, of layers that fit.

        Raises:
            ValueError: If they do not.
        """
        pairs = self.shapes(shapes)
        if len(pairs) < 2:
            raise ValueError("needs two stages or more of each network")
        for student, teacher in pairs:
            _check_columns(student, teacher, self.variant)

    def __call__(self, lesson: Lesson, module: nn.Module | None = None) -> LossOutput:
        students, teachers = zip(*self.maps(lesson), strict=True)
        return kdsvd(students, teachers, k=self.k, variant=self.variant)
