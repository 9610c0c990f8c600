"""ONNX from pixels to probabilities: normalisation and softmax are inside the graph, for whoever has only pictures.

B batch, C channels, H and W height and width.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from cakd_cli.export import onnx_file
from cakd_cli.machine.hardware import Hardware
from cakd_cli.models.normalisation import Normalisation
from cakd_cli.models.saving import SavedModel


class FromPixels(nn.Module):
    """A network that takes uint8 pixels and answers with probabilities.

    Args:
        saved: The network.
    """

    def __init__(self, saved: SavedModel) -> None:
        super().__init__()
        shown = saved.preprocessing
        self.network = saved.model.eval()
        cpu = Hardware(torch.device("cpu"), "fp32", channels_last=False)
        self.normalise = Normalisation(shown.mean, shown.std, cpu)
        self.several_labels = saved.several_labels

    def forward(self, pixels_BHWC: Tensor) -> Tensor:
        """Map pixels, channels last as Pillow and a browser's canvas have them, to (batch, classes) in [0, 1]."""
        logits: Tensor = self.network(self.normalise(pixels_BHWC.permute(0, 3, 1, 2)))
        return logits.sigmoid() if self.several_labels else logits.softmax(1)


def require() -> None:
    """Check that the extra is installed.

    Raises:
        RecipeError: If it is not.
    """
    onnx_file.require()


def write(saved: SavedModel, path: Path) -> None:
    """Write ``images``, uint8 (batch, height, width, channels), to ``probabilities`` (batch, classes), any batch."""
    channels, height, width = saved.preprocessing.input_size
    example = torch.zeros(2, height, width, channels, dtype=torch.uint8)
    described = saved.describe(pixels=True)
    onnx_file.write_graph(FromPixels(saved).eval(), example, path, output="probabilities", described=described)


def from_pixels(saved: SavedModel, images_BCHW: Tensor) -> tuple[nn.Module, Tensor]:
    """Give what the file is compared with.

    Args:
        saved: The network.
        images_BCHW: Normalised images.

    Returns:
        The network from pixels to probabilities, and the uint8 pixels of these images, channels last.
    """
    shown = saved.preprocessing
    mean, std = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (shown.mean, shown.std))
    pixels_BCHW = (255 * (images_BCHW * std + mean)).round().clamp(0, 255).to(torch.uint8)
    return FromPixels(saved).eval(), pixels_BCHW.permute(0, 2, 3, 1).contiguous()


def reload(path: Path) -> Callable[[Tensor], Tensor]:
    """Open the file as a device without torch would; it takes pixels."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(["probabilities"], {"images": pixels.numpy()})[0])
