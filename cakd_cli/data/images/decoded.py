"""Decoded images on disk, so that a file is decoded in one epoch and only cropped in the others.

A folder of $CAKD_HOME/decoded, named by a hash of the files and of the size that they are shrunk to:

    sizes.bin       (images, 2) int32: width and height as kept
    pixels.bin      the images one after the other, uint8 RGB, sparse until they have been seen
    checksums.bin   (images,) uint32: CRC-32 of an image's pixels, 0 = not kept yet

The pixels of a file are the same whoever decodes it, so workers and processes fill the files without asking each other;
an image that does not match its checksum is decoded again.
"""

import contextlib
import hashlib
import mmap
import os
import shutil
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING
from zlib import crc32

import torch

from cakd_cli.data.images.pictures import Files, header_size
from cakd_cli.errors import InputError
from cakd_cli.files import home, whole_folder

if TYPE_CHECKING:
    from PIL.Image import Image

_CHANNELS = 3
_CHECKSUM_BYTES = 4


class DecodedImages:
    """The training images of one folder, shrunk to the least size that any crop needs.

    Args:
        folder: Where its files are, or will be once :meth:`create` has been called.
        sizes: Width and height of each image as kept.
    """

    def __init__(self, folder: Path, sizes: list[tuple[int, int]]) -> None:
        self._folder = folder
        self._sizes = sizes
        self._places = list(pairwise(accumulate((_CHANNELS * w * h for w, h in sizes), initial=0)))
        self._process = -1  # workers open the files for themselves
        self._files: list[int] = []
        self._maps: list[mmap.mmap] = []

    def __getstate__(self) -> dict[str, object]:
        """Leave behind what only this process can use."""
        return {**vars(self), "_process": -1, "_files": [], "_maps": []}

    @classmethod
    def of(cls, files: Files, *, shorter_side: int, kept_as: str, limit_gb: float) -> "DecodedImages":
        """Find the place of these files' decoded images; nothing is written.

        Args:
            files: Of the training images.
            shorter_side: Images are shrunk to it; smaller ones stay as they are.
            kept_as: What makes their pixels beside the files; equal words mean equal pixels.
            limit_gb: Most room that all of them may take, in 10^9 bytes.

        Raises:
            InputError: If they take more, a file cannot be read, or what is kept is damaged.
        """
        digest = hashlib.sha256(f"1 {kept_as}\n".encode())
        for index, path in enumerate(files):
            facts = files.facts(index)
            digest.update(os.fsencode(f"{Path(path).resolve()} {facts.size} {facts.written_ns}\n"))
        folder = home() / "decoded" / digest.hexdigest()[:16]
        here = folder.exists()
        sizes = _read_sizes(folder, len(files)) if here else _kept_sizes(files, shorter_side)
        total = _CHANNELS * sum(w * h for w, h in sizes)
        if total > limit_gb * 1e9:
            raise InputError(
                f"the decoded images take {total / 1e9:.1f} GB, more than data.decoded_gb={limit_gb:g}",
                hint="raise the limit, or decode every time: data.decoded_gb=0",
            )
        place = next(path for path in (folder, *folder.parents) if path.exists())
        missing = total - ((folder / "pixels.bin").stat().st_blocks * 512 if here else 0)
        free = shutil.disk_usage(place).free
        if missing > free:
            raise InputError(
                f"the decoded images need {missing / 1e9:.1f} GB more in {folder.parent}, {free / 1e9:.1f} GB are free",
                hint="make room, or decode every time: data.decoded_gb=0",
            )
        return cls(folder, sizes)

    def create(self) -> None:
        """Make the empty files, unless they are there."""
        if self._folder.exists():
            return
        try:
            with whole_folder(self._folder) as temporary:
                sizes = torch.tensor(self._sizes, dtype=torch.int32).numpy().tobytes()
                (temporary / "sizes.bin").write_bytes(sizes)
                lengths = self._places[-1][1], _CHECKSUM_BYTES * len(self._sizes)
                for name, length in zip(("pixels.bin", "checksums.bin"), lengths, strict=True):
                    with (temporary / name).open("wb") as file:
                        file.truncate(length)
        except OSError:
            if not self._folder.exists():  # else another process was first
                raise

    def read(self, index: int) -> "Image | None":
        """Give an image that has been kept, or none."""
        from PIL import Image

        if not self._open_files():
            return None
        pixels, checksums = self._maps
        expected = int.from_bytes(checksums[index * _CHECKSUM_BYTES : (index + 1) * _CHECKSUM_BYTES], "little")
        content = pixels[slice(*self._places[index])] if expected else b""
        if not expected or _crc(self._sizes[index], content) != expected:
            return None
        return Image.frombytes("RGB", self._sizes[index], content)

    def keep(self, index: int, image: "Image") -> "Image":
        """Shrink a decoded image, keep it, and give it back; on a full disk it is only given back."""
        from PIL import Image

        if image.size != self._sizes[index]:
            image = image.resize(self._sizes[index], Image.Resampling.BILINEAR)
        content = image.tobytes()
        if self._open_files():
            with contextlib.suppress(OSError):
                # Not through the map, where a full disk is a signal that ends the process.
                if os.pwrite(self._files[0], content, self._places[index][0]) == len(content):
                    checksum = _crc(self._sizes[index], content).to_bytes(_CHECKSUM_BYTES, "little")
                    os.pwrite(self._files[1], checksum, index * _CHECKSUM_BYTES)
        return image

    def _open_files(self) -> bool:
        """Open the files once a process; without them, because somebody removed them, every image is decoded."""
        if self._process != os.getpid():
            self._process = os.getpid()
            self._files, self._maps = [], []
            with contextlib.suppress(OSError):
                self._files = [os.open(self._folder / name, os.O_RDWR) for name in ("pixels.bin", "checksums.bin")]
                self._maps = [mmap.mmap(file, 0, access=mmap.ACCESS_READ) for file in self._files]
        return len(self._maps) == 2


def _kept_sizes(files: Files, shorter_side: int) -> list[tuple[int, int]]:
    kept = []
    for index in range(len(files)):
        width, height = header_size(files, index)
        scale = min(1.0, shorter_side / min(width, height))
        kept.append((round(width * scale), round(height * scale)))
    return kept


def _read_sizes(folder: Path, count: int) -> list[tuple[int, int]]:
    try:
        content = bytearray((folder / "sizes.bin").read_bytes())
        sizes = [(w, h) for w, h in torch.frombuffer(content, dtype=torch.int32).reshape(-1, 2).tolist()]
        lengths = [(folder / name).stat().st_size for name in ("pixels.bin", "checksums.bin")]
    except (OSError, ValueError, RuntimeError) as error:
        raise _damaged(folder) from error
    if lengths != [_CHANNELS * sum(w * h for w, h in sizes), _CHECKSUM_BYTES * count] or len(sizes) != count:
        raise _damaged(folder)
    return sizes


def _crc(size: tuple[int, int], content: bytes) -> int:
    return crc32(content, size[0]) or 1


def _damaged(folder: Path) -> InputError:
    return InputError(f"the decoded images in {folder} are damaged", hint=f"remove them: rm -r {folder}")
