"""ONNX, read again by onnxruntime."""

import importlib.util
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
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
    import onnx

    example = torch.zeros(2, *saved.preprocessing.input_size)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            saved.model.eval(),
            (example,),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: Dim("batch", min=1)},),
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    metadata = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in saved.describe().items()
    }
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    onnx.save_model(model, str(path))


def reload(path: Path) -> Callable[[Tensor], Tensor]:
    """Open the file as a device without torch would."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
