"""How a student leaves: ONNX, torch.export and the Hub folder, each checked against the original."""

from pathlib import Path
from typing import Any

from torch import Tensor

from cakd_cli.engine.saved_model import SavedModel
from cakd_cli.errors import CheckFailedError, InputError, RecipeError
from cakd_cli.export import check, onnx_file, pt2_file
from cakd_cli.files import whole_file

_WRITERS = {"onnx": onnx_file, "pt2": pt2_file}


def to_file(saved: SavedModel, images: Tensor, target: Path, format: str) -> dict[str, Any]:  # noqa: A002
    """Write one file, read it again and compare its answers.

    Args:
        saved: The network.
        images: Normalised real images, (samples, channels, height, width).
        target: File to write; it appears only once it has passed.
        format: ``onnx`` or ``pt2``.

    Returns:
        ``bytes``, ``samples``, ``largest_difference`` (of a logit) and ``agreement`` (share of equal answers).

    Raises:
        CheckFailedError: If torch cannot export the network, or the file answers differently; nothing is left then.
        RecipeError: If the name does not end as the format's files do, or an extra is not installed.
    """
    if target.suffix != f".{format}":
        raise RecipeError(f"{target} does not end in .{format}", hint=f"--out {target.with_suffix(f'.{format}')}")
    writer = _WRITERS[format]
    writer.require()
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as temporary:
        try:
            writer.write(saved, temporary)
        except OSError:
            raise
        except Exception as error:
            if isinstance(error.__cause__, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from error
            raise CheckFailedError(
                f"torch cannot export {saved.spec.label} to {format}: {str(error).strip().splitlines()[0]}",
                hint="CAKD_DEBUG=1 shows the whole of torch's report",
            ) from error
        report = check.compare(saved.model, writer.reload(temporary), images)
    return {"bytes": target.stat().st_size, **report}


def check_folder(target: Path) -> None:
    """Refuse a folder in which the Hub's three files would lie among others.

    Raises:
        InputError: If there are others.
    """
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file", hint="choose another folder with --out")
    others = [entry.name for entry in target.iterdir()] if target.is_dir() else []
    others = [name for name in others if name not in ("model.safetensors", "config.json", "README.md")]
    if others:
        raise InputError(f"{target} holds other files: {others[0]}", hint="choose an empty folder with --out")
    target.mkdir(parents=True, exist_ok=True)
