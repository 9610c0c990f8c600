"""Images in a folder that Hugging Face's datasets has written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from cakd_cli.data.images.divided import DividedSpec, check_parts
from cakd_cli.data.images.files import Listing
from cakd_cli.data.images.pictures import Entry, Facts, Files, facts_of
from cakd_cli.errors import InputError, RecipeError, first_line, nearest
from cakd_cli.files import home

# What datasets calls each part, the usual name first.
_PARTS = {"train": ("train", "training"), "val": ("validation", "val", "valid", "dev"), "test": ("test",)}
_NAMES = {name: part for part, names in _PARTS.items() for name in names}


class TableFiles(Files):
    """Images of a table, by name ``FOLDER/PART:ROW``.

    Args:
        table: Of datasets, its image column not decoded.
        column: Of the images.
        name: Of the part, with its folder.
        rows_N: Which of its rows, int64.
        labels_N: Class of each of these rows, int64.
    """

    on_disk: ClassVar[bool] = False

    def __init__(self, table: Any, column: str, name: str, rows_N: Tensor, labels_N: Tensor) -> None:
        super().__init__(
            (f"{name}:{row}", label) for row, label in zip(rows_N.tolist(), labels_N.tolist(), strict=True)
        )
        self._table, self._column, self._name, self._rows_N = table, column, name, rows_N
        self._sizes = _content_sizes(table, column)
        # Its files are written once; a later one has another time.
        self._written = max((facts_of(file["filename"]) for file in table.cache_files), default=Facts(0, 0, 0))

    def open(self, index: int) -> str | Entry:
        """Give the content of one image, or the path of its file where the table holds no more than that."""
        image = self._image(index)
        return Entry(self.path(index), image["bytes"]) if image["bytes"] is not None else str(image["path"])

    def facts(self, index: int) -> Facts:
        """Tell the image's size, and when the table was written."""
        size = self._sizes[int(self._rows_N[index])]
        return facts_of(str(self._image(index)["path"])) if size is None else self._written._replace(size=size)

    def subset(self, indices_N: Tensor) -> "TableFiles":
        """Take the images at these positions."""
        rows_N, labels_N = self._rows_N[indices_N], self.labels_N[indices_N]
        return TableFiles(self._table, self._column, self._name, rows_N, labels_N)

    def _image(self, index: int) -> dict[str, Any]:
        found: dict[str, Any] | None = self._table[int(self._rows_N[index])][self._column]
        return found or {"bytes": b"", "path": None}


def _content_sizes(table: Any, column: str) -> list[int | None]:
    """Bytes of each row's image, none where the table holds a path; images themselves are not read."""
    from pyarrow import compute

    content = compute.struct_field(table.flatten_indices().data.column(column), "bytes")
    sizes: list[int | None] = compute.binary_length(content).to_pylist()
    return sizes


class HuggingFaceSpec(DividedSpec):
    """A folder of Hugging Face's datasets, by save_to_disk or of Parquet, with images and class labels: hf:PATH."""

    layout: ClassVar[str] = "what save_to_disk wrote, or Parquet files"

    type: Literal["hf"] = "hf"
    path: str = Field(description="folder that save_to_disk wrote, or with PART*.parquet; nothing is downloaded")
    image_column: str | None = Field(None, description="name of the column of images; none = the only one")
    label_column: str | None = Field(None, description="name of the column of class labels; none = the only one")

    @property
    def label(self) -> str:
        return Path(self.path).expanduser().resolve().name

    def listing(self) -> Listing:
        root = self._root()
        tables = _read(root)
        first = next(iter(tables.values()))
        datasets = _library()
        image = _column(root, first.features, datasets.Image, self.image_column, key="image_column")
        label = _column(root, first.features, datasets.ClassLabel, self.label_column, key="label_column")
        classes = first.features[label].names
        parts: dict[str, Files] = {}
        for part, table in tables.items():
            if table.features.get(label) != first.features[label] or image not in table.features:
                raise InputError(
                    f"{root}: its parts have different columns or classes", hint="write the data set again"
                )
            labels_N = torch.tensor([-1 if value is None else value for value in table[label]], dtype=torch.int64)
            if (labels_N < 0).any():
                raise InputError(
                    f"{root}: {int((labels_N < 0).sum()):,} of {len(labels_N):,} {part} images have no label",
                    hint="remove the rows, or the part",
                )
            undecoded = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
            parts[part] = TableFiles(undecoded, image, str(root / part), torch.arange(len(labels_N)), labels_N)
        check_parts(root, parts, classes)
        if "test" in parts:
            return Listing(root, parts, classes)
        if "val" in parts:
            reasons = {"path": "the validation part is the test set: there is no test part"}
            return Listing(root, parts, classes, reasons)
        return self._divided(root, parts["train"], classes, why=f"{self.label} has no test part")


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise RecipeError("hf: needs the library datasets", hint="pip install 'cakd[datasets]'") from error
    return datasets


def _read(root: Path) -> Mapping[str, Any]:
    """Open the tables of a folder, by part.

    Raises:
        InputError: If there are none, or they cannot be read.
        RecipeError: If datasets is not installed.
    """
    datasets = _library()
    files = _parquet_files(root)
    try:
        if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
            found = datasets.load_from_disk(str(root))
            tables = dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}
        else:
            # datasets reads Parquet by writing it as Arrow, once.
            kept = str(home() / "hugging-face")
            tables = {name: datasets.Dataset.from_parquet(paths, cache_dir=kept) for name, paths in files.items()}
    except Exception as error:  # of pyarrow, datasets or fsspec: each has its own
        raise InputError(f"{root}: cannot be read: {first_line(error)}", hint="write the data set again") from error
    parts = {_NAMES[name]: table for name, table in tables.items() if name in _NAMES}
    if "train" not in parts:
        raise InputError(
            f"{root}: has no part train, has {', '.join(tables) or 'nothing that datasets reads'}",
            hint=f"name a folder that has {HuggingFaceSpec.layout}",
        )
    return {part: parts[part] for part in _PARTS if part in parts}


def _parquet_files(root: Path) -> dict[str, list[str]]:
    """Find Parquet files by part: ``train-00000-of-00002.parquet`` in the folder or in data/."""
    found: dict[str, list[str]] = {}
    for path in sorted([*root.glob("*.parquet"), *root.glob("data/*.parquet")]):
        found.setdefault(path.stem.split("-")[0], []).append(str(path))
    return found


def _column(root: Path, features: Mapping[str, Any], kind: type[Any], asked: str | None, *, key: str) -> str:
    """Find the one column of a kind, or check the one that was asked for."""
    able = [name for name, feature in features.items() if isinstance(feature, kind)]
    if asked is not None:
        if asked not in able:
            known = nearest(asked, able) if able else "there is none"
            raise InputError(
                f"{root}: data.{key} '{asked}' is no column of {kind.__name__}; {known}",
                hint=f"columns: {', '.join(features)}",
            )
        return asked
    if len(able) != 1:
        raise InputError(
            f"{root}: has {len(able)} columns of {kind.__name__}: {', '.join(able) or 'none'}",
            hint=f"set data.{key}=NAME" if able else f"cast one: cast_column(NAME, {kind.__name__}(...))",
        )
    return able[0]
