"""MobileNetV1 of full width for ImageNet: Howard et al., arXiv 1704.04861.

Parameter names follow mdistiller (a08d46f): its weights load here. As there, fresh weights are drawn as PyTorch does.
"""

from typing import Literal, cast

from pydantic import Field
from torch import Tensor, nn

from cakd_cli.models.base import ModelSpec

_STEM = 32
# Channels and stride of each block.
_BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))


def _convolution(in_channels: int, channels: int, size: int, *, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    padding = (size - 1) // 2
    return [
        nn.Conv2d(in_channels, channels, size, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    ]


def _separable(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    """Filter each channel, then mix them."""
    return nn.Sequential(
        *_convolution(in_channels, in_channels, 3, stride=stride, groups=in_channels),
        *_convolution(in_channels, channels, 1),
    )


class MobileNetV1(nn.Module):
    """Stem that halves, 13 depthwise-separable blocks that halve four times, global average pool, linear classifier."""

    # As the literature counts them, after the stem: the last blocks of one size.
    stages = ("model.3", "model.5", "model.11", "model.13")
    preactivations = tuple((norm, norm) for norm in ("model.3.4", "model.5.4", "model.11.4", "model.13.4"))

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        blocks = [nn.Sequential(*_convolution(in_channels, _STEM, 3, stride=2))]
        width = _STEM
        for channels, stride in _BLOCKS:
            blocks.append(_separable(width, channels, stride))
            width = channels
        self.model = nn.Sequential(*blocks)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (batch, channels, height, width) to logits (batch, classes)."""
        return cast(Tensor, self.fc(self.model(images).mean((2, 3))))


class MobileNetV1Spec(ModelSpec):
    """MobileNetV1 of full width for ImageNet."""

    type: Literal["mobilenet-v1"] = Field(description="as in the ImageNet distillation literature")

    def build(self, *, in_channels: int, num_classes: int) -> nn.Module:
        return MobileNetV1(in_channels, num_classes)
