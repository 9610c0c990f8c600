"""MobileNetV2 of full width for images of 64 pixels: Sandler et al., arXiv 1801.04381, with a stem that keeps the size.

Parameter names and shapes follow mdistiller (a08d46f), whose Tiny-ImageNet figures are those of this network: its
weights load here. As there, convolutions have a bias, and fresh weights are drawn as PyTorch does.
"""

from typing import Literal, cast

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from cakd_cli.models.base import ModelSpec

_STEM, _HEAD = 32, 1280
# Expansion, channels, blocks, stride of the first one.
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 1), (6, 320, 1, 1))


class LinearBottleneck(nn.Module):
    """Widen, filter each channel, narrow; a shortcut where the shape stays."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = in_channels * expansion
        self.shortcut = stride == 1 and in_channels == channels
        self.residual = nn.Sequential(
            nn.Conv2d(in_channels, wide, 1),
            nn.BatchNorm2d(wide),
            nn.ReLU6(inplace=True),
            nn.Conv2d(wide, wide, 3, stride, padding=1, groups=wide),
            nn.BatchNorm2d(wide),
            nn.ReLU6(inplace=True),
            nn.Conv2d(wide, channels, 1),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the block's channels, smaller by its stride."""
        out = cast(Tensor, self.residual(x))
        return x + out if self.shortcut else out


class PointwiseLinear(nn.Linear):
    """A linear layer whose weight has the shape of a 1x1 convolution's: (out, in, 1, 1)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.weight = nn.Parameter(self.weight.detach()[:, :, None, None])

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - its base's name
        """Map (batch, in) to (batch, out)."""
        return functional.linear(input, self.weight.flatten(1), self.bias)


class MobileNetV2TinyImageNet(nn.Module):
    """Stem, seven stages of linear bottlenecks that halve three times, head, global average pool, linear classifier."""

    # As mdistiller counts them, after the stem; the modules are numbered from the first bottleneck on.
    stages = ("stage2", "stage3", "stage4", "conv1")
    # But for the head, a stage ends without an activation.
    preactivations = (
        ("stage2", "stage2.1.residual.7"),
        ("stage3", "stage3.2.residual.7"),
        ("stage4", "stage4.3.residual.7"),
        ("conv1.1", "conv1.1"),
    )

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        # The padding of a 1x1 convolution adds a frame of one pixel, which the reference's weights are trained with.
        stem = nn.Conv2d(in_channels, _STEM, 1, padding=1)
        self.pre = nn.Sequential(stem, nn.BatchNorm2d(_STEM), nn.ReLU6(inplace=True))
        width = _STEM
        for number, (expansion, channels, blocks, stride) in enumerate(_STAGES, start=1):
            first = LinearBottleneck(width, channels, stride, expansion)
            rest = [LinearBottleneck(channels, channels, 1, expansion) for _ in range(blocks - 1)]
            self.add_module(f"stage{number}", nn.Sequential(first, *rest) if rest else first)
            width = channels
        self.conv1 = nn.Sequential(nn.Conv2d(width, _HEAD, 1), nn.BatchNorm2d(_HEAD), nn.ReLU6(inplace=True))
        self.conv2 = PointwiseLinear(_HEAD, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (batch, channels, height, width) to logits (batch, classes)."""
        x = self.pre(images)
        for number in range(1, len(_STAGES) + 1):
            x = self.get_submodule(f"stage{number}")(x)
        return cast(Tensor, self.conv2(self.conv1(x).mean((2, 3))))


class MobileNetTinyImageNetSpec(ModelSpec):
    """MobileNetV2 of full width for images of 64 pixels."""

    type: Literal["mobilenet-v2-tiny-imagenet"] = Field(description="as in the Tiny-ImageNet distillation literature")

    def build(self, *, in_channels: int, num_classes: int) -> nn.Module:
        return MobileNetV2TinyImageNet(in_channels, num_classes)
