"""The loop that people copy from paper repositories: Pillow in a DataLoader, float32, eager, the teacher in every step.

It is written to be as good as such loops are, not worse: no accuracy meters, no progress bar, workers where they help.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from cakd_cli.data import FolderSpec, ImageDataSet, MemorySplit
from cakd_cli.errors import RecipeError
from cakd_cli.losses import LossTerm
from cakd_cli.recipe.schema import Recipe, SGDOptions


class _Pictures(Dataset[tuple[Any, int]]):
    """What torchvision's CIFAR classes do: an array, and a picture made of it for every access."""

    def __init__(self, split: MemorySplit, transform: Callable[[Any], Tensor]) -> None:
        self._images = split.images_NCHW.cpu().permute(0, 2, 3, 1).contiguous().numpy()
        self._labels = split.labels_N.tolist()
        self._transform = transform

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        pixels = self._images[index]
        return self._transform(Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])), self._labels[
            index
        ]


def _loader(recipe: Recipe, data: ImageDataSet) -> DataLoader[Any]:
    from torchvision import datasets, transforms

    end = [transforms.ToTensor(), transforms.Normalize(data.mean, data.std)]
    spec = recipe.data
    if isinstance(spec, FolderSpec):
        crop = transforms.RandomResizedCrop(spec.image_size, scale=(spec.min_crop_area, 1.0))
        begin = [crop, *([transforms.RandomHorizontalFlip()] if spec.horizontal_flip else [])]
        pictures: Dataset[Any] = datasets.ImageFolder(
            os.path.join(os.path.expanduser(spec.path), "train"), transforms.Compose([*begin, *end])
        )
    else:
        split = data.train
        assert isinstance(split, MemorySplit)
        if data.channels not in (1, 3):
            raise RecipeError(f"Pillow has no pictures of {data.channels} channels", hint="leave out --against plain")
        flip = [transforms.RandomHorizontalFlip()] if split.flip else []
        begin = [transforms.RandomCrop(data.image_size, padding=split.padding), *flip]
        pictures = _Pictures(split, transforms.Compose([*begin, *end]))
    return DataLoader(
        pictures,
        batch_size=recipe.engine.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=min(8, os.cpu_count() or 1),
        pin_memory=torch.accelerator.is_available(),
    )


class PlainLoop:
    """The loop, ready to run some steps at a time.

    Args:
        recipe: Networks, data and settings; its precision, memory and layout play no part.
        data: Its data.
        student: On the device, in float32 and channels first.
        teacher: Likewise, or none.
        device: Where it runs.
    """

    def __init__(
        self, recipe: Recipe, data: ImageDataSet, student: nn.Module, teacher: nn.Module, device: torch.device
    ) -> None:
        self._loader = _loader(recipe, data)
        self._terms: Sequence[LossTerm] = recipe.loss
        self._student, self._teacher, self._device = student, teacher, device
        self._batches: Iterator[Any] = iter(self._loader)
        # The engine starts its workers anew for each round of a folder, and so does this loop.
        self._restarts = isinstance(recipe.data, FolderSpec)
        rate = recipe.optimizer.learning_rate
        if isinstance(recipe.optimizer, SGDOptions):
            momentum = recipe.optimizer.momentum
            self._optimizer: torch.optim.Optimizer = torch.optim.SGD(
                student.parameters(), lr=rate, momentum=momentum, weight_decay=recipe.optimizer.weight_decay
            )
        else:
            decay = recipe.optimizer.weight_decay
            self._optimizer = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=decay)

    def run(self, steps: int) -> float:
        """Run some steps and return their seconds."""
        self._student.train()
        self._teacher.eval()
        if self._restarts:
            self._batches = iter(self._loader)
        started = time.perf_counter()
        for _ in range(steps):
            images, labels = self._next()
            images, labels = images.to(self._device), labels.to(self._device)
            with torch.no_grad():
                teacher = self._teacher(images)
            student = self._student(images)
            loss = sum((term.weight * term(student, teacher, labels).total for term in self._terms), torch.zeros(()))
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            loss.item()  # for the average that such loops print; on an accelerator it waits
        return time.perf_counter() - started

    def _next(self) -> tuple[Tensor, Tensor]:
        batch = next(self._batches, None)
        if batch is None:
            self._batches = iter(self._loader)
            batch = next(self._batches)
        return batch[0], batch[1]
