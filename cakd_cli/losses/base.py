"""What every loss shares: its result, and its place in a recipe.

Shape suffixes: B batch, C classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from cakd_cli.losses.emphasis import AdaptiveEmphasis, Emphasis, Weight
from cakd_cli.losses.logits import standardise

# Names of whole training objectives, and each as raw recipe entries.
Objectives = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class LossOutput:
    """A loss and what it is made of.

    Attributes:
        total: Differentiable scalar, nats (times temperature squared where the method scales so).
        parts: Named parts, batch means, before any weight unless the method's docstring says otherwise; they carry
            gradients too.
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
        return self.compare(*self.prepared(student_BC, teacher_BC), target_B)

    def prepared(self, student_BC: Tensor, teacher_BC: Tensor | None) -> tuple[Tensor, Tensor]:
        """Standardise both networks' logits, if the recipe says so."""
        assert teacher_BC is not None, "a recipe with a distillation term and without a teacher is refused"
        return (standardise(student_BC), standardise(teacher_BC)) if self.standardise else (student_BC, teacher_BC)

    def compare(self, student_BC: Tensor, teacher_BC: Tensor, target_B: Tensor) -> LossOutput:
        """Compute the unweighted term for one batch."""
        raise NotImplementedError


class SoftenedTerm(TeacherTerm):
    """A term on softened logits."""

    temperature: float = Field(4.0, gt=0, le=1000, description="softening of both networks' logits")
