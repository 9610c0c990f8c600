"""The loop that people copy from paper repositories: Pillow in a DataLoader, float32, eager, the teacher in every step.

It is written to be as good as such loops are, not worse: no accuracy meters, no progress bar, workers where they help.
"""

import os
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cakd_cli.data import ImageDataSet
from cakd_cli.losses import Lesson, Shapes, Weights
from cakd_cli.recipe.schema import Recipe, SGDOptions


def _loader(recipe: Recipe, data: ImageDataSet) -> DataLoader[Any]:
    from torchvision import transforms

    end = [transforms.ToTensor(), transforms.Normalize(data.mean, data.std)]
    return DataLoader(
        data.train.pictures(end),
        batch_size=recipe.engine.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=min(8, os.cpu_count() or 1),
        pin_memory=torch.accelerator.is_available(),
    )


class PlainLoop:
    """The loop, ready to run some steps at a time, with the loss as it is in the first epoch.

    Args:
        recipe: Networks, data and settings; its precision, memory and layout play no part.
        data: Its data.
        student: On the device, in float32 and channels first.
        teacher: Likewise.
        device: Where it runs.
    """

    def __init__(
        self, recipe: Recipe, data: ImageDataSet, student: nn.Module, teacher: nn.Module, device: torch.device
    ) -> None:
        self._loader = _loader(recipe, data)
        self._student, self._teacher, self._device = student, teacher, device
        self._terms = Weights(recipe.loss).at(1)
        modules = (term.module(Shapes({}, {}, num_classes=data.num_classes)) for term in recipe.loss)
        self._modules = [None if module is None else module.to(device) for module in modules]
        self._batches: Iterator[Any] = iter(self._loader)
        # The engine starts the workers of image files anew for each round, and so does this loop.
        self._restarts = data.resized
        trained = [*student.parameters(), *(p for module in self._modules if module for p in module.parameters())]
        options = recipe.optimizer
        if isinstance(options, SGDOptions):
            self._optimizer: torch.optim.Optimizer = torch.optim.SGD(
                trained, lr=options.learning_rate, momentum=options.momentum, weight_decay=options.weight_decay
            )
        else:
            self._optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=options.weight_decay)

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
            lesson = Lesson(self._student(images), teacher, labels)
            loss = torch.zeros((), device=self._device)
            for term, module in zip(self._terms, self._modules, strict=True):
                loss = loss + term.factor * term(lesson, module).total
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
