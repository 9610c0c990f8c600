"""What every loss shares: its result, and its place in a recipe.

Shape suffixes: B batch, C classes, D elements of a layer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from cakd_cli.losses.logits import standardise
from cakd_cli.losses.weights import AdaptiveWeight, ChangingWeight, Weight
from cakd_cli.options import Options, mistakes

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


class Look(NamedTuple):
    """A layer that a term looks at.

    Attributes:
        layer: Name of a module, or ``stage2`` for the second stage of a network that names its stages; empty for the
            input of the linear classifier, or the map that it is the average of.
        form: ``vector`` (batch, elements), averaged over positions or tokens; ``map`` as the layer gives it;
            ``preactivation``, a stage's map before its last activation; ``importance`` (batch, elements), how much each
            element speaks for the predicted class; ``class maps`` (batch, classes, height, width), the network's own
            classifier at every position of the map, without its bias.
    """

    layer: str = ""
    form: Literal["vector", "map", "preactivation", "importance", "class maps"] = "vector"


class Needs(NamedTuple):
    """What a term needs beside the student's logits and the labels.

    Attributes:
        teacher: Whether it needs a teacher at all.
        student_layers: Of the student.
        teacher_layers: Of the teacher.
        second_view: Whether it needs both networks' logits of a second, strongly augmented view of each image.
    """

    teacher: bool = True
    student_layers: tuple[Look, ...] = ()
    teacher_layers: tuple[Look, ...] = ()
    second_view: bool = False


class Shapes(NamedTuple):
    """What a term's own module is built for.

    Attributes:
        student: Shape of each layer without the batch.
        teacher: Likewise.
        classifier_CD: Weight of the teacher's linear classifier, if a term looks at its input.
        classifier_C: Its bias, if it has one.
        labels_N: Class of each sample by its number in the training file, int64, -1 for those held out; none where
            samples have several.
        norms: Weight and bias of the teacher's batch norm that gives a layer, where one does.
        num_classes: Which both networks tell apart.
        batch_size: Samples that a step sees at a time, the last of an epoch apart.
    """

    student: Mapping[Look, tuple[int, ...]]
    teacher: Mapping[Look, tuple[int, ...]]
    classifier_CD: Tensor | None = None
    classifier_C: Tensor | None = None
    labels_N: Tensor | None = None
    norms: Mapping[Look, tuple[Tensor, Tensor]] = {}
    num_classes: int = 0
    batch_size: int = 0


@dataclass(frozen=True)
class Lesson:
    """What a term may look at in one batch.

    Attributes:
        student_BC: Student logits.
        teacher_BC: Teacher logits; none if no term needs them.
        target_B: Class indices; for several labels a sample bool (batch, classes).
        student: The layers that the term needs, float32.
        teacher: Likewise.
        sample_B: Number of each sample in the training file, int64.
        epoch: From 1.
        student_strong_BC: Student logits of the second view; none unless a term needs it.
        teacher_strong_BC: Teacher logits of it.
    """

    student_BC: Tensor
    teacher_BC: Tensor | None
    target_B: Tensor
    student: Mapping[Look, Tensor] = field(default_factory=dict)
    teacher: Mapping[Look, Tensor] = field(default_factory=dict)
    sample_B: Tensor | None = None
    epoch: int = 1
    student_strong_BC: Tensor | None = None
    teacher_strong_BC: Tensor | None = None

    @property
    def strong(self) -> tuple[Tensor, Tensor]:
        """Both networks' logits of the second view."""
        assert self.student_strong_BC is not None, "Needs.second_view asks for it"
        assert self.teacher_strong_BC is not None, "Needs.second_view asks for it"
        return self.student_strong_BC, self.teacher_strong_BC


class Term(Options):
    """One entry of a recipe's ``loss:`` list: its settings, what it needs, what it trains, and the loss of a batch.

    A kind of term says its ``type``, ``formula`` and ``objectives``, and computes in :meth:`__call__`.
    """

    paper: ClassVar[str] = ""
    # Of the unweighted term.
    formula: ClassVar[str]
    # What ``--loss NAME`` stands for, by name: whole training objectives as published, as raw recipe entries.
    objectives: ClassVar[Objectives]
    # What an objective is, where the first line above does not say it.
    summaries: ClassVar[Mapping[str, str]] = {}

    # Whether it looks at the student's logits, and so trains its classifier.
    of_logits: ClassVar[bool] = True
    # Whether its gradient reaches weights of the student otherwise than through its logits and the layers before them,
    # so that a process must hold them whole.
    of_whole_weights: ClassVar[bool] = False
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
        able = ", ".join(self.weighs) or "none of its weights"
        wrong = [
            ((name,), f"cannot be adaptive: it weighs no part beside others; {able} can")
            for name in type(self).model_fields
            if isinstance(getattr(self, name), AdaptiveWeight) and name not in self.weighs
        ]
        if wrong:
            raise mistakes(wrong, self)
        return self

    def over(self, epochs: int) -> Self:
        """Put numbers where the recipe leaves it to the length of the run."""
        update: dict[str, Any] = {}
        if self.warmup_epochs == "auto":
            update["warmup_epochs"] = epochs / 12
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, ChangingWeight):
                update[name] = value.over(epochs)
        return self.model_copy(update=update)

    def between(self, student: Sequence[str], teacher: Sequence[str]) -> Self:
        """Name layers where the recipe leaves them to the networks.

        Args:
            student: Names of the student's stages, shallow to deep.
            teacher: Of the teacher's.

        Raises:
            ValueError: If a network does not tell its stages.
        """
        return self

    @property
    def factor(self) -> float:
        """The weight, in an epoch; that of a recipe may change over the run."""
        assert not isinstance(self.weight, ChangingWeight), "Weights.at() computes it"
        return self.weight

    @property
    def needs(self) -> Needs:
        """What the term needs."""
        return Needs()

    @property
    def looks_inside(self) -> bool:
        """Whether it looks at layers, also while the recipe leaves open which."""
        needs = self.needs
        return bool(needs.student_layers or needs.teacher_layers) or not self.of_logits

    @property
    def takes_several_labels(self) -> bool:
        """Whether a sample may have several labels, or none."""
        return True

    @property
    def needs_label(self) -> bool:
        """Whether its loss depends on labels; of one that does not, the labels may be -1, for images without any."""
        return not self.takes_several_labels

    @property
    def trains_itself(self) -> bool:
        """Whether it may have a module of its own."""
        return type(self).module is not Term.module

    def module(self, shapes: Shapes) -> nn.Module | None:
        """Make what the term itself trains, which is no part of the student: nothing, for most."""
        return None

    def __call__(self, lesson: Lesson, module: nn.Module | None = None) -> LossOutput:
        """Compute the unweighted term for one batch.

        Args:
            lesson: What it needs of the batch.
            module: What :meth:`module` made.
        """
        raise NotImplementedError


class LogitTerm(Term):
    """A term on both networks' logits; by itself it calls a function of them with its own settings.

    Attributes:
        function: Takes student logits, teacher logits, the labels if ``of_labels``, and the settings by name.
        of_labels: Whether it takes the labels.
    """

    function: ClassVar[Callable[..., LossOutput]]
    of_labels: ClassVar[bool] = False

    standardise: bool = Field(
        False, description="z-score both networks' logits over the classes first (LSKD, arXiv 2403.01427)"
    )

    def __call__(self, lesson: Lesson, module: nn.Module | None = None) -> LossOutput:
        student_BC, teacher_BC = self._logits(lesson)
        labels = (lesson.target_B,) if self.of_labels else ()
        return type(self).function(student_BC, teacher_BC, *labels, **self.settings())

    def _logits(self, lesson: Lesson) -> tuple[Tensor, Tensor]:
        assert lesson.teacher_BC is not None, "a recipe with a distillation term and without a teacher is refused"
        if self.standardise:
            return standardise(lesson.student_BC), standardise(lesson.teacher_BC)
        return lesson.student_BC, lesson.teacher_BC

    def _views(self, lesson: Lesson) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Give both networks' logits of both views."""
        mine_BC, theirs_BC = lesson.strong
        if self.standardise:
            mine_BC, theirs_BC = standardise(mine_BC), standardise(theirs_BC)
        return self._logits(lesson), (mine_BC, theirs_BC)

    def settings(self) -> dict[str, Any]:
        """Values by name of what this kind of term has beside what all have."""
        return {name: getattr(self, name) for name in type(self).model_fields if name not in LogitTerm.model_fields}


class SoftenedTerm(LogitTerm):
    """A term on softened logits."""

    temperature: float = Field(4.0, gt=0, le=1000, description="softening of both networks' logits")
