"""WKD-L: Lv et al., Wasserstein Distance Rivals KL Divergence for Knowledge Distillation, arXiv 2412.08139.

Shape suffixes: B batch, C classes, D elements of the classifier's input.
"""

import math
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from cakd_cli.losses import grouping
from cakd_cli.losses.base import Lesson, Look, LossOutput, Needs, Objectives, Shapes, SoftenedTerm
from cakd_cli.losses.logits import check_pair, check_target, soften
from cakd_cli.losses.normalized import nkd
from cakd_cli.losses.supervised import cross_entropy
from cakd_cli.losses.weights import Weight

# As published: added to every cost and to every denominator.
_EPSILON = 1e-8


def classifier_distance(weight_CD: Tensor) -> Tensor:
    """One minus the cosine of each two rows of a classifier's weight, (classes, classes), in [0, 2]."""
    with torch.autocast(weight_CD.device.type, enabled=False):
        rows_CD = functional.normalize(weight_CD if weight_CD.dtype == torch.float64 else weight_CD.float(), dim=1)
        return 1 - rows_CD @ rows_CD.T


def wkd_l(
    student_BC: Tensor,
    teacher_BC: Tensor,
    target_B: Tensor,
    distance_CC: Tensor,
    *,
    temperature: float,
    gamma: float,
    sinkhorn_reg: float = 0.05,
    sinkhorn_iter: int = 10,
    sharpen: float = 1.0,
) -> LossOutput:
    """``target + gamma * wkd``: the label as of NKD, and the cost of moving the other classes' mass to the teacher's.

    target = -mean p_teacher[y] log p_student[y] at temperature 1, not 0 where both networks agree. ``wkd`` is the
    regularised transport between the softmaxes over the other classes, by Sinkhorn's iterations, through all of which
    gradients flow; no temperature squared. With two classes it is constant. Memory is of the order of the logits': all
    samples share one matrix of costs, and the label's mass is 0.

    Args:
        student_BC: Student logits, (batch, classes), any float type; computed in float32 at least.
        teacher_BC: Teacher logits, same shape; treated as constant.
        target_B: Class indices.
        distance_CC: How far two classes are apart, >= 0; constant. The paper takes one minus the CKA of their features,
            or :func:`classifier_distance`.
        temperature: Softening of the other classes, > 0; the paper uses 6 or 8 on CIFAR-100.
        gamma: Weight of ``wkd``; the paper uses 200 to 600 on CIFAR-100.
        sinkhorn_reg: Weight of the transport's entropy, > 0: the larger, the more spread.
        sinkhorn_iter: Number of iterations, >= 1.
        sharpen: A cost is 1 - exp(-sharpen distance); with 0 the distance itself.

    Returns:
        ``total`` with the parts ``target``, in nats, and ``wkd``: unweighted, batch means.

    Raises:
        ValueError: If shapes do not fit or a setting is out of range.
    """
    check_pair(student_BC, teacher_BC, temperature)
    check_target(student_BC, target_B)
    if distance_CC.shape != (student_BC.shape[1],) * 2:
        raise ValueError(f"distances must be of {student_BC.shape[1]} classes each, got {tuple(distance_CC.shape)}")
    if not (sinkhorn_reg > 0 and sinkhorn_iter >= 1 and sharpen >= 0):
        raise ValueError(
            "sinkhorn_reg must be positive, sinkhorn_iter at least 1 and sharpen not negative, "
            f"got {sinkhorn_reg}, {sinkhorn_iter} and {sharpen}"
        )
    label_BC = grouping.label(teacher_BC, target_B)
    student_rest_BC, teacher_rest_BC = (
        soften(logits_BC, temperature).masked_fill(label_BC, -torch.inf).softmax(1)
        for logits_BC in (student_BC, teacher_BC.detach())
    )
    distance_CC = distance_CC.detach().to(student_rest_BC.dtype)
    cost_CC = (1 - (-sharpen * distance_CC).exp() if sharpen else distance_CC).relu() + _EPSILON
    wkd = _transport(student_rest_BC, teacher_rest_BC, label_BC, cost_CC, sinkhorn_reg, sinkhorn_iter).mean()
    target = nkd(student_BC, teacher_BC, target_B, temperature=1.0, gamma=0.0).parts["target"]
    return LossOutput(target + gamma * wkd, {"target": target, "wkd": wkd})


def _transport(
    student_BC: Tensor, teacher_BC: Tensor, label_BC: Tensor, cost_CC: Tensor, regularisation: float, count: int
) -> Tensor:
    """Cost of moving each student's mass to its teacher's, (batch,); the label has none and takes no part."""
    kernel_CC = (-cost_CC / regularisation).exp()
    others = max(student_BC.shape[1] - 1, 1)
    from_BC = torch.full_like(student_BC, 1 / others).masked_fill(label_BC, 0)
    to_BC = teacher_BC
    with torch.autocast(student_BC.device.type, enabled=False):
        for _ in range(count):
            to_BC = teacher_BC / (from_BC @ kernel_CC + _EPSILON)
            from_BC = student_BC / (to_BC @ kernel_CC.T + _EPSILON)
        return (from_BC * (to_BC @ (kernel_CC * cost_CC).T)).sum(1)


def wkd_l_step(
    student_BC: Tensor,
    teacher_BC: Tensor,
    target_B: Tensor,
    distance_CC: Tensor,
    *,
    temperature: float,
    gamma: float,
    sinkhorn_reg: float = 0.05,
    sinkhorn_iter: int = 10,
    sharpen: float = 1.0,
    ce_weight: float = 1.0,
    epoch: int,
    epochs: int,
    cosine_decay_epoch: int,
) -> LossOutput:
    """Whole objective: cross-entropy and :func:`wkd_l`, whose gamma falls to 0 late in training.

    Args:
        student_BC: As of :func:`wkd_l`; so are the settings that are not named here, and the errors.
        teacher_BC: Likewise.
        target_B: Likewise.
        distance_CC: Likewise.
        temperature: Likewise.
        gamma: Likewise, before it falls.
        sinkhorn_reg: Likewise.
        sinkhorn_iter: Likewise.
        sharpen: Likewise.
        ce_weight: Weight of cross-entropy.
        epoch: From 1.
        epochs: Of the run.
        cosine_decay_epoch: The last epoch with the whole gamma; from there to the last it falls along half a cosine.

    Returns:
        ``total`` with the parts ``loss_ce`` and ``loss_kd``, both weighted.
    """
    moved = wkd_l(
        student_BC,
        teacher_BC,
        target_B,
        distance_CC,
        temperature=temperature,
        gamma=gamma * _share_left(epoch, cosine_decay_epoch, epochs),
        sinkhorn_reg=sinkhorn_reg,
        sinkhorn_iter=sinkhorn_iter,
        sharpen=sharpen,
    )
    loss_ce = ce_weight * cross_entropy(student_BC, target_B).total
    return LossOutput(loss_ce + moved.total, {"loss_ce": loss_ce, "loss_kd": moved.total})


def _share_left(epoch: int, start: float, epochs: float) -> float:
    """1 up to the start, then half a cosine to 0 in the last epoch."""
    if epoch <= start:
        return 1.0
    return (1 + math.cos(math.pi * min((epoch - start) / (epochs - start), 1.0))) / 2


class ClassDistance(nn.Module):
    """How far two classes of the teacher are apart; nothing in it is trained or saved."""

    distance_CC: Tensor

    def __init__(self, distance_CC: Tensor) -> None:
        super().__init__()
        self.register_buffer("distance_CC", distance_CC, persistent=False)


class WKDTerm(SoftenedTerm):
    """The label, and what it costs to move the other classes' mass to where the teacher has it."""

    paper = "Lv et al. 2024, arXiv 2412.08139; with the distances of classes from the classifier's weight, not by CKA"
    formula = "-mean p_t[y] log p_s[y] + gamma mean W(p_s, p_t over the others),  cost 1 - exp(-sharpen (1 - cosine))"
    # CIFAR-100 settings of the official config for ResNet32x4 -> ResNet8x4: the decay begins after 150 of 240 epochs.
    objectives: ClassVar[Objectives] = {"wkd-l": ({"type": "cross-entropy"}, {"type": "wkd-l", "decay_start": 0.625})}

    type: Literal["wkd-l"] = "wkd-l"
    temperature: float = Field(8.0, gt=0, le=1000, description="softening of the other classes")
    gamma: Weight = Field(600.0, description="weight of wkd, the cost of transport")
    distance: Literal["classifier"] = Field(
        "classifier", description="how far two classes are apart: 1 - cosine of their rows in the teacher's classifier"
    )
    sharpen: float = Field(1.0, ge=0, le=100, description="a cost is 1 - exp(-sharpen distance); 0 = the distance")
    sinkhorn_reg: float = Field(0.05, gt=0, le=100, description="weight of the transport's entropy")
    sinkhorn_iter: int = Field(10, ge=1, le=1000, description="number of Sinkhorn's iterations")
    decay_start: float | None = Field(
        None, ge=0, lt=1, description="share of the run after which gamma falls to 0 along half a cosine; none = never"
    )
    epochs: float | None = Field(None, gt=0, description="epochs until gamma is 0; by default the whole run")

    def over(self, epochs: int) -> Self:
        term = super().over(epochs)
        if term.decay_start is None or term.epochs is not None:
            return term
        return term.model_copy(update={"epochs": float(epochs)})

    @property
    def needs(self) -> Needs:
        """The input of the teacher's classifier, with which its weight comes."""
        return Needs(teacher_layers=(Look(),))

    @property
    def takes_several_labels(self) -> bool:
        """It sets one label apart."""
        return False

    def module(self, shapes: Shapes) -> ClassDistance:
        """Measure how far classes are apart.

        Raises:
            ValueError: If the teacher has no linear classifier.
        """
        if shapes.classifier_CD is None:
            raise ValueError("the distance of classes needs a teacher with a linear classifier, one weight a class")
        return ClassDistance(classifier_distance(shapes.classifier_CD))

    def __call__(self, lesson: Lesson, module: nn.Module | None = None) -> LossOutput:
        assert isinstance(module, ClassDistance)
        settings = self.settings()
        for name in ("distance", "decay_start", "epochs"):
            settings.pop(name)
        settings["gamma"] *= self._share_left(lesson.epoch)
        return wkd_l(*self._logits(lesson), lesson.target_B, module.distance_CC, **settings)

    def _share_left(self, epoch: int) -> float:
        if self.decay_start is None:
            return 1.0
        assert self.epochs is not None, "resolve() fills it in"
        return _share_left(epoch, self.decay_start * self.epochs, self.epochs)
