"""A folder of images that tells their classes: by a folder a class, or in the names of the files."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from cakd_cli.data.images.divided import DividedSpec, check_parts
from cakd_cli.data.images.files import Listing
from cakd_cli.data.images.pictures import Files, all_pictures, check_classes, class_folders, has_pictures, list_files
from cakd_cli.errors import InputError
from cakd_cli.options import mistake

_HELD = ("val", "test")
# Folders that are no classes, whatever else they are.
_LOOK_LIKE_PARTS = {"train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing"}


class FolderSpec(DividedSpec):
    """A folder with a folder a class, or with train/ and val/ or test/ that have one: folder:PATH."""

    layout: ClassVar[str] = "train/ and val/ or test/, or a folder a class"

    type: Literal["folder"] = "folder"
    path: str = Field(description="folder with train/ and val/ or test/, or without them")
    class_pattern: str | None = Field(
        None,
        description="regular expression that finds a picture's class in the name of its file, as its one group: "
        "'^([a-z]+)_'; none = the class is the folder",
    )

    @field_validator("class_pattern")
    @classmethod
    def _check_pattern(cls, pattern: str | None) -> str | None:
        if pattern is None:
            return None
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise mistake(f"is no regular expression: {error}") from error
        if groups != 1:
            raise mistake(f"needs one group in round brackets, which is the class, and has {groups}")
        return pattern

    @property
    def label(self) -> str:
        return Path(self.path).expanduser().resolve().name

    def listing(self) -> Listing:
        root = self._root()
        held = [part for part in _HELD if (root / part).is_dir()]
        trains = (root / "train").is_dir()
        if held and not trains:
            raise InputError(
                f"{root}: needs train/ and val/ or test/, has {', '.join(class_folders(root))}",
                hint="put the images in train/CLASS/ and test/CLASS/",
            )
        if not held:
            place = root / "train" if trains else root
            files, classes = self._undivided(place)
            return self._divided(place, files, classes, why=f"{self.label} has no test/ and no val/")
        parts, classes = self._parts(root, ("train", *held))
        reasons = {} if "test" in held else {"path": "val/ is the test set: there is no test/"}
        return Listing(root, parts, classes, reasons)

    def _parts(self, root: Path, names: Sequence[str]) -> tuple[dict[str, Files], Sequence[str]]:
        if self.class_pattern is not None:
            found = {part: self._by_name(root / part, self.class_pattern) for part in names}
            classes = sorted(set().union(*found.values()))
            parts = {part: _labelled(by_class, classes) for part, by_class in found.items()}
            check_parts(root, parts, classes)
            return parts, classes
        classes = class_folders(root / "train")
        if len(classes) < 2:
            raise InputError(
                f"{root / 'train'} has {len(classes)} class folder(s)",
                hint="a classifier needs two at least; or data.class_pattern, which finds classes in names of files",
            )
        for part in names[1:]:
            check_classes(classes, root, part)
        return {part: list_files(root / part, classes) for part in names}, classes

    def _undivided(self, place: Path) -> tuple[Files, Sequence[str]]:
        """List what nobody has divided."""
        if self.class_pattern is not None:
            found = self._by_name(place, self.class_pattern)
            classes = sorted(found)
            files = _labelled(found, classes)
            check_parts(place, {"training": files}, classes)
            return files, classes
        classes = class_folders(place)
        parts = [name for name in classes if name.casefold() in _LOOK_LIKE_PARTS]
        if len(classes) < 2 or parts:
            by_name = "; where the file's name tells its class, set data.class_pattern" if has_pictures(place) else ""
            has = ", ".join(classes) or "no folder"
            raise InputError(
                f"{place}: needs train/ and val/ or test/, or a folder a class, has {has}",
                hint=f"put the images in train/CLASS/ and test/CLASS/, or in CLASS/{by_name}",
            )
        return list_files(place, classes), classes

    def _by_name(self, folder: Path, pattern: str) -> dict[str, list[str]]:
        """Find the pictures of each class by the names of their files.

        Raises:
            InputError: If there are none, or one has no class.
        """
        paths = all_pictures(folder)
        if not paths:
            raise InputError(f"{folder}: has no picture", hint=f"name the folder that has {self.layout}")
        matches = {path: re.search(pattern, Path(path).name) for path in paths}
        without = [path for path, match in matches.items() if not (match and match[1])]
        if without:
            more = f" and {len(without) - 5:,} more" if len(without) > 5 else ""
            names = ", ".join(str(Path(path).relative_to(folder)) for path in without[:5])
            raise InputError(
                f"{folder}: data.class_pattern '{pattern}' finds no class in {len(without):,} of {len(paths):,} "
                f"names: {names}{more}",
                hint="change the pattern, or move the files",
            )
        found: dict[str, list[str]] = {}
        for path, match in matches.items():
            assert match is not None, "those without one were refused"
            found.setdefault(match[1], []).append(path)
        return found


def _labelled(by_class: dict[str, list[str]], classes: Sequence[str]) -> Files:
    return Files((path, label) for label, name in enumerate(classes) for path in by_class.get(name, ()))
