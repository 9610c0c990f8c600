"""FSP: Yim et al., A Gift from Knowledge Distillation, CVPR 2017, the flow of the solution procedure.

The paper trains by the flow first and by the labels afterwards; this term adds it to cross-entropy.

Shape suffixes: B batch, D channels of one stage, E of the next, H and W height and width, P positions.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import ClassVar, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from cakd_cli.losses.base import Lesson, LossOutput, Objectives, Shapes
from cakd_cli.losses.features.layers import MapsTerm
from cakd_cli.losses.features.maps import precise, to_smaller
from cakd_cli.losses.features.pairs import check_stages
from cakd_cli.options import mistakes


def fsp(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> LossOutput:
    """Mean squared difference of the flows between stages that follow one another, summed over them.

    The flow of two maps is the product of each channel of the one with each of the other, mean over positions; the map
    with the greater height is average-pooled to the size of the other.

    Args:
        students: The student's maps (batch, channels, height, width), shallow to deep, any float type; computed in
            float32 at least.
        teachers: The teacher's, with as many channels; treated as constant.

    Returns:
        ``total`` with the part ``fsp``.

    Raises:
        ValueError: If there are fewer than two stages, or numbers of stages, samples or channels differ.
    """
    check_stages(students, teachers)
    _check_channels([map_BDHW.shape[1] for map_BDHW in students], [map_BDHW.shape[1] for map_BDHW in teachers])
    flows = zip(_flows(students), _flows([map_BDHW.detach() for map_BDHW in teachers]), strict=True)
    total = torch.stack([(student_BDE - teacher_BDE).square().mean() for student_BDE, teacher_BDE in flows]).sum()
    return LossOutput(total, {"fsp": total})


def _check_channels(students: list[int], teachers: list[int]) -> None:
    if students != teachers:
        raise ValueError(f"stages of both networks must have as many channels, got {students} and {teachers}")


def _flows(maps: Sequence[Tensor]) -> list[Tensor]:
    flows = []
    for bottom, top in pairwise(maps):
        bottom_BDHW, top_BEHW = to_smaller(precise(bottom), precise(top))
        bottom_BDP, top_BEP = bottom_BDHW.flatten(2), top_BEHW.flatten(2)
        with torch.autocast(bottom.device.type, enabled=False):
            flows.append(bottom_BDP @ top_BEP.mT / bottom_BDP.shape[2])
    return flows


class FSPTerm(MapsTerm):
    """How maps flow from stage to stage, for networks with stages of one width."""

    paper = "Yim et al. 2017, CVPR, A Gift from Knowledge Distillation"
    formula = "sum_stages mean (G_student - G_teacher)^2,  G = mean_positions map_i map_(i+1)'"
    # 50 is RepDistiller's, which begins with the stem and trains by it before the labels.
    objectives: ClassVar[Objectives] = {"fsp": ({"type": "cross-entropy"}, {"type": "fsp", "weight": 50.0})}
    summaries: ClassVar[Mapping[str, str]] = {"fsp": "How maps flow from stage to stage; both of one width."}

    type: Literal["fsp"] = "fsp"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.layers) == 1:
            raise mistakes([(("layers",), "needs two pairs of layers or more: it compares what follows")], self)
        return self

    def module(self, shapes: Shapes) -> None:
        """Make nothing, of layers that fit.

        Raises:
            ValueError: If they do not.
        """
        pairs = self.shapes(shapes)
        if len(pairs) < 2:
            raise ValueError("needs two stages or more of each network")
        _check_channels([student[0] for student, _ in pairs], [teacher[0] for _, teacher in pairs])

    def __call__(self, lesson: Lesson, module: nn.Module | None = None) -> LossOutput:
        students, teachers = zip(*self.maps(lesson), strict=True)
        return fsp(students, teachers)
