"""DIST: Huang et al., Knowledge Distillation from A Stronger Teacher, arXiv 2205.10536.

Shape suffixes: B batch, C classes.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from cakd_cli.losses.base import LossOutput, Objectives, SoftenedTerm
from cakd_cli.losses.logits import check_pair, pearson, soften
from cakd_cli.losses.weights import Weight


def dist(student_BC: Tensor, teacher_BC: Tensor, *, temperature: float, beta: float, gamma: float) -> LossOutput:
    """``beta * inter + gamma * intra``: one minus Pearson correlations, over the classes and over the batch.

    ``inter`` correlates the class probabilities of each sample, ``intra`` the probabilities of each class over the
    batch: a class that no label of the batch names still has some. With a batch of one ``intra`` is constant.

    Args:
        student_BC: Student logits, (batch, classes), any float type; computed in float32 at least.
        teacher_BC: Teacher logits, same shape; treated as constant.
        temperature: Softening, > 0; the paper uses 1 on ImageNet and 4 on CIFAR-100.
        beta: Weight of ``inter``; the paper uses 2.
        gamma: Weight of ``intra``; the paper uses 2.

    Returns:
        ``total`` with the parts ``inter`` and ``intra``: unweighted, times temperature squared.

    Raises:
        ValueError: If shapes do not fit or the temperature is not positive.
    """
    check_pair(student_BC, teacher_BC, temperature)
    student_BC = soften(student_BC, temperature).softmax(1)
    teacher_BC = soften(teacher_BC.detach(), temperature).softmax(1)
    inter = temperature**2 * (1 - pearson(student_BC, teacher_BC).mean())
    intra = temperature**2 * (1 - pearson(student_BC.T, teacher_BC.T).mean())
    return LossOutput(beta * inter + gamma * intra, {"inter": inter, "intra": intra})


class DISTTerm(SoftenedTerm):
    """Correlation of probabilities, over classes and over the batch."""

    paper = "Huang et al. 2022, arXiv 2205.10536"
    formula = "beta T^2 (1 - mean_samples rho(p_student, p_teacher)) + gamma T^2 (1 - mean_classes rho over the batch)"
    # CIFAR-100 settings of the official repository: dist_t4.
    objectives: ClassVar[Objectives] = {"dist": ({"type": "cross-entropy"}, {"type": "dist"})}

    weighs: ClassVar[Mapping[str, str]] = {"beta": "inter", "gamma": "intra"}
    function = staticmethod(dist)

    type: Literal["dist"] = "dist"
    beta: Weight = Field(2.0, description="weight of inter, over the classes")
    gamma: Weight = Field(2.0, description="weight of intra, over the batch")
