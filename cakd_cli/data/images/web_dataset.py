"""Images in the tars of webdataset: the index of each is read once, and images from their places in it."""

import functools
import glob
import json
import os
import re
import tarfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

from pydantic import Field
from torch import Tensor

from cakd_cli.data.images.divided import DividedSpec, check_parts
from cakd_cli.data.images.files import Listing
from cakd_cli.data.images.pictures import Entry, Facts, Files, facts_of
from cakd_cli.errors import InputError, first_line

_IMAGES = ("jpg", "jpeg", "png", "webp")
_LABELS = ("cls", "json")
_MOST_TARS = 100_000


class _Place(NamedTuple):
    """Where something lies in a tar: its name there, the first byte, and how many."""

    name: str
    offset: int
    size: int


class _Sample(NamedTuple):
    """An image of a tar and its label as it is written."""

    image: _Place
    label: str


class TarredFiles(Files):
    """Images in tars, by name ``TAR:NAME``.

    Args:
        found: Tar, place and label of each.
    """

    on_disk: ClassVar[bool] = False

    def __init__(self, found: Iterable[tuple[str, _Place, int]]) -> None:
        tars: dict[str, int] = {}
        self._tar_N, self._offset_N, self._size_N = array("q"), array("q"), array("q")

        def pairs() -> Iterator[tuple[str, int]]:
            for tar, place, label in found:
                self._tar_N.append(tars.setdefault(tar, len(tars)))
                self._offset_N.append(place.offset)
                self._size_N.append(place.size)
                yield f"{tar}:{place.name}", label

        super().__init__(pairs())
        self._tars = list(tars)

    def open(self, index: int) -> Entry:
        """Read the content of one image."""
        with Path(self._tars[self._tar_N[index]]).open("rb") as tar:
            tar.seek(self._offset_N[index])
            return Entry(self.path(index), tar.read(self._size_N[index]))

    def facts(self, index: int) -> Facts:
        """Tell the image's size, and when its tar was written."""
        return facts_of(self._tars[self._tar_N[index]])._replace(size=self._size_N[index])

    def subset(self, indices_N: Tensor) -> "TarredFiles":
        """Take the images at these positions."""
        return TarredFiles(self._found(index) for index in indices_N.tolist())

    def _found(self, index: int) -> tuple[str, _Place, int]:
        tar = self._tars[self._tar_N[index]]
        name = self.path(index)[len(tar) + 1 :]
        return tar, _Place(name, self._offset_N[index], self._size_N[index]), int(self.labels_N[index])


class WebDatasetSpec(DividedSpec):
    """Tars of webdataset, each image beside its label (cls or json): wds:PATH, as 'wds:train-{000..099}.tar'."""

    layout: ClassVar[str] = "tars of KEY.jpg and KEY.cls"

    type: Literal["wds"] = "wds"
    path: str = Field(description="training tars, with braces and wildcards: train-{000..099}.tar, train-*.tar")
    val_path: str | None = Field(None, description="tars of held-out images likewise; none = a share of training's")
    test_path: str | None = Field(None, description="tars of the test set likewise; none = a share of training's")
    json_key: str = Field("label", min_length=1, description="key of the label in KEY.json, where there is no KEY.cls")
    class_names: str | None = Field(
        None, description="text file with a name a line, in the order of the numbers; none = labels are names"
    )

    @property
    def label(self) -> str:
        return re.split(r"[^\w-]", Path(self.path).name)[0].strip("-_") or self.type

    def listing(self) -> Listing:
        patterns = {"train": self.path, "val": self.val_path, "test": self.test_path}
        tars = {part: _expand(pattern) for part, pattern in patterns.items() if pattern is not None}
        _check_apart(tars)
        samples = {part: _samples(paths, self.json_key) for part, paths in tars.items()}
        classes = self._classes(samples)
        labels = {name: label for label, name in enumerate(classes)}
        if self.class_names is not None:
            labels = {str(label): label for label in range(len(classes))}
        parts: dict[str, Files] = {
            part: TarredFiles((tar, sample.image, _label(tar, sample, labels)) for tar, sample in found)
            for part, found in samples.items()
        }
        root = Path(os.path.commonpath([Path(tar).absolute().parent for paths in tars.values() for tar in paths]))
        check_parts(Path(self.path), parts, classes)
        if "test" in parts:
            return Listing(root, parts, classes)
        divided = self._divided(root, parts["train"], classes, why="data.test_path is not set")
        if "val" in parts:
            train, test = divided.parts.values()
            divided = divided._replace(parts={"train": train, "val": parts["val"], "test": test})
        return divided

    def _classes(self, samples: dict[str, list[tuple[str, _Sample]]]) -> Sequence[str]:
        """Name the classes: by a file, or by the labels themselves, numbers in their order."""
        if self.class_names is not None:
            try:
                names = Path(self.class_names).expanduser().read_text(encoding="utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(
                    f"data.class_names {self.class_names}: cannot be read: {error}",
                    hint="name a text file in UTF-8 with a name a line",
                ) from error
            return [name.strip() for name in names if name.strip()]
        found = {sample.label for of_part in samples.values() for _, sample in of_part}
        return sorted(found, key=int) if all(map(str.isdecimal, found)) else sorted(found)


def _expand(pattern: str) -> list[str]:
    """Name the files of a pattern with braces and wildcards.

    Raises:
        InputError: If there is none, or one is not there.
    """
    found: list[str] = []
    for name in _braces(os.path.expanduser(pattern)):
        matches = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
        if not matches or not os.path.isfile(matches[0]):
            raise InputError(
                f"no such tar: {name}", hint="write a pattern of files that are here: train-{000..099}.tar"
            )
        found += matches
    for name in found:
        _check_tar(name)
    return found


def _check_tar(name: str) -> None:
    try:
        with tarfile.open(name, "r:"):
            return
    except tarfile.TarError as error:
        if tarfile.is_tarfile(name):
            what = "is compressed, and images are read from their places in it"
            raise InputError(f"{name}: {what}", hint="unpack it, as gunzip does") from error
        raise InputError(f"{name}: is no tar: {first_line(error)}", hint=f"name {WebDatasetSpec.layout}") from error


def _braces(pattern: str) -> list[str]:
    """Write ``{00..12}`` and ``{a,b}`` out."""
    pieces = []
    for i, piece in enumerate(re.split(r"\{([^{}]*)\}", pattern)):
        numbers = re.fullmatch(r"(\d+)\.\.(\d+)", piece)
        if not i % 2:
            pieces.append([piece])
        elif numbers is None:
            pieces.append(piece.split(","))
        else:
            first, last = int(numbers[1]), int(numbers[2])
            if not first <= last < first + _MOST_TARS:
                raise InputError(f"{pattern}: {{{piece}}} is no range of numbers", hint="write {000..099}")
            pieces.append([str(number).zfill(len(numbers[1])) for number in range(first, last + 1)])
    return ["".join(words) for words in product(*pieces)]


def _check_apart(tars: dict[str, list[str]]) -> None:
    """Raise an InputError if a tar is named twice."""
    seen: dict[str, str] = {}
    for part, paths in tars.items():
        for path in paths:
            before = seen.setdefault(os.path.realpath(path), part)
            if before != part:
                raise InputError(f"{path} is both in {before} and in {part}", hint="give each part tars of its own")


def _samples(tars: Sequence[str], json_key: str) -> list[tuple[str, _Sample]]:
    facts = [facts_of(tar) for tar in tars]
    return [(tar, sample) for tar, of in zip(tars, facts, strict=True) for sample in _index(tar, json_key, of)]


@functools.lru_cache(maxsize=10_000)
def _index(tar: str, json_key: str, facts: Facts) -> tuple[_Sample, ...]:
    """Find the images of a tar and read their labels.

    Args:
        tar: Its path.
        json_key: Of the label in a JSON file.
        facts: Of the tar; when they change, it is read again.

    Raises:
        InputError: If it is damaged, or an image or a label is missing.
    """
    by_key: dict[str, dict[str, _Place]] = {}
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                key, extension = _split(member.name)
                if member.isreg() and extension in (*_IMAGES, *_LABELS):
                    of_key = by_key.setdefault(key, {})
                    if extension in of_key:
                        raise InputError(f"{tar}:{member.name}: is there twice", hint="write the tar again")
                    of_key[extension] = _Place(member.name, member.offset_data, member.size)
            end = archive.offset
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"{tar}: is not whole: {first_line(error)}", hint="fetch it again") from error
    if not by_key:
        raise InputError(f"{tar}: has no image", hint=f"images are KEY.{', KEY.'.join(_IMAGES)}")
    with Path(tar).open("rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # where tarfile stops without a word
            raise InputError(f"{tar}: is not whole: it ends in the middle", hint="fetch it again")

        def read(place: _Place) -> bytes:
            file.seek(place.offset)
            return file.read(place.size)

        samples = []
        for key, of_key in by_key.items():
            images = [of_key[extension] for extension in _IMAGES if extension in of_key]
            labels = [of_key[extension] for extension in _LABELS if extension in of_key]
            if len(images) != 1 or not labels:
                what = f"has {len(images)} images" if len(images) != 1 else "has no label"
                raise InputError(f"{tar}:{key}: {what}", hint="each image needs a KEY.cls or KEY.json beside it")
            samples.append(_Sample(images[0], _read_label(f"{tar}:{labels[0].name}", read(labels[0]), json_key)))
    return tuple(samples)


def _split(name: str) -> tuple[str, str]:
    """Take a name apart as webdataset does: the key ends at the first dot after the last slash."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _read_label(name: str, content: bytes, json_key: str) -> str:
    """Read a label: the text of a .cls, or what a .json has by a key."""
    hint = f"a .cls holds a number or a name; a .json has it by the key data.json_key={json_key}"
    try:
        text = content.decode()
        if name.lower().endswith(".json"):
            found = json.loads(text)
            if not isinstance(found, dict) or json_key not in found:
                raise InputError(f"{name}: has no key '{json_key}'", hint=hint)
            found = found[json_key]
            text = str(found) if isinstance(found, int | str) and not isinstance(found, bool) else ""
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: is no label: {error}", hint=hint) from error
    if not text.strip():
        raise InputError(f"{name}: holds no number and no name", hint=hint)
    return text.strip()


def _label(tar: str, sample: _Sample, labels: dict[str, int]) -> int:
    if sample.label not in labels:
        raise InputError(
            f"{tar}:{sample.image.name}: has the label {sample.label}, and data.class_names has {len(labels)} names",
            hint="labels are numbers from 0 to one less than the names",
        )
    return labels[sample.label]
