"""CAKD over features, the second half of arXiv 2410.14741.

The paper splits softmaxed features into strong and weak by a mask that comes from the teacher's prediction, and weighs
the parts as over logits. Its rule for the mask, alpha and beta, the temperature and the connector are not public: here
they are settings, and their defaults were chosen by a search on held-out images (recipes/evidence).

Shape suffixes: B batch, C classes, D elements (channels) of a layer.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from cakd_cli.losses.base import Lesson, LossOutput, LossTerm, Objectives
from cakd_cli.losses.correlation_aware import cakd
from cakd_cli.losses.emphasis import Weight
from cakd_cli.losses.logits import soften, standardise

Mask = Literal["classifier-evidence", "grad-cam", "activation"]


def classifier_evidence(features_BD: Tensor, logits_BC: Tensor, weight_CD: Tensor) -> Tensor:
    """Strong are the elements that speak for the predicted class more than the mean element does.

    An element's evidence is its value times its weight in the logit of the class that the teacher predicts; a wrong
    prediction gives a wrong mask, as the paper says of its own.

    Args:
        features_BD: Input of the teacher's linear classifier.
        logits_BC: The teacher's logits.
        weight_CD: Weight of that classifier.

    Returns:
        Boolean mask (batch, elements).
    """
    return above_mean(features_BD * weight_CD[logits_BC.argmax(1)])


def above_mean(values_BD: Tensor) -> Tensor:
    """Strong are the elements above their row's mean; none where all are equal."""
    # A mean may round to below values that are all equal.
    return (values_BD > values_BD.mean(1, keepdim=True)) & (values_BD > values_BD.amin(1, keepdim=True))


def activation(features_BD: Tensor, temperature: float) -> Tensor:
    """Strong are the elements whose softmax is above its mean, 1 / elements."""
    return above_mean(soften(features_BD, temperature).softmax(1))


class Connector(nn.Module):
    """Brings the student's features to the teacher's widths; trained with the student and never saved with it.

    Args:
        student_sizes: Elements of each of the student's layers.
        teacher_sizes: Of the teacher's.
        weight_CD: Weight of the teacher's classifier, where the mask needs it.
    """

    def __init__(self, student_sizes: Sequence[int], teacher_sizes: Sequence[int], weight_CD: Tensor | None) -> None:
        super().__init__()
        self.projections = nn.ModuleList(
            nn.Identity() if mine == theirs else nn.Linear(mine, theirs)
            for mine, theirs in zip(student_sizes, teacher_sizes, strict=True)
        )
        self.register_buffer("weight_CD", weight_CD, persistent=False)


class LayerPair(BaseModel):
    """A layer of each network, by the name of its module."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    student: str = Field(min_length=1, description="module of the student")
    teacher: str = Field(min_length=1, description="module of the teacher")


class CAKDFeaturesTerm(LossTerm):
    """Strong against weak features, inside the strong, inside the weak."""

    paper = "arXiv 2410.14741; mask, weights, temperature and connector are inferred"
    formula = "sum_layers T^2 mean [KL(b) + alpha KL(strong) + beta KL(weak)] of softmaxed features"
    objectives: ClassVar[Objectives] = {
        "cakd": (
            {"type": "cross-entropy"},
            {"type": "cakd", "warmup_epochs": "auto"},
            # 20 and beta 2 are the search's; the paper gives neither.
            {"type": "cakd-features", "weight": 20.0, "warmup_epochs": "auto"},
        )
    }

    summaries: ClassVar[Mapping[str, str]] = {"cakd": "CAKD as its paper has it, over logits and over features."}
    weighs: ClassVar[Mapping[str, str]] = {"alpha": "feature_scd", "beta": "feature_wcd"}
    beside: ClassVar[Sequence[str]] = ("feature_bcd",)

    type: Literal["cakd-features"] = "cakd-features"
    layers: tuple[LayerPair, ...] = Field(
        (), strict=False, description="pairs of layers by module name; none = the inputs of both classifiers"
    )
    mask: Mask = Field("classifier-evidence", description="how the teacher tells strong elements from weak ones")
    alpha: Weight = Field(1.0, description="weight of feature_scd, inside the strong elements")
    beta: Weight = Field(2.0, description="weight of feature_wcd, inside the weak elements")
    temperature: float = Field(1.0, gt=0, le=1000, description="softening of both networks' features")
    standardise: bool = Field(True, description="z-score both networks' features over the elements first")
    scale_by_mass: bool = Field(False, description="weigh both inner parts by the teacher's mass of their set as well")

    @model_validator(mode="after")
    def _check(self) -> "CAKDFeaturesTerm":
        if self.layers and self.mask == "classifier-evidence":
            raise ValueError("mask classifier-evidence needs the classifier's input; for layers grad-cam or activation")
        return self

    @property
    def layer_names(self) -> tuple[tuple[str, str], ...]:
        """Pairs of layers, (student, teacher); empty names are the classifiers' inputs."""
        return tuple((pair.student, pair.teacher) for pair in self.layers) or (("", ""),)

    @property
    def needs_importance(self) -> bool:
        """Whether the teacher's layers come with their Grad-CAM importance."""
        return self.mask == "grad-cam"

    def learner(
        self, student_sizes: Sequence[int], teacher_sizes: Sequence[int], weight_CD: Tensor | None
    ) -> Connector:
        """Make the connector."""
        return Connector(student_sizes, teacher_sizes, weight_CD if self.mask == "classifier-evidence" else None)

    def learn(self, lesson: Lesson, learner: nn.Module | None) -> LossOutput:
        """Compute the unweighted term for one batch."""
        assert isinstance(learner, Connector)
        assert lesson.teacher_BC is not None
        total = lesson.student_BC.new_zeros(())
        parts: dict[str, Tensor] = {}
        for i, projection in enumerate(learner.projections):
            theirs_BD = lesson.teacher_features[i].detach()
            output = cakd(
                self._prepared(projection(lesson.student_features[i])),
                self._prepared(theirs_BD),
                self._strong(theirs_BD, lesson, learner, i),
                temperature=self.temperature,
                alpha=self.alpha,
                beta=self.beta,
                scale_by_mass=self.scale_by_mass,
            )
            total = total + output.total
            for name, part in output.parts.items():
                parts[f"feature_{name}"] = parts.get(f"feature_{name}", 0) + part
        return LossOutput(total, parts)

    def _prepared(self, features_BD: Tensor) -> Tensor:
        return standardise(features_BD) if self.standardise else features_BD

    def _strong(self, features_BD: Tensor, lesson: Lesson, learner: Connector, i: int) -> Tensor:
        assert lesson.teacher_BC is not None
        if self.mask == "classifier-evidence":
            assert isinstance(learner.weight_CD, Tensor)
            return classifier_evidence(features_BD, lesson.teacher_BC, learner.weight_CD)
        if self.mask == "grad-cam":
            return above_mean(lesson.importance[i])
        return activation(self._prepared(features_BD), self.temperature)
