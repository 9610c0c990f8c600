"""Writes a student in one of the formats, reads it again and compares the answers before anything is kept."""

import glob
import importlib
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from cakd_cli.errors import CheckFailedError, InputError, RecipeError, first_line
from cakd_cli.export import check
from cakd_cli.export.formats import FORMATS
from cakd_cli.files import whole_file, whole_folder
from cakd_cli.models.saving import FILES, SavedModel


def export(saved: SavedModel, images: Tensor, target: Path, kind: str, *, overwrite: bool = True) -> dict[str, Any]:
    """Write a network, read it again and compare its answers.

    Args:
        saved: The network.
        images: Normalised real images, (samples, channels, height, width).
        target: File or folder to write; it appears only once it has passed.
        kind: A name of :data:`FORMATS`.
        overwrite: Replace what is there.

    Returns:
        ``bytes``, ``samples``, ``largest_difference`` (of a logit) and ``agreement`` (share of equal answers).

    Raises:
        CheckFailedError: If torch cannot export the network, or the file answers differently; nothing is left then.
        RecipeError: If the name does not end as the format's files do, or an extra is not installed.
        InputError: If the target exists and may not be replaced.
    """
    row = FORMATS[kind]
    if row.suffix and target.suffix != row.suffix:
        raise RecipeError(f"{target} does not end in {row.suffix}", hint=f"--out {target.with_suffix(row.suffix)}")
    writer = importlib.import_module(row.module)
    writer.require()
    _clear(target, folder=not row.suffix, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) if row.suffix else whole_folder(target, replace=True) as temporary:
        try:
            writer.write(saved, temporary)
        except OSError:
            raise
        except Exception as error:
            # The exporters wrap whatever ends them, Ctrl-C included.
            if isinstance(error.__cause__, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from error
            raise CheckFailedError(
                f"torch cannot export {saved.spec.label} to {kind}: {first_line(error)}",
                hint="CAKD_DEBUG=1 shows the whole of torch's report",
            ) from error
        report = check.compare(saved.model, writer.reload(temporary), images, tolerance=row.tolerance)
    written = target if row.suffix else target / "model.safetensors"
    return {"bytes": written.stat().st_size, **report}


def _clear(target: Path, *, folder: bool, overwrite: bool) -> None:
    """Refuse a target that holds something else, and remove what a killed export of the same name left beside it.

    Raises:
        InputError: If it may not be written.
    """
    if target.exists() and target.is_dir() != folder:
        kind = "file" if folder else "folder"
        raise InputError(f"{target} is a {kind}", hint="choose another name with --out")
    content = [entry.name for entry in target.iterdir()] if target.is_dir() else []
    others = [name for name in content if name not in FILES]
    if others:
        raise InputError(f"{target} holds other files: {others[0]}", hint="choose an empty folder with --out")
    if not overwrite and (content or target.is_file()):
        raise InputError(f"{target} exists", hint="replace it with --overwrite, or choose another name with --out")
    for left in target.parent.glob(f".{glob.escape(target.name if folder else target.stem)}.*.tmp*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
