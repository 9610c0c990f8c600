"""ShuffleNets for small images: Zhang et al., arXiv 1707.01083 (three groups), and Ma et al., arXiv 1807.11164.

Parameter names follow RepDistiller (b84f547) and mdistiller (a08d46f): their weights load here. The stem is a 1x1
convolution that does not shrink the image, and nothing is pooled before the end.

Shape suffixes: B batch, C channels, H and W height and width.
"""

from typing import Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from cakd_cli.models.base import ModelSpec

_STEM = 24
_GROUPS = 3
_V1 = ((240, 4), (480, 8), (960, 4))  # channels and blocks of each stage
_V2 = ((116, 4), (232, 8), (464, 4))
_V2_HEAD = 1024


def shuffle(x_BCHW: Tensor, groups: int) -> Tensor:
    """Deal the channels of the groups out in turns."""
    batch, channels, height, width = x_BCHW.shape
    return x_BCHW.view(batch, groups, channels // groups, height, width).transpose(1, 2).reshape_as(x_BCHW)


def _depthwise(channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)


def _pointwise(in_channels: int, channels: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 1, groups=groups, bias=False)


class GroupedBlock(nn.Module):
    """Grouped 1x1, shuffle, 3x3 of each channel, grouped 1x1; a block that halves keeps its pooled input beside."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.halves = stride == 2
        out = channels - in_channels if self.halves else channels
        middle = out // 4
        # The stem has too few channels for groups.
        self.groups = 1 if in_channels == _STEM else _GROUPS
        self.conv1 = _pointwise(in_channels, middle, self.groups)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = _depthwise(middle, stride)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = _pointwise(middle, out, _GROUPS)
        self.bn3 = nn.BatchNorm2d(out)
        # A module, so that what it is given can be tapped.
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the block's channels, smaller by its stride."""
        out = shuffle(functional.relu(self.bn1(self.conv1(x))), self.groups)
        out = functional.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.halves:
            return cast(Tensor, self.relu(torch.cat([out, functional.avg_pool2d(x, 3, 2, padding=1)], dim=1)))
        return cast(Tensor, self.relu(out + x))


class ShuffleNetV1(nn.Module):
    """Stem, three stages that halve, global average pool, linear classifier."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = _pointwise(in_channels, _STEM)
        self.bn1 = nn.BatchNorm2d(_STEM)
        width = _STEM
        for number, (channels, blocks) in enumerate(_V1, start=1):
            first = GroupedBlock(width, channels, 2)
            rest = (GroupedBlock(channels, channels, 1) for _ in range(blocks - 1))
            self.add_module(f"layer{number}", nn.Sequential(first, *rest))
            width = channels
        self.linear = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (batch, channels, height, width) to logits (batch, classes)."""
        x = functional.relu(self.bn1(self.conv1(images)))
        for number in range(1, len(_V1) + 1):
            x = self.get_submodule(f"layer{number}")(x)
        return cast(Tensor, self.linear(x.mean((2, 3))))


class SplitBlock(nn.Module):
    """Half of the channels pass, the other half is convolved, then both are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = _pointwise(half, half)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = _depthwise(half, 1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = _pointwise(half, half)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        kept, out = x.chunk(2, dim=1)
        out = functional.relu(self.bn1(self.conv1(out)))
        out = self.bn2(self.conv2(out))
        out = functional.relu(self.bn3(self.conv3(out)))
        return shuffle(torch.cat([kept, out], dim=1), 2)


class HalvingBlock(nn.Module):
    """Two convolved halves of the whole input, each half as large, shuffled."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = _depthwise(in_channels, 2)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = _pointwise(in_channels, half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = _pointwise(in_channels, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = _depthwise(half, 2)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = _pointwise(half, half)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the block's channels, half as large."""
        left = functional.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(functional.relu(self.bn3(self.conv3(x)))))
        right = functional.relu(self.bn5(self.conv5(right)))
        return shuffle(torch.cat([left, right], dim=1), 2)


class ShuffleNetV2(nn.Module):
    """Stem, three stages that halve, head, global average pool, linear classifier."""

    averaged = "relu"

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = _pointwise(in_channels, _STEM)
        self.bn1 = nn.BatchNorm2d(_STEM)
        width = _STEM
        for number, (channels, blocks) in enumerate(_V2, start=1):
            rest = (SplitBlock(channels) for _ in range(blocks - 1))
            self.add_module(f"layer{number}", nn.Sequential(HalvingBlock(width, channels), *rest))
            width = channels
        self.conv2 = _pointwise(width, _V2_HEAD)
        self.bn2 = nn.BatchNorm2d(_V2_HEAD)
        self.relu = nn.ReLU(inplace=True)
        self.linear = nn.Linear(_V2_HEAD, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (batch, channels, height, width) to logits (batch, classes)."""
        x = functional.relu(self.bn1(self.conv1(images)))
        for number in range(1, len(_V2) + 1):
            x = self.get_submodule(f"layer{number}")(x)
        x = self.relu(self.bn2(self.conv2(x)))
        return cast(Tensor, self.linear(x.mean((2, 3))))


class ShuffleNetSpec(ModelSpec):
    """ShuffleNet V1 (three groups) and V2 for small images."""

    type: Literal["shufflenet-v1", "shufflenet-v2"] = Field(description="as in the CIFAR-100 distillation literature")

    def build(self, *, in_channels: int, num_classes: int) -> nn.Module:
        network = ShuffleNetV1 if self.type == "shufflenet-v1" else ShuffleNetV2
        return network(in_channels, num_classes)
