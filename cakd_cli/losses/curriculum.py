"""CTKD: Li et al., Curriculum Temperature for Knowledge Distillation, arXiv 2211.16231.

Shape suffixes: B batch, C classes.
"""

from typing import Any

import torch
from torch import Tensor

from cakd_cli.losses.base import LossOutput, check_pair, soften
from cakd_cli.losses.supervised import cross_entropy


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
    check_pair(student_BC, teacher_BC, 1.0)
    if not (t_start >= 0 and t_end > 0):
        raise ValueError(f"t_start must not be negative and t_end must be positive, got {t_start} and {t_end}")
    precise = torch.float64 if student_BC.dtype == torch.float64 else torch.float32
    theta = torch.as_tensor(theta, dtype=precise, device=student_BC.device)
    temperature = t_start + t_end * _Scaled.apply(theta, reversal_lambda).sigmoid()
    student_log_BC = soften(student_BC, temperature).log_softmax(1)
    teacher_log_BC = soften(teacher_BC.detach(), temperature).log_softmax(1)
    distilled = temperature**2 * (teacher_log_BC.exp() * (teacher_log_BC - student_log_BC)).sum(1).mean()
    ce = cross_entropy(student_BC, target_B).total
    return LossOutput(ce_weight * ce + kd_weight * distilled, {"temperature": temperature, "ce": ce, "kd": distilled})


class _Scaled(torch.autograd.Function):
    """Identity whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return theta.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None
