"""ReviewKD: Chen et al., Distilling Knowledge via Knowledge Review, arXiv 2104.09044.

Shape suffixes: B batch, D channels, H and W height and width.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from cakd_cli.losses.base import Lesson, Look, LossOutput, Needs, Objectives, Shapes
from cakd_cli.losses.features.layers import MapsTerm
from cakd_cli.losses.features.maps import mean_squared, to_size

# Averaged maps of these sizes are compared as well (eq. 7, hierarchical context loss).
_POOLED_SIZES = (4, 2, 1)


def review_kd(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> LossOutput:
    """Squared differences of the maps and of smaller averages of them, summed over the levels.

    A level's loss is the weighted mean of the mean squared difference, with weight 1, and of those of the maps averaged
    to 4, 2 and 1 pixels, with 1/2, 1/4 and 1/8; a size that is no smaller than the map is skipped, and its weight goes
    to the next.

    Args:
        students: The student's map of each level, fused to the teacher's shape, see :class:`ReviewFusion`; a vector is
            a map of one pixel.
        teachers: The teacher's; treated as constant.

    Returns:
        ``total`` with the part ``review_kd``.

    Raises:
        ValueError: If numbers of levels or shapes differ.
    """
    if not len(students) == len(teachers) > 0:
        raise ValueError(f"needs as many levels of both networks, got {len(students)} and {len(teachers)}")
    levels = [_context(_as_map(mine), _as_map(theirs)) for mine, theirs in zip(students, teachers, strict=True)]
    total = torch.stack(levels).sum()
    return LossOutput(total, {"review_kd": total})


def _context(student_BDHW: Tensor, teacher_BDHW: Tensor) -> Tensor:
    loss = mean_squared(student_BDHW, teacher_BDHW)
    weight, weights = 1.0, 1.0
    for size in _POOLED_SIZES:
        if size < student_BDHW.shape[2]:
            weight /= 2
            weights += weight
            pooled = (to_size(one, (size, size)) for one in (student_BDHW, teacher_BDHW))
            loss = loss + weight * mean_squared(*pooled)
    return loss / weights


def _as_map(features: Tensor) -> Tensor:
    return features[:, :, None, None] if features.ndim == 2 else features


class ReviewLevel(nn.Module):
    """Fuses a student's map with what was fused of the deeper ones.

    Args:
        channels: Of the student's map.
        mid_channels: Of what is handed on.
        teacher_shape: Channels, height and width of the teacher's map.
        deepest: Whether nothing deeper is fused in.
    """

    def __init__(self, channels: int, mid_channels: int, teacher_shape: tuple[int, ...], *, deepest: bool) -> None:
        super().__init__()
        wanted, *self.size = teacher_shape
        self.reduce = nn.Sequential(nn.Conv2d(channels, mid_channels, 1, bias=False), nn.BatchNorm2d(mid_channels))
        self.expand = nn.Sequential(nn.Conv2d(mid_channels, wanted, 3, padding=1, bias=False), nn.BatchNorm2d(wanted))
        self.attention = None if deepest else nn.Conv2d(2 * mid_channels, 2, 1)
        for module in (*self.reduce, *self.expand):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)

    def forward(self, map_BDHW: Tensor, deeper_BDHW: Tensor | None) -> tuple[Tensor, Tensor]:
        """Give what is compared with the teacher's map, and what is handed on."""
        own_BDHW = self.reduce(map_BDHW)
        if self.attention is not None:
            assert deeper_BDHW is not None
            deeper_BDHW = functional.interpolate(deeper_BDHW, own_BDHW.shape[2:], mode="nearest")
            shares_B2HW = self.attention(torch.cat([own_BDHW, deeper_BDHW], dim=1)).sigmoid()
            own_BDHW = own_BDHW * shares_B2HW[:, :1] + deeper_BDHW * shares_B2HW[:, 1:]
        if list(own_BDHW.shape[2:]) != self.size:
            own_BDHW = functional.interpolate(own_BDHW, self.size, mode="nearest")
        return self.expand(own_BDHW), own_BDHW


class ReviewFusion(nn.Module):
    """Fuses the student's maps from deep to shallow; trained with the student and never saved with it.

    Args:
        student_shapes: Of each level, shallow to deep, without the batch.
        teacher_shapes: Likewise.
        mid_channels: Of what is handed on; by default the deepest level's, 512 at most.

    Raises:
        ValueError: If the deepest level is not a vector of each network, or another is one.
    """

    def __init__(
        self,
        student_shapes: Sequence[tuple[int, ...]],
        teacher_shapes: Sequence[tuple[int, ...]],
        mid_channels: int | None = None,
    ) -> None:
        super().__init__()
        for shapes in (student_shapes, teacher_shapes):
            if [len(shape) for shape in shapes] != [3] * (len(shapes) - 1) + [1]:
                raise ValueError(f"needs maps and a vector at the end, got {[tuple(shape) for shape in shapes]}")
        mid_channels = mid_channels or min(512, student_shapes[-1][0])
        self.levels = nn.ModuleList(
            ReviewLevel(mine[0], mid_channels, theirs if len(theirs) == 3 else (*theirs, 1, 1), deepest=len(mine) == 1)
            for mine, theirs in zip(student_shapes, teacher_shapes, strict=True)
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Give a map of the teacher's shape for each level, shallow to deep."""
        fused, deeper = [], None
        for level, one in reversed(list(zip(self.levels, features, strict=True))):
            compared, deeper = level(_as_map(one), deeper)
            fused.append(compared)
        return fused[::-1]


class ReviewKDTerm(MapsTerm):
    """Maps of all stages, each fused with the deeper ones, and the input of the classifier."""

    paper = "Chen et al. 2021, arXiv 2104.09044"
    formula = "sum_levels mean_sizes 2^-k mean (pooled fused_student - pooled map_teacher)^2"
    # The weight is 0.6 to 8 over the paper's CIFAR-100 pairs. 20 of 240 epochs of warm-up.
    objectives: ClassVar[Objectives] = {
        "review-kd": ({"type": "cross-entropy"}, {"type": "review-kd", "warmup_epochs": "auto"})
    }

    type: Literal["review-kd"] = "review-kd"
    before_activation: bool = Field(
        True, description="compare with the teacher's maps before their last activation, as published"
    )

    @property
    def pairs(self) -> list[tuple[Look, Look]]:
        """The student's maps after their activation, the teacher's before it."""
        form: Literal["map", "preactivation"] = "preactivation" if self.before_activation else "map"
        return [(Look(pair.student, "map"), Look(pair.teacher, form)) for pair in self.layers]

    @property
    def needs(self) -> Needs:
        """A map of each layer, and the inputs of both classifiers as the deepest level."""
        maps = super().needs
        return Needs(
            student_layers=(*maps.student_layers, Look()),
            teacher_layers=(*maps.teacher_layers, Look()),
        )

    def module(self, shapes: Shapes) -> ReviewFusion:
        """Make the fusion."""
        needs = self.needs
        return ReviewFusion(
            [shapes.student[look] for look in needs.student_layers],
            [shapes.teacher[look] for look in needs.teacher_layers],
        )

    def __call__(self, lesson: Lesson, module: nn.Module | None = None) -> LossOutput:
        assert isinstance(module, ReviewFusion)
        needs = self.needs
        fused = module([lesson.student[look] for look in needs.student_layers])
        return review_kd(fused, [lesson.teacher[look] for look in needs.teacher_layers])
