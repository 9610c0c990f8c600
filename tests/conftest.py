"""What many tests share: the command line in this process, and small data of the real formats."""

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cakd_cli.process import main

# The nets here are so small that a second thread only waits, and on a busy machine waits long.
torch.set_num_threads(1)


def some_daily(values: Sequence[Any], *daily: Any) -> list[Any]:
    """Parameters of which only some are tried in the daily suite, and all with ``pytest -m "slow or not slow"``."""
    return [value if value in daily else pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.fixture(scope="session", autouse=True)
def _shared_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("CAKD_HOME", str(folder))
        yield folder


_numbers = itertools.count()


@pytest.fixture(autouse=True)
def home(_shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own: no test finds what another has asked a teacher.

    Not in ``tmp_path``, which costs each of thousands of tests a look at the folders of all before it.
    """
    folder = _shared_home / f"of test {next(_numbers)}"
    monkeypatch.setenv("CAKD_HOME", str(folder))
    return folder


@pytest.fixture(autouse=True)
def _short_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast a network is decides no test."""
    monkeypatch.setattr("cakd_cli.evaluation.cost._SECONDS", 0.01)


@dataclass(frozen=True)
class Result:
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def cakd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Call the command line as the installed script does, without the cost of a process."""
    monkeypatch.delenv("CAKD_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")

    def call(*words: object) -> Result:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["cakd", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return Result(stop.value.code, captured.out, captured.err)

    return call


def write_tensors_file(path: Path, *, classes: int = 4, channels: int = 1, size: int = 8, names: bool = True) -> Path:
    """Write a learnable data set: each class is a bright quarter of a noisy image."""
    generator = torch.Generator().manual_seed(7)

    def part(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(count) % classes
        images = torch.randint(0, 90, (count, channels, size, size), generator=generator)
        half = size // 2
        for i, label in enumerate(labels.tolist()):
            row, column = divmod(label % 4, 2)
            images[i, :, row * half : (row + 1) * half, column * half : (column + 1) * half] += 120 + 10 * (label // 4)
        return images.to(torch.uint8), labels

    (train_images, train_labels), (test_images, test_labels) = part(160), part(64)
    metadata = {"class_names": json.dumps([f"class {i}" for i in range(classes)])} if names else None
    save_file(
        {
            "train_images": train_images,
            "train_labels": train_labels,
            "test_images": test_images,
            "test_labels": test_labels,
        },
        path,
        metadata=metadata,
    )
    return path


@pytest.fixture(scope="session")
def toy_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tensors_file(tmp_path_factory.mktemp("toy") / "toy.safetensors")


@pytest.fixture(scope="session")
def toy_teacher(toy_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the toy data."""
    return train_toy(toy_file, tmp_path_factory.mktemp("runs") / "teacher")


def train_toy(data: Path, out: Path, *words: str, **flags: Any) -> Path:
    from cakd_cli.commands.train import Wish, train
    from cakd_cli.console import Console

    defaults = {"data": f"tensors:{data}", "model": "resnet8", "engine.epochs": 4, "engine.batch_size": 16}
    train(
        ["engine.precision=fp32", "data.crop_padding=0", "optimizer.learning_rate=0.05", *words],
        defaults | flags,
        Wish(distil="teacher" in flags, out=str(out)),
        console=Console(quiet=True),
    )
    return out
