"""What losses on maps share: precision, checks and pooling.

Shape suffixes: B batch, D channels, H and W height and width.
"""

import torch
from torch import Tensor
from torch.nn import functional


def precise(features: Tensor) -> Tensor:
    """The same numbers in float32 at least."""
    return features if features.dtype == torch.float64 else features.float()


def mean_squared(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference over all elements, in float32 at least; the teacher is constant.

    Raises:
        ValueError: If the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"both networks' must have one shape, got {tuple(student.shape)} and {tuple(teacher.shape)}")
    return (precise(student) - precise(teacher).detach()).square().mean()


def check_maps(*maps: Tensor) -> None:
    """Refuse what is no map.

    Raises:
        ValueError: If one has not the four dimensions of a map, or another batch than the first.
    """
    for one in maps:
        if one.ndim != 4 or len(one) != len(maps[0]):
            raise ValueError(
                f"needs maps (batch, channels, height, width) of one batch, got {[tuple(one.shape) for one in maps]}"
            )


def to_size(map_BDHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Average a map to a height and a width, adaptively."""
    return map_BDHW if map_BDHW.shape[2:] == size else functional.adaptive_avg_pool2d(map_BDHW, size)


def to_smaller(student_BDHW: Tensor, teacher_BDHW: Tensor) -> tuple[Tensor, Tensor]:
    """Average the map with the larger height to the size of the other."""
    smaller = student_BDHW if student_BDHW.shape[2] <= teacher_BDHW.shape[2] else teacher_BDHW
    size = (smaller.shape[2], smaller.shape[3])
    return to_size(student_BDHW, size), to_size(teacher_BDHW, size)
