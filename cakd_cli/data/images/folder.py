"""A folder of images with a folder a class."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from cakd_cli.data.images.files import FileDataSpec, Listing
from cakd_cli.data.images.pictures import check_classes, class_folders, list_files
from cakd_cli.errors import InputError


class FolderSpec(FileDataSpec):
    """A folder with train/ and val/ or test/, each with a folder a class: folder:PATH."""

    layout: ClassVar[str] = "train/ and val/ or test/"

    type: Literal["folder"] = "folder"
    path: str = Field(description="folder with train/ and val/ or test/")

    def _list(self) -> Listing:
        root = self._root()
        held = [part for part in ("val", "test") if (root / part).is_dir()]
        if not (root / "train").is_dir() or not held:
            raise InputError(
                f"{root}: needs train/ and val/ or test/, has {', '.join(class_folders(root)) or 'no folder'}",
                hint="put the images in train/CLASS/ and test/CLASS/",
            )
        classes = class_folders(root / "train")
        if len(classes) < 2:
            raise InputError(
                f"{root / 'train'} has {len(classes)} class folder(s)", hint="a classifier needs two at least"
            )
        for part in held:
            check_classes(classes, root, part)
        return Listing(root, {part: list_files(root / part, classes) for part in ("train", *held)}, classes)

    @property
    def label(self) -> str:
        return Path(self.path).expanduser().resolve().name
