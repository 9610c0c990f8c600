"""What every model shares: its place in a recipe."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field
from torch import nn


class ModelSpec(BaseModel):
    """A network by name, and where its weights come from."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    # The field that `NAME:VALUE` on the command line fills.
    shorthand: ClassVar[str | None] = None

    weights: str | None = Field(
        None, description="file to start from, .safetensors or a .pth of plain tensors; none = fresh weights"
    )

    def build(self, *, in_channels: int, num_classes: int) -> nn.Module:
        """Make the network with fresh weights; it maps (batch, in_channels, height, width) to (batch, num_classes).

        Raises:
            RecipeError: If the network does not exist or cannot take such images.
        """
        raise NotImplementedError

    @property
    def label(self) -> str:
        """What a person calls this network."""
        raise NotImplementedError
