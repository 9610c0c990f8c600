"""CIFAR-10, CIFAR-100 and Fashion-MNIST, downloaded, checked and parsed by torchvision."""

import gzip
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from cakd_cli.data.base import ImageDataSet
from cakd_cli.data.memory import MemoryDataSpec, memory_data_set
from cakd_cli.errors import InputError
from cakd_cli.files import home


class DownloadedSpec(MemoryDataSpec):
    """Settings of data that torchvision can fetch."""

    root: str | None = Field(None, description="folder of the data; none = $CAKD_HOME/data")

    def _open(self, data_class: Any, place: str) -> tuple[Any, Any]:
        root = Path(self.root).expanduser() if self.root else home() / "data"
        try:
            return self._both(data_class, root, download=False)
        except RuntimeError:
            pass  # torchvision's way to say that the files are not there
        try:
            root.mkdir(parents=True, exist_ok=True)
            return self._both(data_class, root, download=True)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"no {self.label} in {root}, and it cannot be downloaded: {_first_line(error)}",
                hint=f"place {place} in {root}, or name another folder with --data-root",
            ) from error

    @staticmethod
    def _both(data_class: Any, root: Path, *, download: bool) -> tuple[Any, Any]:
        return data_class(root, train=True, download=download), data_class(root, train=False, download=download)


class CifarSpec(DownloadedSpec):
    """CIFAR-10 and CIFAR-100: 60,000 colour 32x32 images."""

    type: Literal["cifar10", "cifar100"] = Field(description="number of classes")
    crop_padding: int = Field(4, ge=0, le=16, description="pixels added on each side before a random crop; 0 = none")
    horizontal_flip: bool = Field(True, description="mirror half of the training images left to right")

    def load(self) -> ImageDataSet:
        """Read the data, downloading it if it is not there."""
        from torchvision import datasets

        data_class = datasets.CIFAR10 if self.type == "cifar10" else datasets.CIFAR100
        train, test = self._open(data_class, data_class.filename)
        return memory_data_set(
            self,
            train=(torch.from_numpy(train.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(train.targets)),
            test=(torch.from_numpy(test.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(test.targets)),
            class_names=train.classes,
            source=self.label,
        )

    @property
    def label(self) -> str:
        """What a person calls this data."""
        return self.type


class FashionMnistSpec(DownloadedSpec):
    """Fashion-MNIST: 70,000 grey 28x28 images of clothes."""

    type: Literal["fashion-mnist"] = "fashion-mnist"
    crop_padding: int = Field(2, ge=0, le=16, description="pixels added on each side before a random crop; 0 = none")
    horizontal_flip: bool = Field(True, description="mirror half of the training images left to right")

    def load(self) -> ImageDataSet:
        """Read the data, downloading it if it is not there; the root may also hold the .gz files themselves."""
        from torchvision.datasets import FashionMNIST

        if self.root and (Path(self.root).expanduser() / "train-images-idx3-ubyte.gz").is_file():
            train, test = self._unpacked(FashionMNIST, Path(self.root).expanduser())
        else:
            train, test = self._open(FashionMNIST, "the four -ubyte.gz files")
        return memory_data_set(
            self,
            train=(train.data.unsqueeze(1), train.targets),
            test=(test.data.unsqueeze(1), test.targets),
            class_names=train.classes,
            source=self.label,
        )

    def _unpacked(self, data_class: Any, folder: Path) -> tuple[Any, Any]:
        with tempfile.TemporaryDirectory() as root:
            raw = Path(root) / data_class.__name__ / "raw"
            raw.mkdir(parents=True)
            try:
                for packed in folder.glob("*-ubyte.gz"):
                    with gzip.open(packed) as source, (raw / packed.stem).open("wb") as target:
                        shutil.copyfileobj(source, target)
                return self._both(data_class, Path(root), download=False)
            except (OSError, EOFError, RuntimeError, ValueError, AssertionError) as error:
                raise InputError(f"{folder}: the {self.label} files are not whole: {_first_line(error)}") from error

    @property
    def label(self) -> str:
        """What a person calls this data."""
        return "fashion-mnist"


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
