"""DKD: Zhao et al., Decoupled Knowledge Distillation, arXiv 2203.08679.

Shape suffixes: B batch, C classes.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from cakd_cli.losses import grouping
from cakd_cli.losses.base import LossOutput, TeacherTerm, check_pair
from cakd_cli.losses.decoupling import decouple


def dkd(
    student_BC: Tensor, teacher_BC: Tensor, target_B: Tensor, *, temperature: float, alpha: float, beta: float
) -> LossOutput:
    """``alpha * tckd + beta * nckd`` (arXiv 2203.08679 eq. 7): the label against the rest, and the rest by itself.

    With two classes the rest has one member and ``nckd`` is 0.

    Args:
        student_BC: Student logits, (batch, classes), any float type; computed in float32 at least.
        teacher_BC: Teacher logits, same shape; treated as constant.
        target_B: Class indices.
        temperature: Softening, > 0.
        alpha: Weight of ``tckd``; the paper uses 1.
        beta: Weight of ``nckd``; the paper uses 2 to 8 on CIFAR-100.

    Returns:
        ``total`` with the parts ``tckd`` and ``nckd``: unweighted, batch means, times temperature squared, in nats.

    Raises:
        ValueError: If shapes do not fit or the temperature is not positive.
    """
    check_pair(student_BC, teacher_BC, temperature)
    rest_BC = (~grouping.label(teacher_BC, target_B)).long()
    parts = decouple(student_BC, teacher_BC, rest_BC, num_groups=2, temperature=temperature)
    tckd = temperature**2 * parts.between_B.mean()
    nckd = temperature**2 * parts.within_BK[:, 1].mean()
    return LossOutput(alpha * tckd + beta * nckd, {"tckd": tckd, "nckd": nckd})


class DKDTerm(TeacherTerm):
    """Label against the rest, and the rest by itself, weighted freely (arXiv 2203.08679)."""

    # beta is 8 for ResNet32x4 -> ResNet8x4; 2 to 8 over the paper's CIFAR-100 pairs. 20 of 240 epochs of warm-up.
    objective = ({"type": "cross-entropy"}, {"type": "dkd", "warmup_epochs": "auto"})

    type: Literal["dkd"] = "dkd"
    alpha: float = Field(1.0, ge=0, description="weight of tckd, label against the rest")
    beta: float = Field(8.0, ge=0, description="weight of nckd, inside the rest")

    def compare(self, student_BC: Tensor, teacher_BC: Tensor, target_B: Tensor) -> LossOutput:
        """Compute the unweighted term for one batch."""
        return dkd(student_BC, teacher_BC, target_B, temperature=self.temperature, alpha=self.alpha, beta=self.beta)
