"""Writes a student in one of the formats, reads it again and compares the answers before anything is kept."""

import contextlib
import importlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from cakd_cli.errors import CheckFailedError, InputError, RecipeError, first_line
from cakd_cli.export import check
from cakd_cli.export.formats import FORMATS
from cakd_cli.files import flush, whole_file
from cakd_cli.models.saving import FILES, SavedModel


def export(saved: SavedModel, images: Tensor, target: Path, format: str) -> dict[str, Any]:  # noqa: A002
    """Write a network, read it again and compare its answers.

    Args:
        saved: The network.
        images: Normalised real images, (samples, channels, height, width).
        target: File or folder to write; it appears only once it has passed.
        format: A name of :data:`FORMATS`.

    Returns:
        ``bytes``, ``samples``, ``largest_difference`` (of a logit) and ``agreement`` (share of equal answers).

    Raises:
        CheckFailedError: If torch cannot export the network, or the file answers differently; nothing is left then.
        RecipeError: If the name does not end as the format's files do, or an extra is not installed.
        InputError: If the folder holds something else.
    """
    row = FORMATS[format]
    if row.suffix and target.suffix != row.suffix:
        raise RecipeError(f"{target} does not end in {row.suffix}", hint=f"--out {target.with_suffix(row.suffix)}")
    writer = importlib.import_module(row.module)
    writer.require()
    with whole_file(target) if row.suffix else _folder(target) as temporary:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            writer.write(saved, temporary)
        except OSError:
            raise
        except Exception as error:
            # The exporters wrap whatever ends them, Ctrl-C included.
            if isinstance(error.__cause__, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from error
            raise CheckFailedError(
                f"torch cannot export {saved.spec.label} to {format}: {first_line(error)}",
                hint="CAKD_DEBUG=1 shows the whole of torch's report",
            ) from error
        report = check.compare(saved.model, writer.reload(temporary), images, tolerance=row.tolerance)
    written = target if row.suffix else target / "model.safetensors"
    return {"bytes": written.stat().st_size, **report}


@contextlib.contextmanager
def _folder(target: Path) -> Iterator[Path]:
    """Give a folder inside the target; on success its files take their places one by one.

    Raises:
        InputError: If the target holds other files than such a folder's.
    """
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file", hint="choose another folder with --out")
    others = [entry.name for entry in target.iterdir()] if target.is_dir() else []
    others = [name for name in others if name not in FILES]
    if others:
        raise InputError(f"{target} holds other files: {others[0]}", hint="choose an empty folder with --out")
    created = not target.exists()
    temporary = target / f".{uuid.uuid4().hex[:8]}.tmp"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for name in FILES:
            flush(temporary / name)
            (temporary / name).replace(target / name)
        flush(target)
    except BaseException:
        if created:
            shutil.rmtree(target, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
