"""ONNX in 8 bits, for onnxruntime: weights and activations are integers, scaled by what real images needed.

N samples, C channels, H and W height and width.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cakd_cli.export import onnx_file

# Images that calibrate at once.
_BATCH = 16


def require() -> None:
    """Check that the extra is installed.

    Raises:
        RecipeError: If it is not.
    """
    onnx_file.require()


def quantise(original: Path, path: Path, images_NCHW: Tensor) -> None:
    """Write a float32 ONNX file with 8-bit weights and activations; inputs and outputs stay float32.

    A weight has one scale an output channel, an activation one scale and zero point, from the least and the largest
    value that it took on the calibration images. Logits are not rounded. ``models/int8.py`` trains for these settings.

    Args:
        original: What :func:`onnx_file.write` wrote; its metadata are copied.
        path: File to write.
        images_NCHW: Normalised images to calibrate with.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        # Infers shapes, without which nothing is quantised, and folds batch norms and constants.
        quant_pre_process(original, prepared)
        quantization.quantize_static(
            prepared,
            path,
            _Images(images_NCHW),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            # Weights of 7 bits: x86 without VNNI adds two products in 16 bits, which 8 would overflow.
            reduce_range=True,
            calibrate_method=quantization.CalibrationMethod.MinMax,
            # No layer reads the logits: rounded to 256 values, the two largest would often be equal.
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
        )
    metadata = {entry.key: entry.value for entry in onnx.load(original, load_external_data=False).metadata_props}
    model = onnx.load(path)
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    onnx.save_model(model, path)


def reload(path: Path) -> Callable[[Tensor], Tensor]:
    """Open the file, or its original, with as many threads as torch has, so that times can be compared."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


class _Images:
    """What onnxruntime asks for images to calibrate with."""

    def __init__(self, images_NCHW: Tensor) -> None:
        self._batches = iter(images_NCHW.split(_BATCH))

    def get_next(self) -> dict[str, Any] | None:
        """Give the next batch by the input's name; none after the last."""
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch.numpy()}
