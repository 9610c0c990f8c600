"""SRRL: Yang et al., Knowledge Distillation via Softmax Regression Representation Learning, ICLR 2021.

Shape suffixes: B batch, C classes, D channels.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from cakd_cli.losses.base import Lesson, Look, LossOutput, Needs, Objectives, Shapes
from cakd_cli.losses.features.layers import MapsTerm
from cakd_cli.losses.features.maps import mean_squared, precise
from cakd_cli.losses.weights import ChangingWeight, Weight


def srrl(
    student: Tensor, teacher: Tensor, classifier_CD: Tensor, classifier_C: Tensor | None = None, *, weight: float = 1.0
) -> LossOutput:
    """``stat + weight * srr``: what the last maps are on average, and what the teacher's classifier makes of that.

    Args:
        student: The student's last map in the teacher's channels, (batch, channels, height, width), see
            :class:`ChannelConnector`; or its mean over the positions.
        teacher: The teacher's in any height and width, or its mean; treated as constant.
        classifier_CD: Weight of the teacher's classifier; treated as constant.
        classifier_C: Its bias, if it has one.
        weight: Of ``srr``; 1 in the official code.

    Returns:
        ``total`` with the parts ``stat``, mean squared difference of the means over the positions, and ``srr``, that
        of the logits that the teacher's classifier gives to both.

    Raises:
        ValueError: If channels or batches differ, or the classifier does not take them.
    """
    return _regression("stat", _mean(student), _mean(teacher), classifier_CD, classifier_C, weight)


def srrl_pooled(
    student_BD: Tensor,
    teacher_BD: Tensor,
    classifier_CD: Tensor,
    classifier_C: Tensor | None = None,
    *,
    weight: float = 1.0,
) -> LossOutput:
    """The same of vectors that are connected after the pooling, as SimKD's authors compare with it (arXiv 2203.14001).

    Args and errors as of :func:`srrl`, of vectors (batch, channels); ``weight`` is of both parts.

    Returns:
        ``total`` with the parts ``feat``, mean squared difference of the vectors, and ``srr``, unweighted.
    """
    output = _regression("feat", student_BD, teacher_BD, classifier_CD, classifier_C, 1.0)
    return LossOutput(weight * output.total, output.parts)


def _mean(features: Tensor) -> Tensor:
    return precise(features).flatten(2).mean(2) if features.ndim == 4 else features


def _regression(
    name: str,
    student_BD: Tensor,
    teacher_BD: Tensor,
    classifier_CD: Tensor,
    classifier_C: Tensor | None,
    weight: float,
) -> LossOutput:
    if student_BD.ndim != 2 or classifier_CD.shape[1:] != student_BD.shape[1:]:
        raise ValueError(
            f"a classifier {tuple(classifier_CD.shape)} does not take features of shape {tuple(student_BD.shape)}"
        )
    distance = mean_squared(student_BD, teacher_BD)
    fixed = tuple(None if one is None else one.detach() for one in (classifier_CD, classifier_C))
    with torch.autocast(student_BD.device.type, enabled=False):
        mine_BC, theirs_BC = (_logits(features_BD, *fixed) for features_BD in (student_BD, teacher_BD.detach()))
    srr = mean_squared(mine_BC, theirs_BC)
    return LossOutput(distance + weight * srr, {name: distance, "srr": srr})


def _logits(features_BD: Tensor, classifier_CD: Tensor | None, classifier_C: Tensor | None) -> Tensor:
    assert classifier_CD is not None
    features_BD = precise(features_BD)
    bias_C = None if classifier_C is None else classifier_C.to(features_BD.dtype)
    return functional.linear(features_BD, classifier_CD.to(features_BD.dtype), bias_C)


class ChannelConnector(nn.Module):
    """Brings a student's map to the teacher's channels and holds the teacher's classifier.

    Convolution 1x1, batch norm, ReLU; trained with the student and never saved with it.

    Args:
        student_channels: Of the student's map; a vector is a map of one pixel.
        teacher_channels: Of the teacher's.
        classifier_CD: Weight of the teacher's classifier, which is not trained.
        classifier_C: Its bias, if it has one.

    Raises:
        ValueError: If the classifier does not take the teacher's channels.
    """

    classifier_CD: Tensor
    classifier_C: Tensor | None

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        classifier_CD: Tensor,
        classifier_C: Tensor | None = None,
    ) -> None:
        super().__init__()
        if classifier_CD.shape[1] != teacher_channels:
            raise ValueError(
                f"the teacher's classifier takes {classifier_CD.shape[1]} channels, its layer has {teacher_channels}"
            )
        self.conv = nn.Conv2d(student_channels, teacher_channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(teacher_channels)
        self.register_buffer("classifier_CD", classifier_CD, persistent=False)
        self.register_buffer("classifier_C", classifier_C, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Map (batch, channels, height, width) or vector (batch, channels) of the student to the teacher's channels."""
        vector = features.ndim == 2
        mapped = cast(Tensor, self.bn(self.conv(features[:, :, None, None] if vector else features)).relu())
        return mapped.flatten(1) if vector else mapped


class SRRLTerm(MapsTerm):
    """What the last maps are on average, and what the teacher's classifier makes of the student's."""

    paper = "Yang et al. 2021, ICLR, Softmax Regression Representation Learning"
    formula = (
        "mean (avg f - avg map_teacher)^2 + beta mean (W_t avg f - W_t avg map_teacher)^2,  f = relu(bn(conv(map)))"
    )
    objectives: ClassVar[Objectives] = {"srrl": ({"type": "cross-entropy"}, {"type": "srrl"})}
    usual: ClassVar[Literal["all", "last"]] = "last"

    weighs: ClassVar[Mapping[str, str]] = {"beta": "srr"}
    beside: ClassVar[Sequence[str]] = ("stat",)

    type: Literal["srrl"] = "srrl"
    beta: Weight = Field(1.0, description="weight of srr, the teacher's classifier on both")

    @property
    def pairs(self) -> list[tuple[Look, Look]]:
        """The student's map; of the teacher's the mean is enough."""
        return [(Look(pair.student, "map"), Look(pair.teacher)) for pair in self.layers]

    @property
    def needs(self) -> Needs:
        """The layers, and the input of the teacher's classifier for the classifier's sake."""
        layers = super().needs
        return layers._replace(teacher_layers=(*layers.teacher_layers, Look()))

    def module(self, shapes: Shapes) -> nn.ModuleList:
        """Make a connector a layer.

        Raises:
            ValueError: If the teacher has no linear classifier on the layer's channels.
        """
        if shapes.classifier_CD is None:
            raise ValueError("needs a teacher with a linear classifier, one weight a class")
        return nn.ModuleList(
            ChannelConnector(mine[0], theirs[0], shapes.classifier_CD, shapes.classifier_C)
            for mine, theirs in self.shapes(shapes)
        )

    def __call__(self, lesson: Lesson, module: nn.Module | None = None) -> LossOutput:
        assert isinstance(module, nn.ModuleList)
        assert not isinstance(self.beta, ChangingWeight), "Weights.at() computes it"
        total = lesson.student_BC.new_zeros(())
        parts: dict[str, Tensor] = {}
        for connector, (student, teacher) in zip(module, self.maps(lesson), strict=True):
            assert isinstance(connector, ChannelConnector)
            classifier = connector.classifier_CD, connector.classifier_C
            output = srrl(connector(student), teacher, *classifier, weight=self.beta)
            total = total + output.total
            for name, part in output.parts.items():
                parts[name] = parts.get(name, 0) + part
        return LossOutput(total, parts)
