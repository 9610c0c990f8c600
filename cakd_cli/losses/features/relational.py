"""RKD: Park et al., Relational Knowledge Distillation, arXiv 1904.05068.

Shape suffixes: B batch, D elements.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from cakd_cli.losses.base import Lesson, LossOutput, Objectives
from cakd_cli.losses.features.layers import VectorsTerm
from cakd_cli.losses.features.maps import precise
from cakd_cli.losses.features.pairs import check_vectors, shrink, unit
from cakd_cli.losses.weights import Weight


def rkd(
    student_BD: Tensor,
    teacher_BD: Tensor,
    *,
    distance_weight: float,
    angle_weight: float,
    squared: bool = False,
    eps: float = 1e-12,
) -> LossOutput:
    """``distance_weight * distance + angle_weight * angle``: how the samples of a batch lie to one another.

    ``distance`` compares the distances of pairs by their mean, ``angle`` the cosines at the corners of triplets; both
    by the Huber loss (smooth l1), mean over all pairs or triplets, also those that name a sample twice. A batch of one
    has neither, and its loss is 0. Memory grows with batch^2 (batch + elements).

    Args:
        student_BD: The student's vectors, (batch, elements), any float type; computed in float32 at least.
        teacher_BD: The teacher's, of any other length; treated as constant.
        distance_weight: Weight of ``distance``; the literature uses 25.
        angle_weight: Weight of ``angle``; the literature uses 50.
        squared: Compare squared distances.
        eps: Lower bound of squared distances, in (0, 1]; relative to the largest value's square where that is above 1.

    Returns:
        ``total`` with the parts ``distance`` and ``angle``, unweighted.

    Raises:
        ValueError: If shapes do not fit or ``eps`` is out of range.
    """
    check_vectors(student_BD, teacher_BD)
    if not 0 < eps <= 1:
        raise ValueError(f"eps must be in (0, 1], got {eps}")
    student_BBD, teacher_BBD = _differences(student_BD), _differences(teacher_BD.detach())
    distance = functional.smooth_l1_loss(
        _distances(student_BBD, squared=squared, eps=eps), _distances(teacher_BBD, squared=squared, eps=eps)
    )
    angle = functional.smooth_l1_loss(_cosines(student_BBD), _cosines(teacher_BBD))
    return LossOutput(distance_weight * distance + angle_weight * angle, {"distance": distance, "angle": angle})


def _differences(vectors_BD: Tensor) -> Tensor:
    """From each sample (first dimension) to each other."""
    # The scale cancels in both parts.
    vectors_BD = shrink(precise(vectors_BD), (0, 1))
    return vectors_BD.unsqueeze(0) - vectors_BD.unsqueeze(1)


def _distances(difference_BBD: Tensor, *, squared: bool, eps: float) -> Tensor:
    """Distances by the mean of those between two samples, which are all positive."""
    batch = len(difference_BBD)
    distance_BB = difference_BBD.square().sum(2).clamp(min=eps)
    if not squared:
        distance_BB = distance_BB.sqrt()
    alone_BB = torch.eye(batch, dtype=torch.bool, device=difference_BBD.device)
    distance_BB = distance_BB.masked_fill(alone_BB, 0)
    # Only a batch of one has a mean below eps: 0.
    return distance_BB / (distance_BB.sum() / max(batch * (batch - 1), 1)).clamp(min=eps)


def _cosines(difference_BBD: Tensor) -> Tensor:
    """Cosine of the angle that each sample (first dimension) sees between any two others."""
    direction_BBD = unit(difference_BBD, 2)
    with torch.autocast(difference_BBD.device.type, enabled=False):
        return direction_BBD @ direction_BBD.mT


class RKDTerm(VectorsTerm):
    """How the samples of a batch lie to one another: distances and angles."""

    paper = "Park et al. 2019, arXiv 1904.05068"
    formula = "w_d huber(d_s / mean d_s, d_t / mean d_t) + w_a huber(cos_s, cos_t),  over pairs and triplets of samples"
    # 25 and 50 are RepDistiller's and mdistiller's.
    objectives: ClassVar[Objectives] = {"rkd": ({"type": "cross-entropy"}, {"type": "rkd"})}
    summaries: ClassVar[Mapping[str, str]] = {"rkd": "Distances and angles between the samples of a batch."}
    weighs: ClassVar[Mapping[str, str]] = {"distance_weight": "distance", "angle_weight": "angle"}

    type: Literal["rkd"] = "rkd"
    distance_weight: Weight = Field(25.0, description="weight of distance, over pairs of samples")
    angle_weight: Weight = Field(50.0, description="weight of angle, over triplets of samples")
    squared: bool = Field(False, description="compare squared distances")

    def __call__(self, lesson: Lesson, module: nn.Module | None = None) -> LossOutput:
        settings = {name: getattr(self, name) for name in ("distance_weight", "angle_weight", "squared")}
        return rkd(*self.vectors(lesson), **settings)
