"""What every loss shares: its result, its place in a recipe, and the preparation of logits.

Shape suffixes: B batch, C classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from cakd_cli.losses.emphasis import AdaptiveEmphasis, Emphasis, Weight

# Differences of two logits and their batch sums stay finite in float32 up to here.
LARGEST_SOFTENED_LOGIT = 1e30
STANDARDISING_EPSILON = 1e-7
# Names of whole training objectives, and each as raw recipe entries.
Objectives = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class LossOutput:
    """A loss and what it is made of.

    Attributes:
        total: Differentiable scalar, nats (times temperature squared where the method scales so).
        parts: Named parts before any weight, batch means; they carry gradients too.
    """

    total: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class Lesson:
    """What a term may look at in one batch.

    Attributes:
        student_BC: Student logits.
        teacher_BC: Teacher logits; none if no term needs them.
        target_B: Class indices.
        student_features: One (batch, elements) for each of the term's layers.
        teacher_features: Likewise.
        importance: How much each of the teacher's elements speaks for its prediction, where the term needs it.
    """

    student_BC: Tensor
    teacher_BC: Tensor | None
    target_B: Tensor
    student_features: tuple[Tensor, ...] = ()
    teacher_features: tuple[Tensor, ...] = ()
    importance: tuple[Tensor, ...] = ()


class LossTerm(BaseModel):
    """One entry of a recipe's ``loss:`` list."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    needs_teacher: ClassVar[bool] = True
    paper: ClassVar[str] = ""
    # Of the unweighted term.
    formula: ClassVar[str]
    # What ``--loss NAME`` stands for, by name: whole training objectives as published, as raw recipe entries.
    objectives: ClassVar[Objectives]
    # What an objective is, where the first line above does not say it.
    summaries: ClassVar[Mapping[str, str]] = {}

    # Which part each weight is of, where parts of a term are weighed.
    weighs: ClassVar[Mapping[str, str]] = {}
    # Parts without a weight of their own that an adaptive weight compares its part with as well.
    beside: ClassVar[Sequence[str]] = ()

    type: str
    weight: Weight = Field(1.0, description="factor on this term")
    warmup_epochs: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        0.0, description="epochs over which the weight grows linearly from 0; auto = a twelfth of the run"
    )

    @model_validator(mode="after")
    def _check_adaptive(self) -> Self:
        for name in type(self).model_fields:
            if isinstance(getattr(self, name), AdaptiveEmphasis) and name not in self.weighs:
                able = ", ".join(self.weighs) or "none of its weights"
                raise ValueError(f"{name} cannot be adaptive: it weighs no part beside others; {able} can")
        return self

    def settled(self, epochs: int) -> Self:
        """Put numbers where the recipe leaves it to the length of the run."""
        update: dict[str, Any] = {}
        if self.warmup_epochs == "auto":
            update["warmup_epochs"] = epochs / 12
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Emphasis):
                update[name] = value.settled(epochs)
        return self.model_copy(update=update)

    @property
    def takes_several_labels(self) -> bool:
        """Whether a sample may have several labels, or none."""
        return True

    @property
    def layer_names(self) -> tuple[tuple[str, str], ...]:
        """Layers that the term compares, (student, teacher); an empty name is the input of a classifier."""
        return ()

    @property
    def needs_importance(self) -> bool:
        """Whether the teacher's layers come with their Grad-CAM importance."""
        return False

    def learner(
        self, student_sizes: Sequence[int], teacher_sizes: Sequence[int], weight_CD: Tensor | None
    ) -> nn.Module | None:
        """Make what the term itself learns, which is no part of the student: nothing, for most.

        Args:
            student_sizes: Elements of each of the student's layers.
            teacher_sizes: Of the teacher's.
            weight_CD: Weight of the teacher's linear classifier, if it has one.
        """
        return None

    def learn(self, lesson: Lesson, learner: nn.Module | None) -> LossOutput:
        """Compute the unweighted term for one batch."""
        return self(lesson.student_BC, lesson.teacher_BC, lesson.target_B)

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | None, target_B: Tensor) -> LossOutput:
        """Compute the unweighted term for one batch, by its logits alone."""
        raise NotImplementedError


class TeacherTerm(LossTerm):
    """A term that compares the student with a teacher."""

    standardise: bool = Field(
        False, description="z-score both networks' logits over the classes first (LSKD, arXiv 2403.01427)"
    )

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | None, target_B: Tensor) -> LossOutput:
        """Compute the unweighted term for one batch."""
        assert teacher_BC is not None, "the recipe schema refuses a distillation term without a teacher"
        if self.standardise:
            student_BC, teacher_BC = standardise(student_BC), standardise(teacher_BC)
        return self.compare(student_BC, teacher_BC, target_B)

    def compare(self, student_BC: Tensor, teacher_BC: Tensor, target_B: Tensor) -> LossOutput:
        """Compute the unweighted term for one batch."""
        raise NotImplementedError


class SoftenedTerm(TeacherTerm):
    """A term on softened logits."""

    temperature: float = Field(4.0, gt=0, le=1000, description="softening of both networks' logits")


def soften(logits_BC: Tensor, temperature: float | Tensor) -> Tensor:
    """Divide logits by a temperature, in float32 at least.

    Logits beyond 1e30 times the temperature are held there, with gradient 0: differences of any two
    results, and sums of such differences over a batch, are then finite. A logit that is itself not finite becomes
    NaN, so that it cannot pass unseen.
    """
    precise_BC = logits_BC if logits_BC.dtype == torch.float64 else logits_BC.float()
    held_BC = (precise_BC / temperature).clamp(-LARGEST_SOFTENED_LOGIT, LARGEST_SOFTENED_LOGIT)
    return torch.where(precise_BC.isfinite(), held_BC, torch.nan)


def standardise(logits_BC: Tensor) -> Tensor:
    """Z-score logits over the classes: (z - mean) / (std + 1e-7), in float32 at least (LSKD, arXiv 2403.01427 eq. 8).

    The deviation is the unbiased one, and gradients flow through mean and deviation. Logits that are all equal
    become equal numbers near 0. With two classes the result is +-0.707 whatever the logits were.
    """
    logits_BC = soften(logits_BC, 1.0)
    # Squares of large logits would overflow: the size cancels.
    size_B1 = logits_BC.detach().abs().amax(1, keepdim=True).clamp(min=1)
    small_BC = logits_BC / size_B1
    deviation_B1 = small_BC.std(1, keepdim=True) + STANDARDISING_EPSILON / size_B1
    return (small_BC - small_BC.mean(1, keepdim=True)) / deviation_B1


def pearson(a_BN: Tensor, b_BN: Tensor) -> Tensor:
    """Pearson correlation of each row, in [-1, 1]; 0 for a row that is constant.

    As published with DIST, 1e-8 is added to the product of the norms, so the values must not be tiny.
    """
    a_BN = a_BN - a_BN.mean(1, keepdim=True)
    b_BN = b_BN - b_BN.mean(1, keepdim=True)
    product_B = (a_BN * b_BN).sum(1)
    norms_B: Tensor = torch.linalg.vector_norm(a_BN, dim=1) * torch.linalg.vector_norm(b_BN, dim=1)
    return product_B / (norms_B + 1e-8)


def check_pair(student_BC: Tensor, teacher_BC: Tensor, temperature: float) -> None:
    """Refuse what would broadcast into a wrong number.

    Raises:
        ValueError: If the shapes differ, are not two-dimensional, or the temperature is not positive.
    """
    if student_BC.ndim != 2 or student_BC.shape != teacher_BC.shape:
        raise ValueError(
            "student and teacher logits must have one shape (batch, classes), "
            f"got {tuple(student_BC.shape)} and {tuple(teacher_BC.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def check_target(student_BC: Tensor, target_B: Tensor) -> None:
    """Refuse labels that are not one class index per sample.

    Raises:
        ValueError: If the shape or type of ``target_B`` is wrong. Ranges are not read: that would wait for the device.
    """
    if target_B.shape != student_BC.shape[:1] or target_B.dtype.is_floating_point or target_B.dtype == torch.bool:
        raise ValueError(
            f"labels must be {student_BC.shape[0]} class indices, got {tuple(target_B.shape)} of {target_B.dtype}"
        )
