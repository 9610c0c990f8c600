"""Everything a run leaves on disk: atomic, resumable, without pickle.

recipe.yaml        the whole recipe, nothing automatic
run.json           command, versions, hardware, why it ended
metrics.jsonl      one line an epoch
checkpoints/       epoch-EEEEE-step-SSSSSS/: model, training and best .safetensors, state.json
model.safetensors  config.json  README.md      the finished network
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cakd_cli.errors import InputError, RecipeError
from cakd_cli.files import whole_folder, write_json, write_tensors, write_text
from cakd_cli.recipe import strict_yaml
from cakd_cli.recipe.schema import Recipe

# Keys that may change between a run and its continuation.
_FREE_KEYS = (
    *("engine.device", "engine.log_interval", "engine.checkpoint_seconds", "data.workers", "data.root"),
    # How it computes, not what: like another device, these may change the last digits.
    *("engine.compile", "engine.teacher_form", "engine.teacher_memory", "engine.teacher_memory_gb"),
    "engine.teacher_memory_features",
)
# In the order in which a run is removed, its exports included: what marks the folder as a run goes last.
_OWN_NAMES = (
    *("checkpoints", "export", "model.onnx", "model.pt2", "model.safetensors", "metrics.jsonl", "config.json"),
    "README.md",
    *("run.json", "recipe.yaml"),
)


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


class RunDirectory:
    """One run's folder, locked while it is open."""

    def __init__(self, path: Path, lock: TextIO, created: list[Path]) -> None:
        self.path = path
        self._lock = lock
        self._created = created

    @classmethod
    def open(cls, path: Path, *, resume: bool, overwrite: bool) -> "RunDirectory":
        """Create or enter a folder, lock it, and remove what a killed process left.

        Raises:
            InputError: If another process is using it, or as :func:`check_free`.
        """
        created = [folder for folder in (path, *path.parents) if not folder.exists()]
        # Before the lock, so that a folder of somebody else's gets none; and once more under it.
        check_free(path, resume=resume, overwrite=overwrite)
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("w")
        try:
            # lockf and not flock: worker processes do not inherit it, so it ends with this process.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise InputError(
                f"{path} is in use by another cakd", hint="wait for it, or choose another folder with --out"
            ) from error
        directory = cls(path, lock, created)
        try:
            check_free(path, resume=resume, overwrite=overwrite)
            directory._remove(entry.name for entry in path.iterdir() if _is_temporary(entry.name))
        except BaseException:
            directory.close()
            raise
        return directory

    def clear(self) -> None:
        """Remove the run that is here, and its exports."""
        self._remove(_OWN_NAMES)

    def _remove(self, names: Iterable[str]) -> None:
        for path in [self.path / name for name in names]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Unlock the folder; what was made for a run that never began is removed again."""
        try:
            if self._created and [entry.name for entry in self.path.iterdir()] == [".lock"]:
                (self.path / ".lock").unlink()
                with contextlib.suppress(OSError):  # a parent that somebody else uses by now
                    for folder in self._created:
                        folder.rmdir()
        finally:
            self._lock.close()

    def facts(self) -> dict[str, Any]:
        """Read run.json; empty if there is none or it is damaged."""
        try:
            facts = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return facts if isinstance(facts, dict) else {}

    def write_recipe(self, recipe: Recipe) -> None:
        """Write the recipe that this run follows."""
        write_text(self.path / "recipe.yaml", strict_yaml.dump(type_first(recipe.model_dump(mode="json"))))

    def write_facts(self, facts: Mapping[str, Any]) -> None:
        """Write run.json."""
        write_json(self.path / "run.json", facts)

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Add one epoch's line."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def metrics(self) -> list[dict[str, Any]]:
        """Read the whole lines of metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        lines = []
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
            try:
                line = json.loads(text)
                line["epoch"] + line["images_per_second"]
            except (ValueError, TypeError, KeyError):
                break  # torn by a kill; nothing whole can follow
            lines.append(line)
        return lines

    def keep_metrics(self, epochs: int) -> None:
        """Drop the lines of epochs that a resumed run repeats."""
        lines = [line for line in self.metrics() if line["epoch"] <= epochs]
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Save a moment, then drop the older ones."""
        folder = self.path / "checkpoints"
        folder.mkdir(exist_ok=True)
        target = folder / f"epoch-{checkpoint.state['epoch']:05d}-step-{checkpoint.state['step']:06d}"
        if not target.exists():
            with whole_folder(target) as temporary:
                write_tensors(temporary / "model.safetensors", checkpoint.model)
                write_tensors(temporary / "training.safetensors", checkpoint.training)
                write_tensors(temporary / "best.safetensors", checkpoint.best)
                write_json(temporary / "state.json", checkpoint.state)
        for entry in folder.iterdir():
            if entry != target:
                shutil.rmtree(entry, ignore_errors=True)

    def drop_checkpoints(self) -> None:
        """Remove what only an unfinished run needs."""
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)

    def latest_checkpoint(self) -> Checkpoint | None:
        """Read the newest checkpoint; none if there is none yet.

        Raises:
            InputError: If its files are damaged.
        """
        found = sorted((self.path / "checkpoints").glob("epoch-*"))
        if not found:
            return None
        try:
            tensors = {name: load_file(found[-1] / f"{name}.safetensors") for name in ("model", "training", "best")}
            state = json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(
                f"{found[-1]}: damaged checkpoint: {error}", hint="start again with --overwrite"
            ) from error
        return Checkpoint(**tensors, state=state)


def check_free(path: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that a new run would spoil; creates nothing.

    Raises:
        InputError: If the folder holds something and neither flag says what to do with it.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file", hint="choose another folder with --out")
    content = [entry.name for entry in path.iterdir() if entry.name != ".lock"] if path.is_dir() else []
    content = [name for name in content if not _is_temporary(name)]
    # A run that was killed at its very beginning has only its lock and its recipe.
    is_run = "run.json" in content or ("recipe.yaml" in content and (path / ".lock").exists())
    if content and not is_run:
        raise InputError(
            f"{path} holds files that are not a run's: {content[0]}", hint="choose an empty folder with --out"
        )
    if is_run and not (resume or overwrite):
        raise InputError(
            f"{path} already holds a run", hint="continue it with --resume, or replace it with --overwrite"
        )


def _is_temporary(name: str) -> bool:
    """Whether a file is what :mod:`cakd_cli.files` was writing when its process was killed."""
    return name.startswith(".") and ".tmp" in name


def read_recipe(path: Path) -> Recipe:
    """Read the recipe of an existing run.

    Raises:
        InputError: If it is missing or damaged.
    """
    from cakd_cli.recipe.resolve import resolve

    file = path / "recipe.yaml"
    if not file.is_file():
        raise InputError(f"{path} has no recipe.yaml", hint="it is not the directory of a run")
    try:
        return resolve([], {}, file=file)
    except RecipeError as error:
        raise InputError(f"{file} does not fit this version of cakd: {error.message}") from error


def check_same_recipe(old: Recipe, new: Recipe, path: Path) -> None:
    """Refuse to continue a run under other settings.

    Raises:
        RecipeError: With every setting that differs.
    """
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    changed = [
        f"{key}: {before.get(key)!r} in the run, {after.get(key)!r} now"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key not in _FREE_KEYS
    ]
    if changed:
        raise RecipeError(
            "\n  ".join([f"{path} cannot be resumed with other settings:", *changed]),
            hint=f"continue it as it was: --resume --out {path}; or start another run with another --out",
        )


def type_first(value: Any) -> Any:
    """Order mappings as a person would write them: what it is, then its settings."""
    if isinstance(value, dict):
        ordered = sorted(value.items(), key=lambda item: item[0] != "type")
        return {key: type_first(item) for key, item in ordered}
    return [type_first(item) for item in value] if isinstance(value, list) else value


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {prefix: value}
    return {k: v for key, item in items for k, v in _flat(item, f"{prefix}.{key}" if prefix else str(key)).items()}
