"""Files of pictures that somebody else made: finding, opening and checking them."""

import errno
import hashlib
import os
import stat
from array import array
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cakd_cli.errors import InputError
from cakd_cli.files import home, read_json, write_json

_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
# Of an image once its shorter side has the network's size: far above any photograph, and 200 MB of memory.
_MOST_PIXELS = 2**26
_THREADS = 8
# Files that are waited for together; each costs the kilobyte of what waits.
_AT_ONCE = 10_000


class Files:
    """Paths of pictures and their labels, in few bytes more than their letters.

    A list of a million pairs takes 250 MB, and again in every worker, because counting references writes to it.

    Args:
        pairs: Path and label of each.

    Attributes:
        labels_N: Class indices, int64 on the CPU.
    """

    def __init__(self, pairs: Iterable[tuple[str, int]]) -> None:
        letters, ends, labels = bytearray(), array("q", [0]), array("q")
        for path, label in pairs:
            letters += os.fsencode(path)
            ends.append(len(letters))
            labels.append(label)
        self._letters, self._ends = bytes(letters), ends
        self.labels_N: Tensor = torch.tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        """Count the files."""
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[str]:
        """Give the paths."""
        return map(self.path, range(len(self)))

    def path(self, index: int) -> str:
        """Give the path of one file."""
        return os.fsdecode(self._letters[self._ends[index] : self._ends[index + 1]])

    def without(self, paths: Container[str]) -> "Files":
        """Leave some out."""
        return Files(pair for pair in zip(self, self.labels_N.tolist(), strict=True) if pair[0] not in paths)


def class_folders(path: Path) -> list[str]:
    """Name the folders that stand for classes, sorted."""
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def check_classes(classes: Sequence[str], root: Path, part: str, *, known: str = "train/") -> None:
    """Compare the folders of a part with the classes that are ``known`` from elsewhere.

    Raises:
        InputError: If they differ.
    """
    found = class_folders(root / part)
    extra, missing = sorted(set(found) - set(classes)), sorted(set(classes) - set(found))
    if extra or missing:
        wrong = [f"only in {part}/: {', '.join(extra[:5])}"] if extra else []
        wrong += [f"only in {known}: {', '.join(missing[:5])}"] if missing else []
        raise InputError(
            f"{root}: {known} and {part}/ have different classes; {'; '.join(wrong)}",
            hint="each class needs a folder of its name, with pictures, in every part",
        )


def list_files(root: Path, classes: Sequence[str]) -> Files:
    """List the pictures of each class and its subfolders, in the order of torchvision's ImageFolder.

    Folders are entered once, whatever links lead to them, and only regular files count.

    Args:
        root: With a folder for each class.
        classes: Their names, in label order.

    Raises:
        InputError: If a class has no picture.
    """
    seen = {_identity(path) for path in (root, *root.resolve().parents, *(root / name for name in classes))}
    files = Files(
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted(_walk(root / name, seen), key=os.path.split)
    )
    empty = [classes[label] for label in (files.labels_N.bincount(minlength=len(classes)) == 0).nonzero().flatten()]
    if empty:
        raise InputError(
            f"{root}: no picture in the folder{'s' * (len(empty) > 1)} of {', '.join(empty[:5])}",
            hint=f"pictures end in {', '.join(_SUFFIXES)}",
        )
    return files


def list_folder(folder: Path) -> dict[str, str]:
    """List the pictures of one folder and its subfolders, sorted: path by name without suffix."""
    return {Path(path).stem: path for path in sorted(_walk(folder, {_identity(folder)}))}


def _identity(path: Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_dev, facts.st_ino


def _walk(folder: Path, seen: set[tuple[int, int]]) -> list[str]:
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in sorted(folders) if _is_new(Path(place, name), seen)]
        paths = [os.path.join(place, name) for name in names if name.lower().endswith(_SUFFIXES)]
        found += [path for path in paths if not _is_special(path)]
    return found


def _is_new(folder: Path, seen: set[tuple[int, int]]) -> bool:
    try:
        identity = _identity(folder)
    except OSError:
        return False
    new = identity not in seen
    seen.add(identity)
    return new


def _is_special(path: str) -> bool:
    """Whether it is a pipe or a device, which would wait forever; a broken link is named when it is opened."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def header_size(path: str) -> tuple[int, int]:
    """Width and height of an image, from its header alone.

    Raises:
        InputError: If it cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as file:
            return file.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as an image: {error}", hint="replace or remove the file") from error


def decode(path: str, resize: int) -> Any:
    """Read a picture as RGB, or say in a sentence why it cannot be used: an exception would not leave a worker well.

    Args:
        path: Of the file.
        resize: Pixels to which its shorter side may be resized.
    """
    from PIL import Image

    try:
        with Image.open(path) as file:
            return _wrong_kind(file, resize) or file.convert("RGB")
    except (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
        return f"{path}: cannot be read as an image: {error}"


def _wrong_kind(file: Any, resize: int) -> str:
    width, height = file.size
    if file.mode.startswith(("I", "F")):
        # Pillow would cut every value above 255 to white.
        return f"{file.filename}: has more than 8 bits a channel; convert it to 8"
    if resize**2 * max(width, height) > _MOST_PIXELS * min(width, height):
        return f"{file.filename}: {width} x {height} pixels are too long and narrow to be resized"
    return ""


def bad_files(files: Files, resize: int, *, whole: bool, remember: bool) -> dict[str, str]:
    """Find the pictures that cannot be used; what was found is kept under $CAKD_HOME until a file changes.

    Args:
        files: Which are looked at.
        resize: Pixels to which a shorter side may be resized.
        whole: Decode each file, and do not only look at its header.
        remember: Whether what is found may be kept.

    Returns:
        By path, why.
    """
    digest = hashlib.sha256(f"1 {resize} {whole}\n".encode())
    for path in files:
        facts = Path(path).stat() if Path(path).exists() else None
        stamp = facts and (facts.st_size, facts.st_mtime_ns)
        digest.update(os.fsencode(f"{Path(path).resolve()} {stamp}\n"))
    kept = home() / "checked" / f"{digest.hexdigest()[:16]}.json"
    try:
        known = read_json(kept)
        return {files.path(int(number)): str(why) for number, why in known.items()}
    except (OSError, ValueError, AttributeError, IndexError, RuntimeError):
        pass
    found: dict[int, str] = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for first in range(0, len(files), _AT_ONCE):
            numbers = range(first, min(first + _AT_ONCE, len(files)))
            reasons = pool.map(lambda number: _why_bad(files.path(number), resize, whole=whole), numbers)
            found |= {number: why for number, why in zip(numbers, reasons, strict=True) if why}
    if remember:
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, found)
        except (OSError, RuntimeError):
            pass  # looked at again the next time
    return {files.path(number): why for number, why in found.items()}


def _why_bad(path: str, resize: int, *, whole: bool) -> str:
    from PIL import Image

    try:
        with Image.open(path) as file:
            wrong = _wrong_kind(file, resize)
            if whole and not wrong:
                file.load()
            return wrong
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if getattr(error, "errno", None) not in (None, errno.ENOENT):
            raise  # of the system and not of the file: no reason to leave it out, or to remember
        return f"{path}: cannot be read as an image: {error}"
