"""What every model shares: its place in a recipe."""

from typing import ClassVar

from pydantic import Field
from torch import nn

from cakd_cli.models.ends import ReusedClassifier, with_end
from cakd_cli.options import Options


class ModelSpec(Options):
    """A network by name, and where its weights come from."""

    # The field that `NAME:VALUE` on the command line fills.
    shorthand: ClassVar[str | None] = None

    type: str
    weights: str | None = Field(
        None,
        description="file to start from, .safetensors or a .pth of plain tensors, or a run directory, of any classes; "
        "none = fresh weights",
    )

    end: ReusedClassifier | None = Field(
        None,
        exclude_if=lambda end: end is None,
        description="what stands between the last map and the logits; a run with --loss simkd sets it itself",
    )

    def build(self, *, in_channels: int, num_classes: int) -> nn.Module:
        """Make the network with fresh weights; it maps (batch, in_channels, height, width) to (batch, num_classes).

        Raises:
            RecipeError: If the network does not exist or cannot take such images.
        """
        raise NotImplementedError

    def network(self, *, in_channels: int, num_classes: int) -> nn.Module:
        """Make the whole network with fresh weights, with what a method has put at its end.

        Raises:
            RecipeError: As of :meth:`build`, or if it has not what the end takes the place of.
        """
        return self.ended(self.build(in_channels=in_channels, num_classes=num_classes), num_classes)

    def ended(self, network: nn.Module, num_classes: int) -> nn.Module:
        """Put at the end of what :meth:`build` made what belongs there."""
        return network if self.end is None else with_end(network, self.end, num_classes, name=self.label)

    @property
    def label(self) -> str:
        """What a person calls this network."""
        return self.type

    @property
    def architecture(self) -> str:
        """Everything that decides what the network computes but its weights."""
        return self.model_dump_json(exclude={"weights"})

    @property
    def origin(self) -> str:
        """Where the weights come from that the network starts with, in words."""
        return f"weights of {self.weights}" if self.weights else "fresh weights"

    def missing_file(self) -> str | None:
        """Say what would be downloaded before the network can be made; none if all is here."""
        return None


def num_parameters(model: nn.Module) -> int:
    """Count the elements of all weights, frozen ones included; the buffers of norms are not counted."""
    return sum(parameter.numel() for parameter in model.parameters())
