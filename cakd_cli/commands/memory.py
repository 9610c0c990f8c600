"""cakd teacher-memory."""

import contextlib
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cakd_cli.console import Console
from cakd_cli.engine.build import read_inputs
from cakd_cli.engine.run import fill_memory
from cakd_cli.errors import InputError, RecipeError, UsageError
from cakd_cli.recipe.resolve import resolve
from cakd_cli.report import tables
from cakd_cli.teachers import memory as teacher_memory

_LEFTOVER_SECONDS = 3600.0


def list_all(*, console: Console) -> None:
    """Say whose answers are kept, to what, and how many."""
    rows = [_describe(folder) for folder in teacher_memory.folders()]
    console.result(rows, lambda stdout: tables.show_memories(stdout, rows, str(teacher_memory.root())))


def _describe(folder: Path) -> dict[str, Any]:
    try:
        memory = teacher_memory.read(folder)
    except InputError as error:
        return {"key": folder.name, "error": error.message}
    with contextlib.closing(memory):
        known = len(memory.written())
    return {
        "key": folder.name,
        "teacher": memory.facts["teacher"],
        "data": memory.facts["data"],
        "computed": memory.identity.computed,
        "says": ", ".join(name for name, _ in memory.identity.answers),
        "stored": memory.identity.stored,
        "views_per_image": memory.identity.per_sample,
        "rows": memory.identity.rows,
        "known": known,
        "bytes": teacher_memory.used_bytes(memory.identity),
    }


def verify(keys: Sequence[str], *, console: Console) -> None:
    """Read every answer and compare it with its checksum.

    Raises:
        InputError: If any is not what was written, or a memory is damaged.
    """
    rows = []
    for folder in _chosen(keys):
        with contextlib.closing(teacher_memory.read(folder)) as memory:
            whole, damaged = memory.verify()
        rows.append({"key": folder.name, "whole": whole, "damaged": damaged})
    bad = [row for row in rows if row["damaged"]]
    if bad:
        raise InputError(
            "\n  ".join(
                ["answers are not what was written:", *(f"{row['key']}: {row['damaged']:,} answers" for row in bad)]
            ),
            hint="runs ask the teacher again for these; cakd teacher-memory prune KEY removes them all",
            document={"memories": rows},
        )
    console.result(
        rows,
        lambda stdout: stdout.print(
            "\n".join(f"{row['key']}: all {row['whole']:,} answers are whole" for row in rows) or "nothing to verify",
            markup=False,
        ),
    )


def prune(keys: Sequence[str], *, all_of_them: bool, console: Console) -> None:
    """Remove memories; a run that uses one goes on with what it has open.

    Raises:
        UsageError: If nothing is named, or both.
        InputError: If a key is unknown.
    """
    if bool(keys) == all_of_them:
        raise UsageError("name the memories to remove, or give --all", hint="cakd teacher-memory list")
    folders = _chosen(keys)
    for folder in folders:
        # Under another name at once: whoever looks for it finds it whole or not at all.
        doomed = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
        folder.rename(doomed)
        shutil.rmtree(doomed)
    for leftover in teacher_memory.root().glob(".*.tmp"):
        # What was killed while it was created or removed; a younger one may be somebody's at work.
        if time.time() - leftover.stat().st_mtime > _LEFTOVER_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)
    removed = [folder.name for folder in folders]
    console.result(removed, lambda stdout: stdout.print(f"removed {', '.join(removed) or 'nothing'}", markup=False))


def _chosen(keys: Sequence[str]) -> list[Path]:
    found = {folder.name: folder for folder in teacher_memory.folders()}
    for key in keys:
        if key not in found:
            raise InputError(f"no teacher memory '{key}' in {teacher_memory.root()}", hint="cakd teacher-memory list")
    return [found[key] for key in dict.fromkeys(keys)] if keys else list(found.values())


def fill(words: list[str], flags: Mapping[str, Any], *, console: Console) -> None:
    """Ask the teacher about every view that a run of the recipe will meet.

    Raises:
        CakdError: If the recipe cannot be run, or keeps no memory on disk.
    """
    recipe = resolve(words, flags, defaults={"loss": "cakd"}, flag_names={"model": "--student"})
    if not recipe.needs_teacher:
        raise RecipeError("no term of the loss needs a teacher", hint="give that of the runs to come: loss=kd")
    key, asked = fill_memory(read_inputs(recipe), console)
    document = _describe(teacher_memory.root() / key) | {"asked": asked}
    text = f"{key}: {asked:,} images asked about, {document['known']:,} of {document['rows']:,} answers known"
    console.result(document, lambda stdout: stdout.print(text, markup=False))
