"""MLKD: Jin et al., Multi-Level Logit Distillation, CVPR 2023.

The official code differs from what its text says: masks of confident samples and classes multiply means that have
been taken already, and so are mere factors; two of the strong view's temperatures read the weak view. The two whole
objectives here do as the text says unless ``reference_quirks`` is set, which reproduces the code.

Shape suffixes: B batch, C classes.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cakd_cli.losses.base import Lesson, LogitTerm, LossOutput, Needs, Objectives
from cakd_cli.losses.knowledge_distillation import kd
from cakd_cli.losses.logits import check_pair, kl, soften, standardise
from cakd_cli.losses.supervised import cross_entropy


def mlkd_instance_kd(student_BC: Tensor, teacher_BC: Tensor, *, temperature: float) -> LossOutput:
    """KD at one temperature: temperature squared times the mean KL, in nats; part ``instance_kd``."""
    total = kd(student_BC, teacher_BC, temperature=temperature).total
    return LossOutput(total, {"instance_kd": total})


def mlkd_class_correlation(student_BC: Tensor, teacher_BC: Tensor, *, temperature: float) -> LossOutput:
    """Squared difference of the classes' Gram matrices over the batch, summed, by the number of classes."""
    check_pair(student_BC, teacher_BC, temperature)
    return _correlation("class_correlation", student_BC.T, teacher_BC.T, temperature, dim=0)


def mlkd_batch_correlation(student_BC: Tensor, teacher_BC: Tensor, *, temperature: float) -> LossOutput:
    """Squared difference of the samples' Gram matrices over the classes, summed, by the batch size."""
    check_pair(student_BC, teacher_BC, temperature)
    return _correlation("batch_correlation", student_BC, teacher_BC, temperature, dim=1)


def _correlation(name: str, student: Tensor, teacher: Tensor, temperature: float, *, dim: int) -> LossOutput:
    student = soften(student, temperature).softmax(dim)
    teacher = soften(teacher.detach(), temperature).softmax(dim)
    total = _gram_distance(student, teacher) / student.shape[0]
    return LossOutput(total, {name: total})


def _gram_distance(student: Tensor, teacher: Tensor) -> Tensor:
    with torch.autocast(student.device.type, enabled=False):
        difference = teacher @ teacher.T - student @ student.T
    return difference.square().sum()


def mlkd_single_view(
    student_BC: Tensor,
    teacher_BC: Tensor,
    target_B: Tensor,
    *,
    temperatures: Sequence[float],
    ce_weight: float,
    kd_weight: float,
    enable_mask: bool = True,
    quantile: float = 0.5,
    reference_quirks: bool = False,
) -> LossOutput:
    """Whole objective on one view of each image, as in the GDKD repository.

    Args:
        student_BC: Student logits, (batch, classes), any float type; computed in float32 at least.
        teacher_BC: Teacher logits, same shape; treated as constant.
        target_B: Class indices.
        temperatures: Over which the three levels are summed; the paper uses 2 to 6.
        ce_weight: Weight of cross-entropy; the paper uses 0.1.
        kd_weight: Weight of the three levels; the paper uses 0.9.
        enable_mask: Learn from those samples and classes alone of which the teacher is less sure than of others.
        quantile: The share of samples, and of classes, that is learnt from under the mask.
        reference_quirks: Multiply by the share of the mask instead, as the official code does.

    Returns:
        ``total`` with the parts ``loss_ce`` and ``loss_kd`` (weighted), ``kd``, ``cc``, ``bc`` (unweighted, summed over
        the temperatures, with the mask).

    Raises:
        ValueError: If shapes do not fit or a setting is out of range.
    """
    levels = _levels(
        student_BC,
        teacher_BC,
        temperatures,
        masks=_less_sure(teacher_BC, quantile) if enable_mask else None,
        reference_quirks=reference_quirks,
    )
    loss_ce = ce_weight * cross_entropy(student_BC, target_B).total
    loss_kd = kd_weight * levels.total
    return LossOutput(loss_ce + loss_kd, {"loss_ce": loss_ce, "loss_kd": loss_kd, **levels.parts})


def mlkd_step(
    student_BC: Tensor,
    teacher_BC: Tensor,
    target_B: Tensor,
    student_strong_BC: Tensor,
    teacher_strong_BC: Tensor,
    *,
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    logit_standardisation: bool = False,
    reference_quirks: bool = False,
) -> LossOutput:
    """Whole objective on a weakly and a strongly augmented view of each image, at the temperature and 3, 5, 2, 6.

    KD is on both views; the Gram matrices are of the weak one, the instances' masked as of :func:`mlkd_single_view`.

    Args:
        student_BC: Student logits of the weak view, (batch, classes).
        teacher_BC: Teacher logits of the weak view; treated as constant.
        target_B: Class indices.
        student_strong_BC: Student logits of the strong view.
        teacher_strong_BC: Teacher logits of the strong view; treated as constant.
        temperature: The first of the five.
        ce_weight: Weight of the sum of both views' cross-entropies.
        kd_weight: Weight of the rest.
        logit_standardisation: Whether KD is of z-scored logits; the Gram matrices never are.
        reference_quirks: Multiply by the shares of the masks, and read the weak view for the strong one at 2 and 6.

    Returns:
        ``total`` with the parts ``loss_ce``, ``loss_kd``, ``loss_cc`` and ``loss_bc``, all weighted.

    Raises:
        ValueError: If shapes do not fit or a setting is out of range.
    """
    levels = _levels_of_two_views(
        (student_BC, teacher_BC),
        (student_strong_BC, teacher_strong_BC),
        (temperature, 3.0, 5.0, 2.0, 6.0),
        logit_standardisation=logit_standardisation,
        reference_quirks=reference_quirks,
    )
    loss_ce = ce_weight * (cross_entropy(student_BC, target_B).total + cross_entropy(student_strong_BC, target_B).total)
    parts = {"loss_ce": loss_ce} | {f"loss_{name}": kd_weight * part for name, part in levels.parts.items()}
    return LossOutput(loss_ce + kd_weight * levels.total, parts)


def _levels_of_two_views(
    weak: tuple[Tensor, Tensor],
    strong: tuple[Tensor, Tensor],
    temperatures: Sequence[float],
    *,
    logit_standardisation: bool,
    reference_quirks: bool,
) -> LossOutput:
    """KD of both views and the Gram matrices of the weak one, unweighted, as ``kd``, ``cc`` and ``bc``.

    The official code reads the weak view for the strong one at the fourth and fifth temperature.
    """
    for view in (weak, strong):
        check_pair(*view, temperatures[0])
    masks = samples_B, _ = _less_sure(weak[1], 0.5)
    parts = dict(_levels(*weak, temperatures, masks=masks, reference_quirks=reference_quirks).parts)
    if logit_standardisation:
        weak, strong = ((standardise(mine_BC), standardise(theirs_BC)) for mine_BC, theirs_BC in (weak, strong))
    parts["kd"] = torch.zeros_like(parts["kd"])
    for i, one in enumerate(temperatures):
        parts["kd"] = parts["kd"] + _masked_kd(*weak, one, samples_B, reference_quirks=reference_quirks)
        parts["kd"] = parts["kd"] + kd(*(weak if reference_quirks and i >= 3 else strong), temperature=one).total
    return LossOutput(parts["kd"] + parts["cc"] + parts["bc"], parts)


def _levels(
    student_BC: Tensor,
    teacher_BC: Tensor,
    temperatures: Sequence[float],
    *,
    masks: tuple[Tensor, Tensor] | None,
    reference_quirks: bool,
) -> LossOutput:
    if not temperatures:
        raise ValueError("temperatures is empty")
    parts: dict[str, Tensor] = {}
    for temperature in temperatures:
        check_pair(student_BC, teacher_BC, temperature)
        if masks is None:
            found = {
                "kd": kd(student_BC, teacher_BC, temperature=temperature).total,
                "cc": mlkd_class_correlation(student_BC, teacher_BC, temperature=temperature).total,
                "bc": mlkd_batch_correlation(student_BC, teacher_BC, temperature=temperature).total,
            }
        else:
            samples_B, classes_C = masks
            found = {
                "kd": _masked_kd(student_BC, teacher_BC, temperature, samples_B, reference_quirks=reference_quirks),
                "cc": _masked_gram(
                    student_BC, teacher_BC, temperature, classes_C, by_class=True, reference_quirks=reference_quirks
                ),
                "bc": _masked_gram(
                    student_BC, teacher_BC, temperature, samples_B, by_class=False, reference_quirks=reference_quirks
                ),
            }
        for name, part in found.items():
            parts[name] = parts[name] + part if name in parts else part
    return LossOutput(parts["kd"] + parts["cc"] + parts["bc"], parts)


def _less_sure(teacher_BC: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Samples and classes with the teacher's smaller confidences, up to a quantile of them; at least one of each."""
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile must be in [0, 1], got {quantile}")
    probability_BC = soften(teacher_BC.detach(), 1.0).softmax(1)
    confidence_B, mass_C = probability_BC.amax(1), probability_BC.sum(0)
    return confidence_B <= confidence_B.quantile(quantile), mass_C <= mass_C.quantile(quantile)


def _masked_kd(
    student_BC: Tensor, teacher_BC: Tensor, temperature: float, samples_B: Tensor, *, reference_quirks: bool
) -> Tensor:
    if reference_quirks:
        total = kd(student_BC, teacher_BC, temperature=temperature).total
        return total * samples_B.to(total.dtype).mean()
    kl_B = kl(student_BC, teacher_BC, temperature)
    return temperature**2 * (kl_B * samples_B).sum() / samples_B.sum()


def _masked_gram(
    student_BC: Tensor,
    teacher_BC: Tensor,
    temperature: float,
    kept: Tensor,
    *,
    by_class: bool,
    reference_quirks: bool,
) -> Tensor:
    if reference_quirks:
        correlation = mlkd_class_correlation if by_class else mlkd_batch_correlation
        total = correlation(student_BC, teacher_BC, temperature=temperature).total
        return total * kept.to(total.dtype).mean()
    student, teacher = (
        soften(logits_BC, temperature).softmax(1) * (kept if by_class else kept.unsqueeze(1))
        for logits_BC in (student_BC, teacher_BC.detach())
    )
    if by_class:
        student, teacher = student.T, teacher.T
    return _gram_distance(student, teacher) / kept.sum()


class MLKDTerm(LogitTerm):
    """KD and Gram matrices at several temperatures, on two views of each image or on one."""

    paper = "Jin et al. 2023, CVPR, Multi-Level Logit Distillation"
    formula = "sum_T [T^2 mean KL + |P_t' P_t - P_s' P_s|^2 / C + |P_t P_t' - P_s P_s'|^2 / B]"
    # As published: two views, and the code's quirks.
    objectives: ClassVar[Objectives] = {
        "mlkd": (
            {"type": "cross-entropy", "weight": 0.1, "second_view": True},
            {"type": "mlkd", "weight": 0.9, "second_view": True, "reference_quirks": True},
        )
    }

    type: Literal["mlkd"] = "mlkd"
    temperatures: tuple[Annotated[float, Field(gt=0, le=1000)], ...] = Field(
        (4.0, 3.0, 5.0, 2.0, 6.0), strict=False, min_length=1, description="over which everything is summed"
    )
    second_view: bool = Field(False, description="add KD of a second, strongly augmented view of each image")
    enable_mask: bool = Field(True, description="learn from samples and classes of which the teacher is less sure")
    quantile: float = Field(0.5, ge=0, le=1, description="share of samples and classes under the mask")
    reference_quirks: bool = Field(False, description="multiply by the masks' shares, as the official code does")

    @property
    def needs(self) -> Needs:
        """A second view, where it is asked for."""
        return Needs(second_view=self.second_view)

    def __call__(self, lesson: Lesson, module: nn.Module | None = None) -> LossOutput:
        if self.second_view:
            assert lesson.teacher_BC is not None
            # Not the Gram matrices: standardised logits are for KD alone.
            return _levels_of_two_views(
                (lesson.student_BC, lesson.teacher_BC),
                lesson.strong,
                self.temperatures,
                logit_standardisation=self.standardise,
                reference_quirks=self.reference_quirks,
            )
        student_BC, teacher_BC = self._logits(lesson)
        return _levels(
            student_BC,
            teacher_BC,
            self.temperatures,
            masks=_less_sure(teacher_BC, self.quantile) if self.enable_mask else None,
            reference_quirks=self.reference_quirks,
        )
