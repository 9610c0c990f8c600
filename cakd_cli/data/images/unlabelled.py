"""Training images without labels, beside labelled ones to measure with."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from cakd_cli.data.images.files import FileDataSpec, Listing
from cakd_cli.data.images.pictures import Files, all_pictures, check_classes, class_folders, list_files
from cakd_cli.errors import InputError

# Of a file without a label.
_NONE = -1


class UnlabelledSpec(FileDataSpec):
    """A folder with pictures of any kind in train/, and a folder a class in test/, maybe in val/: unlabelled:PATH."""

    layout: ClassVar[str] = "train/ with pictures and test/ with a folder a class"

    type: Literal["unlabelled"] = "unlabelled"
    path: str = Field(description="folder with train/, in which folders mean nothing, and with test/CLASS/")

    @property
    def label(self) -> str:
        return Path(self.path).expanduser().resolve().name

    def listing(self) -> Listing:
        root = self._root()
        lacking = [part for part in ("train", "test") if not (root / part).is_dir()]
        if lacking:
            raise InputError(f"{root}: lacks {' and '.join(lacking)}", hint=f"name the folder that has {self.layout}")
        classes = class_folders(root / "test")
        if len(classes) < 2:
            raise InputError(
                f"{root / 'test'} has {len(classes)} class folder(s)",
                hint="a classifier needs two at least; the labelled images in test/CLASS/ tell the classes",
            )
        parts = {"train": Files((path, _NONE) for path in all_pictures(root / "train"))}
        if not len(parts["train"]):
            raise InputError(f"{root / 'train'}: has no picture", hint="put the images without labels there")
        if (root / "val").is_dir():
            check_classes(classes, root, "val", known="test/")
            parts["val"] = list_files(root / "val", classes)
        parts["test"] = list_files(root / "test", classes)
        return Listing(root, parts, classes)
