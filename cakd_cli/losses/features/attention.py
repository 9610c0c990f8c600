"""AT: Zagoruyko and Komodakis, Paying More Attention to Attention, arXiv 1612.03928.

Shape suffixes: B batch, D channels, H and W height and width, P positions.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from cakd_cli.losses.base import LossOutput, Objectives
from cakd_cli.losses.features.maps import precise
from cakd_cli.losses.features.pairs import PairwiseTerm, matched, shrink, unit


def attention(map_BDHW: Tensor, p: int) -> Tensor:
    """Where a map is active: the mean over channels of its p-th power, l2-normalised; (batch, positions).

    Raises:
        ValueError: If ``p`` < 1.
    """
    if p < 1:
        raise ValueError(f"p must be at least 1, got {p}")
    # The size of a sample's map cancels.
    return unit(shrink(precise(map_BDHW), (1, 2, 3)).pow(p).mean(1).flatten(1), 1)


def at(student_BDHW: Tensor, teacher_BDHW: Tensor, *, p: int) -> LossOutput:
    """Mean squared difference of two attention maps, over batch and positions.

    Args:
        student_BDHW: The student's map, any float type; computed in float32 at least. The map with the greater height
            is average-pooled to the size of the other.
        teacher_BDHW: The teacher's, with any number of channels; treated as constant.
        p: Power of the activations, >= 1; the paper uses 2.

    Returns:
        ``total`` with the part ``at``, in [0, 4 / positions].

    Raises:
        ValueError: If shapes do not fit or ``p`` < 1.
    """
    student_BDHW, teacher_BDHW = matched(student_BDHW, teacher_BDHW)
    total = (attention(student_BDHW, p) - attention(teacher_BDHW, p)).square().mean()
    return LossOutput(total, {"at": total})


class ATTerm(PairwiseTerm):
    """Where the maps of all stages are active."""

    paper = "Zagoruyko and Komodakis 2017, arXiv 1612.03928"
    formula = "sum_layers mean (a_student - a_teacher)^2,  a = mean_channels map^p / |mean_channels map^p|"
    # 1000 is RepDistiller's and mdistiller's.
    objectives: ClassVar[Objectives] = {"at": ({"type": "cross-entropy"}, {"type": "at", "weight": 1000.0})}
    summaries: ClassVar[Mapping[str, str]] = {"at": "Where the maps of all stages are active."}
    function = staticmethod(at)

    type: Literal["at"] = "at"
    p: int = Field(2, ge=1, le=16, description="power of the activations")
