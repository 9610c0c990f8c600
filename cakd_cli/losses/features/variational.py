"""VID: Ahn et al., Variational Information Distillation for Knowledge Transfer, arXiv 1904.05835.

Shape suffixes: B batch, D channels, H and W height and width.
"""

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from cakd_cli.losses.base import Lesson, LossOutput, Objectives, Shapes
from cakd_cli.losses.features.layers import MapsTerm
from cakd_cli.losses.features.maps import precise, to_smaller
from cakd_cli.losses.features.pairs import matched


def vid(predicted_BDHW: Tensor, teacher_BDHW: Tensor, log_scale_D: Tensor, *, eps: float = 1e-5) -> LossOutput:
    """Negative log likelihood of the teacher's map under a normal distribution, without its constant; mean over all.

    Args:
        predicted_BDHW: Mean of the distribution, from the student's map; computed in float32 at least.
        teacher_BDHW: The teacher's map, with as many channels; treated as constant. The map with the greater height is
            average-pooled to the size of the other.
        log_scale_D: Learnt; the variance of each channel is log(1 + exp(log_scale)) + eps.
        eps: Least variance, > 0.

    Returns:
        ``total`` with the part ``vid``, in nats by the number of elements; it may be negative.

    Raises:
        ValueError: If shapes do not fit or ``eps`` is not positive.
    """
    predicted_BDHW, teacher_BDHW = matched(predicted_BDHW, teacher_BDHW)
    channels = teacher_BDHW.shape[1:2]
    if predicted_BDHW.shape != teacher_BDHW.shape or log_scale_D.shape != channels:
        raise ValueError(
            "prediction, teacher's map and scales must have as many channels, "
            f"got {tuple(predicted_BDHW.shape)}, {tuple(teacher_BDHW.shape)} and {tuple(log_scale_D.shape)}"
        )
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    variance_D11 = (functional.softplus(precise(log_scale_D)) + eps).view(-1, 1, 1)
    error_BDHW = (predicted_BDHW - teacher_BDHW).square()
    total = 0.5 * (error_BDHW / variance_D11 + variance_D11.log()).mean()
    return LossOutput(total, {"vid": total})


class Regressor(nn.Module):
    """Predicts the teacher's map from the student's, and how sure that is; trained along and never saved.

    Args:
        student_channels: Of the student's map.
        teacher_channels: Of the teacher's.
        variance: Of every channel in the beginning.
        eps: As of :func:`vid`.
    """

    def __init__(self, student_channels: int, teacher_channels: int, *, variance: float, eps: float) -> None:
        super().__init__()
        self.regressor = nn.Sequential(
            nn.Conv2d(student_channels, teacher_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
        )
        self.log_scale = nn.Parameter(torch.full((teacher_channels,), math.log(math.expm1(variance - eps))))

    def forward(self, map_BDHW: Tensor) -> Tensor:
        """Predict the teacher's map, at the size of the student's."""
        return cast(Tensor, self.regressor(map_BDHW))


class Regressors(nn.Module):
    """One regressor a pair of layers."""

    def __init__(self, channels: list[tuple[int, int]], *, variance: float, eps: float) -> None:
        super().__init__()
        self.regressors = nn.ModuleList(
            Regressor(mine, theirs, variance=variance, eps=eps) for mine, theirs in channels
        )


class VIDTerm(MapsTerm):
    """How likely the teacher's maps are, given the student's."""

    paper = "Ahn et al. 2019, arXiv 1904.05835"
    formula = "sum_layers mean 0.5 [(regressor(map_student) - map_teacher)^2 / v + log v],  v per channel, learnt"
    objectives: ClassVar[Objectives] = {"vid": ({"type": "cross-entropy"}, {"type": "vid"})}
    summaries: ClassVar[Mapping[str, str]] = {"vid": "How likely the teacher's maps are, given the student's."}

    type: Literal["vid"] = "vid"
    eps: float = Field(1e-5, gt=0, le=0.01, description="least variance of a channel")
    variance: float = Field(5.0, ge=0.1, le=100, description="variance of each channel in the beginning")

    def module(self, shapes: Shapes) -> Regressors:
        """Make the regressors."""
        channels = [(mine[0], theirs[0]) for mine, theirs in self.shapes(shapes)]
        return Regressors(channels, variance=self.variance, eps=self.eps)

    def __call__(self, lesson: Lesson, module: nn.Module | None = None) -> LossOutput:
        assert isinstance(module, Regressors)
        total = lesson.student_BC.new_zeros(())
        for regressor, (student_BDHW, teacher_BDHW) in zip(module.regressors, self.maps(lesson), strict=True):
            assert isinstance(regressor, Regressor)
            # Its activations do not commute with pooling: the smaller size comes first.
            student_BDHW, teacher_BDHW = to_smaller(student_BDHW, teacher_BDHW)
            total = total + vid(regressor(student_BDHW), teacher_BDHW, regressor.log_scale, eps=self.eps).total
        return LossOutput(total, {"vid": total})
