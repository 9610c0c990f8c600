"""SortKD: Limantoro, Parameter-Free Logit Distillation via Sorting Mechanism, arXiv 2508.16544.

Shape suffixes: B batch, C classes.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from cakd_cli.losses import grouping
from cakd_cli.losses.base import LossOutput, Objectives, SoftenedTerm
from cakd_cli.losses.decoupled import dkd
from cakd_cli.losses.knowledge_distillation import kd
from cakd_cli.losses.logits import check_pair, check_target
from cakd_cli.losses.weights import Weight


def sorted_logits(logits_BC: Tensor, target_B: Tensor) -> Tensor:
    """Give the label the largest of a sample's logits, and the others what is left, in their order; (batch, classes).

    Of equal logits the class with the smaller index gets the larger value.

    Raises:
        ValueError: If the labels do not fit.
    """
    check_target(logits_BC, target_B)
    label_BC = grouping.label(logits_BC, target_B)
    order_BC = logits_BC.masked_fill(label_BC, torch.inf).argsort(dim=1, descending=True, stable=True)
    return logits_BC.scatter(1, order_BC, logits_BC.sort(dim=1, descending=True).values)


def sort_kd(student_BC: Tensor, teacher_BC: Tensor, target_B: Tensor, *, temperature: float) -> LossOutput:
    """KD of a teacher that is right about every label, see :func:`sorted_logits`.

    Args:
        student_BC: Student logits, (batch, classes), any float type; computed in float32 at least.
        teacher_BC: Teacher logits, same shape; treated as constant.
        target_B: Class indices.
        temperature: Softening, > 0; the paper uses 4 on CIFAR-100.

    Returns:
        ``total`` with the part ``kd``: times temperature squared, batch mean, in nats.

    Raises:
        ValueError: If shapes do not fit or the temperature is not positive.
    """
    check_pair(student_BC, teacher_BC, temperature)
    return kd(student_BC, sorted_logits(teacher_BC.detach(), target_B), temperature=temperature)


def sort_dkd(
    student_BC: Tensor, teacher_BC: Tensor, target_B: Tensor, *, temperature: float, alpha: float, beta: float
) -> LossOutput:
    """DKD of a teacher that is right about every label, see :func:`sorted_logits`.

    Args:
        student_BC: As of :func:`sort_kd`; so are the errors.
        teacher_BC: Likewise.
        target_B: Likewise.
        temperature: Likewise.
        alpha: Weight of ``tckd``; the paper uses 1.
        beta: Weight of ``nckd``; the paper uses 8 for ResNet32x4 -> ResNet8x4.

    Returns:
        ``total`` with the parts ``tckd`` and ``nckd``: unweighted, batch means, times temperature squared, in nats.
    """
    check_pair(student_BC, teacher_BC, temperature)
    teacher_BC = sorted_logits(teacher_BC.detach(), target_B)
    return dkd(student_BC, teacher_BC, target_B, temperature=temperature, alpha=alpha, beta=beta)


class SortKDTerm(SoftenedTerm):
    """KD of a teacher whose logits are sorted so that the label has the largest."""

    paper = "Limantoro 2025, arXiv 2508.16544"
    formula = "T^2 mean KL(softmax(sort(z_teacher) / T) || p_student),  the label gets the largest logit"
    # CIFAR-100 settings of the official configs: 0.1 CE + 0.9 KD, temperature 4.
    objectives: ClassVar[Objectives] = {
        "sort-kd": ({"type": "cross-entropy", "weight": 0.1}, {"type": "sort-kd", "weight": 0.9})
    }
    function = staticmethod(sort_kd)
    of_labels = True

    type: Literal["sort-kd"] = "sort-kd"

    @property
    def takes_several_labels(self) -> bool:
        """One label gets the largest logit."""
        return False


class SortDKDTerm(SoftenedTerm):
    """DKD of a teacher whose logits are sorted so that the label has the largest."""

    paper = "Limantoro 2025, arXiv 2508.16544"
    formula = "alpha T^2 mean KL(b) + beta T^2 mean KL(rest) of sort(z_teacher),  the label gets the largest logit"
    # As DKD: beta is 8 for ResNet32x4 -> ResNet8x4, 20 of 240 epochs of warm-up.
    objectives: ClassVar[Objectives] = {
        "sort-dkd": ({"type": "cross-entropy"}, {"type": "sort-dkd", "warmup_epochs": "auto"})
    }
    weighs: ClassVar[Mapping[str, str]] = {"alpha": "tckd", "beta": "nckd"}
    function = staticmethod(sort_dkd)
    of_labels = True

    type: Literal["sort-dkd"] = "sort-dkd"
    alpha: Weight = Field(1.0, description="weight of tckd, label against the rest")
    beta: Weight = Field(8.0, description="weight of nckd, inside the rest")

    @property
    def takes_several_labels(self) -> bool:
        """One label gets the largest logit."""
        return False
