"""CTKD: Li et al., Curriculum Temperature for Knowledge Distillation, arXiv 2211.16231.

Shape suffixes: B batch, C classes.
"""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cakd_cli.losses.base import Lesson, LogitTerm, LossOutput, Objectives, Shapes
from cakd_cli.losses.logits import check_pair, kl
from cakd_cli.losses.supervised import cross_entropy
from cakd_cli.losses.weights import CosineWeight, Weight


def ctkd(
    student_BC: Tensor,
    teacher_BC: Tensor,
    target_B: Tensor,
    *,
    theta: float | Tensor,
    t_start: float = 1.0,
    t_end: float = 20.0,
    reversal_lambda: float = -1.0,
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
) -> LossOutput:
    """KD at a temperature that is learnt against the student: ``t_start + t_end * sigmoid(theta)``.

    On its way to ``theta`` the gradient is multiplied by ``reversal_lambda``, from 0 at the beginning down to -1: what
    minimises the loss over the student then maximises it over the temperature, more and more.

    Args:
        student_BC: Student logits, (batch, classes), any float type; computed in float32 at least.
        teacher_BC: Teacher logits, same shape; treated as constant.
        target_B: Class indices.
        theta: Learnt scalar.
        t_start: Lower end of the temperature, >= 0.
        t_end: Width of its range, > 0.
        reversal_lambda: See above.
        ce_weight: Weight of cross-entropy.
        kd_weight: Weight of ``kd``.

    Returns:
        ``total`` with the parts ``temperature``, ``ce`` and ``kd`` (times temperature squared, nats), unweighted.

    Raises:
        ValueError: If shapes do not fit, or the temperature could be 0.
    """
    distilled = _distilled(student_BC, teacher_BC, theta, t_start=t_start, t_end=t_end, reversal_lambda=reversal_lambda)
    ce = cross_entropy(student_BC, target_B).total
    return LossOutput(ce_weight * ce + kd_weight * distilled.total, {**distilled.parts, "ce": ce})


def _distilled(
    student_BC: Tensor,
    teacher_BC: Tensor,
    theta: float | Tensor,
    *,
    t_start: float,
    t_end: float,
    reversal_lambda: float,
) -> LossOutput:
    check_pair(student_BC, teacher_BC, 1.0)
    if not (t_start >= 0 and t_end > 0):
        raise ValueError(f"t_start must not be negative and t_end must be positive, got {t_start} and {t_end}")
    precise = torch.float64 if student_BC.dtype == torch.float64 else torch.float32
    theta = torch.as_tensor(theta, dtype=precise, device=student_BC.device)
    temperature = t_start + t_end * _Scaled.apply(theta, reversal_lambda).sigmoid()
    total = temperature**2 * kl(student_BC, teacher_BC, temperature).mean()
    return LossOutput(total, {"temperature": temperature, "kd": total})


class _Scaled(torch.autograd.Function):
    """Identity whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return theta.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


class LearntTemperature(nn.Module):
    """The number that the temperature is made of; trained with the student and never saved with it."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(()))


class CTKDTerm(LogitTerm):
    """KD at a temperature that is learnt against the student."""

    paper = "Li et al. 2023, arXiv 2211.16231; its global temperature"
    formula = "T^2 mean KL(p_teacher || p_student),  T = t_start + t_end sigmoid(theta), d theta times -reversal"
    # CIFAR-100 settings of the official code: 0.1 CE + 0.9 KD.
    objectives: ClassVar[Objectives] = {
        "ctkd": ({"type": "cross-entropy", "weight": 0.1}, {"type": "ctkd", "weight": 0.9})
    }

    type: Literal["ctkd"] = "ctkd"
    t_start: float = Field(1.0, gt=0, le=1000, description="lower end of the temperature")
    t_end: float = Field(20.0, gt=0, le=1000, description="width of the temperature's range")
    reversal: Weight = Field(
        CosineWeight(start=0.0, end=1.0, epochs=11.0),
        description="how much the temperature works against the student; the official code is an epoch ahead",
    )

    def module(self, shapes: Shapes) -> LearntTemperature:
        """Make the learnt number."""
        return LearntTemperature()

    def __call__(self, lesson: Lesson, module: nn.Module | None = None) -> LossOutput:
        assert isinstance(module, LearntTemperature)
        settings = self.settings()
        return _distilled(*self._logits(lesson), module.theta, reversal_lambda=-settings.pop("reversal"), **settings)
