"""SLD: Limantoro et al., Swapped Logit Distillation via Bi-level Teacher Alignment, arXiv 2504.20108.

Shape suffixes: B batch, C classes.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from cakd_cli.losses.base import Lesson, LogitTerm, LossOutput, Needs, Objectives
from cakd_cli.losses.knowledge_distillation import kd
from cakd_cli.losses.logits import check_pair, check_target, soften
from cakd_cli.losses.supervised import cross_entropy


def swapped(logits_BC: Tensor, target_B: Tensor) -> Tensor:
    """Exchange the logit of the label with the largest one, so that every prediction is right; (batch, classes).

    Raises:
        ValueError: If the labels do not fit.
    """
    check_target(logits_BC, target_B)
    label_B1, top_B1 = target_B.unsqueeze(1), logits_BC.argmax(1, keepdim=True)
    classes_C = torch.arange(logits_BC.shape[1], device=logits_BC.device)
    source_BC = torch.where(classes_C == top_B1, label_B1, classes_C)
    return logits_BC.gather(1, torch.where(classes_C == label_B1, top_B1, source_BC))


def sld_step(
    student_BC: Tensor,
    teacher_BC: Tensor,
    target_B: Tensor,
    student_strong_BC: Tensor,
    teacher_strong_BC: Tensor,
    *,
    ce_weight: float,
    kd_weight: float,
    epoch: int,
    student_after: int = 150,
    temperatures: Sequence[float] = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0),
) -> LossOutput:
    """Whole objective on two views: KD of swapped teachers and, late in training, of the swapped student itself.

    At every temperature ``T^2 mean KL(swap(teacher) || student)``, and after some epochs
    ``T^2 mean KL(swap(student) || student)`` as well. As in the official code the swapped student is no constant:
    gradients flow through both sides.

    Args:
        student_BC: Student logits of the weak view, (batch, classes), any float type; computed in float32 at least.
        teacher_BC: Teacher logits of the weak view; treated as constant.
        target_B: Class indices.
        student_strong_BC: Student logits of the strong view.
        teacher_strong_BC: Teacher logits of the strong view; treated as constant.
        ce_weight: Weight of the sum of both views' cross-entropies; the paper uses 0.1 on CIFAR-100.
        kd_weight: Weight of the sum over views and temperatures; the paper uses 0.9 on CIFAR-100.
        epoch: From 1.
        student_after: The last epoch without the swapped student.
        temperatures: Over which the divergences are summed, each > 0.

    Returns:
        ``total`` with the parts ``loss_ce`` and ``loss_kd``, both weighted, in nats.

    Raises:
        ValueError: If shapes do not fit, or a temperature is not positive or there is none.
    """
    if not temperatures:
        raise ValueError("temperatures is empty")
    views = ((student_BC, teacher_BC), (student_strong_BC, teacher_strong_BC))
    for view in views:
        check_pair(*view, min(temperatures))
    kept = [
        kd(mine_BC, swapped(theirs_BC, target_B), temperature=temperature).total
        for mine_BC, theirs_BC in views
        for temperature in temperatures
    ]
    if epoch > student_after:
        kept += [_own(mine_BC, target_B, temperature) for mine_BC, _ in views for temperature in temperatures]
    loss_kd = kd_weight * torch.stack(kept).sum()
    loss_ce = ce_weight * (cross_entropy(student_BC, target_B).total + cross_entropy(student_strong_BC, target_B).total)
    return LossOutput(loss_ce + loss_kd, {"loss_ce": loss_ce, "loss_kd": loss_kd})


def _own(student_BC: Tensor, target_B: Tensor, temperature: float) -> Tensor:
    """``T^2 mean KL(swap(student) || student)``: only the two classes that change places add to it."""
    log_BC = soften(student_BC, temperature).log_softmax(1)
    label_B1 = log_BC.gather(1, target_B.unsqueeze(1))
    top_B1 = log_BC.gather(1, log_BC.argmax(1, keepdim=True))
    return temperature**2 * ((top_B1.exp() - label_B1.exp()) * (top_B1 - label_B1)).mean()


class SLDTerm(LogitTerm):
    """KD of teachers, and late of the student, whose logits of label and prediction changed places."""

    paper = "Limantoro et al. 2025, arXiv 2504.20108"
    formula = "sum_views,T T^2 mean KL(swap(p_teacher) || p_student), late + T^2 mean KL(swap(p_student) || p_student)"
    # CIFAR-100 settings of the official code, after 150 of 240 epochs; published with optimizer.learning_rate=0.025.
    objectives: ClassVar[Objectives] = {
        "sld": (
            {"type": "cross-entropy", "weight": 0.1, "second_view": True},
            {"type": "sld", "weight": 0.9},
        )
    }

    type: Literal["sld"] = "sld"
    temperatures: tuple[Annotated[float, Field(gt=0, le=1000)], ...] = Field(
        (1.0, 2.0, 3.0, 4.0, 5.0, 6.0), strict=False, min_length=1, description="over which everything is summed"
    )
    student_after: int | None = Field(
        None, ge=0, description="last epoch without the swapped student; by default five eighths of the run"
    )

    def over(self, epochs: int) -> Self:
        """Put the epoch where the recipe leaves it to the length of the run."""
        term = super().over(epochs)
        return term if term.student_after is not None else term.model_copy(update={"student_after": epochs * 5 // 8})

    @property
    def needs(self) -> Needs:
        """Both views."""
        return Needs(second_view=True)

    @property
    def takes_several_labels(self) -> bool:
        """It exchanges one label's logit."""
        return False

    def __call__(self, lesson: Lesson, module: nn.Module | None = None) -> LossOutput:
        weak, strong = self._views(lesson)
        settings = self.settings() | {"ce_weight": 0.0, "kd_weight": 1.0, "epoch": lesson.epoch}
        output = sld_step(*weak, lesson.target_B, *strong, **settings)
        return LossOutput(output.parts["loss_kd"], {"sld": output.parts["loss_kd"]})
