"""DKD: Zhao et al., Decoupled Knowledge Distillation, arXiv 2203.08679.

Shape suffixes: B batch, C classes.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from cakd_cli.losses import grouping
from cakd_cli.losses.base import LossOutput, Objectives, SoftenedTerm
from cakd_cli.losses.decoupling import KLType, Part, decouple, two_groups, weigh
from cakd_cli.losses.logits import check_pair
from cakd_cli.losses.weights import Weight


def dkd(
    student_BC: Tensor, teacher_BC: Tensor, target_B: Tensor, *, temperature: float, alpha: float, beta: float
) -> LossOutput:
    """``alpha * tckd + beta * nckd`` (arXiv 2203.08679 eq. 7): the label against the rest, and the rest by itself.

    With two classes the rest has one member and ``nckd`` is 0.

    Args:
        student_BC: Student logits, (batch, classes), any float type; computed in float32 at least.
        teacher_BC: Teacher logits, same shape; treated as constant.
        target_B: Class indices; or bool (batch, classes): the labels of a sample then stand against the rest together,
            and what is inside them is left out, see :func:`cakd_cli.losses.cakd`.
        temperature: Softening, > 0.
        alpha: Weight of ``tckd``; the paper uses 1.
        beta: Weight of ``nckd``; the paper uses 2 to 8 on CIFAR-100.

    Returns:
        ``total`` with the parts ``tckd`` and ``nckd``: unweighted, batch means, times temperature squared, in nats.

    Raises:
        ValueError: If shapes do not fit or the temperature is not positive.
    """
    return dkd_mod(student_BC, teacher_BC, target_B, temperature=temperature, alpha=alpha, beta=beta)


def dkd_mod(
    student_BC: Tensor,
    teacher_BC: Tensor,
    target_B: Tensor,
    *,
    temperature: float,
    alpha: float,
    beta: float,
    strategy: Literal["target", "top1"] = "target",
    kl_type: KLType = "forward",
) -> LossOutput:
    """DKD around another class, or with another divergence inside the rest (DKDMod of the GDKD repository).

    Args:
        student_BC: As of :func:`dkd`; so are the parts, results and errors.
        teacher_BC: Likewise.
        target_B: Likewise; not used by ``top1``.
        temperature: Likewise.
        alpha: Likewise.
        beta: Likewise.
        strategy: The class that stands against the rest: the label, or the teacher's largest logit.
        kl_type: Of ``nckd``: forward KL(teacher || student), reverse, or the mean of both.
    """
    check_pair(student_BC, teacher_BC, temperature)
    if strategy == "target":
        alone_BC = grouping.label(teacher_BC, target_B)
    elif strategy == "top1":
        alone_BC = grouping.top_k(teacher_BC, 1)
    else:
        raise ValueError(f"strategy must be target or top1, got {strategy!r}")
    split = decouple(
        student_BC, teacher_BC, two_groups(alone_BC), num_groups=2, temperature=temperature, kl_type=kl_type
    )
    return weigh(split, temperature, Part("tckd", alpha), (None, Part("nckd", beta)))


class DKDTerm(SoftenedTerm):
    """The label against the rest, and the rest, weighted freely."""

    paper = "Zhao et al. 2022, arXiv 2203.08679"
    formula = "alpha T^2 mean KL(b) + beta T^2 mean KL(rest),  b = (p_label, 1 - p_label)"
    # beta is 8 for ResNet32x4 -> ResNet8x4; 2 to 8 over the paper's CIFAR-100 pairs. 20 of 240 epochs of warm-up.
    objectives: ClassVar[Objectives] = {
        "dkd": ({"type": "cross-entropy"}, {"type": "dkd", "warmup_epochs": "auto"}),
        "ls-dkd": (
            {"type": "cross-entropy"},
            {"type": "dkd", "weight": 9.0, "temperature": 2.0, "standardise": True, "warmup_epochs": "auto"},
        ),
    }
    summaries: ClassVar[Mapping[str, str]] = {"ls-dkd": "DKD of z-scored logits (LSKD, arXiv 2403.01427)."}
    weighs: ClassVar[Mapping[str, str]] = {"alpha": "tckd", "beta": "nckd"}
    function = staticmethod(dkd_mod)
    of_labels = True

    type: Literal["dkd"] = "dkd"
    alpha: Weight = Field(1.0, description="weight of tckd, label against the rest")
    beta: Weight = Field(8.0, description="weight of nckd, inside the rest")
    strategy: Literal["target", "top1"] = Field(
        "target", description="the class against the rest: the label, or the teacher's largest logit"
    )
    kl_type: KLType = Field("forward", description="direction of the KL inside the rest")

    @property
    def needs_label(self) -> bool:
        """Whether it is the label that stands alone."""
        return self.strategy == "target"
