"""What a method puts between a student's last map and its logits, where it stays: trained, evaluated and saved with it.

Shape suffixes: B batch, D channels, H and W height and width.
"""

from collections import OrderedDict
from typing import Literal, cast

from pydantic import Field
from torch import Tensor, nn

from cakd_cli.models.layers import averaged_map, find_classifier
from cakd_cli.options import Options


class ReusedClassifier(Options):
    """Convolutions to a teacher's channels; its linear classifier stands in the place of the student's (SimKD)."""

    type: Literal["reused-classifier"] = "reused-classifier"
    channels: int = Field(ge=1, description="of the teacher's last map, which its classifier sees the average of")
    size: tuple[int, int] | None = Field(
        None, strict=False, description="height and width to which the student's map is averaged first; none = as it is"
    )
    reduction: int = Field(2, ge=1, description="the convolutions work in the teacher's channels divided by it")


class Projection(nn.Module):
    """Three convolutions that bring a map to other channels, SimKD's (arXiv 2203.14001).

    Args:
        channels: Of the map.
        wanted: Of what comes out.
        size: Height and width to which the map is averaged first; none leaves it as it is.
        reduction: The convolutions work in ``wanted`` channels divided by it; 2 in the paper, 4 and 8 are cheaper.

    Raises:
        ValueError: If the reduction leaves no channel.
    """

    def __init__(self, channels: int, wanted: int, size: tuple[int, int] | None = None, *, reduction: int = 2) -> None:
        super().__init__()
        if not 1 <= reduction <= wanted:
            raise ValueError(f"reduction must be from 1 to {wanted}, got {reduction}")
        middle = wanted // reduction
        self.resize = nn.Identity() if size is None else nn.AdaptiveAvgPool2d(size)
        self.transfer = nn.Sequential(
            nn.Conv2d(channels, middle, 1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(),
            nn.Conv2d(middle, middle, 3, padding=1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(),
            nn.Conv2d(middle, wanted, 1, bias=False),
            nn.BatchNorm2d(wanted),
            nn.ReLU(),
        )

    def forward(self, map_BDHW: Tensor) -> Tensor:
        """Give the projected map."""
        return cast(Tensor, self.transfer(self.resize(map_BDHW)))


def with_end(network: nn.Module, end: ReusedClassifier, num_classes: int, *, name: str) -> nn.Module:
    """Put an end behind a network's last map, in place; its layers before that keep their places.

    Args:
        network: Ends with a map, the average of its positions, and a linear classifier.
        end: What to put there.
        num_classes: Which the classifier tells apart.
        name: What the network is called in an error.

    Returns:
        The network. The classifier is frozen, and its weights are as good as none until the teacher's are copied there.

    Raises:
        RecipeError: If it does not tell its last map, or has no linear classifier.
        ValueError: If the end does not fit.
    """
    layer, head = averaged_map(network, name), find_classifier(network, num_classes, name=name)
    channels = cast(int, network.get_submodule(head).in_features)
    projection = Projection(channels, end.channels, end.size, reduction=end.reduction)
    network.set_submodule(layer, nn.Sequential(OrderedDict(map=network.get_submodule(layer), projection=projection)))
    network.set_submodule(head, nn.Linear(end.channels, num_classes).requires_grad_(False))
    return network
