"""What a teacher has answered before: one row a view, in RAM or in files that every run on the machine shares.

A folder of $CAKD_HOME/teacher-memory, named by a hash of everything that decides an answer:

    memory.json     that identity, and how the answers were computed
    answers.bin     (views, width) float16 or float32, sparse until it is filled
    checksums.bin   (views,) uint32: CRC-32 of a row, begun with the view's name; 0 = not known
    lock            held by whoever writes

A row counts once its checksum is there, and is written before it, so a killed process leaves a row whole or unknown.
A row that does not match its checksum, whatever happened to it, is as unknown as one that was never written.

Shape suffixes: B rows asked for, K those of them that are known, D numbers of an answer, W bytes of a row.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cakd_cli.data import ImageDataSet
from cakd_cli.errors import InputError
from cakd_cli.files import home, read_json, whole_folder, write_json
from cakd_cli.machine.hardware import Hardware
from cakd_cli.models.layers import Answers
from cakd_cli.teachers.network import Teacher

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.int64]

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
_CHECKSUM_BYTES = 4
# Rows that are looked at together where all of them are.
_MANY = 1 << 14
# What memory.json says beside the identity: names for people.
FACTS = ("teacher", "data")
# Part of every identity: another layout is another memory.
_LAYOUT = 1


@dataclass(frozen=True)
class Identity:
    """Everything that decides an answer.

    Attributes:
        teacher: Hash of the weights.
        architecture: The network around them.
        mean: Of the teacher's normalisation.
        std: Likewise.
        data: Fingerprint.
        views: What makes a view.
        samples: Samples in the file.
        per_sample: Views of each.
        computed: Kind of device and precision.
        form: In which the teacher computes.
        stored: ``fp16`` or ``fp32``.
        answers: Names and shapes, without the batch, of what it answers.
    """

    teacher: str
    architecture: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    data: str
    views: str
    samples: int
    per_sample: int
    computed: str
    form: str
    stored: str
    answers: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers in each answer."""
        return tuple(math.prod(shape) for _, shape in self.answers)

    @property
    def width(self) -> int:
        """Numbers in all answers to a view."""
        return sum(self.sizes)

    @property
    def rows(self) -> int:
        """Count the views."""
        return self.samples * self.per_sample

    @property
    def dtype(self) -> torch.dtype:
        """Of what is stored."""
        return DTYPES[self.stored]

    @property
    def row_bytes(self) -> int:
        """Size of an answer in bytes."""
        return self.width * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Size of the whole memory in bytes once it is full."""
        return self.rows * (self.row_bytes + _CHECKSUM_BYTES)

    def document(self) -> dict[str, Any]:
        """Return what memory.json holds of it."""
        answers = [[name, list(shape)] for name, shape in self.answers]
        return {
            **vars(self),
            "layout": _LAYOUT,
            "mean": list(self.mean),
            "std": list(self.std),
            "answers": answers,
        }

    @classmethod
    def of_document(cls, content: Mapping[str, Any]) -> "Identity":
        """Read what :meth:`document` gave.

        Raises:
            KeyError, TypeError, AttributeError: If it is something else.
        """
        values = {field.name: content[field.name] for field in fields(cls)}
        answers = tuple((name, tuple(shape)) for name, shape in values["answers"])
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"]), "answers": answers})

    @property
    def key(self) -> str:
        """Name of the folder."""
        text = json.dumps(self.document(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def identify(teacher: Teacher, data: ImageDataSet, hardware: Hardware, *, form: str, stored: str) -> Identity | None:
    """Say what a teacher's answers to the training views depend on; none where there is no end of views."""
    views = data.train.views
    if views is None:
        return None
    return Identity(
        teacher=teacher.weights_hash,
        architecture=teacher.architecture,
        mean=teacher.mean,
        std=teacher.std,
        data=data.fingerprint,
        views=views.identity,
        samples=views.samples,
        per_sample=views.per_sample,
        computed=f"{hardware.device.type} {hardware.precision}",
        form=form,
        stored=stored,
        answers=tuple(teacher.shapes.items()),
    )


class TeacherMemory:
    """The answers of one teacher to the views of one data set.

    Args:
        identity: What the answers depend on.
        folder: Where its files are; none keeps it in RAM.

    Raises:
        InputError: If the files are not this memory's, or not whole.
    """

    def __init__(self, identity: Identity, folder: Path | None = None) -> None:
        self.identity = identity
        self.folder = folder
        self.facts: dict[str, Any] = {}
        self.damaged = 0  # rows met so far that are not what was written
        self.stopped = ""  # why nothing is recorded any more
        self._sizes = (identity.rows * identity.row_bytes, identity.rows * _CHECKSUM_BYTES)
        self._files: list[int] = []
        self._maps: list[Bytes] = []
        if folder is None:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # takes room as it is written
            self._maps = [np.frombuffer(mmap.mmap(-1, size, flags=flags), np.uint8) for size in self._sizes]
            return
        self.facts = read_facts(folder)
        if self.facts["identity"] != identity.document():
            raise _damaged(folder, "memory.json describes another")
        try:
            self._open_files(folder)
            self._check_sizes()
            for file in self._files[:2]:
                self._maps.append(np.frombuffer(mmap.mmap(file, 0, access=mmap.ACCESS_READ), np.uint8))
        except FileNotFoundError as error:
            self._close_files()
            raise _damaged(folder, f"{Path(error.filename).name} is missing") from error
        except BaseException:
            self._close_files()
            raise

    def _open_files(self, folder: Path) -> None:
        for name in ("answers.bin", "checksums.bin", "lock"):
            try:
                self._files.append(os.open(folder / name, os.O_RDWR))
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise
                self._files.append(os.open(folder / name, os.O_RDONLY))
                self.stopped = f"{folder / name} may only be read"

    def _close_files(self) -> None:
        while self._files:
            os.close(self._files.pop())
            self._maps = []

    @classmethod
    def open(cls, identity: Identity, facts: Mapping[str, str], folder: Path | None = None) -> "TeacherMemory":
        """Open the memory on disk, creating it with these ``FACTS`` where there is none.

        Args:
            identity: What the answers depend on.
            facts: What people see of it.
            folder: Where; none is the one that all runs share.

        Raises:
            InputError: If its files are damaged.
            OSError: If it cannot be created.
        """
        folder = folder or folder_of(identity)
        if not folder.exists():
            document = {"identity": identity.document(), "created_at": datetime.now(UTC).isoformat(timespec="seconds")}
            try:
                with whole_folder(folder) as temporary:
                    write_json(temporary / "memory.json", {**document, **facts})
                    for name, size in (("answers.bin", identity.row_bytes), ("checksums.bin", _CHECKSUM_BYTES)):
                        with (temporary / name).open("wb") as file:
                            file.truncate(size * identity.rows)
                            if name == "checksums.bin" and hasattr(os, "posix_fallocate"):
                                # A hole of /dev/shm takes room when it is read; a signal ends whom there is none for.
                                os.posix_fallocate(file.fileno(), 0, size * identity.rows)
                    (temporary / "lock").touch()
            except OSError:
                if not folder.exists():  # else another process was first, and its memory is as good
                    raise
        return cls(identity, folder)

    def recall(self, views_B: Tensor) -> tuple[Tensor, Tensor]:
        """Look up answers.

        Args:
            views_B: Names of views, int64 on the CPU.

        Returns:
            Answers (batch, width) in float32 on the CPU, zero where unknown, and which are known, bool (batch,).

        Raises:
            InputError: If the files have been cut since they were opened.
        """
        found_K, rows_KW, damaged = self._look_up(views_B.numpy())
        self.damaged += damaged
        found = torch.from_numpy(found_K)
        answers_KD = torch.from_numpy(rows_KW.view(f"f{self.identity.dtype.itemsize}")).float()
        known_B = torch.zeros(len(views_B), dtype=torch.bool).index_fill_(0, found, True)
        if len(found) == len(views_B):
            return answers_KD, known_B
        return torch.zeros(len(views_B), self.identity.width).index_copy_(0, found, answers_KD), known_B

    def pack(self, answers: Answers) -> Tensor:
        """Lay answers by name side by side, (batch, width)."""
        return torch.cat([answers[name].flatten(1) for name, _ in self.identity.answers], dim=1)

    def unpack(self, rows_BD: Tensor) -> Answers:
        """Undo :meth:`pack`."""
        parts = rows_BD.split(list(self.identity.sizes), 1)
        return {
            name: part if len(shape) == 1 else part.reshape(-1, *shape)
            for (name, shape), part in zip(self.identity.answers, parts, strict=True)
        }

    def rounded(self, answers_BD: Tensor) -> Tensor:
        """Round answers to what the memory would give back; what it cannot hold stays as it is."""
        stored = answers_BD.to(self.identity.dtype).float()
        return torch.where(stored.isfinite(), stored, answers_BD)

    def record(self, views_B: Tensor, answers_BD: Tensor) -> None:
        """Keep answers; those of views that are known by now, and those that are not finite, are left out.

        A disk that is full or fails ends the recording, not the run: ``stopped`` then says why.

        Args:
            views_B: Names of views, int64 on the CPU.
            answers_BD: Answers on the CPU.
        """
        if self.stopped:
            return
        stored_BD = answers_BD.to(self.identity.dtype)
        # By NumPy: where another thread records, torch would start as many again as there are cores.
        finite = np.isfinite(stored_BD.numpy()).all(1).nonzero()[0]
        views, first = np.unique(views_B.numpy()[finite], return_index=True)
        try:
            with self._locked():
                unknown = np.delete(np.arange(len(views)), self._look_up(views)[0])
                rows_KW = stored_BD.contiguous().numpy().view(np.uint8).take(finite[first[unknown]], axis=0)
                self._keep(views[unknown], rows_KW)
        except OSError as error:
            self.stopped = f"{self.folder}: {error.strerror or error}"

    def written(self) -> Tensor:
        """Name the views whose answers have been written, int64."""
        # Of a copy: another process may write while they are looked through.
        return torch.from_numpy(self._maps[1].copy().view("<u4").nonzero()[0])

    def verify(self) -> tuple[int, int]:
        """Read every row that has been written.

        Returns:
            Rows that are whole, and rows that are not what was written.
        """
        written = self.written()
        damaged = sum(self._look_up(views.numpy())[2] for views in written.split(_MANY))
        return len(written) - damaged, damaged

    def close(self) -> None:
        """Close the files."""
        self._close_files()

    def _look_up(self, views_B: Numbers) -> tuple[Numbers, Bytes, int]:
        """Copy the rows that are whole, and say at which positions they were asked for.

        Returns:
            Positions (known,), rows (known, bytes), and how many others are not what was written.

        Raises:
            InputError: If the files have been cut since they were opened.
        """
        if self.folder is not None:
            self._check_sizes()
        checksums_B = self._read(1, views_B, _CHECKSUM_BYTES).view("<u4")[:, 0]
        written = checksums_B.nonzero()[0]
        views = views_B.take(written)
        rows_KW = self._read(0, views, self.identity.row_bytes)
        whole = (self._checksums(views, rows_KW) == checksums_B.take(written)).nonzero()[0]
        if len(whole) < len(written):
            return written.take(whole), rows_KW.take(whole, axis=0), len(written) - len(whole)
        return written, rows_KW, 0

    def _keep(self, views_K: Numbers, rows_KW: Bytes) -> None:
        """Write rows, and then their checksums."""
        checksums_KW = self._checksums(views_K, rows_KW).astype("<u4")[:, None].view(np.uint8)
        for part, content_KW in enumerate((rows_KW, checksums_KW)):
            row = f"V{content_KW.shape[1]}"
            if self.folder is None:
                self._maps[part].view(row)[views_K] = content_KW.view(row)[:, 0]
                continue
            for view, content in zip(views_K.tolist(), _each(content_KW), strict=True):
                if os.pwrite(self._files[part], content, view * len(content)) != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _checksums(self, views_K: Numbers, rows_KW: Bytes) -> NDArray[np.uint32]:
        if self.folder is None:  # nobody else writes here, and nothing is ever half there
            return np.ones(len(views_K), np.uint32)
        checksums = map(crc32, _each(rows_KW), (views_K & 0xFFFFFFFF).tolist())
        # A row of zeros in the place of another, or a checksum of 0, must not pass.
        return np.maximum(np.fromiter(checksums, np.uint32, len(views_K)), 1)

    # Files are read through maps, always into copies, but not written through them: a full disk would be a signal that
    # ends the process. A file that is cut would be one as well, which is why its size is looked at before.

    def _read(self, part: int, views_B: Numbers, size: int) -> Bytes:
        """Copy the rows of these views out of a file whose rows have so many bytes."""
        return self._maps[part].reshape(-1, size).take(views_B, axis=0)

    def _check_sizes(self) -> None:
        assert self.folder is not None
        for file, size in zip(self._files, self._sizes, strict=False):
            try:
                found = os.fstat(file).st_size
            except OSError as error:  # a network's disk on which somebody else removed it
                raise _damaged(self.folder, error.strerror or str(error)) from error
            if found != size:
                raise _damaged(self.folder, f"a file has {found:,} bytes instead of {size:,}")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if self.folder is None:
            yield
            return
        lock = self._files[-1]
        fcntl.lockf(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(lock, fcntl.LOCK_UN)


def root() -> Path:
    """Folder of all memories on disk."""
    return home() / "teacher-memory"


def folder_of(identity: Identity) -> Path:
    """Folder of a memory, which may not exist yet."""
    return root() / identity.key


def known_form(identity: Identity, *, compiled: bool) -> str | None:
    """Find the form of a memory that differs in the form alone; the fullest if there are several.

    Args:
        identity: With any form.
        compiled: Whether a compiled form may be taken.
    """
    found = {}
    for folder in folders():
        with contextlib.suppress(InputError, KeyError, TypeError):  # a damaged memory is nobody's sibling
            known = read_facts(folder)["identity"]
            if known == {**identity.document(), "form": known["form"]} and (compiled or known["form"] != "compiled"):
                found[known["form"]] = sum(file.stat().st_blocks for file in folder.glob("*.bin"))
    return max(found, key=found.__getitem__) if found else None


def used_bytes(identity: Identity) -> int:
    """Room that a memory takes on disk now, in bytes: holes take none."""
    return sum(file.stat().st_blocks * 512 for file in folder_of(identity).glob("*.bin"))


def read_check(identity: Identity, data: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read how the teacher did on held-out images, if another run has measured it.

    Args:
        identity: Of the memory.
        data: What a run records of its data; another split is another measurement.
    """
    return next((check["teacher"] for check in _checks(identity) if check["data"] == data), None)


def write_check(identity: Identity, data: Mapping[str, Any], checked: Mapping[str, Any]) -> None:
    """Note how the teacher did, for the runs to come."""
    folder = folder_of(identity)
    with contextlib.suppress(OSError), (folder / "lock").open("r+") as lock:  # a full disk is no reason to end a run
        fcntl.lockf(lock, fcntl.LOCK_EX)
        if read_check(identity, data) is None:
            write_json(folder / "checks.json", [*_checks(identity), {"data": data, "teacher": checked}])


def _checks(identity: Identity) -> list[dict[str, Any]]:
    try:
        checks = read_json(folder_of(identity) / "checks.json")
        for check in checks:
            check["data"], float(check["teacher"]["top1"]), int(check["teacher"]["samples"])
    except (OSError, ValueError, TypeError, KeyError):
        return []  # damaged or not there: measured again
    return checks  # type: ignore[no-any-return]


def folders() -> list[Path]:
    """Every memory on disk, whole or not."""
    return sorted(path for path in root().glob("*") if path.is_dir() and not path.name.startswith("."))


def read_facts(folder: Path) -> dict[str, Any]:
    """Read memory.json.

    Raises:
        InputError: If it is missing or damaged.
    """
    try:
        facts = read_json(folder / "memory.json")
        facts["identity"]["layout"]
        whole = all(isinstance(facts[name], str) for name in FACTS)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, f"memory.json cannot be read: {type(error).__name__}") from error
    if not whole:
        raise _damaged(folder, f"memory.json lacks one of {', '.join(FACTS)}")
    return facts  # type: ignore[no-any-return]


def read(folder: Path) -> TeacherMemory:
    """Open a memory for a look at it.

    Raises:
        InputError: If it is damaged.
    """
    content = read_facts(folder)["identity"]
    try:
        identity = Identity.of_document(content)
        whole = identity.document() == content and identity.key == folder.name
    except (KeyError, TypeError, ValueError, AttributeError):
        whole = False
    if not whole:
        raise _damaged(folder, "memory.json describes another")
    return TeacherMemory(identity, folder)


def _each(content_KW: Bytes) -> list[bytes]:
    """Cut rows apart."""
    return content_KW.view(f"V{content_KW.shape[1]}").ravel().tolist()


def _damaged(folder: Path, what: str) -> InputError:
    return InputError(
        f"the teacher memory {folder} is damaged: {what}", hint=f"cakd teacher-memory prune {folder.name}"
    )
