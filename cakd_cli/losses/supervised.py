"""What a label teaches.

Shape suffixes: B batch, C classes.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from cakd_cli.losses.base import Lesson, LossOutput, Needs, Objectives, Term
from cakd_cli.losses.logits import check_target, soften


def cross_entropy(
    student_BC: Tensor,
    target_B: Tensor,
    *,
    label_smoothing: float = 0.0,
    multi_label: Literal["bce", "softmax"] = "bce",
) -> LossOutput:
    """Mean cross-entropy of the labels, in nats; computed in float32 at least.

    Args:
        student_BC: Student logits, (batch, classes).
        target_B: Class indices, or for several labels a sample bool (batch, classes).
        label_smoothing: Share of the target spread evenly over all classes, in [0, 1).
        multi_label: For several labels a sample: ``bce`` asks of every class by itself whether it is there, summed over
            classes; ``softmax`` spreads the target evenly over a sample's labels, and leaves samples without any out.

    Returns:
        ``total`` with the part ``cross_entropy``.

    Raises:
        ValueError: If shapes do not fit or a setting is out of range.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if target_B.ndim == 2 and target_B.dtype == torch.bool and target_B.shape == student_BC.shape:
        total = _several_labels(soften(student_BC, 1.0), target_B, label_smoothing, multi_label)
    else:
        check_target(student_BC, target_B)
        total = functional.cross_entropy(soften(student_BC, 1.0), target_B, label_smoothing=label_smoothing)
    return LossOutput(total, {"cross_entropy": total})


def _several_labels(student_BC: Tensor, positive_BC: Tensor, label_smoothing: float, form: str) -> Tensor:
    target_BC = positive_BC.to(student_BC.dtype)
    if form == "bce":
        # The even answer of one class is one half.
        target_BC = target_BC * (1 - label_smoothing) + label_smoothing / 2
        return functional.binary_cross_entropy_with_logits(student_BC, target_BC, reduction="none").sum(1).mean()
    if form != "softmax":
        raise ValueError(f"multi_label must be bce or softmax, got {form!r}")
    count_B1 = target_BC.sum(1, keepdim=True)
    even_BC = target_BC / count_B1.clamp(min=1)
    smooth_BC = even_BC * (1 - label_smoothing) + label_smoothing / student_BC.shape[1] * (count_B1 > 0)
    return -(smooth_BC * student_BC.log_softmax(1)).sum() / (count_B1 > 0).sum().clamp(min=1)


class CrossEntropyTerm(Term):
    """Labels alone: the student learns without a teacher."""

    formula = "mean -log p_student[label];  of several labels: mean sum_classes binary cross-entropy"
    objectives: ClassVar[Objectives] = {"cross-entropy": ({"type": "cross-entropy"},)}

    type: Literal["cross-entropy"] = "cross-entropy"
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")
    multi_label: Literal["bce", "softmax"] = Field(
        "bce", description="of several labels: each class by itself, or one even target over them"
    )
    second_view: bool = Field(False, description="add that of a second, strongly augmented view of each image")

    @property
    def needs(self) -> Needs:
        """No teacher."""
        return Needs(teacher=False, second_view=self.second_view)

    @property
    def needs_label(self) -> bool:
        """It is all that it learns from."""
        return True

    def __call__(self, lesson: Lesson, module: nn.Module | None = None) -> LossOutput:
        output = self._of(lesson.student_BC, lesson.target_B)
        if not self.second_view:
            return output
        assert lesson.student_strong_BC is not None
        strong = self._of(lesson.student_strong_BC, lesson.target_B).total
        return LossOutput(output.total + strong, {**output.parts, "cross_entropy_strong": strong})

    def _of(self, student_BC: Tensor, target_B: Tensor) -> LossOutput:
        return cross_entropy(student_BC, target_B, label_smoothing=self.label_smoothing, multi_label=self.multi_label)
