"""Pictures of nothing, for measurements in which only their size matters."""

from typing import Literal

import torch
from pydantic import Field

from cakd_cli.data.base import ImageDataSet
from cakd_cli.data.images.memory import MemoryDataSpec, memory_data_set

# Enough for what is measured on images that nothing is learnt from.
_TEST_IMAGES = 256


class NoiseSpec(MemoryDataSpec):
    """Uniform noise with labels in turn, for cakd bench: nothing can be learnt from it."""

    type: Literal["noise"] = "noise"
    channels: int = Field(3, ge=1, le=16, description="of an image")
    image_size: int = Field(32, ge=1, le=1024, description="height and width in pixels")
    classes: int = Field(100, ge=2, le=100_000, description="number of labels")
    images: int = Field(50_000, ge=1, le=10_000_000, description="training images, those held out included")
    crop_padding: int = Field(4, ge=0, le=16, description="pixels added on each side before a random crop; 0 = none")
    horizontal_flip: bool = Field(True, description="mirror half of the training images left to right")

    @property
    def is_noise(self) -> bool:
        return True

    def load(self, *, fetch: bool = True) -> ImageDataSet:
        """Draw the images; the same ones every time."""
        generator = torch.Generator().manual_seed(0)

        def part(count: int) -> tuple[torch.Tensor, torch.Tensor]:
            shape = (count, self.channels, self.image_size, self.image_size)
            images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            return images, torch.arange(count) % self.classes

        return memory_data_set(
            self,
            train=part(self.images),
            test=part(_TEST_IMAGES),
            class_names=[str(label) for label in range(self.classes)],
            source=self.label,
        )

    @property
    def label(self) -> str:
        return f"noise of {self.channels} x {self.image_size} x {self.image_size}"
