"""Reading weights that somebody else wrote, without running anything of theirs."""

import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cakd_cli.errors import InputError

_SAVE_AGAIN = "save it again with torch.save(model.state_dict(), PATH), or as safetensors"


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a .safetensors file, or a .pth that holds nothing but tensors.

    Raises:
        InputError: If the file is missing, damaged, would need code of its own to be read, or holds something else than
            weights.
    """
    if not path.is_file():
        raise InputError(f"no such weights file: {path}")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickled(path)
    for name, value in content.items():
        problem = _problem(name, value)
        if problem:
            raise InputError(f"{path}: {str(name)[:80]!r} is {problem}", hint="it must map parameter names to tensors")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a whole safetensors file: {error}") from error


def _read_pickled(path: Path) -> Mapping[Any, Any]:
    _check_archive(path)
    try:
        with torch.serialization.safe_globals(_numpy_scalars()), warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{path}: not a file of plain tensors", hint=_SAVE_AGAIN) from error
    # The field's checkpoints wrap the weights under one of these.
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: holds no state dict", hint="it must map parameter names to tensors")
    return content


def _check_archive(path: Path) -> None:
    """Refuse what unpacks to more than it is, and compare each part with its checksum, which torch does not."""
    if not zipfile.is_zipfile(path):
        return  # the format before torch 1.6, which has no checksums
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(info.file_size for info in archive.infolist())
            if unpacked > path.stat().st_size:
                raise InputError(f"{path}: unpacks to {unpacked:,} bytes, more than it has", hint=_SAVE_AGAIN)
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, NotImplementedError, EOFError, RuntimeError) as error:
        raise InputError(f"{path}: damaged: {error}", hint="copy it again") from error
    if damaged is not None:
        raise InputError(f"{path}: damaged: {damaged} is not what was written", hint="copy it again")


def _numpy_scalars() -> list[Any]:
    """What an accuracy beside the weights is made of, as in the checkpoints of mdistiller: numbers, and no code."""
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    kinds = [type(np.dtype(kind)) for kind in ("?", *"bhilq", *"BHILQ", *"efd")]
    return [*((scalar, name) for name in names), np.dtype, *kinds]


def _problem(name: Any, value: Any) -> str:
    """Say why an entry is no weight; empty if it is one."""
    if not isinstance(name, str):
        return "a key that is not a name"
    if not isinstance(value, Tensor):
        return f"{type(value).__name__}, not a tensor"
    if value.layout != torch.strided or value.is_quantized or value.is_nested:
        return "sparse, quantized or nested"
    if value.device.type == "meta":
        return "without content (of the meta device)"
    if value.is_complex():
        return "complex"
    return ""


def load_state(model: nn.Module, state: Mapping[str, Any], *, source: str) -> None:
    """Load weights into a network that they must fit exactly.

    Raises:
        InputError: If a tensor is missing, unknown, or of another shape.
    """
    own = model.state_dict()
    wrong = {name: (state[name].shape, own[name].shape) for name in own if name in state}
    wrong = {name: shapes for name, shapes in wrong.items() if shapes[0] != shapes[1]}
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unknown = [name for name in state if name not in own]
    heads = {(theirs[:1], ours[:1]) for theirs, ours in wrong.values() if theirs[1:] == ours[1:]}
    if len(heads) == 1 and len(wrong) <= 2 and not missing and not unknown:
        ((theirs, ours),) = heads
        raise InputError(
            f"{source}: the weights are of a network of {theirs[0]} classes, and the data has {ours[0]}",
            hint="give the data that it was trained on",
        )
    shapes = [f"{name} is {tuple(theirs)}, not {tuple(ours)}" for name, (theirs, ours) in wrong.items()]
    problems = [
        f"{title}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for title, names in (("of another shape", shapes), ("missing", missing), ("unknown", unknown))
        if names
    ]
    if problems:
        raise InputError(
            f"{source}: the weights do not fit the network; " + "; ".join(problems),
            hint="check the model's name and the number of classes and channels",
        )
    model.load_state_dict(state, strict=False)
