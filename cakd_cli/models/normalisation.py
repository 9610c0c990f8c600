"""From pixels to what a network expects."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cakd_cli.machine.hardware import Hardware


class Normalisation:
    """From uint8 pixels to what one network expects, in one multiply and add.

    Args:
        mean: Of each channel, for pixels in [0, 1].
        std: Likewise.
        hardware: Where images live.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], hardware: Hardware) -> None:
        shape = (1, -1, 1, 1)
        deviation = torch.tensor(std, dtype=torch.float64).reshape(shape)
        self._scale = (1 / (255 * deviation)).float().to(hardware.device)
        self._shift = (-torch.tensor(mean, dtype=torch.float64).reshape(shape) / deviation).float().to(hardware.device)
        self._format = torch.channels_last if hardware.channels_last else torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise uint8 images (batch, channels, height, width) to float32 in the network's memory layout."""
        return torch.addcmul(self._shift, images.float(), self._scale).contiguous(memory_format=self._format)
