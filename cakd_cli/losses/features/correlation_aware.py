"""CAKD over features, the second half of arXiv 2410.14741.

The paper splits softmaxed features into strong and weak by a mask that comes from the teacher's prediction, and weighs
the parts as over logits. Its rule for the mask, alpha and beta, the temperature and the connector are not public: here
they are settings, and their defaults were chosen by a search on held-out images (recipes/evidence).

Shape suffixes: B batch, C classes, D elements (channels) of a layer.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from cakd_cli.losses.base import Lesson, Look, LossOutput, Needs, Objectives, Shapes, Term
from cakd_cli.losses.correlation_aware import cakd
from cakd_cli.losses.features.layers import LayerPair
from cakd_cli.losses.logits import soften, standardise
from cakd_cli.losses.weights import Weight
from cakd_cli.options import mistakes

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


class CAKDFeaturesTerm(Term):
    """Strong against weak features, inside the strong, inside the weak."""

    paper = "arXiv 2410.14741; mask, weights, temperature and connector are inferred"
    formula = "sum_layers T^2 mean [KL(b) + alpha KL(strong) + beta KL(weak)] of softmaxed features"
    objectives: ClassVar[Objectives] = {}  # it is a part of CAKDTerm's

    weighs: ClassVar[Mapping[str, str]] = {"alpha": "feature_scd", "beta": "feature_wcd"}
    beside: ClassVar[Sequence[str]] = ("feature_bcd",)
    of_logits = False

    type: Literal["cakd-features"] = "cakd-features"
    layers: tuple[LayerPair, ...] = Field(
        (),
        strict=False,
        description="pairs of layers by module name or stage; none = the inputs of both classifiers",
    )
    mask: Mask = Field("classifier-evidence", description="how the teacher tells strong elements from weak ones")
    alpha: Weight = Field(1.0, description="weight of feature_scd, inside the strong elements")
    beta: Weight = Field(2.0, description="weight of feature_wcd, inside the weak elements")
    temperature: float = Field(1.0, gt=0, le=1000, description="softening of both networks' features")
    standardise: bool = Field(True, description="z-score both networks' features over the elements first")
    scale_by_mass: bool = Field(False, description="weigh both inner parts by the teacher's mass of their set as well")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.layers and self.mask == "classifier-evidence":
            wrong = "classifier-evidence needs the classifier's input; for layers grad-cam or activation"
            raise mistakes([(("mask",), wrong)], self)
        return self

    @property
    def needs(self) -> Needs:
        """Each layer as a vector, and its importance where the mask is Grad-CAM."""
        pairs = [(pair.student, pair.teacher) for pair in self.layers] or [("", "")]
        mine, theirs = (tuple(Look(pair[i]) for pair in pairs) for i in (0, 1))
        importance = tuple(look._replace(form="importance") for look in theirs) if self.mask == "grad-cam" else ()
        return Needs(student_layers=mine, teacher_layers=(*theirs, *importance))

    def module(self, shapes: Shapes) -> Connector:
        """Make the connector.

        Raises:
            ValueError: If the mask needs a weight of each class, and the teacher has none.
        """
        mine, theirs = self._layers()
        if self.mask == "classifier-evidence" and shapes.classifier_CD is None:
            raise ValueError("classifier-evidence needs a linear classifier, one weight a class; take mask=grad-cam")
        return Connector(
            [shapes.student[look][0] for look in mine],
            [shapes.teacher[look][0] for look in theirs],
            shapes.classifier_CD if self.mask == "classifier-evidence" else None,
        )

    def __call__(self, lesson: Lesson, module: nn.Module | None = None) -> LossOutput:
        assert isinstance(module, Connector)
        outputs = []
        settings: dict[str, Any] = {
            name: getattr(self, name) for name in ("temperature", "alpha", "beta", "scale_by_mass")
        }
        for projection, mine, theirs in zip(module.projections, *self._layers(), strict=True):
            teacher_BD = lesson.teacher[theirs].detach()
            output = cakd(
                self._prepared(projection(lesson.student[mine])),
                self._prepared(teacher_BD),
                self._strong(teacher_BD, lesson, module, theirs),
                **settings,
            )
            outputs.append(output)
        parts = {
            f"feature_{name}": reduce(add, (output.parts[name] for output in outputs)) for name in outputs[0].parts
        }
        return LossOutput(reduce(add, (output.total for output in outputs)), parts)

    def _layers(self) -> tuple[tuple[Look, ...], tuple[Look, ...]]:
        needs = self.needs
        return needs.student_layers, needs.teacher_layers[: len(needs.student_layers)]

    def _prepared(self, features_BD: Tensor) -> Tensor:
        return standardise(features_BD) if self.standardise else features_BD

    def _strong(self, features_BD: Tensor, lesson: Lesson, connector: Connector, look: Look) -> Tensor:
        if self.mask == "classifier-evidence":
            assert lesson.teacher_BC is not None
            assert isinstance(connector.weight_CD, Tensor)
            return classifier_evidence(features_BD, lesson.teacher_BC, connector.weight_CD)
        if self.mask == "grad-cam":
            return above_mean(lesson.teacher[look._replace(form="importance")])
        return activation(self._prepared(features_BD), self.temperature)
