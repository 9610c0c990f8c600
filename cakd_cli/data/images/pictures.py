"""Files of pictures that somebody else made: finding, opening and checking them."""

import errno
import hashlib
import io
import os
import stat
from array import array
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

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


class Entry(io.BytesIO):
    """Content of a picture that is no file of its own; where its path would be said it says its name."""

    def __init__(self, name: str, content: bytes) -> None:
        super().__init__(content)
        self._name = name

    def __str__(self) -> str:
        """Give its name."""
        return self._name

    def __repr__(self) -> str:
        """Give its name in quotes, as Pillow says a path."""
        return repr(self._name)


class Facts(NamedTuple):
    """What tells two states of a file apart.

    Attributes:
        size: In bytes.
        written_ns: When its content was last written, in nanoseconds.
        changed_ns: When anything of it last changed; this cannot be set, and tells a replaced file of the same time.
    """

    size: int
    written_ns: int
    changed_ns: int


def facts_of(path: str) -> Facts:
    """Ask the system about a file.

    Raises:
        OSError: If it is not there.
    """
    found = os.stat(path)
    return Facts(found.st_size, found.st_mtime_ns, found.st_ctime_ns)


class Files:
    """Paths of pictures and their labels, in few bytes more than their letters.

    A list of a million pairs takes 250 MB, and again in every worker, because counting references writes to it.

    Args:
        pairs: Path and label of each.

    Attributes:
        labels_N: Class indices, int64 on the CPU; -1 of files without a label.
        on_disk: Whether each picture is a file of its own, so that its path leads to it; if not, it has a name alone.
    """

    on_disk: ClassVar[bool] = True

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

    def open(self, index: int) -> str | Entry:
        """Give what Pillow opens: the path of a file, or the content of what is none.

        Raises:
            OSError: If it cannot be read.
        """
        return self.path(index)

    def facts(self, index: int) -> Facts:
        """Tell the state of one file.

        Raises:
            OSError: If it is not there.
        """
        return facts_of(self.path(index))

    def subset(self, indices_N: Tensor) -> "Files":
        """Take the files at these positions."""
        return Files((self.path(index), int(self.labels_N[index])) for index in indices_N.tolist())

    def without(self, paths: Container[str]) -> "Files":
        """Leave some out."""
        return self.subset(torch.tensor([i for i, path in enumerate(self) if path not in paths], dtype=torch.int64))


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
    return {Path(path).stem: path for path in all_pictures(folder)}


def all_pictures(folder: Path) -> list[str]:
    """List the pictures of one folder and its subfolders by path, sorted."""
    return sorted(_walk(folder, {_identity(folder)}))


def has_pictures(folder: Path) -> bool:
    """Whether a picture lies in the folder itself."""
    return any(entry.name.lower().endswith(_SUFFIXES) for entry in folder.iterdir())


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


def header_size(files: Files, index: int) -> tuple[int, int]:
    """Width and height of an image, from its header alone.

    Raises:
        InputError: If it cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(files.open(index)) as file:
            return file.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        path = files.path(index)
        raise InputError(f"{path}: cannot be read as an image: {error}", hint="replace or remove the file") from error


def decode(source: str | Entry, resize: int, *, draft: int | None = None) -> Any:
    """Read a picture as RGB, or say in a sentence why it cannot be used: an exception would not leave a worker well.

    Args:
        source: Path of the file, or what stands for it.
        resize: Pixels to which its shorter side may be resized.
        draft: Pixels of the shorter side that are enough: a JPEG of twice, four or eight times as many is decoded at
            that scale, in a fraction of the time.
    """
    from PIL import Image

    try:
        with Image.open(source) as file:
            if draft is not None:
                file.draft(None, (draft, draft))
            return _wrong_kind(file, source, resize) or file.convert("RGB")
    except (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
        return f"{source}: cannot be read as an image: {error}"


def middle_crop(resize: int, size: int) -> Callable[[Any], Tensor]:
    """Make what shows a picture to a network when nothing is learnt.

    Args:
        resize: Pixels of the shorter side before the middle is cropped.
        size: Height and width of the middle, in pixels.

    Returns:
        From a Pillow picture to its uint8 pixels, (channels, size, size).
    """
    from torchvision.transforms import v2

    shown: Callable[[Any], Tensor] = v2.Compose(
        [v2.Resize(resize, antialias=True), v2.CenterCrop(size), v2.PILToTensor()]
    )
    return shown


def _wrong_kind(file: Any, source: str | Entry, resize: int) -> str:
    width, height = file.size
    if file.mode.startswith(("I", "F")):
        # Pillow would cut every value above 255 to white.
        return f"{source}: has more than 8 bits a channel; convert it to 8"
    if resize**2 * max(width, height) > _MOST_PIXELS * min(width, height):
        return f"{source}: {width} x {height} pixels are too long and narrow to be resized"
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
    for number, path in enumerate(files):
        try:
            stamp = files.facts(number)[:2]
        except (FileNotFoundError, NotADirectoryError):
            stamp = None  # a link to nowhere, which is named when it is opened
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
            reasons = pool.map(lambda number: _why_bad(files, number, resize, whole=whole), numbers)
            found |= {number: why for number, why in zip(numbers, reasons, strict=True) if why}
    if remember:
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, found)
        except (OSError, RuntimeError):
            pass  # looked at again the next time
    return {files.path(number): why for number, why in found.items()}


def _why_bad(files: Files, index: int, resize: int, *, whole: bool) -> str:
    from PIL import Image

    try:
        source = files.open(index)
        with Image.open(source) as file:
            wrong = _wrong_kind(file, source, resize)
            if whole and not wrong:
                file.load()
            return wrong
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if getattr(error, "errno", None) not in (None, errno.ENOENT):
            raise  # of the system and not of the file: no reason to leave it out, or to remember
        return f"{files.path(index)}: cannot be read as an image: {error}"
