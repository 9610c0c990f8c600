"""A file of logits: what any teacher, wherever it ran, has said of the training images.

A safetensors file with the tensor ``logits``, floating point and finite: (samples, classes), a row a training image in
the order in which cakd numbers them, those held out included; or (samples, views, classes), a row a view, where the
views of an image are finitely many and in cakd's order. Its metadata may name the classes, as a JSON list under
``class_names``. ``SNIPPET`` writes one.

It knows no other image, so what it says of test images cannot be asked.

Shape suffixes: B batch, R rows, V views of an image, C classes of the data.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cakd_cli.data import Batch, ImageDataSet
from cakd_cli.data.base import to_device
from cakd_cli.errors import InputError, RecipeError
from cakd_cli.machine.hardware import Hardware
from cakd_cli.models.layers import LOGITS, Answers
from cakd_cli.teachers.classes import ClassMap, map_classes
from cakd_cli.teachers.fitted import fitted
from cakd_cli.teachers.network import Teacher, TeacherSpec
from cakd_cli.teachers.onnx_file import are_probabilities

SNIPPET = """\
import json, torch
from safetensors.torch import save_file
from cakd_cli.recipe.resolve import resolve
words = {"data": "folder:PATH", "model": "resnet8"}
data = resolve(["data.validation_fraction=0"], words).data.without_auto()[0].load()
batches = data.train.ordered_batches(batch_size=256, device=torch.device("cpu"))
logits = torch.cat([network(batch.images) for batch in batches])  # images are uint8
save_file({"logits": logits}, "answers.safetensors", {"class_names": json.dumps(data.class_names)})
"""
_HINT = "a file of logits is written in Python like this, with a network of yours:\n" + SNIPPET.rstrip()
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Numbers that are looked at together.
_MANY = 1 << 24


class LogitsTeacher(TeacherSpec):
    """A safetensors file of logits, a row a training image or a row a view: logits:FILE."""

    shorthand: ClassVar[str | None] = "path"

    type: Literal["logits"] = "logits"
    path: str = Field(min_length=1, description="safetensors file with the tensor 'logits'")

    @property
    def label(self) -> str:
        return f"logits:{self.path}"

    @property
    def origin(self) -> str:
        return "a file that answers about training images alone, so agreement on test images is not known"


class StoredLogits(nn.Module):
    """Looks answers up by the numbers of samples or the names of views; it is shown no images, and has no forward.

    Args:
        rows: The file's own logits, (samples, its classes), or (samples times views, its classes) where views are told
            apart.
        views: Rows of each sample that are told apart; none where one row answers every view.
        groups: Of each class of the data, the file's own; none where they are the same.
    """

    def __init__(self, rows: Tensor, views: int | None, groups: tuple[tuple[int, ...], ...] | None) -> None:
        super().__init__()
        self._rows, self._views = rows, views
        self._classes = nn.Identity() if groups is None else fitted(nn.Identity(), None, groups).to(rows.device)

    def answer(self, batch: Batch) -> Answers:
        """Look up the answers to a training batch, float32 (batch, classes) where its images are."""
        # Rows that the device has no room for are waited for; names of views are on the host already.
        chosen_B = batch.samples if self._views is None else batch.views
        assert chosen_B is not None, "training batches are numbered"
        return {LOGITS: to_device(self._of_rows(chosen_B), batch.images.device)}

    def of_samples(self, samples_B: Tensor) -> Tensor:
        """Say what is known of samples by their numbers: the mean over their views, float32 (batch, classes)."""
        if self._views is None:
            return self._of_rows(samples_B)
        each_BV = samples_B[:, None] * self._views + torch.arange(self._views)
        mean_BC: Tensor = self._of_rows(each_BV.flatten()).unflatten(0, each_BV.shape).mean(1)
        return mean_BC

    def _of_rows(self, rows_B: Tensor) -> Tensor:
        rows_BC = self._rows[to_device(rows_B, self._rows.device)].float()
        logits_BC: Tensor = self._classes(rows_BC)
        return logits_BC

    def close(self) -> None:
        """There is nothing to let go of."""


class _Content(NamedTuple):
    """What a file holds."""

    logits: Tensor
    class_names: tuple[str, ...] | None
    sha256: str


def load_logits(
    spec: LogitsTeacher, data: ImageDataSet, hardware: Hardware, *, class_map: ClassMap | None = None
) -> Teacher:
    """Read a file of logits, which stays on disk where an accelerator has no room for it.

    Arguments and errors are those of :func:`cakd_cli.teachers.load_teacher`.
    """
    content = _read(Path(spec.path).expanduser(), spec.label)
    _check_shape(content.logits, data, spec.label)
    views = content.logits.shape[1] if content.logits.ndim == 3 else None
    rows = content.logits.flatten(0, -2)
    _check_values(rows, views, spec.label)
    total = rows.shape[1]
    name = f"the teacher {spec.label}"
    mapped = map_classes(content.class_names, total, data, class_map, teacher=name)
    groups = None if mapped is None else mapped.groups
    notes = [] if mapped is None else [f"{name}: {mapped}"]
    seen = data.train.views
    if views is None and (seen is None or seen.per_sample > 1):
        many = "every view" if seen is None else f"all {seen.per_sample} views"
        notes.append(f"{name} has one row an image: {many} of it get the answer to the image as it is")
    free = hardware.free_bytes()
    if free is not None and rows.nbytes <= free / 2:
        rows = rows.to(hardware.device)
    return Teacher(
        model=StoredLogits(rows, views, groups).eval(),
        mean=data.mean,
        std=data.std,
        name=spec.label,
        architecture=json.dumps(["logits", content.sha256, groups]),
        weights_hash=content.sha256[:16],
        shapes={LOGITS: (data.num_classes,)},
        mapped=mapped,
        classes={} if mapped is None else mapped.document(content.class_names, data),
        notes=tuple(notes),
    )


def _read(path: Path, label: str) -> _Content:
    """Open a file; its logits are read when they are looked at.

    Raises:
        InputError: If it is missing or damaged, has no logits, or its classes have no names.
    """
    if not path.is_file():
        raise InputError(f"no such file of logits: {path}", hint=_HINT)
    try:
        with safe_open(path, "pt") as file:
            names = sorted(file.keys())
            if "logits" not in names:
                few = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
                raise InputError(f"{label} has no tensor 'logits'; it has {few or 'none'}", hint=_HINT)
            logits = file.get_tensor("logits")
            metadata = file.metadata() or {}
        with path.open("rb") as content:
            sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file: {error}") from error
    return _Content(logits, _class_names(metadata, label), sha256)


def _class_names(metadata: dict[str, str], label: str) -> tuple[str, ...] | None:
    if "class_names" not in metadata:
        return None
    try:
        names = json.loads(metadata["class_names"])
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(
            f"{label}: its metadata 'class_names' is not a JSON list of names",
            hint="save_file(tensors, FILE, {'class_names': json.dumps(names)})",
        )
    return tuple(names)


def _check_shape(logits: Tensor, data: ImageDataSet, label: str) -> None:
    """Refuse what is no row for each training image, or for each of its views.

    Raises:
        InputError: If the tensor is of another kind, or of other images.
        RecipeError: If rows are of views, and the data has others, or no end of them.
    """
    shape = " x ".join(map(str, logits.shape)) or "none"
    if logits.ndim not in (2, 3) or math.prod(logits.shape) == 0:
        raise InputError(
            f"{label}: logits has the shape {shape}, not (images, classes) or (images, views, classes)", hint=_HINT
        )
    if logits.dtype not in _DTYPES:
        raise InputError(
            f"{label}: logits is {str(logits.dtype).removeprefix('torch.')}, not floating point",
            hint=f"give {', '.join(str(dtype).removeprefix('torch.') for dtype in _DTYPES)}",
        )
    if not data.fingerprint:  # what stands for data that is not here has other counts
        return
    if len(logits) != data.train.samples:
        raise InputError(
            f"{label} has rows of {len(logits):,} images, and {data.name} has {data.train.samples:,} to train on, "
            "those held out included",
            hint=_HINT,
        )
    views = data.train.views
    if logits.ndim == 3 and views is None:
        raise RecipeError(
            f"{label} has a row for each of {logits.shape[1]} views of an image, and every epoch draws new views of "
            f"{data.name}",
            hint="data.views=8 draws 8 views of each image and replays them; or give a row an image",
        )
    if logits.ndim == 3 and views is not None and views.per_sample != logits.shape[1]:
        raise RecipeError(
            f"{label} has rows of {logits.shape[1]} views of an image, and {data.name} shows {views.per_sample}",
            hint="set the augmentation that it was made with, or give a row an image",
        )


def _check_values(rows: Tensor, views: int | None, label: str) -> None:
    """Refuse rows that are no logits.

    Raises:
        InputError: If a number is not finite, or all rows are probabilities.
    """
    probable = True
    for first, part in _parts(rows):
        bad = (~part.isfinite().all(1)).nonzero()
        if len(bad):
            row = first + int(bad[0])
            where = f"image {row}" if views is None else f"view {row % views} of image {row // views}"
            raise InputError(f"{label}: the logits of {where}, counted from 0, are not finite")
        probable = probable and are_probabilities(part.float())
    if probable:
        raise InputError(
            f"{label} holds probabilities: all rows are in [0, 1] and sum to one", hint="write their logarithm"
        )


def _parts(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Cut rows into parts, each with the number of its first row."""
    size = max(1, _MANY // rows.shape[1])
    return ((first, rows[first : first + size]) for first in range(0, len(rows), size))
