"""FT: Kim et al., Paraphrasing Complex Network: Network Compression via Factor Transfer, arXiv 1802.04977.

The paraphraser that makes the teacher's factors is trained first, on the teacher's maps alone, to give them back. A
run has no such first part: a recipe has no term of it, and here are its parts.

Shape suffixes: B batch, D channels, H and W height and width.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import cast

from torch import Tensor, nn

from cakd_cli.losses.base import LossOutput
from cakd_cli.losses.features.attention import attention
from cakd_cli.losses.features.pairs import matched


def ft(student_BDHW: Tensor, teacher_BDHW: Tensor, *, p1: int, p2: float) -> LossOutput:
    """Difference of two factors, each as its :func:`~cakd_cli.losses.features.attention.attention` of power ``p1``.

    Args:
        student_BDHW: The student's factor, from a :class:`Translator`; any float type, computed in float32 at least.
            The factor with the greater height is average-pooled to the size of the other.
        teacher_BDHW: The teacher's, from a :class:`Paraphraser`; treated as constant.
        p1: Power of the factors, >= 1; RepDistiller uses 2.
        p2: Power of the absolute differences, >= 1; RepDistiller uses 1.

    Returns:
        ``total`` with the part ``ft``: the mean over batch and positions. RepDistiller weighs it by 200.

    Raises:
        ValueError: If shapes do not fit or a power is below 1.
    """
    if not p2 >= 1:
        raise ValueError(f"p2 must be at least 1, got {p2}")
    student_BDHW, teacher_BDHW = matched(student_BDHW, teacher_BDHW)
    total = (attention(student_BDHW, p1) - attention(teacher_BDHW, p1)).abs().pow(p2).mean()
    return LossOutput(total, {"ft": total})


class Translator(nn.Module):
    """Makes the student's factor of its map; trained with the student and never saved with it.

    Args:
        student_channels: Of the student's map.
        teacher_channels: Of the teacher's.
        factor_rate: Channels of the factor by those of the teacher, > 0; RepDistiller uses 0.5.

    Raises:
        ValueError: If the factor has no channel.
    """

    def __init__(self, student_channels: int, teacher_channels: int, factor_rate: float = 0.5) -> None:
        super().__init__()
        channels = _factor_channels(teacher_channels, factor_rate)
        self.encoder = _three([student_channels, student_channels, channels, channels], nn.Conv2d, nn.BatchNorm2d)

    def forward(self, map_BDHW: Tensor) -> Tensor:
        """Factor of a map of the student, at its size."""
        return cast(Tensor, self.encoder(map_BDHW))


class Paraphraser(nn.Module):
    """Makes the teacher's factor of its map, and the map of the factor, by which it is trained before the student.

    Args:
        teacher_channels: Of the teacher's map.
        factor_rate: As of :class:`Translator`.

    Raises:
        ValueError: If the factor has no channel.
    """

    def __init__(self, teacher_channels: int, factor_rate: float = 0.5) -> None:
        super().__init__()
        channels = _factor_channels(teacher_channels, factor_rate)
        self.encoder = _three([teacher_channels, teacher_channels, channels, channels], nn.Conv2d, nn.Identity)
        self.decoder = _three([channels, channels, teacher_channels, teacher_channels], nn.ConvTranspose2d, nn.Identity)

    def forward(self, map_BDHW: Tensor) -> Tensor:
        """Factor of a map of the teacher, at its size."""
        return cast(Tensor, self.encoder(map_BDHW))

    def reconstruction(self, map_BDHW: Tensor) -> Tensor:
        """What it is trained by: the mean squared error of the map that it makes of the map's factor."""
        return cast(Tensor, self.decoder(self.encoder(map_BDHW)) - map_BDHW).square().mean()


def _factor_channels(teacher_channels: int, factor_rate: float) -> int:
    channels = int(teacher_channels * factor_rate)
    if channels < 1:
        raise ValueError(f"a factor of {factor_rate} times {teacher_channels} channels has none")
    return channels


def _three(widths: Sequence[int], conv: Callable[..., nn.Module], norm: Callable[[int], nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        *(
            layer
            for before, after in pairwise(widths)
            for layer in (conv(before, after, 3, padding=1), norm(after), nn.LeakyReLU(0.1))
        )
    )
