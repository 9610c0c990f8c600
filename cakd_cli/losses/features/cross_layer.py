"""SemCKD: Chen et al., Cross-Layer Distillation with Semantic Calibration, arXiv 2012.03236.

Shape suffixes: B batch, S stages of the student, T stages of the teacher, K elements of a query or key, N elements of a
map.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from cakd_cli.losses.base import Lesson, Look, LossOutput, Needs, Objectives, Shapes
from cakd_cli.losses.features.layers import LayerPair, MapsTerm
from cakd_cli.losses.features.maps import check_maps, precise, to_smaller
from cakd_cli.losses.features.pairs import unit


def sem_ckd(query_BSK: Tensor, key_BTK: Tensor, error_BST: Tensor, *, soft: float = 1.0) -> LossOutput:
    """Error of every stage of the student at every stage of the teacher, weighed by their likeness in each sample.

    Args:
        query_BSK: Of the student's stages, of length 1, (batch, stages, elements).
        key_BTK: Of the teacher's.
        error_BST: Mean squared difference of each sample's maps, (batch, student's stages, teacher's stages).
        soft: Temperature of the softmax over the teacher's stages, > 0; 1 in the paper.

    Returns:
        ``total`` with the part ``semckd``: the mean over the batch and the student's stages.

    Raises:
        ValueError: If shapes do not fit or ``soft`` is not positive.
    """
    attention_BST = layer_attention(query_BSK, key_BTK, soft=soft)
    if error_BST.shape != attention_BST.shape:
        raise ValueError(f"needs errors of shape {tuple(attention_BST.shape)}, got {tuple(error_BST.shape)}")
    total = (attention_BST * precise(error_BST)).sum(2).mean()
    return LossOutput(total, {"semckd": total})


def layer_attention(query_BSK: Tensor, key_BTK: Tensor, *, soft: float = 1.0) -> Tensor:
    """How much each stage of the student looks at each of the teacher's, (batch, S, T); sums to 1 over the teacher's.

    Args and errors as of :func:`sem_ckd`.
    """
    if query_BSK.ndim != 3 or key_BTK.ndim != 3 or query_BSK.shape[::2] != key_BTK.shape[::2]:
        raise ValueError(
            "queries and keys must be (batch, stages, elements) of one batch and width, "
            f"got {tuple(query_BSK.shape)} and {tuple(key_BTK.shape)}"
        )
    if not soft > 0:
        raise ValueError(f"soft must be positive, got {soft}")
    with torch.autocast(query_BSK.device.type, enabled=False):
        return (precise(query_BSK) @ precise(key_BTK).mT / soft).softmax(2)


def _error(student_BDHW: Tensor, teacher_BDHW: Tensor) -> Tensor:
    """Mean squared difference of each sample, (batch,)."""
    return (precise(student_BDHW) - precise(teacher_BDHW)).square().flatten(1).mean(1)


class CrossLayerAttention(nn.Module):
    """Queries, keys, and a regressor for every pair of stages; trained with the student and never saved with it.

    Queries and keys are made of a map's Gram matrix over the batch, so each element stands for a place in the batch. A
    batch that is smaller, as the last one of an epoch, is compared as if what lacks were 0.

    Args:
        student_channels: Of each stage, shallow to deep.
        teacher_channels: Likewise.
        batch_size: Largest number of samples.
        factor: Queries have ``batch_size // factor`` elements; 4 in the paper.

    Raises:
        ValueError: If queries would have fewer than two elements: of length 1, they would be +-1.
    """

    def __init__(
        self, student_channels: Sequence[int], teacher_channels: Sequence[int], *, batch_size: int, factor: int = 4
    ) -> None:
        super().__init__()
        if batch_size < 2 * factor:
            raise ValueError(
                f"needs batches of {2 * factor} at least, twice the reduction of {factor}, got {batch_size}"
            )
        self.batch_size = batch_size
        width = batch_size // factor
        self.queries, self.keys = (
            nn.ModuleList(
                nn.Sequential(nn.Linear(batch_size, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
                for _ in channels
            )
            for channels in (student_channels, teacher_channels)
        )
        self.regressors = nn.ModuleList(
            nn.ModuleList(_regressor(mine, theirs) for theirs in teacher_channels) for mine in student_channels
        )

    def forward(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Give queries, keys and errors of maps (batch, channels, height, width), as :func:`sem_ckd` takes them.

        Raises:
            ValueError: If the batch is larger than it may be.
        """
        check_maps(*students, *teachers)
        if len(students[0]) > self.batch_size:
            raise ValueError(f"the batch has {len(students[0])} samples and batch_size is {self.batch_size}")
        teachers = [teacher.detach() for teacher in teachers]
        rows = []
        for student, regressors in zip(students, self.regressors, strict=True):
            assert isinstance(regressors, nn.ModuleList)
            pooled = [to_smaller(student, teacher) for teacher in teachers]
            errors = [_error(one(mine), theirs) for one, (mine, theirs) in zip(regressors, pooled, strict=True)]
            rows.append(torch.stack(errors, dim=1))
        return self._embedded(self.queries, students), self._embedded(self.keys, teachers), torch.stack(rows, dim=1)

    def _embedded(self, embeddings: nn.ModuleList, maps: Sequence[Tensor]) -> Tensor:
        with torch.autocast(maps[0].device.type, enabled=False):
            found = []
            for embedding, one in zip(embeddings, maps, strict=True):
                flat_BN = precise(one).flatten(1)
                gram_BB = functional.pad(flat_BN @ flat_BN.T, (0, self.batch_size - len(flat_BN)))
                found.append(unit(embedding(gram_BB), 1))
            return torch.stack(found, dim=1)


def _regressor(channels: int, wanted: int) -> nn.Sequential:
    middle = 2 * wanted
    return nn.Sequential(
        nn.Conv2d(channels, middle, 1, bias=False),
        nn.BatchNorm2d(middle),
        nn.ReLU(),
        nn.Conv2d(middle, middle, 3, padding=1, bias=False),
        nn.BatchNorm2d(middle),
        nn.ReLU(),
        nn.Conv2d(middle, wanted, 1, bias=False),
    )


class SemCKDTerm(MapsTerm):
    """Maps of every stage at every stage of the teacher, weighed by attention."""

    paper = "Chen et al. 2021, arXiv 2012.03236"
    formula = "mean_batch,stages sum_teacher's softmax(q_student . k_teacher) mean (conv(map_student) - map_teacher)^2"
    # CIFAR-100 settings of the official code: KD at temperature 4.
    objectives: ClassVar[Objectives] = {
        "sem-ckd": ({"type": "cross-entropy"}, {"type": "kd"}, {"type": "sem-ckd", "weight": 400.0})
    }

    type: Literal["sem-ckd"] = "sem-ckd"
    layers: tuple[LayerPair, ...] = Field(
        (), strict=False, description="layers that give maps; each of the student's meets each of the teacher's"
    )
    reduction: int = Field(4, ge=1, description="queries have so many times fewer elements than a batch has samples")
    soft: float = Field(1.0, gt=0, le=1000, description="temperature of the attention over the teacher's layers")

    def between(self, student: Sequence[str], teacher: Sequence[str]) -> Self:
        """Take all stages, where the recipe names no layers; a network with fewer gives its first one again.

        Raises:
            ValueError: If a network does not tell its stages.
        """
        if self.layers or not (student and teacher):
            return super().between(student, teacher)
        count = max(len(student), len(teacher))
        mine, theirs = ([stages[0]] * (count - len(stages)) + list(stages) for stages in (student, teacher))
        pairs = zip(mine, theirs, strict=True)
        return self.model_copy(update={"layers": tuple(LayerPair(student=a, teacher=b) for a, b in pairs)})

    @property
    def needs(self) -> Needs:
        """A map of each layer, once."""
        return Needs(student_layers=self._looks(0), teacher_layers=self._looks(1))

    def _looks(self, whose: Literal[0, 1]) -> tuple[Look, ...]:
        return tuple(dict.fromkeys(pair[whose] for pair in self.pairs))

    def module(self, shapes: Shapes) -> CrossLayerAttention:
        """Make queries, keys and regressors."""
        return CrossLayerAttention(
            [shapes.student[look][0] for look in self._looks(0)],
            [shapes.teacher[look][0] for look in self._looks(1)],
            batch_size=shapes.batch_size,
            factor=self.reduction,
        )

    def __call__(self, lesson: Lesson, module: nn.Module | None = None) -> LossOutput:
        assert isinstance(module, CrossLayerAttention)
        students = [lesson.student[look] for look in self._looks(0)]
        teachers = [lesson.teacher[look] for look in self._looks(1)]
        return sem_ckd(*module(students, teachers), soft=self.soft)
