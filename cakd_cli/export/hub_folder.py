"""The folder that the Hugging Face hub and timm read, read again by cakd."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from cakd_cli.models import saving
from cakd_cli.models.saving import SavedModel


def require() -> None:
    """Nothing beyond torch is needed."""


def write(saved: SavedModel, path: Path) -> None:
    """Write weights, config and card into a folder."""
    saving.write(path, saved)


def reload(path: Path) -> Callable[[Tensor], Tensor]:
    """Read the folder as a stranger would, who has nothing else."""
    return saving.read(path).model
