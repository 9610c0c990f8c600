"""VGG for small images: Simonyan and Zisserman, arXiv 1409.1556, with batch norm and one linear layer.

Parameter names follow RepDistiller (b84f547) and mdistiller (a08d46f): their weights load here and give the same
logits.
"""

from typing import Literal, cast

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from cakd_cli.models.base import ModelSpec

_WIDTHS = (64, 128, 256, 512, 512)
# Convolutions of each block.
_BLOCKS = {
    "vgg8": (1, 1, 1, 1, 1),
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}


class VGG(nn.Module):
    """Five blocks of 3x3 convolutions, halved after the first three, then a global average and a linear classifier."""

    # As the literature counts them, after the stem.
    stages = ("relu1", "relu2", "relu3", "relu4")

    def __init__(self, convolutions: tuple[int, ...], in_channels: int, num_classes: int) -> None:
        super().__init__()
        for number, (width, count) in enumerate(zip(_WIDTHS, convolutions, strict=True)):
            layers: list[nn.Module] = []
            for _ in range(count):
                layers += [nn.Conv2d(in_channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                in_channels = width
            # The last ReLU stands beside its block, whose parameter names are the reference's.
            self.add_module(f"block{number}", nn.Sequential(*layers[:-1]))
            self.add_module(f"relu{number}", layers[-1])
        self.preactivations = tuple(
            (f"block{number}", f"block{number}.{len(self.get_submodule(f'block{number}')) - 1}")  # type: ignore[arg-type]
            for number in range(1, len(_WIDTHS))
        )
        self.classifier = nn.Linear(in_channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (batch, channels, height, width) to logits (batch, classes)."""
        x = images
        large = images.shape[2] >= 64
        for number in range(len(_WIDTHS)):
            x = self.get_submodule(f"relu{number}")(self.get_submodule(f"block{number}")(x))
            if number < 3 or (number == 3 and large):
                x = functional.max_pool2d(x, 2)
        return cast(Tensor, self.classifier(x.mean((2, 3))))


class VGGSpec(ModelSpec):
    """VGG with batch norm for small images; images of 64 pixels are halved once more."""

    type: Literal["vgg8", "vgg11", "vgg13", "vgg16", "vgg19"] = Field(description="layers")

    def build(self, *, in_channels: int, num_classes: int) -> nn.Module:
        return VGG(_BLOCKS[self.type], in_channels, num_classes)
