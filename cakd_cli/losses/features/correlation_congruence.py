"""CC: Peng et al., Correlation Congruence for Knowledge Distillation, arXiv 1904.01802, as RepDistiller computes it.

The paper compares correlations of samples. RepDistiller, whose results the literature quotes, multiplies the errors of
samples that follow one another in the batch; so does this loss.

Shape suffixes: B batch, D elements.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from cakd_cli.losses.base import Lesson, LossOutput, Objectives, Shapes
from cakd_cli.losses.features.layers import VectorsTerm
from cakd_cli.losses.features.maps import precise


def cc(student_BD: Tensor, teacher_BD: Tensor) -> LossOutput:
    """Mean over samples of the sum over elements of the sample's error times that of the next sample.

    The error is the absolute difference of the embeddings. A batch of one has no next sample, and its loss is 0.

    Args:
        student_BD: Embeddings of the student's vectors, (batch, elements); computed in float32 at least.
        teacher_BD: Embeddings of the teacher's, same shape; they may be trained too, so gradients reach them.

    Returns:
        ``total`` with the part ``cc``.

    Raises:
        ValueError: If the shapes differ or are not two-dimensional.
    """
    if student_BD.ndim != 2 or student_BD.shape != teacher_BD.shape:
        raise ValueError(
            "embeddings must have one shape (batch, elements), "
            f"got {tuple(student_BD.shape)} and {tuple(teacher_BD.shape)}"
        )
    error_BD = (precise(student_BD) - precise(teacher_BD)).abs()
    total = (error_BD[:-1] * error_BD[1:]).sum() / max(len(error_BD) - 1, 1)
    return LossOutput(total, {"cc": total})


class Embeddings(nn.Module):
    """A linear embedding of each network's vectors; trained with the student and never saved with it."""

    def __init__(self, student_width: int, teacher_width: int, feat_dim: int) -> None:
        super().__init__()
        self.student = nn.Linear(student_width, feat_dim)
        self.teacher = nn.Linear(teacher_width, feat_dim)


class CCTerm(VectorsTerm):
    """Errors of neighbours in the batch, in an embedding that is trained along."""

    paper = "Peng et al. 2019, arXiv 1904.01802; as RepDistiller computes it"
    formula = "mean_i sum_d e_i e_(i+1),  e = |embed_s(student) - embed_t(teacher)|"
    # 0.02 is RepDistiller's.
    objectives: ClassVar[Objectives] = {"cc": ({"type": "cross-entropy"}, {"type": "cc", "weight": 0.02})}
    summaries: ClassVar[Mapping[str, str]] = {"cc": "Errors of neighbours in the batch, in a trained embedding."}

    type: Literal["cc"] = "cc"
    feat_dim: int = Field(128, ge=1, description="elements of the embeddings")

    def module(self, shapes: Shapes) -> Embeddings:
        """Make the embeddings."""
        return Embeddings(*self.widths(shapes), self.feat_dim)

    def __call__(self, lesson: Lesson, module: nn.Module | None = None) -> LossOutput:
        assert isinstance(module, Embeddings)
        student_BD, teacher_BD = self.vectors(lesson)
        return cc(module.student(student_BD), module.teacher(teacher_BD.detach()))
