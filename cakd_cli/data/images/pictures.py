"""Files of pictures that somebody else made: finding, opening and checking them."""

import errno
import hashlib
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cakd_cli.errors import InputError
from cakd_cli.files import home, read_json, write_json

_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
# Of an image once its shorter side has the network's size: far above any photograph, and 200 MB of memory.
_MOST_PIXELS = 2**26
_THREADS = 8


def list_files(root: Path, classes: Sequence[str]) -> list[tuple[str, int]]:
    """List the pictures of each class and its subfolders, in the order of torchvision's ImageFolder.

    Folders are entered once, whatever links lead to them, and only regular files count.

    Args:
        root: With a folder for each class.
        classes: Their names, in label order.

    Returns:
        Paths and labels.

    Raises:
        InputError: If a class has no picture.
    """
    seen = {_identity(path) for path in (root, *root.resolve().parents, *(root / name for name in classes))}
    samples: list[tuple[str, int]] = []
    empty = []
    for label, name in enumerate(classes):
        found = sorted(_walk(root / name, seen), key=os.path.split)
        samples += [(path, label) for path in found]
        empty += [] if found else [name]
    if empty:
        raise InputError(
            f"{root}: no picture in the folder{'s' * (len(empty) > 1)} of {', '.join(empty[:5])}",
            hint=f"pictures end in {', '.join(_SUFFIXES)}",
        )
    return samples


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


def bad_files(paths: Sequence[str], resize: int, *, whole: bool, remember: bool) -> dict[str, str]:
    """Find the pictures that cannot be used; what was found is kept under $CAKD_HOME until a file changes.

    Args:
        paths: Of the files.
        resize: Pixels to which a shorter side may be resized.
        whole: Decode each file, and do not only look at its header.
        remember: Whether what is found may be kept.

    Returns:
        By path, why.
    """
    digest = hashlib.sha256(f"1 {resize} {whole}\n".encode())
    for path in paths:
        facts = Path(path).stat() if Path(path).exists() else None
        stamp = facts and (facts.st_size, facts.st_mtime_ns)
        digest.update(os.fsencode(f"{Path(path).resolve()} {stamp}\n"))
    kept = home() / "checked" / f"{digest.hexdigest()[:16]}.json"
    try:
        known = read_json(kept)
        return {paths[int(number)]: str(why) for number, why in known.items()}
    except (OSError, ValueError, AttributeError, IndexError, RuntimeError):
        pass
    with ThreadPoolExecutor(_THREADS) as pool:
        reasons = pool.map(lambda path: _why_bad(path, resize, whole=whole), paths)
        found = {number: why for number, why in enumerate(reasons) if why}
    if remember:
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, found)
        except (OSError, RuntimeError):
            pass  # looked at again the next time
    return {paths[number]: why for number, why in found.items()}


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
