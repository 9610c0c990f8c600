"""Image files in the folders of the literature: ImageNet, Tiny-ImageNet and CUB-200-2011, as their archives unpack."""

import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import ClassVar, Literal

from pydantic import Field

from cakd_cli.data.images.files import FileDataSpec, ImageSize, Listing
from cakd_cli.data.images.pictures import Files, check_classes, class_folders, list_files, list_folder
from cakd_cli.errors import InputError, first_line


class ImageNetSpec(FileDataSpec):
    """ImageNet with train/WNID and val/, which is the test set, flat or by class: imagenet:PATH."""

    layout: ClassVar[str] = "train/ and val/, or Kaggle's ILSVRC/ and LOC_val_solution.csv"

    type: Literal["imagenet"] = "imagenet"
    path: str = Field(description="folder with train/ and val/, or with ILSVRC/ as Kaggle's archive unpacks")
    image_size: ImageSize = Field(224, description="height and width that networks see, in pixels")
    min_crop_area: float = Field(0.08, gt=0, le=1, description="least share of an image in a training crop")

    def listing(self) -> Listing:
        root = self._root()
        kaggle = root / "ILSVRC" / "Data" / "CLS-LOC"
        images = kaggle if kaggle.is_dir() else root
        _check_has(images, ("train", "val"), hint=f"name the folder that has {self.layout}")
        wnids = class_folders(images / "train")
        if len(wnids) < 2:
            hint = "each class needs a folder: train/WNID/"
            raise InputError(f"{images / 'train'} has {len(wnids)} class folder(s)", hint=hint)
        if class_folders(images / "val"):
            check_classes(wnids, images, "val")
            test = list_files(images / "val", wnids)
        else:
            test = _labelled(images / "val", *_validation_classes(root), wnids)
        # Not what torchvision's meta.bin calls them: that file comes and goes, and names must not.
        words = _words(root, ("LOC_synset_mapping.txt", "synset_words.txt"))
        parts = {"train": list_files(images / "train", wnids), "test": test}
        return Listing(images, parts, _named(wnids, words), wordnet_ids=wnids)


class TinyImageNetSpec(FileDataSpec):
    """Tiny-ImageNet as its zip unpacks, 64x64; val/ is the test set: tiny-imagenet:PATH."""

    layout: ClassVar[str] = "wnids.txt, train/ and val/: tiny-imagenet-200 of tiny-imagenet-200.zip"
    mean: ClassVar[tuple[float, ...]] = (0.4802, 0.4481, 0.3975)
    std: ClassVar[tuple[float, ...]] = (0.2302, 0.2265, 0.2262)

    type: Literal["tiny-imagenet"] = "tiny-imagenet"
    path: str = Field(description="folder tiny-imagenet-200, with wnids.txt, train/ and val/")
    image_size: ImageSize = Field(64, description="height and width that networks see, in pixels")
    min_crop_area: float = Field(1.0, gt=0, le=1, description="least share of an image in a training crop")
    test_crop: float = Field(1.0, gt=0, le=1, description="share of the shorter side kept by the middle crop")
    rotation: float = Field(
        20.0, ge=0, le=180, description="most degrees by which training images are turned, either way; 0 = none"
    )

    def listing(self) -> Listing:
        root = self._root()
        _check_has(root, ("wnids.txt", "train", "val"), hint=f"name the folder that has {self.layout}")
        wnids = sorted((root / "wnids.txt").read_text(encoding="utf-8", errors="replace").split())
        check_classes(wnids, root, "train", known="wnids.txt")
        if (root / "val" / "images").is_dir():
            _check_has(root / "val", ("val_annotations.txt",), hint=_UNPACK)
            annotations = root / "val" / "val_annotations.txt"
            test = _labelled(root / "val" / "images", annotations, _read_table(annotations), wnids)
        else:  # sorted into folders, as torchvision's ImageFolder needs it
            check_classes(wnids, root, "val")
            test = list_files(root / "val", wnids)
        parts = {"train": list_files(root / "train", wnids), "test": test}
        return Listing(root, parts, _named(wnids, _words(root, ("words.txt",))), wordnet_ids=wnids)


class CubSpec(FileDataSpec):
    """CUB-200-2011, 11,788 pictures of 200 kinds of birds in their published split: cub200:PATH."""

    layout: ClassVar[str] = "CUB_200_2011/, as CUB_200_2011.tgz unpacks"

    type: Literal["cub200"] = "cub200"
    path: str = Field(description="folder with CUB_200_2011/, or that folder itself")
    image_size: ImageSize = Field(224, description="height and width that networks see, in pixels")

    def listing(self) -> Listing:
        outer = self._root()
        root = outer / "CUB_200_2011" if (outer / "CUB_200_2011").is_dir() else outer
        _check_has(root, ("images", *_CUB_TABLES), hint=f"name the folder that has {self.layout}")
        paths, kinds, training, classes = (_read_table(root / name) for name in _CUB_TABLES)
        labels = {kind: label for label, kind in enumerate(classes)}
        unknown = [
            path
            for image, path in paths.items()
            if kinds.get(image) not in labels or training.get(image) not in ("0", "1")
        ]
        if unknown:
            raise InputError(
                f"{root}: image_class_labels.txt or train_test_split.txt does not know {len(unknown):,} of "
                f"{len(paths):,} images, as {unknown[0]}",
                hint=_UNPACK,
            )
        parts = {
            part: Files(
                (str(root / "images" / path), labels[kinds[image]])
                for image, path in paths.items()
                if training[image] == flag
            )
            for part, flag in (("train", "1"), ("test", "0"))
        }
        if not all(parts.values()):
            raise InputError(f"{root}: train_test_split.txt has no image to train on, or none to test on", hint=_UNPACK)
        return Listing(root, parts, [name.partition(".")[2].replace("_", " ") for name in classes.values()])


_CUB_TABLES = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
_UNPACK = "unpack the archive again"
_IMAGENET_TABLES = ("LOC_val_solution.csv", "val.txt")
_DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"


def _check_has(folder: Path, needed: Sequence[str], *, hint: str) -> None:
    missing = [name for name in needed if not (folder / name).exists()]
    if missing:
        raise InputError(f"{folder}: lacks {', '.join(missing)}", hint=hint)


def _read_table(path: Path) -> dict[str, str]:
    """Give what follows the first word of each line, by that word; it ends at a blank or a comma."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = (re.split(r"[\s,]+", line.strip(), maxsplit=1) for line in lines)
    return {row[0]: row[1] for row in rows if len(row) == 2}


def _words(root: Path, names: Sequence[str]) -> dict[str, str]:
    """Read what WordNet calls its synsets from the first file that is here."""
    here = [root / name for name in names if (root / name).is_file()]
    return _read_table(here[0]) if here else {}


def _named(wnids: Sequence[str], words: Mapping[str, str]) -> list[str]:
    """Call each class by the first of its words; those that share it, as the two cranes do, by their wnid as well."""
    first = {wnid: words.get(wnid, wnid).split(",")[0] for wnid in wnids}
    counts = Counter(first.values())
    return [word if counts[word] == 1 else f"{word} ({wnid})" for wnid, word in first.items()]


def _labelled(folder: Path, source: Path, rows: Mapping[str, str], classes: Sequence[str]) -> Files:
    """List the pictures of a flat folder with the labels that a table has for them.

    Args:
        folder: Of the pictures.
        source: Of the table, to name in an error.
        rows: By name of a picture, with or without its suffix, its class or the class's number, and what else there is.
        classes: Their names, in label order.

    Raises:
        InputError: If the two are not of the same pictures.
    """
    labels = {str(label): label for label in range(len(classes))} | {name: label for label, name in enumerate(classes)}
    known = {Path(name).stem: row.split()[0] for name, row in rows.items()}
    expected = {name: labels[word] for name, word in known.items() if word in labels}
    paths = list_folder(folder)
    unknown, lacks = f"{source}: knows no class of", f"{folder}: lacks"
    for names, others, what in ((paths, expected, unknown), (expected, paths, lacks)):
        missing = [name for name in names if name not in others]
        if missing:
            raise InputError(f"{what} {len(missing):,} of {len(names):,} images, as {missing[0]}", hint=_UNPACK)
    return Files((path, expected[name]) for name, path in paths.items())


def _validation_classes(root: Path) -> tuple[Path, Mapping[str, str]]:
    """Find which class each of ImageNet's validation images has, and the file that says so."""
    from torchvision.datasets.imagenet import META_FILE

    for name in _IMAGENET_TABLES:
        if (root / name).is_file():
            return root / name, _read_table(root / name)
    for name in (META_FILE, _DEVKIT):
        if (root / name).is_file():
            wnids = _devkit_wnids(root / name)
            return root / name, {f"ILSVRC2012_val_{number:08d}": wnid for number, wnid in enumerate(wnids, 1)}
    raise InputError(
        f"{root}: val/ has no folder a class, and nothing says which class its images have",
        hint=f"place one of {', '.join((*_IMAGENET_TABLES, META_FILE, _DEVKIT))} in {root}",
    )


def _devkit_wnids(path: Path) -> list[str]:
    """Read the class of each validation image from the devkit, or from what torchvision has made of it."""
    from torchvision.datasets import imagenet

    try:
        if path.name == imagenet.META_FILE:
            return list(imagenet.load_meta_file(path.parent)[1])
        # torchvision writes what it finds into a folder, and the data may belong to somebody else.
        with tempfile.TemporaryDirectory() as folder:
            imagenet.parse_devkit_archive(folder, str(path.resolve()))
            return list(imagenet.load_meta_file(folder)[1])
    except ModuleNotFoundError as error:
        raise InputError(f"{path}: cannot be read without scipy", hint="pip install scipy") from error
    except (OSError, RuntimeError, ValueError, TypeError, LookupError, EOFError, UnpicklingError) as error:
        raise InputError(f"{path}: is not whole: {first_line(error)}", hint="fetch it again") from error
