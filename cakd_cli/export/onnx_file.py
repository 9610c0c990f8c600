"""ONNX, read again by onnxruntime."""

import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from cakd_cli.errors import RecipeError
from cakd_cli.models.saving import SavedModel


def require() -> None:
    """Check that the extra is installed.

    Raises:
        RecipeError: If it is not.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise RecipeError(f"export to ONNX needs {', '.join(missing)}", hint="pip install 'cakd[export]'")


def write(saved: SavedModel, path: Path) -> None:
    """Write ``images`` (batch, channels, height, width), normalised, to ``logits`` (batch, classes), any batch."""
    # A batch of two: torch would take the size 1 for a constant.
    example = torch.zeros(2, *saved.preprocessing.input_size)
    write_graph(saved.model.eval(), example, path, output="logits", described=saved.describe())


def write_graph(model: nn.Module, example: Tensor, path: Path, *, output: str, described: Mapping[str, Any]) -> None:
    """Write what a module does to ``images`` of any batch.

    Args:
        model: In eval mode.
        example: A batch of what it takes.
        path: File to write.
        output: Name of its answer.
        described: Metadata of the file; what is no string is written as JSON.
    """
    import onnx

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            input_names=["images"],
            output_names=[output],
            dynamic_shapes=({0: Dim("batch", min=1)},),
            external_data=False,
            verbose=False,
        )
    assert program is not None
    written = program.model_proto
    metadata = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in described.items()
    }
    onnx.helper.set_model_props(written, metadata)
    onnx.checker.check_model(written, full_check=True)
    onnx.save_model(written, str(path))


def reload(path: Path) -> Callable[[Tensor], Tensor]:
    """Open the file as a device without torch would."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
