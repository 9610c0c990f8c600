"""What every data set shares: its place in a recipe, its splits and its batches.

Shape suffixes: B batch, N samples of a split, C channels, H and W height and width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset

from cakd_cli.options import Options

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class InputSpec(NamedTuple):
    """What a network is given.

    Attributes:
        shape: Of one sample, (channels, height, width).
        dtype: Of a batch before the network's own normalisation.
    """

    shape: tuple[int, int, int]
    dtype: torch.dtype = torch.uint8

    def example(self, device: torch.device | None = None) -> Tensor:
        """One sample of zeros, as a network takes it: normalised, float32."""
        return torch.zeros(1, *self.shape, device=device)


class Batch(NamedTuple):
    """Images and labels on one device.

    Attributes:
        images: uint8, (batch, channels, height, width), not normalised: each network has its own normalisation.
        labels: Class indices, (batch,), -1 for images without a label; bool (batch, classes) for several an image.
        views: Name of each image's view, int64 (batch,) on the CPU, where no device has to be waited for to read it;
            none where views are not counted.
        samples: Number of each image in the training file, int64 (batch,); none where nothing is learnt.
        strong: A second view of each image, strongly augmented; none unless :meth:`Split.with_second_view` asks for it.
        other_labels: Labels of the images that are mixed into these; none where none are.
        own_share: Share in [0, 1] that each image has of what is shown, (batch,), the same for all of them.
    """

    images: Tensor
    labels: Tensor
    views: Tensor | None = None
    samples: Tensor | None = None
    strong: Tensor | None = None
    other_labels: Tensor | None = None
    own_share: Tensor | None = None


class Share(NamedTuple):
    """What of each batch one process takes.

    Attributes:
        rank: The process's number.
        ranks: Processes.
        parts: Into which a batch is cut one after the other; each of them is shared.
        incomplete: Whether an epoch ends with the incomplete batch that is left, as far as it can be shared equally.
    """

    rank: int = 0
    ranks: int = 1
    parts: int = 1
    incomplete: bool = False

    def steps(self, samples: int, batch_size: int) -> int:
        """Count the batches of an epoch."""
        full, rest = divmod(samples, batch_size)
        return full + (self.incomplete and rest >= self.parts * self.ranks)

    def of(self, samples_N: Tensor, batch_size: int) -> Tensor:
        """Pick what is this process's of every batch, in order; ranks times parts divide the batch size."""
        end = len(samples_N) // batch_size * batch_size
        full_N = samples_N[:end].view(-1, self.parts, self.ranks, batch_size // self.parts // self.ranks)
        mine_N = full_N[:, :, self.rank].flatten()
        each = (len(samples_N) - end) // (self.parts * self.ranks)
        if not (self.incomplete and each):
            return mine_N
        rest_N = samples_N[end : end + each * self.parts * self.ranks].view(self.parts, self.ranks, each)
        return torch.cat([mine_N, rest_N[:, self.rank].flatten()])


WHOLE = Share()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor without waiting where that is safe: not every accelerator keeps the source until it is copied."""
    return tensor.to(device, non_blocking=device.type == "cuda")


@dataclass(frozen=True)
class Views:
    """The finite set of views that training can meet: what a teacher can be asked once and for all.

    A view's name is ``sample * per_sample + view``, with the sample's number in its file, so that it does not depend
    on which samples are held out.

    Attributes:
        samples: Samples in the file, those held out included.
        per_sample: Views of each.
        identity: What makes the pixels of a view beside the data's fingerprint; equal words mean equal views.
    """

    samples: int
    per_sample: int
    identity: str

    @property
    def count(self) -> int:
        """Count the views of all samples."""
        return self.samples * self.per_sample


class Split(ABC):
    """One part of a data set.

    Attributes:
        samples: Samples in the file, or the list of files, by which they are numbered; those of other splits included.
    """

    samples: int

    @property
    @abstractmethod
    def views(self) -> Views | None:
        """Describe the views that :meth:`train_batches` names; none where there is no end of them."""

    @abstractmethod
    def __len__(self) -> int:
        """Count the samples."""

    @abstractmethod
    def train_batches(
        self, *, batch_size: int, seed: int, epoch: int, start: int, device: torch.device, share: Share = WHOLE
    ) -> Iterator[Batch]:
        """Yield a share of the batches of an epoch, shuffled and augmented, from batch number ``start`` on.

        Order and augmentation are functions of (seed, epoch, sample) alone: a resumed epoch goes on as it would have.
        """

    @abstractmethod
    def ordered_batches(self, *, batch_size: int, device: torch.device) -> Iterator[Batch]:
        """Yield every sample once, in order, without augmentation."""

    @abstractmethod
    def labels_by_number(self) -> Tensor | None:
        """Class of each sample by its number in the training file, int64 on the CPU, -1 for those of other splits.

        None where a sample may have several.
        """

    @abstractmethod
    def with_second_view(self) -> "Split":
        """Return the split whose training batches hold a second, strongly augmented view of each image."""

    @abstractmethod
    def subset(self, indices_N: Tensor) -> "Split":
        """Return the split of the samples at these positions."""

    @abstractmethod
    def pictures(self, end: list[Callable[..., Any]]) -> Dataset[Any]:
        """Return the split as people write it who use torchvision alone, to measure against.

        Args:
            end: Transforms after the augmentation.

        Returns:
            Pillow pictures, augmented and transformed, with their labels.

        Raises:
            RecipeError: If Pillow has no such pictures.
        """


@dataclass(frozen=True)
class ImageDataSet:
    """Everything that a run needs to know of its data.

    Attributes:
        name: As a person would say it.
        train: Training samples without those held out.
        validation: Held-out samples, or none.
        test: Samples that only the end of a run looks at.
        class_names: One name a class, in label order.
        wordnet_ids: WordNet's id of each class, where the data is made of its synsets; empty of other data.
        channels: Channels of an image.
        image_size: Height and width of an image as a network sees it, in pixels.
        mean: Mean of each channel over training images, pixels in [0, 1].
        std: Standard deviation likewise.
        fingerprints: Hash of the pixels and labels of ``train`` (with what is held out of it), ``test``, and ``val``
            where it is a part of its own; of folders, of the paths and sizes of their files. Empty for stand-ins.
        crop_pct: Share of the shorter side that is shown when nothing is learnt.
        multi_label: Whether an image may have several labels, or none.
        labelled: Whether training images have labels; without, each is -1.
        resized: Whether images are resized to what a network sees.
        left_out: Files that cannot be read.
        reasons: What was chosen because of what the files have, by key of the recipe's ``data``.
    """

    name: str
    train: Split
    validation: Split | None
    test: Split
    class_names: tuple[str, ...]
    channels: int
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprints: Mapping[str, str]
    crop_pct: float = 1.0
    multi_label: bool = False
    labelled: bool = True
    resized: bool = False
    left_out: tuple[str, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)
    wordnet_ids: tuple[str, ...] = ()

    @property
    def input(self) -> InputSpec:
        """What a network is given."""
        return InputSpec((self.channels, *self.image_size))

    @property
    def fingerprint(self) -> str:
        """Hash of what training sees."""
        return self.fingerprints.get("train", "")

    @property
    def num_classes(self) -> int:
        """Count the classes."""
        return len(self.class_names)


class DataSpec(Options):
    """A data set by name, and how it is split and augmented."""

    # The field that `NAME:VALUE` on the command line fills.
    shorthand: ClassVar[str | None] = None

    type: str
    validation_fraction: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of each training class held out to choose the best epoch, where there is no val/",
    )
    split_seed: int = Field(
        0, ge=0, le=2**32 - 1, description="seed of the held-out share; the same for teacher and students"
    )

    def load(self, *, fetch: bool = True) -> ImageDataSet:
        """Read the data; nothing is written but what is downloaded, and which files were found to be bad.

        Args:
            fetch: Whether data that is not here may be downloaded, and anything written; without it, images of the same
                sizes stand for it.

        Raises:
            InputError: If it is missing, damaged or cannot be understood.
        """
        raise NotImplementedError

    @property
    def label(self) -> str:
        """What a person calls this data."""
        return self.type

    def without_auto(self, processes: int = 1) -> tuple[Self, dict[str, str]]:
        """Choose what is left to the files and the machine.

        Args:
            processes: Of the run, which share the machine.

        Returns:
            The options without ``auto``, and why each was chosen, by key.

        Raises:
            InputError: If the files cannot be read.
        """
        return self, {}

    def shown_as(self, image_size: tuple[int, int], crop_pct: float) -> Self:
        """Show images as a trained network saw them, where files have no size of their own."""
        return self

    def missing_file(self) -> str | None:
        """Say what would be downloaded before the data can be read; none if all is here."""
        return None

    def faster_loading(self) -> str:
        """Say what would make images come faster; empty if nothing would."""
        return ""

    def countable_views(self) -> str:
        """Say what would make the views of an image few enough to be remembered; empty if they are."""
        return ""

    @property
    def is_noise(self) -> bool:
        """Whether nothing can be learnt from it."""
        return False


def hold_out(labels_N: Tensor, fraction: float, seed: int, *, least: int = 0) -> tuple[Tensor, Tensor]:
    """Choose which training samples to keep and which to hold out, the same share of every class.

    Args:
        labels_N: Class indices on the CPU.
        fraction: Share to hold out, in [0, 1); at least one sample of every class stays in training.
        seed: The choice is a function of the labels and this number.
        least: Samples of a class to hold out, where it has more than that.

    Returns:
        Positions to keep and positions to hold out, both ascending.
    """
    generator = torch.Generator().manual_seed(seed)
    held_N = torch.zeros(len(labels_N), dtype=torch.bool)
    for label in labels_N.unique():
        positions = (labels_N == label).nonzero().squeeze(1)
        count = min(max(round(len(positions) * fraction), least), len(positions) - 1)
        held_N[positions[torch.randperm(len(positions), generator=generator)[:count]]] = True
    return (~held_N).nonzero().squeeze(1), held_N.nonzero().squeeze(1)
