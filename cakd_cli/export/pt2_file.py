"""torch.export's .pt2, read again by torch."""

import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim

from cakd_cli.models.saving import SavedModel


def require() -> None:
    """Nothing beyond torch is needed."""


def write(saved: SavedModel, path: Path) -> None:
    """Write normalised images (batch, channels, height, width) to logits (batch, classes), any batch."""
    # A batch of two: torch would take the size 1 for a constant.
    example = torch.zeros(2, *saved.preprocessing.input_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(saved.model.eval(), (example,), dynamic_shapes=({0: Dim("batch", min=1)},))
        # Through memory: torch's own writer aborts the process when the disk is full.
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files={"cakd.json": json.dumps(saved.describe(), ensure_ascii=False)})
    path.write_bytes(buffer.getvalue())


def reload(path: Path) -> Callable[[Tensor], Tensor]:
    """Open the file as another program would."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.load(path).module()
