"""SDD: Wei, Luo and Luo, Scale Decoupled Distillation, arXiv 2403.13512.

Shape suffixes: B batch, C classes, N regions, R rows of the batch times regions, D channels, H and W height and width.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from cakd_cli.losses import grouping
from cakd_cli.losses.base import Lesson, LossOutput, Objectives
from cakd_cli.losses.decoupling import decouple, two_groups
from cakd_cli.losses.features.layers import ClassMapsTerm
from cakd_cli.losses.logits import check_target, kl, soften
from cakd_cli.options import mistakes


def sdd_regions(
    features_BDHW: Tensor, weight_CD: Tensor, bias_C: Tensor | None = None, *, scales: Sequence[int] = (1, 2, 4)
) -> Tensor:
    """Logits of the whole map and of parts of it: each region's mean through the network's own classifier.

    The map is averaged to the finest scale first, and the coarser ones are means of that: where a side does not divide
    they are not the means of the map itself. As published the whole map comes first, then each scale row by row.

    Args:
        features_BDHW: Last map before pooling.
        weight_CD: Weight of the linear classifier.
        bias_C: Its bias.
        scales: Regions to a side, the first 1; the paper uses 1, 2 and 4.

    Returns:
        Logits (batch, classes, regions).

    Raises:
        ValueError: If shapes do not fit, the first scale is not 1 or another is below 1.
    """
    if not scales or scales[0] != 1 or min(scales) < 1:
        raise ValueError(f"scales must be positive and begin with 1, got {tuple(scales)}")
    if features_BDHW.ndim != 4 or weight_CD.ndim != 2 or features_BDHW.shape[1] != weight_CD.shape[1]:
        raise ValueError(
            "needs a map (batch, channels, height, width) and a classifier of its channels, "
            f"got {tuple(features_BDHW.shape)} and {tuple(weight_CD.shape)}"
        )
    return functional.linear(_means(features_BDHW, scales).transpose(1, 2), weight_CD, bias_C).transpose(1, 2)


def _means(map_BDHW: Tensor, scales: Sequence[int]) -> Tensor:
    """Average a map over the regions of every scale: (batch, channels, regions)."""
    finest_BDHW = functional.adaptive_avg_pool2d(map_BDHW, max(scales))
    pooled = [functional.adaptive_avg_pool2d(finest_BDHW, scale).flatten(2) for scale in scales]
    return torch.cat(pooled, dim=2)


def region_weights(teacher_BCN: Tensor, target_B: Tensor) -> Tensor:
    """Weigh a region 2 where the teacher is right about it or about the whole, region 0, and wrong about the other.

    Returns:
        2 or 1, int64, (batch, regions).
    """
    right_BN = teacher_BCN.argmax(1) == target_B.unsqueeze(1)
    return 1 + (right_BN != right_BN[:, :1]).long()


def sdd_kd(student_BCN: Tensor, teacher_BCN: Tensor, target_B: Tensor, *, temperature: float) -> LossOutput:
    """KD of every region, those that contradict the whole image twice: the mean over batch and regions.

    Args:
        student_BCN: Student logits of :func:`sdd_regions`, (batch, classes, regions), region 0 the whole image, any
            float type; computed in float32 at least.
        teacher_BCN: Teacher logits, same shape; treated as constant.
        target_B: Class indices.
        temperature: Softening, > 0; the paper uses 4 on CIFAR-100.

    Returns:
        ``total`` with the part ``sdd_kd``: times temperature squared, in nats.

    Raises:
        ValueError: If shapes do not fit or the temperature is not positive.
    """
    student_RC, teacher_RC, _ = _rows(student_BCN, teacher_BCN, target_B, temperature)
    return _weighed("sdd_kd", temperature**2 * kl(student_RC, teacher_RC, temperature), teacher_BCN, target_B)


def sdd_dkd(
    student_BCN: Tensor, teacher_BCN: Tensor, target_B: Tensor, *, temperature: float, alpha: float, beta: float
) -> LossOutput:
    """DKD of every region, those that contradict the whole image twice: the mean over batch and regions.

    Args:
        student_BCN: As of :func:`sdd_kd`; so are the errors.
        teacher_BCN: Likewise.
        target_B: Likewise.
        temperature: Likewise.
        alpha: Weight of the label against the rest; the paper uses 1.
        beta: Weight inside the rest; the paper uses 2 to 8 on CIFAR-100.

    Returns:
        ``total`` with the part ``sdd_dkd``: times temperature squared, in nats.
    """
    student_RC, teacher_RC, target_R = _rows(student_BCN, teacher_BCN, target_B, temperature)
    label_RC = two_groups(grouping.label(teacher_RC, target_R))
    split = decouple(student_RC, teacher_RC, label_RC, num_groups=2, temperature=temperature)
    loss_R = temperature**2 * (alpha * split.between_B + beta * split.within_BK[:, 1])
    return _weighed("sdd_dkd", loss_R, teacher_BCN, target_B)


def sdd_nkd(
    student_BCN: Tensor, teacher_BCN: Tensor, target_B: Tensor, *, temperature: float, gamma: float
) -> LossOutput:
    """NKD of every region, those that contradict the whole image twice: the mean over batch and regions.

    Of each region ``-p_t[y] log p_s[y] - gamma T^2 sum p_t log p_s``, the first at temperature 1. Unlike NKD, and as in
    the official code, the sum is over all classes, the label among them. It is not 0 where both networks agree.

    Args:
        student_BCN: As of :func:`sdd_kd`; so are the errors.
        teacher_BCN: Likewise.
        target_B: Likewise.
        temperature: Softening of the second part, > 0; the paper uses 1.
        gamma: Weight of the second part; the paper uses 1.5.

    Returns:
        ``total`` with the part ``sdd_nkd``, in nats.
    """
    student_RC, teacher_RC, target_R = _rows(student_BCN, teacher_BCN, target_B, temperature)
    student_log_R, teacher_log_R = (
        soften(logits_RC, 1.0).log_softmax(1).gather(1, target_R.unsqueeze(1)).squeeze(1)
        for logits_RC in (student_RC, teacher_RC)
    )
    cross_RC = soften(teacher_RC, temperature).softmax(1) * soften(student_RC, temperature).log_softmax(1)
    loss_R = -teacher_log_R.exp() * student_log_R - gamma * temperature**2 * cross_RC.sum(1)
    return _weighed("sdd_nkd", loss_R, teacher_BCN, target_B)


def _rows(
    student_BCN: Tensor, teacher_BCN: Tensor, target_B: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and labels with each region as a sample of its own, the teacher constant."""
    if student_BCN.ndim != 3 or student_BCN.shape != teacher_BCN.shape:
        raise ValueError(
            "student and teacher logits must have one shape (batch, classes, regions), "
            f"got {tuple(student_BCN.shape)} and {tuple(teacher_BCN.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    check_target(student_BCN, target_B)
    student_RC, teacher_RC = (logits.transpose(1, 2).flatten(0, 1) for logits in (student_BCN, teacher_BCN.detach()))
    return student_RC, teacher_RC, target_B.unsqueeze(1).expand(-1, student_BCN.shape[2]).flatten()


def _weighed(name: str, loss_R: Tensor, teacher_BCN: Tensor, target_B: Tensor) -> LossOutput:
    total = (region_weights(teacher_BCN, target_B).flatten() * loss_R).mean()
    return LossOutput(total, {name: total})


class _RegionsTerm(ClassMapsTerm):
    """A term on the logits of regions of the image."""

    scales: tuple[Annotated[int, Field(ge=1, le=64)], ...] = Field(
        (1, 2, 4), strict=False, min_length=1, description="regions to a side, the whole image first"
    )

    @model_validator(mode="after")
    def _check_scales(self) -> Self:
        if self.scales[0] != 1:
            raise mistakes([(("scales",), f"must begin with 1, the whole image; got {list(self.scales)}")], self)
        return self

    @property
    def takes_several_labels(self) -> bool:
        """No: a region counts twice where it contradicts the whole image about the label."""
        return False

    def regions(self, lesson: Lesson) -> tuple[Tensor, Tensor]:
        """Give both networks' logits (batch, classes, regions), as :func:`sdd_regions` does."""
        assert lesson.teacher_BC is not None, "a recipe with a distillation term and without a teacher is refused"
        student_BCHW, teacher_BCHW = self.class_maps(lesson)
        return self._logits(student_BCHW, lesson.student_BC), self._logits(teacher_BCHW, lesson.teacher_BC)

    def _logits(self, maps_BCHW: Tensor, logits_BC: Tensor) -> Tensor:
        # Class maps lack the classifier's bias, which is what the logits have beside their average.
        bias_BC = logits_BC - maps_BCHW.mean((2, 3))
        return _means(maps_BCHW, self.scales) + bias_BC.unsqueeze(2)


class SDDKDTerm(_RegionsTerm):
    """KD of every region of the image, those that contradict the whole twice."""

    paper = "Wei et al. 2024, CVPR, arXiv 2403.13512"
    formula = "T^2 mean_regions w KL(p_t, p_s),  w = 2 where a region contradicts the whole about the label, else 1"
    objectives: ClassVar[Objectives] = {
        "sdd-kd": ({"type": "cross-entropy", "weight": 0.1}, {"type": "sdd-kd", "weight": 0.9})
    }

    type: Literal["sdd-kd"] = "sdd-kd"
    temperature: float = Field(4.0, gt=0, le=1000, description="softening of both networks' logits")

    def __call__(self, lesson: Lesson, module: nn.Module | None = None) -> LossOutput:
        return sdd_kd(*self.regions(lesson), lesson.target_B, temperature=self.temperature)


class SDDDKDTerm(_RegionsTerm):
    """DKD of every region of the image, those that contradict the whole twice."""

    paper = "Wei et al. 2024, CVPR, arXiv 2403.13512"
    formula = "T^2 mean_regions w (alpha TCKD + beta NCKD)"
    # The paper has beta 2, 6 or 8, as DKD of the pair.
    objectives: ClassVar[Objectives] = {
        "sdd-dkd": ({"type": "cross-entropy"}, {"type": "sdd-dkd", "warmup_epochs": "auto"})
    }

    type: Literal["sdd-dkd"] = "sdd-dkd"
    temperature: float = Field(4.0, gt=0, le=1000, description="softening of both networks' logits")
    alpha: float = Field(1.0, ge=0, description="weight of the label against the rest")
    beta: float = Field(8.0, ge=0, description="weight inside the rest")

    def __call__(self, lesson: Lesson, module: nn.Module | None = None) -> LossOutput:
        return sdd_dkd(
            *self.regions(lesson), lesson.target_B, temperature=self.temperature, alpha=self.alpha, beta=self.beta
        )


class SDDNKDTerm(_RegionsTerm):
    """NKD of every region of the image, those that contradict the whole twice."""

    paper = "Wei et al. 2024, CVPR, arXiv 2403.13512"
    formula = "mean_regions w (-p_t(y) log p_s(y) - gamma T^2 sum p_t log p_s)"
    objectives: ClassVar[Objectives] = {"sdd-nkd": ({"type": "cross-entropy"}, {"type": "sdd-nkd"})}

    type: Literal["sdd-nkd"] = "sdd-nkd"
    temperature: float = Field(1.0, gt=0, le=1000, description="softening in the second part")
    gamma: float = Field(1.5, ge=0, description="weight of the second part, over all classes")

    def __call__(self, lesson: Lesson, module: nn.Module | None = None) -> LossOutput:
        return sdd_nkd(*self.regions(lesson), lesson.target_B, temperature=self.temperature, gamma=self.gamma)
