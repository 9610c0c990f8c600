"""Image files that may come without a test set: a share of every class is then taken for it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import Field

from cakd_cli.data.base import hold_out
from cakd_cli.data.images.files import FileDataSpec, Listing
from cakd_cli.data.images.pictures import Files
from cakd_cli.errors import InputError


class DividedSpec(FileDataSpec):
    """Settings of image files that are divided into training and test images where nobody has done it."""

    test_fraction: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="share of each class that becomes the test set, chosen by split_seed, where there is no other",
    )

    def _divided(self, root: Path, files: Files, classes: Sequence[str], *, why: str) -> Listing:
        """Take the test set out of the files: at least one of each class.

        Args:
            root: Folder from which fingerprints name the files.
            files: All of them.
            classes: Names of the classes, in label order.
            why: Clause that says what is not there.

        Raises:
            InputError: If a class has one file alone.
        """
        counts = files.labels_N.bincount(minlength=len(classes)).tolist()
        single = [name for name, count in zip(classes, counts, strict=True) if count == 1]
        if single:
            raise InputError(
                f"{self.path}: {why}, and one image alone cannot be divided: class {', '.join(single[:5])}",
                hint="add images to the class, or give a test set",
            )
        keep_N, out_N = hold_out(files.labels_N, self.test_fraction, self.split_seed, least=1)
        reason = f"{why}: {len(out_N):,} of {len(files):,} images, the same share of every class, are the test set"
        parts = {"train": files.subset(keep_N), "test": files.subset(out_N)}
        return Listing(root, parts, classes, {"test_fraction": reason})


def check_parts(source: Path, parts: Mapping[str, Files], classes: Sequence[str]) -> None:
    """Check that there are two classes at least, and images of each in every part.

    Raises:
        InputError: If not.
    """
    if len(classes) < 2:
        raise InputError(
            f"{source}: all images are of one class, {', '.join(classes)}", hint="a classifier needs two at least"
        )
    for part, files in parts.items():
        counts = files.labels_N.bincount(minlength=len(classes)).tolist()
        lacking = [name for name, count in zip(classes, counts, strict=True) if not count]
        if lacking:
            more = f" and {len(lacking) - 5:,} more" if len(lacking) > 5 else ""
            raise InputError(
                f"{source}: no {part} image of class {', '.join(lacking[:5])}{more}",
                hint="every part needs images of every class",
            )
