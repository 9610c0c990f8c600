"""Writes a student in one of the formats, reads it again and compares the answers before anything is kept."""

import contextlib
import glob
import importlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cakd_cli.data import ImageDataSet
from cakd_cli.errors import CheckFailedError, InputError, RecipeError, first_line
from cakd_cli.export import check
from cakd_cli.export.formats import FORMATS
from cakd_cli.files import whole_file, whole_folder
from cakd_cli.models.saving import FILES, SavedModel

# Training images that a quantised file is calibrated with, at most.
CALIBRATION_SAMPLES = 512


def export(
    saved: SavedModel,
    data: ImageDataSet,
    target: Path,
    kind: str,
    *,
    overwrite: bool = True,
    max_drop: float | None = None,
) -> dict[str, Any]:
    """Write a network, read it again and compare its answers.

    Args:
        saved: The network.
        data: Its images: of the test split to compare answers, of the training split to calibrate a quantised file.
        target: File or folder to write; it appears only once it has passed.
        kind: A name of :data:`FORMATS`.
        overwrite: Replace what is there.
        max_drop: By how much the accuracy of a quantised file may be lower, in [0, 1]; none for any.

    Returns:
        ``bytes``, ``samples`` and ``agreement`` (share of equal answers); ``largest_difference`` (of a logit) or, of a
        quantised file, what :func:`check.compare_quantised` measures and ``calibration_images``.

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
        if row.original is not None:
            report = _quantise(saved, data, temporary, kind, max_drop)
        else:
            assert row.tolerance is not None
            with _blamed(f"torch cannot export {saved.spec.label} to {kind}"):
                writer.write(saved, temporary)
            model, images = saved.model, check.real_images(saved, data.test, check.SAMPLES)
            if row.pixels:
                model, images = writer.from_pixels(saved, images)
            report = check.compare(model, writer.reload(temporary), images, tolerance=row.tolerance)
    written = target if row.suffix else target / "model.safetensors"
    return {"bytes": written.stat().st_size, **report}


def _quantise(saved: SavedModel, data: ImageDataSet, path: Path, kind: str, max_drop: float | None) -> dict[str, Any]:
    """Write the original, which is checked as always, and the quantised file, and compare them."""
    row = FORMATS[kind]
    assert row.original is not None
    writer = importlib.import_module(row.module)
    with tempfile.TemporaryDirectory() as folder:
        original = Path(folder) / FORMATS[row.original].default
        export(saved, data, original, row.original)
        images = check.real_images(saved, data.train, CALIBRATION_SAMPLES)
        with _blamed(f"onnxruntime cannot quantise {saved.spec.label}"):
            writer.quantise(original, path, images)
        answers = (writer.reload(original), writer.reload(path))
        report = check.compare_quantised(*answers, saved, data.test, max_drop=max_drop)
        for when, file in (("before", original), ("after", path)):
            report[when]["bytes"] = file.stat().st_size
    return {**report, "calibration_images": len(images)}


@contextlib.contextmanager
def _blamed(on: str) -> Iterator[None]:
    """Turn whatever an exporter ends with into one line.

    Raises:
        CheckFailedError: In place of any exception but the file system's and Ctrl-C.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        # The exporters wrap whatever ends them, Ctrl-C included.
        if isinstance(error.__cause__, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise CheckFailedError(f"{on}: {first_line(error)}", hint="CAKD_DEBUG=1 shows the whole report") from error


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
