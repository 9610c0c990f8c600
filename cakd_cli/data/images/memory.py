"""Data sets that fit in memory: uint8 on the device, augmented there a whole batch at a time.

Shape suffixes: B batch, N samples, C channels, H and W height and width.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from cakd_cli.data.base import (
    WHOLE,
    Batch,
    ImageDataSet,
    Share,
    Split,
    Views,
    hold_out,
    to_device,
)
from cakd_cli.data.images.augmentation import Draw, draw_views, epoch_key, num_views, take_views
from cakd_cli.data.images.strong import AugmentedSpec, Transform, each
from cakd_cli.errors import InputError, RecipeError


class MemorySplit(Split):
    """Images and labels as tensors.

    Args:
        images_NCHW: uint8.
        labels_N: Class indices; for several labels an image bool (samples, classes).
        number_N: The sample's number in its file, which names its views; on the CPU.
        samples: Samples in the file.
        padding: Pixels of padding before a random crop; 0 = no crop.
        flip: Whether training images may be mirrored.
    """

    def __init__(
        self, images_NCHW: Tensor, labels_N: Tensor, number_N: Tensor, *, samples: int, padding: int, flip: bool
    ) -> None:
        self.images_NCHW = images_NCHW
        self.labels_N = labels_N
        self.number_N = number_N
        self.samples = samples
        self.padding = padding
        self.flip = flip
        self._padded_NHWC: Tensor | None = None
        # Beyond the crop and the flip: of the view, and of the second one; each none if nothing is done.
        self._augment: Transform | None = None
        self._second: Transform | None = None
        self._has_second = False

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.labels_N)

    @property
    def views(self) -> Views | None:
        """Describe the crops and flips of the file's samples; none where more is done to them."""
        if self._augment is not None:
            return None
        height, width = self.images_NCHW.shape[2:]
        identity = f"crop {height}x{width} of padding {self.padding}" + (", flip" if self.flip else "")
        return Views(self.samples, num_views(self.padding, self.flip), identity)

    def to(self, device: torch.device) -> "MemorySplit":
        """Return the split with its data on a device, so that batches need no transfer."""
        return self._like(self.images_NCHW.to(device), self.labels_N.to(device), self.number_N)

    def augmented(self, augment: Transform | None, second: Transform | None) -> "MemorySplit":
        """Return the split whose training images, and second views, are augmented beyond the crop and the flip."""
        split = self._like(self.images_NCHW, self.labels_N, self.number_N)
        split._augment, split._second = augment, second
        return split

    def with_second_view(self) -> "MemorySplit":
        """Return the split whose training batches hold a second view of each image."""
        split = self._like(self.images_NCHW, self.labels_N, self.number_N)
        split._has_second = True
        return split

    def _like(self, images_NCHW: Tensor, labels_N: Tensor, number_N: Tensor) -> "MemorySplit":
        split = MemorySplit(images_NCHW, labels_N, number_N, samples=self.samples, padding=self.padding, flip=self.flip)
        split._augment, split._second, split._has_second = self._augment, self._second, self._has_second
        return split

    def num_bytes(self) -> int:
        """Memory that training on this split takes, in bytes: the images, and their padded copy."""
        channels, height, width = self.images_NCHW.shape[1:]
        padded = channels * (height + 2 * self.padding) * (width + 2 * self.padding)
        return self.images_NCHW.nbytes + len(self) * padded

    def subset(self, indices_N: Tensor) -> "MemorySplit":
        """Return the split of the samples at these positions."""
        home_N = indices_N.to(self.labels_N.device)
        return self._like(self.images_NCHW[home_N], self.labels_N[home_N], self.number_N[indices_N.cpu()])

    def train_batches(
        self, *, batch_size: int, seed: int, epoch: int, start: int, device: torch.device, share: Share = WHOLE
    ) -> Iterator[Batch]:
        """Yield a share of the batches of an epoch, shuffled and augmented, from batch number ``start`` on."""
        if self._padded_NHWC is None:
            padded = functional.pad(self.images_NCHW, [self.padding] * 4)
            self._padded_NHWC = padded.permute(0, 2, 3, 1).contiguous()
        # Drawn on the CPU, so that every device sees one order and the host knows each view; one transfer an epoch.
        order_N = torch.randperm(len(self), generator=torch.Generator().manual_seed(epoch_key(seed, epoch)))
        order_N, size = share.of(order_N, batch_size), batch_size // share.ranks
        number_N = self.number_N[order_N]
        views = self.views
        keys = [Draw(seed, epoch, second=False)] + ([Draw(seed, epoch, second=True)] if self._has_second else [])
        view_KN = [
            draw_views(number_N, seed=key.view_seed, epoch=epoch, padding=self.padding, flip=self.flip) for key in keys
        ]
        name_N = None if views is None else number_N * views.per_sample + view_KN[0]
        order_N, sample_N, *on_home_KN = (x.to(self.labels_N.device) for x in (order_N, number_N, *view_KN))
        for first in range(start * size, len(order_N), size):
            chosen = slice(first, first + size)
            images, *strong = (
                to_device(self._seen(order_N[chosen], view_N[chosen], number_N[chosen], key), device)
                for view_N, key in zip(on_home_KN, keys, strict=True)
            )
            labels, samples = (to_device(x, device) for x in (self.labels_N[order_N[chosen]], sample_N[chosen]))
            names = None if name_N is None else name_N[chosen]
            yield Batch(images, labels, names, samples, strong[0] if strong else None)

    def _seen(self, position_B: Tensor, view_B: Tensor, number_B: Tensor, draw: Draw) -> Tensor:
        """Cut views out, and augment them as their draw says."""
        assert self._padded_NHWC is not None
        images = take_views(self._padded_NHWC, position_B, view_B, padding=self.padding, flip=self.flip)
        transform = self._second if draw.second else self._augment
        return (
            images if transform is None else each(transform, images, [draw.of(number) for number in number_B.tolist()])
        )

    def ordered_batches(self, *, batch_size: int, device: torch.device) -> Iterator[Batch]:
        """Yield every sample once, in order, without augmentation."""
        for images, labels in zip(self.images_NCHW.split(batch_size), self.labels_N.split(batch_size), strict=True):
            yield Batch(images.to(device), labels.to(device))

    def labels_by_number(self) -> Tensor | None:
        """Class of each sample of the file, -1 for those that are not in the split; none for several labels."""
        if self.labels_N.ndim > 1:
            return None
        labels_N = torch.full((self.samples,), -1)
        labels_N[self.number_N] = self.labels_N.cpu()
        return labels_N

    def pictures(self, end: list[Callable[..., Any]]) -> Dataset[Any]:
        """What torchvision's CIFAR classes do: an array, and a picture made of it for every access."""
        from torchvision import transforms

        channels, height, width = self.images_NCHW.shape[1:]
        if channels not in (1, 3):
            raise RecipeError(f"Pillow has no pictures of {channels} channels", hint="leave out --against plain")
        flip = [transforms.RandomHorizontalFlip()] if self.flip else []
        begin = [transforms.RandomCrop((height, width), padding=self.padding), *flip]
        return _Pictures(self, transforms.Compose([*begin, *end]))


class _Pictures(Dataset[tuple[Any, int]]):
    def __init__(self, split: MemorySplit, transform: Callable[[Any], Tensor]) -> None:
        self._images = split.images_NCHW.cpu().permute(0, 2, 3, 1).contiguous().numpy()
        self._labels = split.labels_N.tolist()
        self._transform = transform

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        pixels = self._images[index]
        picture = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
        return self._transform(picture), self._labels[index]


class MemoryDataSpec(AugmentedSpec):
    """Settings of data that fits in memory."""

    crop_padding: int = Field(0, ge=0, le=16, description="pixels added on each side before a random crop; 0 = none")
    horizontal_flip: bool = Field(False, description="mirror half of the training images left to right")


def memory_data_set(
    spec: MemoryDataSpec,
    *,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    class_names: Sequence[str],
    source: str,
) -> ImageDataSet:
    """Check tensors, hold out the validation split and measure the normalisation.

    Args:
        spec: The recipe's settings.
        train: uint8 images (samples, channels, height, width) and class indices, or 0 and 1 (samples, classes).
        test: Likewise.
        class_names: One name a class.
        source: What to call the data in an error.

    Raises:
        InputError: If shapes, types or labels do not fit.
    """
    if len(set(class_names)) != len(class_names) or len(class_names) < 2:
        raise InputError(
            f"{source}: {len(class_names)} class names, {len(set(class_names))} of them different",
            hint="a classifier needs two classes at least, each with a name of its own",
        )
    _check_parts(train, test, len(class_names), source)
    splits = [
        MemorySplit(
            images, _class_labels(labels), torch.arange(len(labels)), samples=len(labels), padding=padding, flip=flip
        )
        for (images, labels), padding, flip in (
            (train, spec.crop_padding, spec.horizontal_flip),
            (test, 0, False),
        )
    ]
    splits[0] = splits[0].augmented(spec.augmentation(), spec.augmentation(second=True))
    # Images of several labels have no class of which each part could hold its share.
    strata_N = splits[0].labels_N if train[1].ndim == 1 else torch.zeros(len(train[1]), dtype=torch.long)
    keep, held = hold_out(strata_N, spec.validation_fraction, spec.split_seed)
    mean, std = _channel_statistics(train[0])
    return ImageDataSet(
        name=spec.label,
        train=splits[0].subset(keep),
        validation=splits[0].subset(held) if len(held) else None,
        test=splits[1],
        class_names=tuple(class_names),
        channels=train[0].shape[1],
        image_size=(train[0].shape[2], train[0].shape[3]),
        mean=mean,
        std=std,
        fingerprints={"train": _fingerprint(*train), "test": _fingerprint(*test)},
        multi_label=train[1].ndim == 2,
    )


def _class_labels(labels: Tensor) -> Tensor:
    return labels.long() if labels.ndim == 1 else labels.bool()


def _check_parts(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], num_classes: int, source: str) -> None:
    for part, (images, labels) in (("train", train), ("test", test)):
        _check(images, labels, num_classes, f"{source}: {part}")
    if train[1].ndim != test[1].ndim:
        raise InputError(
            f"{source}: train labels are {tuple(train[1].shape)}, test labels {tuple(test[1].shape)}",
            hint="both must be one integer an image, or both 0 and 1 of shape (images, classes)",
        )
    if train[0].shape[1:] != test[0].shape[1:]:
        raise InputError(
            f"{source}: train images are {tuple(train[0].shape[1:])}, test images {tuple(test[0].shape[1:])}",
            hint="both must have one (channels, height, width)",
        )


def _check(images: Tensor, labels: Tensor, num_classes: int, source: str) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
        raise InputError(
            f"{source} images are {tuple(images.shape)} of {str(images.dtype).removeprefix('torch.')}",
            hint="they must be uint8 of shape (samples, channels, height, width)",
        )
    if labels.ndim == 2 and labels.shape == (len(images), num_classes) and not labels.dtype.is_floating_point:
        if labels.long().min() < 0 or labels.long().max() > 1:
            raise InputError(
                f"{source} labels of shape {tuple(labels.shape)} run from {labels.min()} to {labels.max()}",
                hint="for several labels an image they must be 0 and 1",
            )
        if not labels.any():
            raise InputError(f"{source} labels are all 0", hint="at least one image must have a label")
        return
    if labels.shape != images.shape[:1] or labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise InputError(
            f"{source} labels are {tuple(labels.shape)} of {str(labels.dtype).removeprefix('torch.')} "
            f"for {len(images)} images",
            hint=f"they must be one integer an image, or 0 and 1 of shape (images, {num_classes} classes)",
        )
    labels = labels.long()
    if labels.min() < 0 or labels.max() >= num_classes:
        raise InputError(
            f"{source} labels run from {labels.min()} to {labels.max()}, but there are {num_classes} classes",
            hint=f"labels must be 0 to {num_classes - 1}",
        )


def _channel_statistics(images_NCHW: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Exact mean and standard deviation of each channel, of pixels in [0, 1]."""
    means, stds = [], []
    values = torch.arange(256, dtype=torch.float64) / 255
    for channel in images_NCHW.unbind(1):
        share = channel.flatten().bincount(minlength=256).double() / channel.numel()
        mean = (share * values).sum()
        # A constant channel has no spread to divide by.
        std = (share * (values - mean).square()).sum().sqrt().clamp(min=1 / 255)
        means.append(round(mean.item(), 6))
        stds.append(round(std.item(), 6))
    return tuple(means), tuple(stds)


def _fingerprint(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
