"""CIFAR-10, CIFAR-100, Fashion-MNIST and STL-10, downloaded, checked and parsed by torchvision."""

import gzip
import shutil
import tempfile
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from cakd_cli.data.base import ImageDataSet
from cakd_cli.data.images.memory import MemoryDataSpec, MemorySplit, memory_data_set
from cakd_cli.errors import InputError, first_line
from cakd_cli.files import home


class DownloadedSpec(MemoryDataSpec):
    """Settings of data that torchvision can fetch."""

    # Of the whole set: training images, test images, (channels, height, width), megabytes to download.
    sizes: ClassVar[tuple[int, int, tuple[int, int, int], int]]
    # What a person without a network places where.
    archive: ClassVar[str] = ""

    root: str | None = Field(None, description="folder of the data; none = $CAKD_HOME/data")

    @property
    def _folder(self) -> Path:
        return Path(self.root).expanduser() if self.root else home() / "data"

    def _data_class(self) -> Any:
        raise NotImplementedError

    def _read(self) -> tuple[Any, Any]:
        """Give both parts as torchvision has them.

        Raises:
            RuntimeError: If they are not here.
        """
        return self._both(self._folder, download=False)

    def _both(self, root: Path, *, download: bool) -> tuple[Any, Any]:
        data_class = self._data_class()
        return data_class(root, train=True, download=download), data_class(root, train=False, download=download)

    def missing_file(self) -> str | None:
        try:
            self._read()
        except RuntimeError:  # torchvision's way to say that the files are not there
            return f"{self.label}, {self.sizes[3]} MB, into {self._folder}"
        return None

    def load(self, *, fetch: bool = True) -> ImageDataSet:
        """Read the data, downloading it if it is not here and may be."""
        try:
            train, test = self._read()
        except RuntimeError:
            if not fetch:
                return self._stand_in()
            train, test = self._download()
        return memory_data_set(
            self,
            train=self._tensors(train),
            test=self._tensors(test),
            class_names=train.classes,
            source=self.label,
        )

    def _download(self) -> tuple[Any, Any]:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            return self._both(self._folder, download=True)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"no {self.label} in {self._folder}, and it cannot be downloaded: {first_line(error)}",
                hint=f"place {self.archive} in {self._folder}, or name another folder with --data-root",
            ) from error

    @staticmethod
    def _tensors(part: Any) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def _stand_in(self) -> ImageDataSet:
        """One black image in the place of all: what a dry run needs to know of data that is not here."""
        train, test, shape, _ = self.sizes
        names = self._data_class().classes if hasattr(self._data_class(), "classes") else None
        classes = len(names) if names else int(self.type.removeprefix("cifar"))

        def part(count: int) -> MemorySplit:
            images = torch.zeros(1, *shape, dtype=torch.uint8).expand(count, -1, -1, -1)
            labels = torch.arange(count) % classes
            padding, flip = self.crop_padding, self.horizontal_flip
            return MemorySplit(images, labels, torch.arange(count), samples=train, padding=padding, flip=flip)

        held = round(train * self.validation_fraction)
        return ImageDataSet(
            name=self.label,
            train=part(train - held),
            validation=part(held) if held else None,
            test=part(test),
            class_names=tuple(names or map(str, range(classes))),
            channels=shape[0],
            image_size=shape[1:],
            mean=(0.5,) * shape[0],
            std=(0.25,) * shape[0],
            fingerprints={},
        )


class CifarSpec(DownloadedSpec):
    """CIFAR-10 and CIFAR-100: 60,000 colour 32x32 images."""

    sizes = (50_000, 10_000, (3, 32, 32), 170)

    type: Literal["cifar10", "cifar100"] = Field(description="number of classes")
    crop_padding: int = Field(4, ge=0, le=16, description="pixels added on each side before a random crop; 0 = none")
    horizontal_flip: bool = Field(True, description="mirror half of the training images left to right")

    def _data_class(self) -> Any:
        from torchvision import datasets

        return datasets.CIFAR10 if self.type == "cifar10" else datasets.CIFAR100

    @property
    def archive(self) -> str:  # type: ignore[override]
        return str(self._data_class().filename)

    @staticmethod
    def _tensors(part: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)


class FashionMnistSpec(DownloadedSpec):
    """Fashion-MNIST: 70,000 grey 28x28 images of clothes."""

    sizes = (60_000, 10_000, (1, 28, 28), 31)
    archive = "the four -ubyte.gz files"

    type: Literal["fashion-mnist"] = "fashion-mnist"
    crop_padding: int = Field(2, ge=0, le=16, description="pixels added on each side before a random crop; 0 = none")
    horizontal_flip: bool = Field(True, description="mirror half of the training images left to right")

    def _data_class(self) -> Any:
        from torchvision.datasets import FashionMNIST

        return FashionMNIST

    def _read(self) -> tuple[Any, Any]:
        """Give both parts; the root may also hold the .gz files themselves."""
        if self.root and (self._folder / "train-images-idx3-ubyte.gz").is_file():
            return self._unpacked()
        return super()._read()

    @staticmethod
    def _tensors(part: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return part.data.unsqueeze(1), part.targets

    def _unpacked(self) -> tuple[Any, Any]:
        with tempfile.TemporaryDirectory() as root:
            raw = Path(root) / "FashionMNIST" / "raw"
            raw.mkdir(parents=True)
            try:
                for packed in self._folder.glob("*-ubyte.gz"):
                    with gzip.open(packed) as source, (raw / packed.stem).open("wb") as target:
                        shutil.copyfileobj(source, target)
                return self._both(Path(root), download=False)
            except (OSError, EOFError, RuntimeError, ValueError, AssertionError) as error:
                raise InputError(
                    f"{self._folder}: the {self.label} files are not whole: {first_line(error)}"
                ) from error


class Stl10Spec(DownloadedSpec):
    """STL-10: 13,000 colour 96x96 images of 10 classes; its unlabelled images are not used."""

    sizes = (5_000, 8_000, (3, 96, 96), 2_640)
    archive = "stl10_binary.tar.gz"

    type: Literal["stl10"] = "stl10"
    crop_padding: int = Field(12, ge=0, le=16, description="pixels added on each side before a random crop; 0 = none")
    horizontal_flip: bool = Field(True, description="mirror half of the training images left to right")

    def _data_class(self) -> Any:
        from torchvision.datasets import STL10

        # Of the 100,000 unlabelled images torchvision would want a checksum, and read 2.8 GB for it.
        return type("Labelled", (STL10,), {"train_list": STL10.train_list[:2], "classes": _STL10_CLASSES})

    def _both(self, root: Path, *, download: bool) -> tuple[Any, Any]:
        data_class = self._data_class()
        return data_class(root, "train", download=download), data_class(root, "test", download=download)

    @staticmethod
    def _tensors(part: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(part.data).contiguous(), torch.from_numpy(part.labels)


_STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
