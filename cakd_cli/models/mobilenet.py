"""MobileNetV2 of half width for small images: Sandler et al., arXiv 1801.04381.

Parameter names follow RepDistiller (b84f547) and mdistiller (a08d46f): their weights load here and give the same
logits.
"""

from typing import Literal, cast

from pydantic import Field
from torch import Tensor, nn

from cakd_cli.models.base import ModelSpec

# Expansion, width before it is halved, blocks, stride of the first one.
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
_STEM, _HEAD = 16, 1280


def _convolution(in_channels: int, channels: int, size: int, *, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    padding = (size - 1) // 2
    return [
        nn.Conv2d(in_channels, channels, size, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(channels),
    ]


class InvertedResidual(nn.Module):
    """Widen, filter each channel, narrow; a shortcut where the shape stays."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = in_channels * expansion
        self.shortcut = stride == 1 and in_channels == channels
        self.conv = nn.Sequential(
            *_convolution(in_channels, wide, 1),
            nn.ReLU(inplace=True),
            *_convolution(wide, wide, 3, stride=stride, groups=wide),
            nn.ReLU(inplace=True),
            *_convolution(wide, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the block's channels, smaller by its stride."""
        out = cast(Tensor, self.conv(x))
        return x + out if self.shortcut else out


class MobileNetV2(nn.Module):
    """Stem that halves, seven stages of inverted residuals, head, global average pool, linear classifier."""

    # As the literature counts them, after the stem.
    stages = ("blocks.1", "blocks.2", "blocks.4", "blocks.6")
    # A stage ends without an activation.
    preactivations = (
        ("blocks.1", "blocks.1.1.conv.7"),
        ("blocks.2", "blocks.2.2.conv.7"),
        ("blocks.4", "blocks.4.2.conv.7"),
        ("blocks.6", "blocks.6.0.conv.7"),
    )
    averaged = "conv2"

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(*_convolution(in_channels, _STEM, 3, stride=2), nn.ReLU(inplace=True))
        stages = []
        width = _STEM
        for expansion, channels, blocks, first_stride in _STAGES:
            layers = []
            for number in range(blocks):
                layers.append(InvertedResidual(width, channels // 2, first_stride if number == 0 else 1, expansion))
                width = channels // 2
            stages.append(nn.Sequential(*layers))
        self.blocks = nn.ModuleList(stages)
        self.conv2 = nn.Sequential(*_convolution(width, _HEAD, 1), nn.ReLU(inplace=True))
        self.classifier = nn.Sequential(nn.Linear(_HEAD, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (batch, channels, height, width) to logits (batch, classes)."""
        x = self.conv1(images)
        for stage in self.blocks:
            x = stage(x)
        return cast(Tensor, self.classifier(self.conv2(x).mean((2, 3))))


class MobileNetSpec(ModelSpec):
    """MobileNetV2 of half width for small images."""

    type: Literal["mobilenet-v2"] = Field(description="half width, as in the CIFAR-100 distillation literature")

    def build(self, *, in_channels: int, num_classes: int) -> nn.Module:
        return MobileNetV2(in_channels, num_classes)
