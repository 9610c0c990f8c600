"""Moments that a run can go on from: one folder each, whole or absent, with checksums; the last two are kept.

checkpoints/epoch-EEEEE-step-SSSSSS/
    model.safetensors  training.safetensors  best.safetensors  state.json
    manifest.json      bytes and SHA-256 of each of these files
"""

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cakd_cli.errors import InputError
from cakd_cli.files import read_json, whole_folder, write_json, write_tensors

_KEPT = 2
_TENSOR_FILES = ("model", "training", "best")
_FILES = (*(f"{name}.safetensors" for name in _TENSOR_FILES), "state.json")


@dataclass(frozen=True)
class Checkpoint:
    """A saved moment of a run.

    Attributes:
        model: State of the network.
        training: Tensors of optimizer, average, the terms' own modules, random number generators and sums.
        best: State of the best network so far; empty before the first validation.
        state: Plain numbers.
    """

    model: dict[str, Tensor]
    training: dict[str, Tensor]
    best: dict[str, Tensor]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: Where they lie; need not exist.

    Attributes:
        damaged: What is wrong with each one that :meth:`latest` could not use, newest first.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._saved: list[Path] = []  # by this process, and so whole
        self._unusable: list[Path] = []
        self.damaged: list[str] = []

    def save(self, checkpoint: Checkpoint) -> None:
        """Save a moment, then drop all but the last two."""
        self._folder.mkdir(exist_ok=True)
        target = self._folder / f"epoch-{checkpoint.state['epoch']:05d}-step-{checkpoint.state['step']:06d}"
        if target in self._saved:
            return
        # One that a damaged checkpoint made the run repeat is written anew.
        shutil.rmtree(target, ignore_errors=True)
        self._unusable = [path for path in self._unusable if path != target]
        with whole_folder(target) as temporary:
            for name in _TENSOR_FILES:
                write_tensors(temporary / f"{name}.safetensors", getattr(checkpoint, name))
            write_json(temporary / "state.json", checkpoint.state)
            write_json(temporary / "manifest.json", {name: _digest(temporary / name) for name in _FILES})
        self._saved.append(target)
        for path in self._unusable:
            shutil.rmtree(path, ignore_errors=True)
        self._unusable.clear()
        for entry in self._folder.iterdir():
            if entry not in self._found()[-_KEPT:]:
                shutil.rmtree(entry, ignore_errors=True)

    def drop(self) -> None:
        """Remove them all: only an unfinished run needs them."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def exist(self) -> bool:
        """Whether there is any."""
        return bool(self._found())

    def latest(self) -> Checkpoint | None:
        """Read the newest one that is whole; none if there is none yet.

        Raises:
            InputError: If there are some, and all are damaged.
        """
        found = self._found()
        whole: list[str] = []
        for path in reversed(found):
            wrong = {name: problem for name in _FILES if (problem := _problem(path, name))}
            if not wrong:
                return _read(path)
            self._unusable.append(path)
            name, problem = next(iter(wrong.items()))
            self.damaged.append(f"{path / name}: damaged checkpoint: {problem}")
            whole += [f"{path.name}/{name}" for name in _FILES if name not in wrong]
        if self.damaged:
            left = f"whole are only {', '.join(whole)}" if whole else "no file of theirs is whole"
            raise InputError("\n  ".join([*self.damaged, left]), hint="start again with --overwrite")
        return None

    def _found(self) -> list[Path]:
        return sorted(path for path in self._folder.glob("epoch-*") if path.is_dir())


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _problem(folder: Path, name: str) -> str:
    """Say what is wrong with a file; empty if it is what was written."""
    try:
        manifest = read_json(folder / "manifest.json")
        if not isinstance(manifest, Mapping) or name not in manifest:
            return "manifest.json does not name it"
        found = _digest(folder / name)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "" if found == manifest[name] else "its content is not what was written"


def _read(folder: Path) -> Checkpoint:
    try:
        tensors = {name: load_file(folder / f"{name}.safetensors") for name in _TENSOR_FILES}
        state = read_json(folder / "state.json")
    except (OSError, ValueError, SafetensorError) as error:  # changed since it was checked
        raise InputError(f"{folder}: damaged checkpoint: {error}", hint="run the same command again") from error
    return Checkpoint(**tensors, state=state)
