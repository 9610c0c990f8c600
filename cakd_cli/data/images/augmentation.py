"""Views of images: which crop and flip a sample gets, as a number that can be named and replayed.

With padding p an image has (2p + 1)^2 crops, twice that with flips. A view's number is a hash of
(seed, epoch, sample), so it needs no generator state and is the same on every device and worker.

Shape suffixes: B batch, N samples, H and W padded height and width, C channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _mix_int(x: int) -> int:
    # The 32-bit finaliser "lowbias32" by C. Wellons.
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK
    return x ^ (x >> 16)


def _mix(x: Tensor) -> Tensor:
    # As above on int64: products wrap around, and their low 32 bits are right.
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """Hash (seed, epoch, sample) to 32 bits."""
    return _mix_int(epoch_key(seed, epoch) ^ _mix_int(index & _MASK))


def epoch_key(seed: int, epoch: int) -> int:
    """Hash (seed, epoch) to 32 bits."""
    return _mix_int((_mix_int(seed & _MASK) + epoch * 0x9E3779B9 + 1) & _MASK)


# Any two numbers: so that what one view draws says nothing of another, nor its crop of what follows the crop.
_SECOND_VIEW, _BEYOND_THE_CROP = 0x5EC0BD, 0xA36


class Draw(NamedTuple):
    """Where the draws of a view come from.

    Attributes:
        seed: Of the run.
        epoch: From 0.
        second: Whether it is the second view of its sample.
    """

    seed: int
    epoch: int
    second: bool

    @property
    def view_seed(self) -> int:
        """Seed of the crop and the flip; the second view has others than the first."""
        return self.seed ^ (_SECOND_VIEW if self.second else 0)

    def of(self, sample: int) -> int:
        """Seed of what else is drawn for a sample, by its number in the training file."""
        return sample_seed(self.view_seed ^ _BEYOND_THE_CROP, self.epoch, sample)


def num_views(padding: int, flip: bool) -> int:
    """Count the views of an image."""
    return (2 * padding + 1) ** 2 * (2 if flip else 1)


def draw_views(index_B: Tensor, *, seed: int, epoch: int, padding: int, flip: bool) -> Tensor:
    """Choose the view of each sample in an epoch.

    Args:
        index_B: Numbers of the samples in the training file, int64.
        seed: Of the run.
        epoch: From 0.
        padding: Pixels added on each side before the crop.
        flip: Whether images may be mirrored left to right.

    Returns:
        View numbers, int64, in [0, num_views).
    """
    return _mix(_mix(index_B & _MASK) ^ epoch_key(seed, epoch)) % num_views(padding, flip)


def take_views(padded_NHWC: Tensor, position_B: Tensor, view_B: Tensor, *, padding: int, flip: bool) -> Tensor:
    """Cut the named view out of each image, all in one gather.

    Args:
        padded_NHWC: Images with ``padding`` pixels added on each side.
        position_B: Which images.
        view_B: Which view of each; the middle crop without a flip is view ``2 p (p + 1)``, doubled with flips.
        padding: Pixels added on each side.
        flip: Whether view numbers count flips (odd numbers are mirrored).

    Returns:
        (batch, channels, height, width) in channels-last memory.
    """
    device = padded_NHWC.device
    height, width = (size - 2 * padding for size in padded_NHWC.shape[1:3])
    crop_B = view_B // 2 if flip else view_B
    side = 2 * padding + 1
    rows_BH = (crop_B // side).unsqueeze(1) + torch.arange(height, device=device)
    columns_W = torch.arange(width, device=device)
    columns_BW = columns_W.expand(len(view_B), -1)
    if flip:
        columns_BW = torch.where((view_B % 2 == 1).unsqueeze(1), columns_W.flip(0), columns_W)
    columns_BW = (crop_B % side).unsqueeze(1) + columns_BW
    images_BHWC = padded_NHWC[position_B[:, None, None], rows_BH[:, :, None], columns_BW[:, None, :]]
    return images_BHWC.permute(0, 3, 1, 2)
