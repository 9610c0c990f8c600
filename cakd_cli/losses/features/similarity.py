"""Similarities of the samples of a batch.

SP: Tung and Mori, Similarity-Preserving Knowledge Distillation, arXiv 1907.09682. PKT: Passalis and Tefas, Learning
Deep Representations with Probabilistic Knowledge Transfer, arXiv 1803.10837.

Shape suffixes: B batch, D elements or channels, H and W height and width.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from cakd_cli.losses.base import Lesson, LossOutput, Objectives
from cakd_cli.losses.features.layers import VectorsTerm
from cakd_cli.losses.features.maps import precise
from cakd_cli.losses.features.pairs import PairwiseTerm, check_vectors, shrink, unit


def sp(student: Tensor, teacher: Tensor) -> LossOutput:
    """Squared difference of the samples' similarities, summed, by the square of the batch size.

    The similarities are the Gram matrix of the flattened features, each of its rows l2-normalised.

    Args:
        student: The student's features, (batch, ...), any float type; computed in float32 at least.
        teacher: The teacher's, (batch, ...), of any other size; treated as constant.

    Returns:
        ``total`` with the part ``sp``, in [0, 4 / batch].

    Raises:
        ValueError: If the batches differ or a tensor has no dimension beside the batch.
    """
    if student.ndim < 2 or teacher.ndim < 2 or len(student) != len(teacher):
        raise ValueError(
            f"needs two tensors (batch, ...) of one batch, got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    total = (_similarities(student) - _similarities(teacher.detach())).square().sum() / len(student) ** 2
    return LossOutput(total, {"sp": total})


def _similarities(features: Tensor) -> Tensor:
    features_BD = precise(features).flatten(1)
    with torch.autocast(features.device.type, enabled=False):
        # The size of a row's own sample cancels in the row, that of the whole batch everywhere.
        return unit(shrink(features_BD, 1) @ shrink(features_BD, (0, 1)).T, 1)


class SPTerm(PairwiseTerm):
    """Which samples of a batch have similar maps."""

    paper = "Tung and Mori 2019, arXiv 1907.09682"
    formula = "sum_layers |G_student - G_teacher|^2 / B^2,  G = rows of F F' l2-normalised"
    # 3000 is RepDistiller's and mdistiller's.
    objectives: ClassVar[Objectives] = {"sp": ({"type": "cross-entropy"}, {"type": "sp", "weight": 3000.0})}
    summaries: ClassVar[Mapping[str, str]] = {"sp": "Which samples of a batch have similar maps."}
    usual = "last"
    function = staticmethod(sp)

    type: Literal["sp"] = "sp"


def pkt(student_BD: Tensor, teacher_BD: Tensor, *, eps: float = 1e-7) -> LossOutput:
    """Divergence of the samples' similarities as probabilities, mean over pairs of samples.

    Each row of cosine similarities, brought to [0, 1] by (c + 1) / 2, is scaled to a sum of 1. The mean, not the sum,
    over a row is the official code's.

    Args:
        student_BD: The student's vectors, (batch, elements), any float type; computed in float32 at least.
        teacher_BD: The teacher's, of any other length; treated as constant.
        eps: Added to norms and probabilities, > 0.

    Returns:
        ``total`` with the part ``pkt``, in nats by the batch size.

    Raises:
        ValueError: If shapes do not fit or ``eps`` is not positive.
    """
    check_vectors(student_BD, teacher_BD)
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    student_BB, teacher_BB = _probabilities(student_BD, eps), _probabilities(teacher_BD.detach(), eps)
    total = (teacher_BB * ((teacher_BB + eps) / (student_BB + eps)).log()).mean()
    return LossOutput(total, {"pkt": total})


def _probabilities(vectors_BD: Tensor, eps: float) -> Tensor:
    vectors_BD = precise(vectors_BD)
    # Squares of large values would overflow: epsilon shrinks with them.
    size_B1 = vectors_BD.detach().abs().amax(1, keepdim=True).clamp(min=1)
    small_BD = vectors_BD / size_B1
    norm_B1: Tensor = torch.linalg.vector_norm(small_BD, dim=1, keepdim=True)
    unit_BD = small_BD / (norm_B1 + eps / size_B1)
    with torch.autocast(vectors_BD.device.type, enabled=False):
        similarity_BB: Tensor = (unit_BD @ unit_BD.T + 1) / 2
    return similarity_BB / similarity_BB.sum(1, keepdim=True)


class PKTTerm(VectorsTerm):
    """Which samples of a batch are similar, as probabilities."""

    paper = "Passalis and Tefas 2018, arXiv 1803.10837"
    formula = "mean_ij q_t log(q_t / q_s),  q = rows of (cos + 1) / 2 scaled to a sum of 1"
    # 30000 is RepDistiller's and mdistiller's.
    objectives: ClassVar[Objectives] = {"pkt": ({"type": "cross-entropy"}, {"type": "pkt", "weight": 30000.0})}
    summaries: ClassVar[Mapping[str, str]] = {"pkt": "Which samples of a batch are similar, as probabilities."}

    type: Literal["pkt"] = "pkt"

    def __call__(self, lesson: Lesson, module: nn.Module | None = None) -> LossOutput:
        return pkt(*self.vectors(lesson))
