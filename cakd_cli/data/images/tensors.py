"""Data sets that are one safetensors file, and the digits that ship with cakd."""

import json
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open

from cakd_cli.data.base import ImageDataSet
from cakd_cli.data.images.memory import MemoryDataSpec, memory_data_set
from cakd_cli.errors import InputError

# Above this a label is a mistake, not a class.
MOST_CLASSES = 100_000
KEYS = ("train_images", "train_labels", "test_images", "test_labels")


class TensorsSpec(MemoryDataSpec):
    """A safetensors file of uint8 images and labels, one or several an image: tensors:FILE."""

    shorthand: ClassVar[str | None] = "path"

    type: Literal["tensors"] = "tensors"
    path: str = Field(description="file with train_images, train_labels, test_images, test_labels")
    crop_padding: int = Field(2, ge=0, le=16, description="pixels added on each side before a random crop; 0 = none")

    def load(self, *, fetch: bool = True) -> ImageDataSet:
        return _read(self, Path(self.path).expanduser())

    @property
    def label(self) -> str:
        return Path(self.path).stem


class DigitsSpec(MemoryDataSpec):
    """Optical digits that ship with cakd: 1,797 grey 8x8 images (UCI, CC BY 4.0)."""

    type: Literal["digits"] = "digits"
    crop_padding: int = Field(1, ge=0, le=16, description="pixels added on each side before a random crop; 0 = none")

    def load(self, *, fetch: bool = True) -> ImageDataSet:
        return _read(self, Path(__file__).parent / "assets" / "digits.safetensors")


def _read(spec: MemoryDataSpec, path: Path) -> ImageDataSet:
    if not path.is_file():
        raise InputError(f"no such data file: {path}")
    if path.suffix != ".safetensors":
        hint = f"unpack it first: xz -dk {path}" if path.suffix == ".xz" else None
        raise InputError(f"{path}: not a .safetensors file", hint=hint)
    try:
        with safe_open(path, "pt") as file:
            missing = [key for key in KEYS if key not in file.keys()]  # noqa: SIM118 - not a mapping
            if missing:
                raise InputError(
                    f"{path}: lacks {', '.join(missing)}; it has {', '.join(sorted(file.keys())[:8])}",
                    hint=f"the file must hold {', '.join(KEYS)}",
                )
            tensors = {key: file.get_tensor(key) for key in KEYS}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file: {error}") from error
    return memory_data_set(
        spec,
        train=(tensors["train_images"], tensors["train_labels"]),
        test=(tensors["test_images"], tensors["test_labels"]),
        class_names=_class_names(metadata, tensors["train_labels"], path),
        source=str(path),
    )


def _class_names(metadata: dict[str, str], labels: torch.Tensor, path: Path) -> list[str]:
    if "class_names" not in metadata and labels.ndim == 2:
        return [str(label) for label in range(labels.shape[1])]
    if "class_names" not in metadata:
        largest = int(labels.long().max()) if labels.numel() and not labels.dtype.is_floating_point else 0
        if largest >= MOST_CLASSES:
            raise InputError(f"{path}: a label is {largest}", hint="labels must count classes from 0")
        return [str(label) for label in range(max(largest, 1) + 1)]
    try:
        names = json.loads(metadata["class_names"])
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path}: the metadata 'class_names' is not a JSON list of strings")
    return names
