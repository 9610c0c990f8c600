"""FitNet: Romero et al., FitNets: Hints for Thin Deep Nets, arXiv 1412.6550, as CIFAR-100's literature trains it.

The paper trains the hint first and distils afterwards; RepDistiller and mdistiller add it to cross-entropy, and so does
this term.

Shape suffixes: B batch, D channels, H and W height and width.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal, cast

from pydantic import Field
from torch import Tensor, nn

from cakd_cli.losses.base import Lesson, LossOutput, Objectives, Shapes
from cakd_cli.losses.features.layers import LayerPair, MapsTerm


def fitnet(hint_BDHW: Tensor, guided_BDHW: Tensor) -> LossOutput:
    """Mean squared difference of two maps over all elements.

    Args:
        hint_BDHW: The teacher's map; treated as constant.
        guided_BDHW: The student's map, brought to the same shape.

    Returns:
        ``total`` with the part ``fitnet``.

    Raises:
        ValueError: If the shapes differ.
    """
    if hint_BDHW.shape != guided_BDHW.shape:
        raise ValueError(f"both maps must have one shape, got {tuple(hint_BDHW.shape)} and {tuple(guided_BDHW.shape)}")
    total = (guided_BDHW - hint_BDHW.detach()).square().mean()
    return LossOutput(total, {"fitnet": total})


class MapConnector(nn.Module):
    """Brings a student's map to the shape of the teacher's: convolution, batch norm, ReLU.

    The convolution halves with stride 2, doubles transposed, and otherwise has the kernel that leaves the teacher's
    size.

    Args:
        student_shape: Channels, height and width.
        teacher_shape: Likewise; no map that is larger, other than twice as large.

    Raises:
        ValueError: If no such convolution leads from one shape to the other.
    """

    def __init__(self, student_shape: tuple[int, ...], teacher_shape: tuple[int, ...]) -> None:
        super().__init__()
        if not all(len(shape) == 3 and shape[1] == shape[2] for shape in (student_shape, teacher_shape)):
            raise ValueError(f"needs square maps, got {student_shape} and {teacher_shape}")
        channels, size, _ = student_shape
        wanted, target, _ = teacher_shape
        if size == 2 * target:
            self.conv: nn.Module = nn.Conv2d(channels, wanted, 3, stride=2, padding=1)
        elif 2 * size == target:
            self.conv = nn.ConvTranspose2d(channels, wanted, 4, stride=2, padding=1)
        elif size >= target:
            self.conv = nn.Conv2d(channels, wanted, 1 + size - target)
        else:
            raise ValueError(f"no convolution leads from a map of {size} to one of {target} pixels")
        self.bn = nn.BatchNorm2d(wanted)

    def forward(self, map_BDHW: Tensor) -> Tensor:
        """Map (batch, channels, height, width) of the student to the teacher's shape."""
        return cast(Tensor, self.bn(self.conv(map_BDHW)).relu())


class Connectors(nn.Module):
    """One connector a pair of layers; trained with the student and never saved with it."""

    def __init__(self, student_shapes: list[tuple[int, ...]], teacher_shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        pairs = zip(student_shapes, teacher_shapes, strict=True)
        self.connectors = nn.ModuleList(MapConnector(mine, theirs) for mine, theirs in pairs)


class FitNetTerm(MapsTerm):
    """The map of a middle layer, through a convolution that is trained along."""

    paper = "Romero et al. 2015, arXiv 1412.6550"
    formula = "sum_layers mean (relu(bn(conv(map_student))) - map_teacher)^2"
    # 100 is RepDistiller's and mdistiller's.
    objectives: ClassVar[Objectives] = {"fitnet": ({"type": "cross-entropy"}, {"type": "fitnet", "weight": 100.0})}
    summaries: ClassVar[Mapping[str, str]] = {"fitnet": "The map of a middle layer, through a trained convolution."}

    type: Literal["fitnet"] = "fitnet"
    layers: tuple[LayerPair, ...] = Field(
        (LayerPair(student="stage2", teacher="stage2"),),
        strict=False,
        min_length=1,
        description="pairs of layers that give maps, by module name or stage",
    )

    def module(self, shapes: Shapes) -> Connectors:
        """Make the connectors."""
        pairs = self.shapes(shapes)
        return Connectors([student for student, _ in pairs], [teacher for _, teacher in pairs])

    def __call__(self, lesson: Lesson, module: nn.Module | None = None) -> LossOutput:
        assert isinstance(module, Connectors)
        total = lesson.student_BC.new_zeros(())
        for connector, (student, teacher) in zip(module.connectors, self.maps(lesson), strict=True):
            total = total + fitnet(teacher, connector(student)).total
        return LossOutput(total, {"fitnet": total})
