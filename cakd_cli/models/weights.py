"""Reading weights that somebody else wrote, without running anything of theirs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cakd_cli.errors import InputError


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a .safetensors file, or a .pth that holds nothing but tensors.

    Raises:
        InputError: If the file is missing, damaged, or would need code of its own to be read.
    """
    if not path.is_file():
        raise InputError(f"no such weights file: {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path}: not a whole safetensors file: {error}") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            f"{path}: not a file of plain tensors",
            hint="save it again with torch.save(model.state_dict(), PATH), or as safetensors",
        ) from error
    # The field's checkpoints wrap the weights under one of these.
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{path}: holds no state dict", hint="it must map parameter names to tensors")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def load_state(model: nn.Module, state: Mapping[str, Any], *, source: str) -> None:
    """Load weights into a network that they must fit exactly.

    Raises:
        InputError: If a tensor is missing, unknown, or of another shape.
    """
    own = model.state_dict()
    wrong = [
        f"{name} is {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unknown = [name for name in state if name not in own]
    problems = [
        f"{title}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for title, names in (("of another shape", wrong), ("missing", missing), ("unknown", unknown))
        if names
    ]
    if problems:
        raise InputError(
            f"{source}: the weights do not fit the network; " + "; ".join(problems),
            hint="check the model's name and the number of classes and channels",
        )
    model.load_state_dict(state, strict=False)
