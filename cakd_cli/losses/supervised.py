"""What a label teaches.

Shape suffixes: B batch, C classes.
"""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from cakd_cli.losses.base import LossOutput, LossTerm, Objectives, check_target, soften


def cross_entropy(student_BC: Tensor, target_B: Tensor, *, label_smoothing: float = 0.0) -> LossOutput:
    """Mean cross-entropy of the labels, in nats; computed in float32 at least.

    Args:
        student_BC: Student logits, (batch, classes).
        target_B: Class indices.
        label_smoothing: Share of the target spread evenly over all classes, in [0, 1).

    Returns:
        ``total`` with the part ``cross_entropy``.

    Raises:
        ValueError: If shapes do not fit or ``label_smoothing`` is out of range.
    """
    check_target(student_BC, target_B)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    total = functional.cross_entropy(soften(student_BC, 1.0), target_B, label_smoothing=label_smoothing)
    return LossOutput(total, {"cross_entropy": total})


class CrossEntropyTerm(LossTerm):
    """Labels alone: the student learns without a teacher."""

    needs_teacher: ClassVar[bool] = False
    formula = "mean -log p_student[label]"
    objectives: ClassVar[Objectives] = {"cross-entropy": ({"type": "cross-entropy"},)}

    type: Literal["cross-entropy"] = "cross-entropy"
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | None, target_B: Tensor) -> LossOutput:
        """Compute the unweighted term for one batch."""
        return cross_entropy(student_BC, target_B, label_smoothing=self.label_smoothing)
