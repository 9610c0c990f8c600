"""RLD: Sun et al., Knowledge Distillation with Refined Logits, arXiv 2408.07703.

Shape suffixes: B batch, C classes.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from cakd_cli.losses import grouping
from cakd_cli.losses.base import LossOutput, Objectives, SoftenedTerm
from cakd_cli.losses.decoupling import decouple, two_groups
from cakd_cli.losses.logits import check_pair, check_target, standardise
from cakd_cli.losses.supervised import cross_entropy
from cakd_cli.losses.swapped import swapped
from cakd_cli.losses.weights import Weight


def rld(
    student_BC: Tensor,
    teacher_BC: Tensor,
    target_B: Tensor,
    *,
    temperature: float,
    alpha_temperature: float,
    alpha: float,
    beta: float,
    logit_stand: bool = False,
) -> LossOutput:
    """``alpha * scd + beta * mcd``: how sure the teacher is, held against the label, and the classes it ranks below.

    ``scd`` compares the student's probability of the label with the teacher's largest, whichever class has it; ``mcd``
    is the KL among the classes whose teacher logit is strictly below the label's. A class that the teacher wrongly
    prefers to the label is so never taught. With the label last for the teacher ``mcd`` of the sample is 0.

    Args:
        student_BC: Student logits, (batch, classes), any float type; computed in float32 at least.
        teacher_BC: Teacher logits, same shape; treated as constant.
        target_B: Class indices.
        temperature: Softening of ``mcd``, > 0.
        alpha_temperature: Softening of ``scd``, > 0; the paper uses 1.
        alpha: Weight of ``scd``; the paper uses 1.
        beta: Weight of ``mcd``; the paper uses 8 on CIFAR-100.
        logit_stand: Whether both networks' logits are z-scored first.

    Returns:
        ``total`` with the parts ``scd`` and ``mcd``: unweighted, batch means, times the square of their temperature, in
        nats.

    Raises:
        ValueError: If shapes do not fit or a temperature is not positive.
    """
    check_pair(student_BC, teacher_BC, temperature)
    check_target(student_BC, target_B)
    teacher_BC = teacher_BC.detach()
    if logit_stand:
        student_BC, teacher_BC = standardise(student_BC), standardise(teacher_BC)
    label_BC = two_groups(grouping.label(teacher_BC, target_B))
    # Swapped, the teacher's largest probability stands where the label is.
    sure = decouple(student_BC, swapped(teacher_BC, target_B), label_BC, num_groups=2, temperature=alpha_temperature)
    above_BC = two_groups(teacher_BC >= teacher_BC.gather(1, target_B.unsqueeze(1)))
    ranked = decouple(student_BC, teacher_BC, above_BC, num_groups=2, temperature=temperature)
    scd = alpha_temperature**2 * sure.between_B.mean()
    mcd = temperature**2 * ranked.within_BK[:, 1].mean()
    return LossOutput(alpha * scd + beta * mcd, {"scd": scd, "mcd": mcd})


def rld_step(
    student_BC: Tensor,
    teacher_BC: Tensor,
    target_B: Tensor,
    *,
    temperature: float,
    alpha_temperature: float,
    alpha: float,
    beta: float,
    logit_stand: bool = False,
    ce_weight: float = 1.0,
    warmup: float = 20.0,
    epoch: int,
) -> LossOutput:
    """Whole objective: cross-entropy and :func:`rld`, whose weight grows linearly over the first epochs.

    Args:
        student_BC: As of :func:`rld`; so are the settings that are not named here, and the errors.
        teacher_BC: Likewise.
        target_B: Likewise.
        temperature: Likewise.
        alpha_temperature: Likewise.
        alpha: Likewise.
        beta: Likewise.
        logit_stand: Likewise.
        ce_weight: Weight of cross-entropy.
        warmup: Epochs until the weight of :func:`rld` is 1, > 0.
        epoch: From 1.

    Returns:
        ``total`` with the parts ``loss_ce`` and ``loss_kd``, both weighted.
    """
    refined = rld(
        student_BC,
        teacher_BC,
        target_B,
        temperature=temperature,
        alpha_temperature=alpha_temperature,
        alpha=alpha,
        beta=beta,
        logit_stand=logit_stand,
    )
    loss_ce = ce_weight * cross_entropy(student_BC, target_B).total
    loss_kd = min(epoch / warmup, 1.0) * refined.total
    return LossOutput(loss_ce + loss_kd, {"loss_ce": loss_ce, "loss_kd": loss_kd})


class RLDTerm(SoftenedTerm):
    """The teacher's confidence for the label, and the classes that it ranks below the label."""

    paper = "Sun et al. 2024, arXiv 2408.07703"
    formula = (
        "alpha T_a^2 mean KL((max p_t, rest) || (p_s[label], rest)) + beta T^2 mean KL(classes with z_t < z_t[label])"
    )
    # CIFAR-100 settings of the official configs; 20 of 240 epochs of warm-up. Several pairs have another beta.
    objectives: ClassVar[Objectives] = {"rld": ({"type": "cross-entropy"}, {"type": "rld", "warmup_epochs": "auto"})}

    weighs: ClassVar[Mapping[str, str]] = {"alpha": "scd", "beta": "mcd"}
    function = staticmethod(rld)
    of_labels = True

    type: Literal["rld"] = "rld"
    alpha_temperature: float = Field(1.0, gt=0, le=1000, description="softening of scd")
    alpha: Weight = Field(1.0, description="weight of scd, how sure the teacher is")
    beta: Weight = Field(8.0, description="weight of mcd, among the classes below the label")

    @property
    def takes_several_labels(self) -> bool:
        """It ranks the classes against one label."""
        return False
