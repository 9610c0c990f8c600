"""What is in a data set before anything is trained: what cannot be read, what is there twice, what settings it needs.

Everything said is measured on the images themselves. Two images are the same if networks get the same pixels, whatever
bytes their files have.

Shape suffixes: N images, P pixels of a small grey copy, C classes.
"""

import hashlib
import math
import os
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from cakd_cli.data.base import DataSpec, ImageDataSet, Split, hold_out
from cakd_cli.data.images.files import FileDataSpec, FileSplit, Listing, suitable_size
from cakd_cli.data.images.memory import MemorySplit
from cakd_cli.data.images.pictures import Files, decode

# Training images of a class under which little can be learnt, and the ratio of classes from which they are uneven.
_FEW_IMAGES, _UNEVEN = 10, 10
# Steps of an epoch under which a batch is large for the data.
_FEW_STEPS = 10
# Most of every class that is worth holding out to have an image of the smallest.
_MOST_HELD_OUT = 0.3
# Where no header can be read, and so nothing decoded.
_ANY_SIZE = 224
# Side of the small copies, how many are compared, and how many make a comparison.
_SMALL, _COMPARED, _LEAST_COMPARED = 16, 2_000, 40
_THREADS = 8
# Files that are waited for together, and tensors that are looked at together.
_AT_ONCE, _BATCH = 10_000, 1_024
# Above this many files, looking for doubled ones would be felt at the start of every run.
_MOST_AT_START = 50_000
_HEAD_BYTES = 4_096
# From the worst; the one named first has the copies.
_LEAKS = (("test", "train"), ("test", "validation"), ("validation", "train"))
_NO_LABEL = -1
_SPOKEN = {"test": "test", "validation": "validation", "train": "training"}


class _Image(NamedTuple):
    """One image.

    Attributes:
        part: train, validation or test.
        label: Its class; of several labels an image, all of them.
        name: Path below the folder of the data, or its tensor and number.
        content: What is equal for images that are the same.
        one_colour: Whether all its pixels are alike.
        small: Grey copy, if it is one of those that are compared.
    """

    part: str
    label: Hashable
    name: str
    content: bytes
    one_colour: bool = False
    small: bytes = b""


@dataclass(frozen=True)
class _Found:
    """What was looked at.

    Attributes:
        name: As a person would say it.
        class_names: In label order.
        images: All that can be read.
        counts: Images of each class, (C,), by part.
        unreadable: Why, by path below the folder of the data.
        pictures: Sizes, and modes and formats of files.
        size: That networks should see, and why; none where the data has one size.
        notes: What the data left open, and what was made of it.
    """

    name: str
    class_names: Sequence[str]
    images: list[_Image]
    counts: dict[str, Tensor]
    pictures: dict[str, Any]
    unreadable: dict[str, str] = field(default_factory=dict)
    size: tuple[int, str] | None = None
    notes: tuple[str, ...] = ()


class _Finding(NamedTuple):
    """Something that somebody should know.

    Attributes:
        kind: One word, for programs.
        says: One sentence.
        cases: All of them; the names of images that are the same stand together.
    """

    kind: str
    says: str
    cases: list[list[str]]


def check(spec: DataSpec, *, batch_size: int, note: Callable[[str], None]) -> dict[str, Any]:
    """Look at every image of a data set once.

    Args:
        spec: Which; data that is not here is downloaded.
        batch_size: Images an optimizer step, to compare with how many there are.
        note: Takes a line before the long part of the work.

    Returns:
        ``data``, ``splits`` (images), ``classes`` (images by class and part), ``pictures`` (sizes, modes, formats),
        ``unreadable`` (why, by file), ``must_mend`` and ``warnings`` (each ``kind``, ``says``, ``cases``; worst first),
        ``suggestions`` (each ``setting`` and ``why``), ``notes``, ``ready``, ``seconds`` and ``images_per_second``.

    Raises:
        InputError: If the data is missing, or is no data set at all.
    """
    data = spec if isinstance(spec, FileDataSpec) else spec.load()
    started = time.monotonic()
    found = _look_at_files(data, note) if isinstance(data, FileDataSpec) else _look_at_tensors(data)
    seconds = time.monotonic() - started
    mend, warnings = _unusable(found, left_out=isinstance(spec, FileDataSpec) and spec.bad_images == "skip")
    warnings += [*_doubled(found.images), *_one_colour(found.images), *_uneven(found.class_names, found.counts)]
    suggestions = [
        *_image_size(found, spec),
        *_flips(found.images, spec),
        *_batch_size(len(_of(found.images, "train")), batch_size),
        *_held_out(found.counts, spec.validation_fraction),
    ]
    return {
        "data": found.name,
        "splits": {part: len(_of(found.images, part)) for part in found.counts},
        "classes": {
            name: {part: int(count_C[label]) for part, count_C in found.counts.items()}
            for label, name in enumerate(found.class_names)
        },
        "pictures": found.pictures,
        "unreadable": found.unreadable,
        "must_mend": [finding._asdict() for finding in mend],
        "warnings": [finding._asdict() for finding in warnings],
        "suggestions": [{"setting": setting, "why": why} for setting, why in suggestions],
        "notes": list(found.notes),
        "ready": not mend,
        "seconds": round(seconds, 3),
        "images_per_second": round((len(found.images) + len(found.unreadable)) / seconds, 1),
    }


def at_start(data: ImageDataSet) -> list[str]:
    """Say what is wrong with files that are about to be trained on, decoding none; empty if nothing is.

    Takes less than a second for 10,000 files. Of more than 50,000 the doubled ones are left to :func:`check`.
    """
    if not isinstance(data.train, FileSplit):
        return []
    images = [
        _Image(part, int(split.files.labels_N[index]), split.files.path(index), content=b"")
        for part, split in (("train", data.train), ("validation", data.validation), ("test", data.test))
        if isinstance(split, FileSplit)
        for index in split.index_N.tolist()
    ]
    findings = _uneven(data.class_names, {"train": _counted(_of(images, "train"), data.num_classes)})
    if len(images) <= _MOST_AT_START and data.train.files.on_disk:
        # Copies inside a class teach little that is wrong.
        findings = [found for found in _doubled(_same_files(images)) if found.kind != "copies"] + findings
    return [f"{found.says}{_example(found.cases)}" for found in findings]


def _example(cases: list[list[str]]) -> str:
    """Name the two ends of the first case: between them may be thousands of copies."""
    return f" ({' and '.join(dict.fromkeys((cases[0][0], cases[0][-1])))})" if cases else ""


def _of(images: Sequence[_Image], part: str) -> list[_Image]:
    return [image for image in images if image.part == part]


def _counted(images: Sequence[_Image], classes: int) -> Tensor:
    """Count the images of each class; one of several labels counts for each of them."""
    labels = (image.label if isinstance(image.label, tuple) else (image.label,) for image in images)
    counts = Counter(chain.from_iterable(labels))
    return torch.tensor([counts[label] for label in range(classes)])


def _look_at_files(spec: FileDataSpec, note: Callable[[str], None]) -> _Found:
    listing = spec.listing()
    headers = {
        part: list(_each(_header, [(files, index) for index in range(len(files))]))
        for part, files in listing.parts.items()
    }
    training, *_ = headers.values()
    sides = [min(header[:2]) for header in training if header]
    size = suitable_size(sides) if sides else None
    if spec.image_size == "auto":
        spec = spec.model_copy(update={"image_size": size[0] if size else _ANY_SIZE})
    note(f"decoding {sum(map(len, headers.values())):,} files of {spec.label}")
    images, unreadable = _decoded(listing, spec)
    if len(listing.parts) < 3 and bool((listing.parts["train"].labels_N >= 0).any()):
        images = _with_held_out(images, spec)
    classes = len(listing.class_names)
    return _Found(
        name=spec.label,
        class_names=listing.class_names,
        images=images,
        counts={part: _counted(_of(images, part), classes) for part in _parts_of(images)},
        pictures=_describe([header for part in headers.values() for header in part if header]),
        unreadable=unreadable,
        size=size,
        notes=tuple(listing.reasons.values()),
    )


def _parts_of(images: Sequence[_Image]) -> list[str]:
    here = {image.part for image in images}
    return [part for part in ("train", "validation", "test") if part in here or part != "validation"]


def _each(look: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Look at many files, in their order."""
    with ThreadPoolExecutor(_THREADS) as pool:
        for first in range(0, len(items), _AT_ONCE):
            yield from pool.map(look, items[first : first + _AT_ONCE])


def _header(wish: tuple[Files, int]) -> tuple[int, int, str, str] | None:
    """Width, height, mode and format of a picture; none if its header cannot be read."""
    from PIL import Image

    files, index = wish
    try:
        with Image.open(files.open(index)) as file:
            return *file.size, file.mode, file.format or "?"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _describe(headers: Sequence[tuple[int, int, str, str]]) -> dict[str, Any]:
    """Say the least, median and largest of what headers hold, and how often each mode and format is there."""
    if not headers:
        return {}
    widths, heights, modes, formats = zip(*headers, strict=True)
    aspects = [max(width, height) / min(width, height) for width, height in zip(widths, heights, strict=True)]
    measures = {"width": widths, "height": heights, "aspect": aspects}
    return {
        **{name: [min(of), statistics.median(of), max(of)] for name, of in measures.items()},
        "modes": dict(Counter(modes).most_common()),
        "formats": dict(Counter(formats).most_common()),
    }


def _decoded(listing: Listing, spec: FileDataSpec) -> tuple[list[_Image], dict[str, str]]:
    """Decode every file as training does.

    Returns:
        Those that can be used, and why the others cannot.
    """
    images, unreadable = [], {}
    last = list(listing.parts)[-1]
    for number, (part, files) in enumerate(listing.parts.items()):
        role = "train" if number == 0 else "test" if part == last else "validation"
        compared = _sample(len(files)) if number == 0 else frozenset()
        labels = files.labels_N.tolist()
        looks = [(files, index, spec.resize, index in compared) for index in range(len(files))]
        for path, label, found in zip(files, labels, _each(_look, looks), strict=True):
            name = str(Path(path).relative_to(listing.root)) if Path(path).is_relative_to(listing.root) else path
            if isinstance(found, str):
                unreadable[name] = found.removeprefix(f"{path}: ")
            else:
                images.append(_Image(role, label, name, *found))
    return images, unreadable


def _sample(count: int) -> frozenset[int]:
    """Choose which training images are compared with their mirror images: always the same ones."""
    return frozenset(torch.randperm(count, generator=torch.Generator().manual_seed(0))[:_COMPARED].tolist())


def _look(wish: tuple[Files, int, int, bool]) -> str | tuple[bytes, bool, bytes]:
    """Decode one file, or say why it cannot be used."""
    files, index, resize, compared = wish
    picture = decode(files.open(index), resize)
    if isinstance(picture, str):
        return picture
    pixels = picture.tobytes()
    one_colour = all(least == most for least, most in picture.getextrema())
    small = picture.convert("L").resize((_SMALL, _SMALL)).tobytes() if compared else b""
    return _digest(pixels, picture.size), one_colour, small


def _digest(pixels: bytes, size: Sequence[int]) -> bytes:
    """Hash what networks get."""
    found = hashlib.sha256(f"{tuple(size)}".encode())
    found.update(pixels)  # apart: to join them would copy every image
    return found.digest()


def _with_held_out(images: Sequence[_Image], spec: FileDataSpec) -> list[_Image]:
    """Move the training images that a run holds out to the validation part."""
    training = _of(images, "train")
    labels_N = torch.tensor([image.label for image in training], dtype=torch.int64)
    _, held = hold_out(labels_N, spec.validation_fraction, spec.split_seed)
    for index in held.tolist():
        training[index] = training[index]._replace(part="validation")
    return training + [image for image in images if image.part != "train"]


def _look_at_tensors(data: ImageDataSet) -> _Found:
    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    splits = {part: split for part, split in parts.items() if split is not None}
    images = [image for part, split in splits.items() for image in _tensors(part, split)]
    height, width = data.image_size
    aspect = max(height, width) / min(height, width)
    return _Found(
        name=data.name,
        class_names=data.class_names,
        images=images,
        counts={part: _counted(_of(images, part), data.num_classes) for part in splits},
        pictures={"width": [width] * 3, "height": [height] * 3, "aspect": [aspect] * 3, "channels": data.channels},
    )


def _tensors(part: str, split: Split) -> Iterator[_Image]:
    numbers = split.number_N.tolist() if isinstance(split, MemorySplit) else range(len(split))
    file_part = "train" if part == "validation" else part
    compared = _sample(len(split)) if part == "train" else frozenset()
    position = 0
    for images, labels, *_ in split.ordered_batches(batch_size=_BATCH, device=torch.device("cpu")):
        flat = images.flatten(2)
        one_colour_B = (flat.amax(2) == flat.amin(2)).all(1).tolist()
        small_BP = functional.interpolate(images.float().mean(1, keepdim=True), size=(_SMALL, _SMALL), mode="area")
        copies = [copy.tobytes() for copy in small_BP.round().to(torch.uint8).numpy()]
        for row, image in enumerate(images.numpy()):
            label = tuple(labels[row].nonzero().flatten().tolist()) if labels.ndim > 1 else int(labels[row])
            content = _digest(image.tobytes(), image.shape)
            small = copies[row] if position in compared else b""
            yield _Image(part, label, f"{file_part} {numbers[position]}", content, one_colour_B[row], small)
            position += 1


def _unusable(found: _Found, *, left_out: bool) -> tuple[list[_Finding], list[_Finding]]:
    """Say what a training would stop at, and what it would leave out.

    Args:
        left_out: Whether pictures that cannot be read are.
    """
    mend: list[_Finding] = []
    warnings: list[_Finding] = []
    if found.unreadable:
        total = len(found.images) + len(found.unreadable)
        says = f"{len(found.unreadable):,} of {total:,} files cannot be used"
        cases = [[f"{name}: {why}"] for name, why in found.unreadable.items()]
        (warnings if left_out else mend).append(_Finding("unreadable", says, cases))
        emptied = [
            [f"{name}: none in {part}"]
            for part, count_C in found.counts.items()
            for name, count in zip(found.class_names, count_C.tolist(), strict=True)
            if part != "validation" and count_C.any() and not count
        ]
        if emptied:
            mend.append(_Finding("emptied", f"classes without an image that can be read: {len(emptied):,}", emptied))
    unwritable = [[repr(name)] for name in found.class_names if not _is_text(name)]
    if unwritable:
        mend.append(_Finding("names", f"class names that cannot be written as text: {len(unwritable):,}", unwritable))
    return mend, warnings


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _doubled(images: Sequence[_Image]) -> list[_Finding]:
    """Find images that are there more than once: first those that spoil what is measured, last mere copies."""
    by_content: dict[bytes, list[_Image]] = defaultdict(list)
    for image in images:
        by_content[image.content].append(image)
    groups = [group for group in by_content.values() if len(group) > 1]
    findings = []
    for copy, original in _LEAKS:
        leaking = [group for group in groups if {copy, original} <= {image.part for image in group}]
        if leaking:
            count, total = sum(len(_of(group, copy)) for group in leaking), len(_of(images, copy))
            says = f"{_SPOKEN[copy]} images that are {_SPOKEN[original]} images as well: {count:,} of {total:,}"
            cases = [[image.name for part in (copy, original) for image in _of(group, part)] for group in leaking]
            findings.append(_Finding(f"{copy}-in-{original}", says, cases))
    torn = [group for group in groups if len({image.label for image in group} - {_NO_LABEL}) > 1]
    if torn:
        says = f"images that are the same as one of another class: {sum(map(len, torn)):,}"
        findings.append(_Finding("conflict", says, [[image.name for image in group] for group in torn]))
    alike = [group for group in groups if len({image[:2] for image in group}) == 1]
    if alike:
        says = f"copies of an image of the same class and part: {sum(len(group) - 1 for group in alike):,}"
        findings.append(_Finding("copies", says, [[image.name for image in group] for group in alike]))
    return findings


def _same_files(images: Sequence[_Image]) -> list[_Image]:
    """Give images with equal contents the same one, as far as files of several parts or classes have the same bytes.

    Sizes rule out most of them, and the first bytes nearly all of the rest.
    """
    groups = [list(images)]
    for look in (_file_size, _head, _whole):
        finer = []
        for group in groups:
            found: dict[Hashable, list[_Image]] = defaultdict(list)
            for image in group:
                found[look(image.name)].append(image)
            finer += [alike for alike in found.values() if len({image[:2] for image in alike}) > 1]
        groups = finer
    first = {image.name: group[0].name for group in groups for image in group}
    return [image._replace(content=os.fsencode(first.get(image.name, image.name))) for image in images]


def _file_size(path: str) -> int:
    return os.stat(path).st_size


def _head(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(_HEAD_BYTES)


def _whole(path: str) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _one_colour(images: Sequence[_Image]) -> list[_Finding]:
    cases = [[image.name] for image in images if image.one_colour]
    return [_Finding("one-colour", f"images of one colour all over: {len(cases):,}", cases)] if cases else []


def _uneven(class_names: Sequence[str], counts: dict[str, Tensor]) -> list[_Finding]:
    """Find classes of few training images, and classes that have many times those of others."""
    findings = []
    count_C = counts["train"]
    if not count_C.any():  # without labels
        return []
    largest, smallest = int(count_C.argmax()), int(count_C.argmin())
    if count_C[largest] >= _UNEVEN * count_C[smallest].clamp(min=1):
        said = [f"{class_names[label]} {int(count_C[label]):,}" for label in (largest, smallest)]
        says = f"training images are uneven: {said[0]}, {said[1]}"
        findings.append(_Finding("uneven", says, []))
    few = [label for label, count in enumerate(count_C.tolist()) if count < _FEW_IMAGES]
    if few:
        says = f"classes of fewer than {_FEW_IMAGES} training images: {len(few):,} of {len(count_C):,}"
        findings.append(_Finding("few", says, [[f"{class_names[label]}: {int(count_C[label])}"] for label in few]))
    return findings


def _image_size(found: _Found, spec: DataSpec) -> Iterator[tuple[str, str]]:
    if found.size is None or not isinstance(spec, FileDataSpec) or spec.image_size == found.size[0]:
        return
    yield f"data.image_size={found.size[0]}", found.size[1]


def _flips(images: Sequence[_Image], spec: DataSpec) -> Iterator[tuple[str, str]]:
    """Say whether to mirror training images, from how often the nearest small copy is of the same class."""
    flips = getattr(spec, "horizontal_flip", None)
    compared = {
        image.content: image
        for image in images
        if image.small and isinstance(image.label, int) and image.label != _NO_LABEL
    }
    if flips is None or len(compared) < _LEAST_COMPARED:
        return
    labels_N = torch.tensor([image.label for image in compared.values()])
    small = [list(image.small) for image in compared.values()]
    upright_N, mirrored_N = _nearest_is_alike(torch.tensor(small, dtype=torch.float32), labels_N)
    lost, won = int((upright_N & ~mirrored_N).sum()), int((mirrored_N & ~upright_N).sum())
    upright, mirrored = float(upright_N.float().mean()), float(mirrored_N.float().mean())
    chance = float(labels_N.bincount().max()) / len(labels_N)
    measured = (
        f"the nearest of {len(compared):,} small grey copies is of the same class for {upright:.0%} of the images, "
        f"and for {mirrored:.0%} mirrored"
    )
    if upright < 1.5 * chance:
        if flips:
            yield "data.horizontal_flip=false", "if left and right tell classes apart, as in letters, signs and hands"
    # Three standard deviations of what chance would do to as many pairs.
    elif lost - won > 3 * math.sqrt(lost + won) and mirrored < 0.8 * upright:
        if flips:
            yield "data.horizontal_flip=false", measured
    elif not flips:
        yield "data.horizontal_flip=true", measured


def _nearest_is_alike(small_NP: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Find whether the nearest other image has the same label, of each image as it is and of its mirror image.

    Returns:
        Two bool tensors (N,).
    """
    small_NP = small_NP - small_NP.mean(1, keepdim=True)
    small_NP = small_NP / small_NP.norm(dim=1, keepdim=True).clamp(min=1)
    mirrored_NP = small_NP.view(-1, _SMALL, _SMALL).flip(2).flatten(1)
    alike = [
        labels_N[(asked_NP @ small_NP.T).fill_diagonal_(-math.inf).argmax(1)] == labels_N
        for asked_NP in (small_NP, mirrored_NP)
    ]
    return alike[0], alike[1]


def _batch_size(images: int, batch_size: int) -> Iterator[tuple[str, str]]:
    steps, fitting = images // batch_size, 2 ** int(math.log2(max(1, images / _FEW_STEPS)))
    if steps < _FEW_STEPS and fitting < batch_size:
        why = f"an epoch of {images:,} training images has {images // fitting} steps then; of {batch_size}, {steps}"
        yield f"engine.batch_size={fitting}", why


def _held_out(counts: dict[str, Tensor], fraction: float) -> Iterator[tuple[str, str]]:
    """Find the share of every class that is worth holding out so that each class has a validation image."""
    count_C = counts["train"] + counts.get("validation", 0)
    held_C = counts.get("validation", torch.zeros_like(count_C))
    without = count_C[(held_C == 0) & (count_C > 1)]
    if not fraction or not len(without):
        return
    # A half is rounded down.
    needed = math.ceil(100 * 0.51 / int(without.min())) / 100
    if needed <= _MOST_HELD_OUT:
        why = f"then every class has an image to choose the best epoch by; {fraction:g} leaves {len(without):,} without"
        yield f"data.validation_fraction={needed:g}", why
