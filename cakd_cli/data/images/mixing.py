"""MixUp (arXiv 1710.09412) and CutMix (arXiv 1905.04899): images of a batch in pairs, with the labels of both.

Shape suffixes: B batch, C channels, H and W height and width.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cakd_cli.data.base import WHOLE, Batch, Share, Split
from cakd_cli.data.images.augmentation import sample_seed
from cakd_cli.errors import RecipeError

Mix = Literal["none", "mixup", "cutmix", "both"]


class MixedSplit(Split):
    """A split whose training batches are mixed; everything else is as it was.

    Args:
        split: What is mixed.
        mix: How; ``both`` draws one of them for each batch.
        alpha: Both parameters of the beta distribution that an image's share is drawn from.
    """

    def __init__(self, split: Split, mix: Mix, alpha: float) -> None:
        self._split, self._mix, self._alpha = split, mix, alpha
        self.samples = split.samples

    @property
    def views(self) -> None:
        """There is no end of mixed images."""
        return None

    def __len__(self) -> int:
        """Count the samples."""
        return len(self._split)

    def train_batches(
        self, *, batch_size: int, seed: int, epoch: int, start: int, device: torch.device, share: Share = WHOLE
    ) -> Iterator[Batch]:
        """Yield mixed batches; how much and where is a function of (seed, epoch, number of the batch) alone."""
        batches = self._split.train_batches(
            batch_size=batch_size, seed=seed, epoch=epoch, start=start, device=device, share=share
        )
        for number, batch in enumerate(batches, start):
            yield mixed(batch, self._mix, self._alpha, random.Random(sample_seed(seed, epoch, number)))

    def ordered_batches(self, *, batch_size: int, device: torch.device) -> Iterator[Batch]:
        return self._split.ordered_batches(batch_size=batch_size, device=device)

    def labels_by_number(self) -> Tensor | None:
        return self._split.labels_by_number()

    def with_second_view(self) -> Split:
        raise NotImplementedError("a recipe with both is refused")

    def subset(self, indices_N: Tensor) -> Split:
        return MixedSplit(self._split.subset(indices_N), self._mix, self._alpha)

    def pictures(self, end: list[Callable[..., Any]]) -> Dataset[Any]:
        raise RecipeError("the plain loop does not mix images", hint="data.mix=none")


def mixed(batch: Batch, mix: Mix, alpha: float, draws: random.Random) -> Batch:
    """Mix each image with that of its place from the end, all by one share.

    Args:
        batch: uint8 images; those of MixUp are rounded.
        mix: ``mixup``, ``cutmix`` or ``both``.
        alpha: Of the beta distribution, > 0.
        draws: Where share, kind and place come from; the host's, so that no device is waited for.
    """
    images = batch.images
    share = draws.betavariate(alpha, alpha)
    if mix == "mixup" or (mix == "both" and draws.random() < 0.5):
        images = torch.lerp(images.flip(0).float(), images.float(), share).round().to(torch.uint8)
    else:
        top, left, bottom, right = _box(images.shape[2], images.shape[3], share, draws)
        images = images.clone()
        images[:, :, top:bottom, left:right] = batch.images.flip(0)[:, :, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (images.shape[2] * images.shape[3])
    shares_B = torch.full((len(images),), share, device=images.device)
    return batch._replace(images=images, views=None, other_labels=batch.labels.flip(0), own_share=shares_B)


def _box(height: int, width: int, share: float, draws: random.Random) -> tuple[int, int, int, int]:
    """Place a rectangle that takes what the share leaves, around a point drawn evenly; what lies outside is lost."""
    side = (1 - share) ** 0.5
    y, x = draws.randrange(height), draws.randrange(width)
    half_height, half_width = int(height * side) // 2, int(width * side) // 2
    return max(0, y - half_height), max(0, x - half_width), min(height, y + half_height), min(width, x + half_width)
