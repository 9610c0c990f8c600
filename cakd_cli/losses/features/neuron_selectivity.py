"""NST: Huang and Wang, Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, arXiv 1707.01219.

Shape suffixes: B batch, D channels, H and W height and width, P positions.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from cakd_cli.losses.base import LossOutput, Objectives
from cakd_cli.losses.features.pairs import PairwiseTerm, matched, unit


def nst(student_BDHW: Tensor, teacher_BDHW: Tensor) -> LossOutput:
    """Squared maximum mean discrepancy of the channels' maps under the kernel (a . b)^2, mean over the batch.

    Each channel's map, l2-normalised over its positions, is one sample of its network's distribution.

    Args:
        student_BDHW: The student's map, any float type; computed in float32 at least. The map with the greater height
            is average-pooled to the size of the other.
        teacher_BDHW: The teacher's, with any number of channels; treated as constant.

    Returns:
        ``total`` with the part ``nst``, in [0, 2].

    Raises:
        ValueError: If shapes do not fit.
    """
    student_BDHW, teacher_BDHW = matched(student_BDHW, teacher_BDHW)
    student_BDP, teacher_BDP = unit(student_BDHW.flatten(2), 2), unit(teacher_BDHW.flatten(2), 2)
    among_teacher, among_student = _kernel(teacher_BDP, teacher_BDP), _kernel(student_BDP, student_BDP)
    total = among_teacher + among_student - 2 * _kernel(student_BDP, teacher_BDP)
    return LossOutput(total, {"nst": total})


def _kernel(first_BDP: Tensor, second_BDP: Tensor) -> Tensor:
    """Mean of the kernel over batch and pairs of channels."""
    with torch.autocast(first_BDP.device.type, enabled=False):
        return (first_BDP @ second_BDP.mT).square().mean()


class NSTTerm(PairwiseTerm):
    """What the channels of all stages select, as a distribution."""

    paper = "Huang and Wang 2017, arXiv 1707.01219"
    formula = "sum_layers mean k(t,t) + mean k(s,s) - 2 mean k(s,t),  k(a,b) = (a.b)^2 of normalised channel maps"
    # 50 is RepDistiller's and mdistiller's.
    objectives: ClassVar[Objectives] = {"nst": ({"type": "cross-entropy"}, {"type": "nst", "weight": 50.0})}
    summaries: ClassVar[Mapping[str, str]] = {"nst": "What the channels of all stages select, as a distribution."}
    function = staticmethod(nst)

    type: Literal["nst"] = "nst"
