"""CAKD: Correlation-Aware Knowledge Distillation, arXiv 2410.14741.

Shape suffixes: B batch, C classes (or any softmaxed elements).
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cakd_cli.losses.base import Lesson, LossOutput, Objectives, SoftenedTerm
from cakd_cli.losses.decoupling import Part, decouple, two_groups, weigh
from cakd_cli.losses.grouping import Grouping, LabelGrouping
from cakd_cli.losses.logits import check_pair
from cakd_cli.losses.weights import Weight


def cakd(
    student_BC: Tensor,
    teacher_BC: Tensor,
    strong_BC: Tensor,
    *,
    temperature: float,
    alpha: float,
    beta: float,
    scale_by_mass: bool = False,
) -> LossOutput:
    """``bcd + alpha * scd + beta * wcd``: strong against weak, inside the strong, inside the weak.

    The paper's text leaves open whether alpha and beta replace the teacher masses p_s, p_w that the theorem puts
    before SCD and WCD, or multiply them. The default, replacing them, is inferred from DKD, which it equals for
    S = {label} and alpha_DKD = 1. ``scale_by_mass`` is the other reading, exactly KD at alpha = beta = 1.

    Args:
        student_BC: Student logits (or other elements to softmax), (batch, classes); computed in float32 at least.
        teacher_BC: Teacher logits, same shape; treated as constant.
        strong_BC: Boolean mask of the strong elements. A part whose set is empty or holds one element is 0.
        temperature: Softening, > 0.
        alpha: Weight of ``scd``.
        beta: Weight of ``wcd``.
        scale_by_mass: Weigh ``scd`` and ``wcd`` of each sample by the teacher's mass of their set as well.

    Returns:
        ``total`` with the parts ``bcd``, ``scd`` and ``wcd``: unweighted, batch means, times temperature squared, nats.

    Raises:
        ValueError: If shapes do not fit, the mask is not boolean, or the temperature is not positive.
    """
    check_pair(student_BC, teacher_BC, temperature)
    if strong_BC.dtype != torch.bool or strong_BC.shape != student_BC.shape:
        raise ValueError(
            f"strong_BC must be a boolean mask of shape {tuple(student_BC.shape)}, "
            f"got {tuple(strong_BC.shape)} of {strong_BC.dtype}"
        )
    split = decouple(student_BC, teacher_BC, two_groups(strong_BC), num_groups=2, temperature=temperature)
    inside = Part("scd", alpha, scale_by_mass), Part("wcd", beta, scale_by_mass)
    return weigh(split, temperature, Part("bcd"), inside)


class CAKDTerm(SoftenedTerm):
    """Strong against weak classes, inside the strong, inside the weak."""

    paper = "arXiv 2410.14741; alpha, beta and the reading of the weights are inferred"
    formula = "T^2 mean [KL(b) + alpha KL(strong) + beta KL(weak)],  b = masses of strong and weak"
    # The published text gives the form (cross-entropy 1, 20 of 240 epochs of warm-up, temperature 4) but neither
    # alpha nor beta; 1 and 8 are DKD's for ResNet32x4 -> ResNet8x4, whose loss this is for S = {label}.
    objectives: ClassVar[Objectives] = {
        "cakd-logits": ({"type": "cross-entropy"}, {"type": "cakd", "warmup_epochs": "auto"}),
        "cakd": (
            {"type": "cross-entropy"},
            {"type": "cakd", "warmup_epochs": "auto"},
            # Over features, losses/features; 20 and beta 2 are the search's, the paper gives neither.
            {"type": "cakd-features", "weight": 20.0, "warmup_epochs": "auto"},
        ),
    }
    summaries: ClassVar[Mapping[str, str]] = {
        "cakd-logits": "CAKD's first half, over logits with S = {label}.",
        "cakd": "CAKD as its paper has it, over logits and over features.",
    }
    weighs: ClassVar[Mapping[str, str]] = {"alpha": "scd", "beta": "wcd"}
    beside: ClassVar[Sequence[str]] = ("bcd",)

    type: Literal["cakd"] = "cakd"
    alpha: Weight = Field(1.0, description="weight of scd, inside the strong classes")
    beta: Weight = Field(8.0, description="weight of wcd, inside the weak classes")
    grouping: Grouping = Field(default_factory=LabelGrouping, description="which classes are strong")
    scale_by_mass: bool = Field(False, description="weigh scd and wcd by the teacher's mass of their set as well")

    @property
    def needs_label(self) -> bool:
        """Whether the strong classes are the labels."""
        return isinstance(self.grouping, LabelGrouping)

    def __call__(self, lesson: Lesson, module: nn.Module | None = None) -> LossOutput:
        student_BC, teacher_BC = self._logits(lesson)
        settings = self.settings()
        strong_BC = settings.pop("grouping").strong(teacher_BC, lesson.target_B, self.temperature)
        return cakd(student_BC, teacher_BC, strong_BC, **settings)
