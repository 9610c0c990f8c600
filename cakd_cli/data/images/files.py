"""Data sets that stay in files: decoded, cropped and turned in worker processes.

Shape suffixes: B batch, N samples.
"""

import functools
import hashlib
import importlib.metadata
import math
import os
import resource
import signal
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cakd_cli.data.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    WHOLE,
    Batch,
    ImageDataSet,
    Share,
    Split,
    Views,
    hold_out,
    to_device,
)
from cakd_cli.data.images.augmentation import Draw, epoch_key, sample_seed
from cakd_cli.data.images.decoded import DecodedImages
from cakd_cli.data.images.pictures import Files, bad_files, decode, header_size, middle_crop
from cakd_cli.data.images.strong import AugmentedSpec
from cakd_cli.errors import InputError

# The draw with which a sample is asked for when it is not to be augmented.
_NO_DRAW = -1
# Of recorded views, whatever the run's seed.
_RECORDED_SEED = 0
# ImageNet's, and the largest that is chosen by itself.
_USUAL_SIZE, _SIZE_STEP, _LEAST_SIZE = 224, 8, 8
# What a process has open in training, and what a worker adds: its pipes, and tensors on their way.
_OPEN_FILES, _OPEN_FILES_A_WORKER = 64, 24
# Files whose headers tell how large images are.
_LOOKED_AT = 256

ImageSize = Annotated[int, Field(ge=_LEAST_SIZE, le=1024)] | Literal["auto"]


# An image, its class, and maybe its second view.
Sample = tuple[Tensor, int] | tuple[Tensor, int, Tensor]


class _Images(Dataset[Any]):
    """Decodes one file at a time; runs in the workers.

    An unreadable file comes back as a sentence, because an exception would arrive with the worker's traceback.
    """

    def __init__(
        self, files: Files, seed: int, spec: "FileDataSpec", decoded: DecodedImages | None, second_seed: int | None
    ) -> None:
        from torchvision.transforms import v2

        self.files = files
        self.decoded = decoded
        self.seed = seed
        # Of the run; none without second views.
        self.second_seed = second_seed
        self.beyond = [spec.augmentation(second=second, photographs=True) for second in (False, True)]
        self.augment = v2.Compose(
            [
                *([v2.RandomRotation(spec.rotation)] if spec.rotation else []),
                v2.RandomResizedCrop(spec.size, scale=(spec.min_crop_area, 1.0), antialias=True),
                v2.RandomHorizontalFlip(0.5 if spec.horizontal_flip else 0.0),
                v2.PILToTensor(),
            ]
        )
        self.resize = spec.resize
        self.draft = spec.shorter_side if spec.draft_jpeg else None
        self.plain = middle_crop(spec.resize, spec.size)

    def __getitem__(self, key: tuple[int, int, int]) -> Sample | str:
        draw, index, epoch = key
        label = int(self.files.labels_N[index])
        decoded = self.decoded if draw != _NO_DRAW else None
        image = decoded.read(index) if decoded is not None else None
        if image is None:
            image = self._decode(index, learns=draw != _NO_DRAW)
            if isinstance(image, str):
                return image
            if decoded is not None:
                image = decoded.keep(index, image)
        if draw == _NO_DRAW:
            return self.plain(image), label
        seen = self._seen(image, sample_seed(self.seed, draw, index), second=False)
        if self.second_seed is None:
            return seen, label
        return seen, label, self._seen(image, Draw(self.second_seed, epoch, second=True).of(index), second=True)

    def _decode(self, index: int, *, learns: bool) -> Any:
        try:
            source = self.files.open(index)
        except OSError as error:
            return f"{self.files.path(index)}: cannot be read as an image: {error}"
        return decode(source, self.resize, draft=self.draft if learns else None)

    def _seen(self, image: Any, seed: int, *, second: bool) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which reseeds every device as well.
            torch.default_generator.manual_seed(seed)
            view: Tensor = self.augment(image)
            beyond = self.beyond[second]
            return view if beyond is None else beyond(view)


def _collate(samples: list[Sample | str]) -> tuple[Tensor, ...] | str:
    for sample in samples:
        if isinstance(sample, str):
            return sample
    images, labels, *strong = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels), *map(torch.stack, strong)


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and schedulers signal the whole group; a worker that died of it would take the run's checkpoint along."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _check_open_files(workers: int) -> None:
    """Let this process open what its workers need, before torch starts some of them and waits for the rest forever.

    Raises:
        InputError: If the system's limit is too low.
    """
    needed = _OPEN_FILES + _OPEN_FILES_A_WORKER * workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if workers == 0 or soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise InputError(
            f"{workers} processes that decode images need {needed} open files, and this process may open {hard}",
            hint=f"ulimit -n {needed}, or data.workers=0",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _cores() -> int:
    """Count the cores that this process may use; more workers would only wait for each other."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Listing(NamedTuple):
    """What a data set consists of.

    Attributes:
        root: Folder from which fingerprints name the files.
        parts: The training files first, and those that only the end of a run looks at last; ``val`` between them where
            validation is a part of its own.
        class_names: One name a class, in label order.
        reasons: Why the parts are these where the files leave it open, by key of the recipe's ``data``.
        wordnet_ids: WordNet's id of each class, where the data is made of its synsets; empty of other data.
    """

    root: Path
    parts: Mapping[str, Files]
    class_names: Sequence[str]
    reasons: Mapping[str, str] = {}
    wordnet_ids: Sequence[str] = ()


class FileSplit(Split):
    """Files and their labels; nothing is decoded before it is asked for.

    Attributes:
        files: Of the whole part.
        index_N: Which of them, int64.
    """

    def __init__(
        self, files: Files, spec: "FileDataSpec", index_N: Tensor, decoded: DecodedImages | None = None
    ) -> None:
        self.files = files
        self.samples = len(files)
        self._spec = spec
        self.index_N = index_N
        self._decoded = decoded
        self._has_second = False

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.index_N)

    @functools.cached_property
    def views(self) -> Views | None:
        """Describe the recorded crops; none where every epoch has new ones."""
        spec = self._spec
        if not spec.views:
            return None
        settings = f"{spec.image_size} pixels, area {spec.min_crop_area}, flip {spec.horizontal_flip}"
        if spec.rotation:
            settings += f", turned by {spec.rotation:g} degrees at most"
        if spec.decoded_gb:
            settings += ", shrunk first"
        if spec.draft_jpeg:
            settings += ", drafted"
        if spec.augmentation() is not None:
            settings += f", {spec.augment}, cutout {spec.cutout}, erasing {spec.erasing:g}"
        # The draws are torch's, the crops torchvision's and the pixels Pillow's.
        made_by = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "torchvision", "pillow"))
        return Views(len(self.files), spec.views, f"{spec.views} crops: {settings}; {made_by}; {_stamps(self.files)}")

    def subset(self, indices_N: Tensor) -> "FileSplit":
        """Return the split of the samples at these positions."""
        split = FileSplit(self.files, self._spec, self.index_N[indices_N], self._decoded)
        split._has_second = self._has_second
        return split

    def with_second_view(self) -> "FileSplit":
        """Return the split whose training batches hold a second view of each image."""
        split = self.subset(torch.arange(len(self)))
        split._has_second = True
        return split

    def train_batches(
        self, *, batch_size: int, seed: int, epoch: int, start: int, device: torch.device, share: Share = WHOLE
    ) -> Iterator[Batch]:
        """Yield a share of the batches of an epoch, shuffled and augmented, from batch number ``start`` on."""
        generator = torch.Generator().manual_seed(epoch_key(seed, epoch))
        order = self.index_N[torch.randperm(len(self), generator=generator)]
        size = batch_size // share.ranks
        chunks = share.of(order, batch_size)[start * size :].split(size)
        if self._decoded is not None:
            self._decoded.create()
        views, second_seed = self._spec.views, seed if self._has_second else None
        if not views:
            drawn = [[(epoch, index, epoch) for index in chunk.tolist()] for chunk in chunks]
        else:
            # A recorded view is the draw of a small number instead of the epoch, and the same in every run.
            seed, own_seed = _RECORDED_SEED, seed
            drawn = [[(sample_seed(own_seed, epoch, i) % views, i, epoch) for i in chunk.tolist()] for chunk in chunks]
        for batch, keys, chunk in zip(self._load(seed, drawn, device, second_seed), drawn, chunks, strict=True):
            names = torch.tensor([index * views + view for view, index, _ in keys]) if views else None
            yield batch._replace(views=names, samples=to_device(chunk, device))

    def ordered_batches(self, *, batch_size: int, device: torch.device) -> Iterator[Batch]:
        """Yield every sample once, in order, without augmentation."""
        chunks = self.index_N.split(batch_size)
        yield from self._load(0, [[(_NO_DRAW, index, 0) for index in chunk.tolist()] for chunk in chunks], device)

    def labels_by_number(self) -> Tensor:
        """Class of each file, -1 for those that are not in the split."""
        labels_N = torch.full((len(self.files),), -1)
        labels_N[self.index_N] = self.files.labels_N[self.index_N]
        return labels_N

    def _load(
        self, seed: int, batches: list[list[tuple[int, int, int]]], device: torch.device, second_seed: int | None = None
    ) -> Iterator[Batch]:
        workers = min(self._spec.num_workers, len(batches))
        _check_open_files(workers)
        loader: DataLoader[Any] = DataLoader(
            _Images(self.files, seed, self._spec, self._decoded, second_seed),
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
            worker_init_fn=_leave_signals_to_the_parent,
            # Its own generator: drawing from the global one would change what a resumed run sees.
            generator=torch.Generator(),
        )
        for content in loader:
            if isinstance(content, str):
                raise InputError(content, hint="replace or remove the file")
            images, labels, *strong = (to_device(part, device) for part in content)
            yield Batch(images, labels, strong=strong[0] if strong else None)

    def pictures(self, end: list[Callable[..., Any]]) -> Dataset[Any]:
        """What torchvision's ImageFolder gives with the same augmentation."""
        from torchvision import transforms

        spec = self._spec
        turn = [transforms.RandomRotation(spec.rotation)] if spec.rotation else []
        crop = transforms.RandomResizedCrop(spec.size, scale=(spec.min_crop_area, 1.0))
        flip = [transforms.RandomHorizontalFlip()] if spec.horizontal_flip else []
        return _Pictures(self.files, self.index_N, transforms.Compose([*turn, crop, *flip, *end]))


class _Pictures(Dataset[tuple[Any, int]]):
    def __init__(self, files: Files, index_N: Tensor, transform: Callable[[Any], Any]) -> None:
        self._files = files
        self._index_N = index_N
        self._transform = transform

    def __len__(self) -> int:
        return len(self._index_N)

    def __getitem__(self, position: int) -> tuple[Any, int]:
        from PIL import Image

        index = int(self._index_N[position])
        with Image.open(self._files.open(index)) as file:
            picture = file.convert("RGB")
        return self._transform(picture), int(self._files.labels_N[index])


class FileDataSpec(AugmentedSpec):
    """Settings of images that stay in files."""

    shorthand: ClassVar[str | None] = "path"
    # What the folder of the data has.
    layout: ClassVar[str]
    # Of each channel, pixels in [0, 1].
    mean: ClassVar[tuple[float, ...]] = IMAGENET_MEAN
    std: ClassVar[tuple[float, ...]] = IMAGENET_STD

    path: str = Field(description="folder of the data")
    image_size: ImageSize = Field(
        "auto", description="height and width that networks see, in pixels; auto is what the files have, 224 at most"
    )
    min_crop_area: float = Field(0.25, gt=0, le=1, description="least share of an image in a training crop")
    test_crop: float = Field(0.875, gt=0, le=1, description="share of the shorter side kept by the middle crop")
    horizontal_flip: bool = Field(True, description="mirror half of the training images left to right")
    rotation: float = Field(
        0, ge=0, le=180, description="most degrees by which training images are turned, either way; 0 = none"
    )
    views: int = Field(
        0,
        ge=0,
        le=10_000,
        description="crops of each training image that are drawn once and replayed, so that a teacher memory can hold "
        "the answers; 0 = new ones in every epoch",
    )
    decoded_gb: float = Field(
        0,
        ge=0,
        le=1e6,
        description="room under $CAKD_HOME for decoded training images, in 10^9 bytes; 0 = decode in every epoch",
    )
    draft_jpeg: bool = Field(
        False,
        description="decode training JPEGs that are far larger than crops need at a half, a quarter or an eighth: "
        "faster, with other crops of the same sizes; what is measured is decoded whole",
    )
    bad_images: Literal["fail", "skip"] = Field(
        "fail", description="what to do with pictures that cannot be read: name them, or leave them out and list them"
    )
    workers: Annotated[int, Field(ge=0, le=256)] | Literal["auto"] = Field(
        "auto", description="processes that decode images, no more than batches; auto is one a core, 8 at most"
    )

    @property
    def size(self) -> int:
        """Height and width that networks see, in pixels."""
        assert self.image_size != "auto", "without_auto() chooses it"
        return self.image_size

    @property
    def resize(self) -> int:
        """Pixels of the shorter side before the middle is cropped."""
        return round(self.size / self.test_crop)

    @property
    def shorter_side(self) -> int:
        """Pixels of the shorter side with which the smallest crop still has as many as the networks see."""
        return math.ceil(self.size / math.sqrt(self.min_crop_area))

    @property
    def num_workers(self) -> int:
        """Processes that decode images."""
        return min(8, _cores()) if self.workers == "auto" else self.workers

    def without_auto(self, processes: int = 1) -> tuple[Self, dict[str, str]]:
        workers = max(1, self.num_workers // processes) if self.workers == "auto" else self.num_workers
        update: dict[str, Any] = {"workers": workers}
        reasons = {}
        if self.image_size == "auto":
            update["image_size"], reasons["image_size"] = self._size_of_files()
        return self.model_copy(update=update), reasons

    def _size_of_files(self) -> tuple[int, str]:
        """Look at the headers of some training images; the median image is not enlarged."""
        files = self.listing().parts["train"]
        step = max(1, len(files) // _LOOKED_AT)
        looked_at = range(0, len(files), step)
        return suitable_size([min(header_size(files, index)) for index in looked_at])

    def shown_as(self, image_size: tuple[int, int], crop_pct: float) -> Self:
        return self.model_copy(update={"image_size": image_size[0], "test_crop": crop_pct})

    def faster_loading(self) -> str:
        cores = _cores()
        if self.num_workers < cores:
            return f"data.workers={cores} would decode more images at a time (now {self.num_workers})"
        if not self.decoded_gb:
            return "data.decoded_gb=20 would keep decoded images, in 20 GB at most"
        return ""

    def countable_views(self) -> str:
        return "" if self.views else "data.views=8 would draw 8 crops of each image once"

    def load(self, *, fetch: bool = True) -> ImageDataSet:
        """List the files; images are decoded when they are asked for."""
        if self.image_size == "auto":
            return self.without_auto()[0].load(fetch=fetch)
        listing = self.listing()
        bad = {part: self._bad_files(files, remember=fetch) for part, files in listing.parts.items()}
        parts = {part: files.without(bad[part]) if bad[part] else files for part, files in listing.parts.items()}
        decoded = None
        if self.decoded_gb:
            kept_as = f"{self.shorter_side}{' draft' if self.draft_jpeg else ''}"
            decoded = DecodedImages.of(
                parts["train"], shorter_side=self.shorter_side, kept_as=kept_as, limit_gb=self.decoded_gb
            )
        splits = {
            part: FileSplit(files, self, torch.arange(len(files)), decoded if part == "train" and fetch else None)
            for part, files in parts.items()
        }
        train, *middle, test = splits.values()
        validation = middle[0] if middle else None
        labelled = bool((parts["train"].labels_N >= 0).any())
        if validation is None and labelled:
            keep, out = hold_out(parts["train"].labels_N, self.validation_fraction, self.split_seed)
            train, validation = splits["train"].subset(keep), splits["train"].subset(out) if len(out) else None
        return ImageDataSet(
            name=self.label,
            train=train,
            validation=validation,
            test=test,
            class_names=tuple(listing.class_names),
            wordnet_ids=tuple(listing.wordnet_ids),
            channels=3,
            image_size=(self.size, self.size),
            mean=self.mean,
            std=self.std,
            fingerprints={part: _fingerprint(listing.root, files) for part, files in parts.items()},
            left_out=tuple(path for part in parts for path in sorted(bad[part])),
            labelled=labelled,
            reasons=listing.reasons,
            crop_pct=self.test_crop,
            resized=True,
        )

    def _bad_files(self, files: Files, *, remember: bool) -> dict[str, str]:
        """Check every file: its header, or all of it where bad ones are left out.

        Returns:
            Why a file is left out, by path.

        Raises:
            InputError: If some cannot be used, and are not to be left out; or if a class has no other.
        """
        skip = self.bad_images == "skip"
        bad = bad_files(files, self.resize, whole=skip, remember=remember)
        if bad and (not skip or len(files.without(bad).labels_N.unique()) < len(files.labels_N.unique())):
            what = f"{len(bad):,} of {len(files):,} images cannot be used" + (", all of a class" if skip else "")
            more = [f"and {len(bad) - 5:,} more"] if len(bad) > 5 else []
            raise InputError(
                "\n  ".join([f"{what}:", *list(bad.values())[:5], *more]),
                hint="replace or remove the files" + ("" if skip else ", or leave them out: data.bad_images=skip"),
            )
        return bad

    def listing(self) -> Listing:
        """Find the files and the classes.

        Raises:
            InputError: If they are missing or do not fit together.
        """
        raise NotImplementedError

    def _root(self) -> Path:
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise InputError(f"no such folder of images: {root}", hint=f"name the folder that has {self.layout}")
        return root


def suitable_size(shorter_sides: Sequence[int]) -> tuple[int, str]:
    """Choose the height and width that networks see, and say why, from the shorter sides of images, in pixels."""
    median = round(statistics.median(shorter_sides))
    size = max(_LEAST_SIZE, min(_USUAL_SIZE, median // _SIZE_STEP * _SIZE_STEP))
    return size, f"the shorter side of the median training image has {median} pixels"


def _stamps(files: Files) -> str:
    """Hash when the files were last written: a changed picture may have the size of the old one."""
    digest = hashlib.sha256()
    for index in range(len(files)):
        facts = files.facts(index)
        digest.update(f"{facts.written_ns} {facts.changed_ns}\n".encode())
    return digest.hexdigest()[:16]


def _fingerprint(root: Path, files: Files) -> str:
    digest = hashlib.sha256()
    for index, path in enumerate(files):
        # A table may name files that lie elsewhere.
        name = Path(path).relative_to(root) if Path(path).is_relative_to(root) else os.path.relpath(path, root)
        digest.update(os.fsencode(f"{name} {files.facts(index).size}\n"))
    return digest.hexdigest()[:16]
