"""MGD: Yang et al., Masked Generative Distillation, arXiv 2205.01529.

Shape suffixes: B batch, D channels, H and W height and width.
"""

from typing import ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from cakd_cli.losses.base import Lesson, LossOutput, Objectives, Shapes
from cakd_cli.losses.features.layers import MapsTerm
from cakd_cli.losses.features.maps import check_maps, mean_squared

MaskKind = Literal["channel", "spatial"]


def mgd(generated_BDHW: Tensor, teacher_BDHW: Tensor, *, alpha_mgd: float = 1.0) -> LossOutput:
    """``alpha_mgd * mgd``: the teacher's map, generated from what a mask leaves of the student's.

    Args:
        generated_BDHW: What :class:`MaskedGeneration` makes of the student's map.
        teacher_BDHW: The teacher's map, same shape; treated as constant.
        alpha_mgd: Weight; 7e-5 in classification, 2e-5 in detection and segmentation.

    Returns:
        ``total`` with the part ``mgd``: squared difference summed over elements, mean over the batch, unweighted.

    Raises:
        ValueError: If the shapes differ.
    """
    check_maps(generated_BDHW, teacher_BDHW)
    distance = mean_squared(generated_BDHW, teacher_BDHW) * generated_BDHW[0].numel()
    return LossOutput(alpha_mgd * distance, {"mgd": distance})


def mgd_mask(uniform: Tensor, *, lambda_mgd: float, mask_kind: MaskKind) -> Tensor:
    """1 where the student's map may be seen and 0 where it is hidden.

    Args:
        uniform: Numbers drawn evenly from [0, 1): (batch, channels, 1, 1) for ``channel``, (batch, 1, height, width)
            for ``spatial``.
        lambda_mgd: Share that is hidden, in [0, 1]; 0.15 in classification, 0.45 to 0.75 elsewhere.
        mask_kind: ``channel`` hides numbers below the share, ``spatial`` those above one minus the share.

    Raises:
        ValueError: If the share is out of range.
    """
    if not 0 <= lambda_mgd <= 1:
        raise ValueError(f"lambda_mgd must be in [0, 1], got {lambda_mgd}")
    visible = uniform >= lambda_mgd if mask_kind == "channel" else uniform <= 1 - lambda_mgd
    return visible.to(uniform.dtype)


class MaskedGeneration(nn.Module):
    """Generates a teacher's map from a masked one of the student; trained with the student and never saved with it.

    A 1x1 convolution to the teacher's channels where they differ, the mask, then two 3x3 convolutions with a ReLU
    between them.

    Args:
        student_channels: Of the student's map.
        teacher_channels: Of the teacher's.
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        same = student_channels == teacher_channels
        self.align: nn.Module = nn.Identity() if same else nn.Conv2d(student_channels, teacher_channels, 1)
        self.generation = nn.Sequential(
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
        )

    def forward(self, map_BDHW: Tensor, mask: Tensor) -> Tensor:
        """Give a map of the teacher's channels; the mask is as of :func:`mgd_mask`."""
        return cast(Tensor, self.generation(self.align(map_BDHW) * mask))

    def draw(self, map_BDHW: Tensor, *, lambda_mgd: float, mask_kind: MaskKind) -> Tensor:
        """Draw a mask for a map of the student, on its device."""
        batch, _, height, width = map_BDHW.shape
        convolution = self.generation[0]
        assert isinstance(convolution, nn.Conv2d)
        shape = (batch, convolution.in_channels, 1, 1) if mask_kind == "channel" else (batch, 1, height, width)
        return mgd_mask(torch.rand(shape, device=map_BDHW.device), lambda_mgd=lambda_mgd, mask_kind=mask_kind)


class MGDTerm(MapsTerm):
    """The teacher's last map, generated from a masked one of the student."""

    paper = "Yang et al. 2022, arXiv 2205.01529"
    formula = "sum_layers mean_batch sum (conv(relu(conv(mask * conv(map_student)))) - map_teacher)^2"
    # The weight is that of the official code for ImageNet.
    objectives: ClassVar[Objectives] = {"mgd": ({"type": "cross-entropy"}, {"type": "mgd", "weight": 7e-5})}
    usual: ClassVar[Literal["all", "last"]] = "last"

    type: Literal["mgd"] = "mgd"
    hidden: float = Field(0.15, ge=0, le=1, description="share of the student's map that is hidden")
    mask_kind: MaskKind = Field("channel", description="hide whole channels of a sample, or positions in all of them")

    def module(self, shapes: Shapes) -> nn.ModuleList:
        """Make a generation a layer.

        Raises:
            ValueError: If maps of a pair differ in height or width.
        """
        pairs = self.shapes(shapes)
        for mine, theirs in pairs:
            if mine[1:] != theirs[1:]:
                raise ValueError(f"needs maps of one height and width, got {mine} and {theirs}")
        return nn.ModuleList(MaskedGeneration(mine[0], theirs[0]) for mine, theirs in pairs)

    def __call__(self, lesson: Lesson, module: nn.Module | None = None) -> LossOutput:
        assert isinstance(module, nn.ModuleList)
        total = lesson.student_BC.new_zeros(())
        for generation, (student, teacher) in zip(module, self.maps(lesson), strict=True):
            assert isinstance(generation, MaskedGeneration)
            mask = generation.draw(student, lambda_mgd=self.hidden, mask_kind=self.mask_kind)
            total = total + mgd(generation(student, mask), teacher).total
        return LossOutput(total, {"mgd": total})
