"""NKD: Yang et al., From Knowledge Distillation to Self-Knowledge Distillation, arXiv 2303.13005.

Shape suffixes: B batch, C classes.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from cakd_cli.losses import grouping
from cakd_cli.losses.base import LossOutput, Objectives, SoftenedTerm
from cakd_cli.losses.logits import check_pair, soften
from cakd_cli.losses.weights import Weight


def nkd(student_BC: Tensor, teacher_BC: Tensor, target_B: Tensor, *, temperature: float, gamma: float) -> LossOutput:
    """``target + non_target``: the label's log probability weighed by the teacher's, and cross-entropy of the rest.

    target = -mean p_teacher[y] log p_student[y] at temperature 1;
    non_target = -gamma T^2 mean sum q_teacher log q_student with q the softmax over the other classes.
    A cross-entropy: it is not 0 where both networks agree.

    Args:
        student_BC: Student logits, (batch, classes), any float type; computed in float32 at least.
        teacher_BC: Teacher logits, same shape; treated as constant.
        target_B: Class indices.
        temperature: Softening of the rest, > 0; the paper uses 1.
        gamma: Weight of ``non_target``, with which the part is given; the paper uses 1.5.

    Returns:
        ``total`` with the parts ``target`` and ``non_target``, in nats.

    Raises:
        ValueError: If shapes do not fit or the temperature is not positive.
    """
    check_pair(student_BC, teacher_BC, temperature)
    label_BC = grouping.label(teacher_BC, target_B)
    student_B, teacher_B = (
        soften(logits_BC, 1.0).log_softmax(1).gather(1, target_B.unsqueeze(1)).squeeze(1)
        for logits_BC in (student_BC, teacher_BC.detach())
    )
    target = -(teacher_B.exp() * student_B).mean()
    rest_student_BC = _log_rest(student_BC, label_BC, temperature)
    rest_teacher_BC = _log_rest(teacher_BC.detach(), label_BC, temperature)
    cross_BC = torch.where(label_BC, 0, rest_teacher_BC.exp() * rest_student_BC)
    non_target = -gamma * temperature**2 * cross_BC.sum(1).mean()
    return LossOutput(target + non_target, {"target": target, "non_target": non_target})


def _log_rest(logits_BC: Tensor, label_BC: Tensor, temperature: float) -> Tensor:
    """Log probabilities among the other classes; 0 at the label, where infinity would spoil gradients."""
    inside_BC = soften(logits_BC, temperature).masked_fill(label_BC, -torch.inf).log_softmax(1)
    return torch.where(label_BC, 0, inside_BC)


class NKDTerm(SoftenedTerm):
    """The label as the teacher gives it, the others normalised."""

    paper = "Yang et al. 2023, arXiv 2303.13005"
    formula = "-mean p_t[y] log p_s[y] - gamma T^2 mean sum_rest q_t log q_s,  q over the other classes"
    objectives: ClassVar[Objectives] = {"nkd": ({"type": "cross-entropy"}, {"type": "nkd"})}
    function = staticmethod(nkd)
    of_labels = True

    type: Literal["nkd"] = "nkd"
    temperature: float = Field(1.0, gt=0, le=1000, description="softening of the other classes")
    gamma: Weight = Field(1.5, description="weight of the other classes")

    @property
    def takes_several_labels(self) -> bool:
        """It weighs the probability of one label."""
        return False
