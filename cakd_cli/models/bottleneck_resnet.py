"""ResNet50 for small images: He et al., arXiv 1512.03385, without the stem's stride and pooling.

Parameter names follow RepDistiller (b84f547) and mdistiller (a08d46f): their weights load here.
"""

from typing import Literal, cast

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from cakd_cli.models.base import ModelSpec

_STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))  # inner channels, blocks, stride of the first one
_EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1 that narrows, 3x3, 1x1 that widens, and a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out = _EXPANSION * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        # A module, so that what it is given can be tapped.
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of four times the block's channels, smaller by its stride."""
        out = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        out = functional.relu(self.bn2(self.conv2(out)), inplace=True)
        return cast(Tensor, self.relu(self.bn3(self.conv3(out)) + self.shortcut(x)))


class BottleneckResNet(nn.Module):
    """Stem, four stages of bottlenecks, global average pool, linear classifier."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        width = 64
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        for number, (channels, blocks, stride) in enumerate(_STAGES, start=1):
            first = Bottleneck(width, channels, stride)
            width = _EXPANSION * channels
            rest = (Bottleneck(width, channels, 1) for _ in range(blocks - 1))
            self.add_module(f"layer{number}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (batch, channels, height, width) to logits (batch, classes)."""
        x = functional.relu(self.bn1(self.conv1(images)), inplace=True)
        for number in range(1, len(_STAGES) + 1):
            x = self.get_submodule(f"layer{number}")(x)
        return cast(Tensor, self.linear(x.mean((2, 3))))


class BottleneckResNetSpec(ModelSpec):
    """ResNet50 for small images."""

    type: Literal["resnet50"] = Field(description="bottleneck blocks")

    def build(self, *, in_channels: int, num_classes: int) -> nn.Module:
        return BottleneckResNet(in_channels, num_classes)
