"""Wide ResNets: Zagoruyko and Komodakis, arXiv 1605.07146.

Parameter names follow RepDistiller (b84f547) and mdistiller (a08d46f): their weights load here and give the same
logits.
"""

from typing import Literal, cast

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from cakd_cli.models.base import ModelSpec


class PreActivationBlock(nn.Module):
    """Norm, ReLU, convolution, twice; a block that changes width also activates its shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.convShortcut: nn.Module | None = None
        if in_channels != channels:
            self.convShortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the block's channels, smaller by its stride."""
        active = functional.relu(self.bn1(x), inplace=True)
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        out = functional.relu(self.bn2(self.conv1(active)), inplace=True)
        return cast(Tensor, self.conv2(out) + shortcut)


class Stage(nn.Module):
    """Blocks of one width."""

    def __init__(self, in_channels: int, channels: int, blocks: int, stride: int) -> None:
        super().__init__()
        first = PreActivationBlock(in_channels, channels, stride)
        self.layer = nn.Sequential(first, *(PreActivationBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the stage's channels."""
        return cast(Tensor, self.layer(x))


class WideResNet(nn.Module):
    """Stem, three stages of pre-activation blocks, norm, global average pool, linear classifier."""

    # As the literature counts them, after the stem.
    stages = ("block1", "block2", "block3")
    preactivations = tuple((norm, norm) for norm in ("block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"))
    averaged = "relu"

    def __init__(self, depth: int, width: int, in_channels: int, num_classes: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        widths = (16, 16 * width, 32 * width, 64 * width)
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.block1 = Stage(widths[0], widths[1], blocks, stride=1)
        self.block2 = Stage(widths[1], widths[2], blocks, stride=2)
        self.block3 = Stage(widths[2], widths[3], blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(widths[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (batch, channels, height, width) to logits (batch, classes)."""
        x = self.block3(self.block2(self.block1(self.conv1(images))))
        x = self.relu(self.bn1(x))
        return cast(Tensor, self.fc(x.mean((2, 3))))


class WideResNetSpec(ModelSpec):
    """Wide ResNet for small images: wrn-DEPTH-WIDTH."""

    type: Literal["wrn-16-1", "wrn-16-2", "wrn-40-1", "wrn-40-2"] = Field(description="depth and widening factor")

    def build(self, *, in_channels: int, num_classes: int) -> nn.Module:
        depth, width = map(int, self.type.removeprefix("wrn-").split("-"))
        return WideResNet(depth, width, in_channels, num_classes)
