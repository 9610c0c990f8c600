"""ABKD: Wang et al., Pursuing a Proper Allocation of the Probability Mass in Knowledge Distillation, arXiv 2505.04560.

Shape suffixes: B batch, C classes.
"""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from cakd_cli.losses.base import LossOutput, Objectives, SoftenedTerm
from cakd_cli.losses.logits import check_pair, soften


def ab(student_BC: Tensor, teacher_BC: Tensor, *, temperature: float, alpha: float, beta: float) -> LossOutput:
    """Batch mean of the alpha-beta divergence of softened probabilities, without temperature squared.

    With a = alpha, b = beta: ``sum p_t^(a+b) / (b (a+b)) + p_s^(a+b) / (a (a+b)) - p_t^a p_s^b / (a b)``. KL(teacher ||
    student) is a = 1, b = 0, the reverse a = 0, b = 1. Where a, b or a + b is 0 the official code takes a limit that it
    multiplies by a (by b where a is 0), and so is this; with a negative a = -b the value is then negative.

    Finite for any logits where no exponent is negative.

    Args:
        student_BC: Student logits, (batch, classes), any float type; computed in float32 at least.
        teacher_BC: Teacher logits, same shape; treated as constant.
        temperature: Softening, > 0; the paper uses 4 on CIFAR-100.
        alpha: Exponent of the teacher's probabilities; larger, it looks at classes that the student misses.
        beta: Exponent of the student's; larger, it looks at classes of which the student is sure.

    Returns:
        ``total`` with the part ``ab``.

    Raises:
        ValueError: If the shapes differ or the temperature is not positive.
    """
    check_pair(student_BC, teacher_BC, temperature)
    student_BC = soften(student_BC, temperature).log_softmax(1)
    teacher_BC = soften(teacher_BC.detach(), temperature).log_softmax(1)
    total = _divergence(student_BC, teacher_BC, alpha, beta).sum(1).mean()
    return LossOutput(total, {"ab": total})


def _divergence(student_BC: Tensor, teacher_BC: Tensor, alpha: float, beta: float) -> Tensor:
    """Divergence of each class, from log probabilities."""
    gap_BC = teacher_BC - student_BC
    if alpha == 0 and beta == 0:
        return gap_BC.square() / 2
    if beta == 0:
        student_power_BC, teacher_power_BC = (alpha * student_BC).exp(), (alpha * teacher_BC).exp()
        return teacher_power_BC * gap_BC + (student_power_BC - teacher_power_BC) / alpha
    if alpha == 0:
        student_power_BC, teacher_power_BC = (beta * student_BC).exp(), (beta * teacher_BC).exp()
        return (teacher_power_BC - student_power_BC) / beta - student_power_BC * gap_BC
    if alpha + beta == 0:
        return (alpha * gap_BC).expm1() / alpha - gap_BC
    both = alpha + beta
    alone_BC = (both * teacher_BC).exp() / beta + (both * student_BC).exp() / alpha
    return alone_BC / both - (alpha * teacher_BC + beta * student_BC).exp() / (alpha * beta)


class ABDivergenceTerm(SoftenedTerm):
    """Between KL, its reverse and Hellinger's distance: the alpha-beta divergence."""

    paper = "Wang et al. 2025, arXiv 2505.04560"
    formula = (
        "mean sum p_t^(a+b) / (b (a+b)) + p_s^(a+b) / (a (a+b)) - p_t^a p_s^b / (a b),  limits times a where b = 0"
    )
    # The official code's example on CIFAR-100; exponents and weight differ from pair to pair.
    objectives: ClassVar[Objectives] = {
        "ab-divergence": ({"type": "cross-entropy"}, {"type": "ab-divergence", "weight": 64.0})
    }
    function = staticmethod(ab)

    type: Literal["ab-divergence"] = "ab-divergence"
    alpha: float = Field(0.8, ge=0, le=4, description="exponent of the teacher's probabilities")
    beta: float = Field(0.3, ge=0, le=4, description="exponent of the student's probabilities")
