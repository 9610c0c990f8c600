"""Everything a run leaves on disk: atomic, resumable, without pickle.

recipe.yaml        the whole recipe, nothing automatic
run.json           command, versions, hardware, why it ended
metrics.jsonl      one line an epoch
checkpoints/       see :mod:`cakd_cli.engine.checkpoints`
model.safetensors  config.json  README.md      the finished network
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from cakd_cli.engine.checkpoints import Checkpoints
from cakd_cli.errors import InputError, RecipeError
from cakd_cli.files import read_json, write_json, write_text
from cakd_cli.recipe import strict_yaml
from cakd_cli.recipe.schema import Recipe

# Keys that may change between a run and its continuation.
_FREE_KEYS = (
    *(
        "engine.device",
        "engine.out_of_memory",
        "engine.log_interval",
        "engine.checkpoint_seconds",
        "engine.parallel",
        "engine.tracking",
        "data.workers",
        "data.root",
    ),
    # How it computes, not what: like another device, these may change the last digits.
    *("engine.compile", "engine.teacher_form", "engine.teacher_memory", "engine.teacher_memory_gb"),
    "engine.teacher_memory_features",
)
# In the order in which a run is removed, its exports included: what marks the folder as a run goes last.
_OWN_NAMES = (
    *("tensorboard", "wandb"),
    *(
        "checkpoints",
        "export",
        "evaluation.json",
        "model.onnx",
        "model.int8.onnx",
        "model.uint8.onnx",
        "model.pt2",
        "model.safetensors",
        "metrics.jsonl",
        "config.json",
    ),
    "README.md",
    *("run.json", "recipe.yaml"),
)


class RunDirectory:
    """One run's folder, locked while it is open; other processes of the run have it without a lock, and write nothing.

    Attributes:
        path: The folder.
        checkpoints: The run's.
        left_by: Whose lock was found, if its process died without closing it.
    """

    def __init__(self, path: Path, lock: TextIO | None = None, created: Sequence[Path] = ()) -> None:
        self.path = path
        self.checkpoints = Checkpoints(path / "checkpoints")
        self.left_by = _holder(lock) if lock is not None else ""
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
        directory = cls(path, _locked(path), created)
        try:
            check_free(path, resume=resume, overwrite=overwrite)
            directory._remove(entry.name for entry in path.iterdir() if _is_temporary(entry.name))
            directory._write_holder()
        except BaseException:
            directory.close()
            raise
        return directory

    def _write_holder(self) -> None:
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "started_at": now()}
        assert self._lock is not None
        with contextlib.suppress(OSError):  # a full disk will tell soon enough
            self._lock.truncate(0)
            os.write(self._lock.fileno(), json.dumps(holder).encode())

    def traces(self) -> list[str]:
        """Say whether the last process that used the folder died without closing it."""
        return [f"{self.path} was left by {self.left_by}, which did not end in order"] if self.left_by else []

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
        if self._lock is None:
            return
        try:
            if self._created and [entry.name for entry in self.path.iterdir()] == [".lock"]:
                (self.path / ".lock").unlink()
                with contextlib.suppress(OSError):  # a parent that somebody else uses by now
                    for folder in self._created:
                        folder.rmdir()
            self._lock.truncate(0)
        finally:
            self._lock.close()

    def facts(self) -> dict[str, Any]:
        """Read run.json; empty if there is none or it is damaged."""
        try:
            facts = read_json(self.path / "run.json")
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
                int(line["epoch"] + line["images_per_second"])
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                break  # torn by a kill; nothing whole can follow
            lines.append(line)
        return lines

    def keep_metrics(self, epochs: int) -> None:
        """Drop the lines of epochs that a resumed run repeats."""
        lines = [line for line in self.metrics() if line["epoch"] <= epochs]
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def _locked(path: Path) -> TextIO:
    """Open and lock a folder's lock file; the lock ends with the process, its content stays to say whose it was."""
    lock = (path / ".lock").open("a+", encoding="utf-8", errors="replace")
    try:
        # lockf and not flock: worker processes do not inherit it, so it ends with this process.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = _holder(lock)
        lock.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise InputError(f"{path} cannot be locked: {error.strerror}", hint="choose a local disk") from error
        raise InputError(
            f"{path} is in use by another cakd{f': {holder}' if holder else ''}",
            hint="wait for it, or choose another folder with --out",
        ) from error
    return lock


def _holder(lock: TextIO) -> str:
    """Say whose lock it is; empty if nobody's, or if the file holds something else."""
    lock.seek(0)
    try:
        holder = json.loads(lock.read(1024))
        return f"process {holder['pid']} on {holder['host']}, started {holder['started_at']}"
    except (ValueError, TypeError, KeyError):
        return ""


def holder(path: Path) -> str:
    """Say who uses a run's folder now; empty if nobody does."""
    try:
        with (path / ".lock").open("r+", encoding="utf-8", errors="replace") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with (path / ".lock").open(encoding="utf-8", errors="replace") as lock:
            return _holder(lock) or "another process"
    except OSError:
        pass  # there is no lock, or none that this process may take: the run itself will say so
    return ""


def now() -> str:
    """The time, as run.json and locks say it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def check_free(path: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that a new run would spoil; creates nothing.

    Raises:
        InputError: If the folder holds something and neither flag says what to do with it.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file", hint="choose another folder with --out")
    content = [entry.name for entry in path.iterdir() if entry.name != ".lock"] if path.is_dir() else []
    content = [name for name in content if not _is_temporary(name)]
    is_run = _is_run(path, content)
    if content and not is_run:
        raise InputError(
            f"{path} holds files that are not a run's: {content[0]}", hint="choose an empty folder with --out"
        )
    if is_run and not (resume or overwrite):
        raise InputError(
            f"{path} already holds a run", hint="continue it with --resume, or replace it with --overwrite"
        )


def _is_run(path: Path, content: list[str]) -> bool:
    """Whether cakd made what is there; other tools write files of the same names."""
    if "recipe.yaml" not in content:
        return False
    try:
        facts = read_json(path / "run.json")
    except FileNotFoundError:
        return (path / ".lock").exists()  # killed at its very beginning
    except (OSError, ValueError):
        return True  # damaged, beside a recipe
    versions = facts.get("versions") if isinstance(facts, dict) else None
    return not isinstance(versions, dict) or "cakd" in versions


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
    # Where a full memory decides it, another machine may decide otherwise.
    cut = ("engine.gradient_accumulation",) if old.engine.out_of_memory == "accumulate" else ()
    changed = [
        f"{key}: {before.get(key)!r} in the run, {after.get(key)!r} now"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key not in (*_FREE_KEYS, *cut)
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
