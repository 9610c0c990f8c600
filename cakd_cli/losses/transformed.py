"""TTM and WTTM: Zheng and Yang, Knowledge Distillation Based on Transformed Teacher Matching, arXiv 2402.11148.

Shape suffixes: B batch, C classes.
"""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from cakd_cli.losses.base import LogitTerm, LossOutput, Objectives
from cakd_cli.losses.logits import check_pair, kl, soften


def ttm(student_BC: Tensor, teacher_BC: Tensor, *, gamma: float) -> LossOutput:
    """Batch mean of KL(q || p_student) with q the teacher's probabilities to the power gamma, normalised.

    The power is a temperature 1 / gamma of the teacher alone; the student's is 1, and there is no temperature squared.

    Args:
        student_BC: Student logits, (batch, classes), any float type; computed in float32 at least.
        teacher_BC: Teacher logits, same shape; treated as constant.
        gamma: Power, > 0; below 1 the teacher is softened. The official code's example is 0.1.

    Returns:
        ``total`` with the part ``ttm``, in nats.

    Raises:
        ValueError: If the shapes differ or gamma is not positive.
    """
    total = kl(student_BC, _powered(student_BC, teacher_BC, gamma), 1.0).mean()
    return LossOutput(total, {"ttm": total})


def wttm(student_BC: Tensor, teacher_BC: Tensor, *, gamma: float) -> LossOutput:
    """:func:`ttm` with each sample weighed by the sum of the teacher's probabilities to the power gamma.

    A flat teacher weighs more: between 1 and classes^(1 - gamma) for gamma below 1. Weights are not normalised.

    Args and errors as of :func:`ttm`; ``total`` with the part ``wttm``.
    """
    powered_BC = _powered(student_BC, teacher_BC, gamma)
    weight_B = (gamma * soften(teacher_BC.detach(), 1.0).log_softmax(1)).exp().sum(1)
    total = (weight_B * kl(student_BC, powered_BC, 1.0)).mean()
    return LossOutput(total, {"wttm": total})


def _powered(student_BC: Tensor, teacher_BC: Tensor, gamma: float) -> Tensor:
    """Logits of the teacher's probabilities to the power gamma."""
    check_pair(student_BC, teacher_BC, 1.0)
    if not gamma > 0:
        raise ValueError(f"gamma must be positive, got {gamma}")
    return soften(teacher_BC.detach(), 1 / gamma)


class TTMTerm(LogitTerm):
    """KL to a softened teacher, of a student that is not softened."""

    paper = "Zheng and Yang 2024, arXiv 2402.11148"
    formula = "mean KL(q || p_student),  q = p_teacher^gamma / sum p_teacher^gamma, temperature 1"
    # The official code's example on CIFAR-100, VGG13 -> VGG8; the weight differs from pair to pair.
    objectives: ClassVar[Objectives] = {"ttm": ({"type": "cross-entropy"}, {"type": "ttm", "weight": 45.0})}
    function = staticmethod(ttm)

    type: Literal["ttm"] = "ttm"
    gamma: float = Field(0.1, gt=0, le=10, description="power of the teacher's probabilities; 1 / its temperature")


class WTTMTerm(LogitTerm):
    """TTM that weighs a sample more where the teacher is flat."""

    paper = "Zheng and Yang 2024, arXiv 2402.11148"
    formula = "mean (sum p_teacher^gamma) KL(q || p_student),  q = p_teacher^gamma / sum p_teacher^gamma"
    # The official code's example, which adds 0.8 CRD; the weight differs from pair to pair.
    objectives: ClassVar[Objectives] = {"wttm": ({"type": "cross-entropy"}, {"type": "wttm", "weight": 4.0})}
    function = staticmethod(wttm)

    type: Literal["wttm"] = "wttm"
    gamma: float = Field(0.2, gt=0, le=10, description="power of the teacher's probabilities; 1 / its temperature")
