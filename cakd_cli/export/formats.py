"""The kinds of file in which a student leaves; to add one, write its module and its row here.

Nothing else is imported, so that the command line can name them without waiting for torch. A module has ``require()``,
``write(saved, path)`` and ``reload(path)``, which gives what the file answers to normalised images.
"""

from typing import NamedTuple


class Format(NamedTuple):
    """A row.

    Attributes:
        suffix: Of its files; empty for a folder.
        default: Name inside a run directory unless another is given; a run that is replaced removes it
            (``engine/run_directory.py``).
        tolerance: Largest difference of a logit, as a share of the largest logit: programs add in another order.
        module: Where it is written and read again.
    """

    suffix: str
    default: str
    tolerance: float
    module: str


FORMATS = {
    "onnx": Format(".onnx", "model.onnx", 1e-4, "cakd_cli.export.onnx_file"),
    "pt2": Format(".pt2", "model.pt2", 1e-4, "cakd_cli.export.pt2_file"),
    "safetensors": Format("", "export", 1e-6, "cakd_cli.export.hub_folder"),
}
