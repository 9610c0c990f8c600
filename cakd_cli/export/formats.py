"""The kinds of file in which a student leaves; to add one, write its module and its row here.

Nothing else is imported, so that the command line can name them without waiting for torch. A module has ``require()``,
``write(saved, path)`` and ``reload(path)``, which gives what the file answers to normalised images. The module of a
quantised format has ``quantise(original, path, images)`` instead of ``write``.
"""

from typing import NamedTuple


class Format(NamedTuple):
    """A row.

    Attributes:
        suffix: Of its files; empty for a folder.
        default: Name inside a run directory unless another is given; a run that is replaced removes it
            (``engine/run_directory.py``).
        tolerance: Largest difference of a logit, as a share of the largest logit: programs add in another order.
            None for a quantised file: its accuracy is compared instead.
        module: Where it is written and read again.
        runs_on: What opens the file.
        extra: What must be installed beside cakd; empty for nothing.
        original: For a quantised file, the format that it is made from and compared with.
        pixels: Whether the file takes uint8 pixels and answers with probabilities; ``from_pixels(saved, images)`` of
            its module gives the network and the images that it is compared on.
    """

    suffix: str
    default: str
    tolerance: float | None
    module: str
    runs_on: str
    extra: str = ""
    original: str | None = None
    pixels: bool = False


FORMATS = {
    "onnx": Format(".onnx", "model.onnx", 1e-4, "cakd_cli.export.onnx_file", "onnxruntime", "cakd[export]"),
    "onnx-int8": Format(
        ".onnx",
        "model.int8.onnx",
        None,
        "cakd_cli.export.onnx_int8",
        "onnxruntime, in 8 bits",
        "cakd[export]",
        original="onnx",
    ),
    "onnx-uint8": Format(
        ".onnx",
        "model.uint8.onnx",
        1e-4,
        "cakd_cli.export.onnx_uint8",
        "onnxruntime, on pixels",
        "cakd[export]",
        pixels=True,
    ),
    "pt2": Format(".pt2", "model.pt2", 1e-4, "cakd_cli.export.pt2_file", "torch, without cakd"),
    "safetensors": Format("", "export", 1e-6, "cakd_cli.export.hub_folder", "Hub, timm, cakd"),
}
