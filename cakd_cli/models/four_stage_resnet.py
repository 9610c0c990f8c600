"""ResNet18, 34 and 50 for small images: He et al., arXiv 1512.03385, without the stem's stride and pooling.

Parameter names follow RepDistiller (b84f547) and mdistiller (a08d46f): their weights load here and give the same
logits. ResNet34 is not among theirs and follows their ResNet18.
"""

from typing import Literal, cast

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from cakd_cli.models.base import ModelSpec

# Blocks of each stage.
_BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}
_STEM = 64
_STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))  # inner channels, stride of the first block


def _shortcut(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    if stride == 1 and in_channels == channels:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))


class PlainBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, channels, stride)
        # A module, so that what it is given can be tapped.
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the block's channels, smaller by its stride."""
        out = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        return cast(Tensor, self.relu(self.bn2(self.conv2(out)) + self.shortcut(x)))


class Bottleneck(nn.Module):
    """1x1 that narrows, 3x3, 1x1 that widens, and a shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out = self.expansion * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.shortcut = _shortcut(in_channels, out, stride)
        # A module, so that what it is given can be tapped.
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of four times the block's channels, smaller by its stride."""
        out = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        out = functional.relu(self.bn2(self.conv2(out)), inplace=True)
        return cast(Tensor, self.relu(self.bn3(self.conv3(out)) + self.shortcut(x)))


class FourStageResNet(nn.Module):
    """Stem, four stages of blocks, global average pool, linear classifier."""

    # As the literature counts them, after the stem.
    stages = ("layer1", "layer2", "layer3", "layer4")

    def __init__(
        self, block: type[PlainBlock | Bottleneck], blocks: tuple[int, ...], in_channels: int, num_classes: int
    ) -> None:
        super().__init__()
        width = _STEM
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        for name, (channels, stride), count in zip(self.stages, _STAGES, blocks, strict=True):
            first = block(width, channels, stride)
            width = block.expansion * channels
            self.add_module(name, nn.Sequential(first, *(block(width, channels, 1) for _ in range(count - 1))))
        self.linear = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (batch, channels, height, width) to logits (batch, classes)."""
        x = functional.relu(self.bn1(self.conv1(images)), inplace=True)
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return cast(Tensor, self.linear(x.mean((2, 3))))


class FourStageResNetSpec(ModelSpec):
    """ResNet of four stages for small images: the stem neither strides nor pools."""

    type: Literal["resnet18", "resnet34", "resnet50"] = Field(description="depth; resnet50 has bottleneck blocks")

    def build(self, *, in_channels: int, num_classes: int) -> nn.Module:
        block = Bottleneck if self.type == "resnet50" else PlainBlock
        return FourStageResNet(block, _BLOCKS[self.type], in_channels, num_classes)
