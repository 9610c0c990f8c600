"""A table of image files and their classes."""

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from cakd_cli.data.images.divided import DividedSpec, check_parts
from cakd_cli.data.images.files import Listing
from cakd_cli.data.images.pictures import Files
from cakd_cli.errors import InputError, nearest
from cakd_cli.options import mistakes

_PARTS = ("train", "val", "test")
# Mistakes of a table that are shown; they often are one and the same.
_SHOWN = 5


class _Row(NamedTuple):
    """One image.

    Attributes:
        line: In the table, from 1.
        path: As the table has it, from the folder of the table.
        label: Name of the class.
        part: ``train``, ``val`` or ``test``; none if the table has no such column.
    """

    line: int
    path: str
    label: str
    part: str | None


class CsvSpec(DividedSpec):
    """A CSV or TSV file with a header and columns path, label and, if it divides, split: csv:PATH."""

    layout: ClassVar[str] = "columns path and label"

    type: Literal["csv"] = "csv"
    path: str = Field(description="file with a header, UTF-8; .tsv is divided by tabs; paths in it begin at its folder")
    path_column: str = Field("path", min_length=1, description="name of the column of image files")
    label_column: str = Field("label", min_length=1, description="name of the column of class names")
    split_column: str = Field(
        "split", min_length=1, description="name of the column of train, val and test; the table may lack it"
    )

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        names = {"path_column": self.path_column, "label_column": self.label_column, "split_column": self.split_column}
        for key, name in names.items():
            same = [other for other in names if other != key and names[other] == name]
            if same:
                raise mistakes([((key,), f"is '{name}', and so is {same[0]}")], self)
        return self

    @property
    def label(self) -> str:
        return Path(self.path).stem

    def listing(self) -> Listing:
        table = Path(self.path).expanduser()
        if not table.is_file():
            raise InputError(
                f"no such table of images: {table}", hint=f"name a CSV file with a header and {self.layout}"
            )
        rows = list(self._rows(table))
        if not rows:
            raise InputError(f"{table}: has no row below its header", hint="one row an image")
        _check_rows(table, rows)
        classes = sorted({row.label for row in rows})
        labels = {name: label for label, name in enumerate(classes)}

        def files_of(part: str | None) -> Files:
            return Files((str(table.parent / row.path), labels[row.label]) for row in rows if row.part == part)

        if rows[0].part is None:
            files = files_of(None)
            check_parts(table, {"training": files}, classes)
            return self._divided(table.parent, files, classes, why=f"{table.name} has no column '{self.split_column}'")
        parts = {part: files_of(part) for part in _PARTS if any(row.part == part for row in rows)}
        if "train" not in parts or len(parts) < 2:
            missing = "train" if "train" not in parts else "test"
            raise InputError(
                f"{table}: no row has the split {missing}",
                hint=f"a table without the column '{self.split_column}' is divided by data.test_fraction",
            )
        check_parts(table, parts, classes)
        reasons = {} if "test" in parts else {"path": "the rows of split val are the test set: none has the split test"}
        return Listing(table.parent, parts, classes, reasons)

    def _rows(self, table: Path) -> Iterator[_Row]:
        """Read the table.

        Raises:
            InputError: If it is no such table.
        """
        reader = None
        try:
            with table.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.reader(file, delimiter="\t" if table.suffix.lower() == ".tsv" else ",", strict=True)
                header = [name.strip() for name in next(reader, [])]
                columns = self._columns(table, header)
                for cells in reader:
                    if not cells:
                        continue
                    if len(cells) != len(header):
                        raise InputError(
                            f"{table}:{reader.line_num}: has {len(cells)} column(s), the header has {len(header)}",
                            hint='write a cell that holds the delimiter in quotes: "a, b"',
                        )
                    path, label, *part = (cells[column] for column in columns)
                    yield _Row(reader.line_num, path, label.strip(), part[0].strip() if part else None)
        except UnicodeDecodeError as error:
            raise InputError(f"{table}: is not text in UTF-8: {error.reason}", hint="save it as UTF-8") from error
        except csv.Error as error:
            line = reader.line_num if reader else 1
            raise InputError(f"{table}:{line}: is no table: {error}", hint="check the quotes of the line") from error

    def _columns(self, table: Path, header: Sequence[str]) -> list[int]:
        """Find the columns by name: of paths, of labels, and maybe of splits."""
        wanted = [self.path_column, self.label_column, *([self.split_column] if self.split_column in header else [])]
        for key, name in zip(("path_column", "label_column", "split_column"), wanted, strict=False):
            if header.count(name) != 1:
                what = f"has {header.count(name)} columns '{name}'" if name in header else f"has no column '{name}'"
                found = nearest(name, [other for other in header if other]) if any(header) else "it is empty"
                raise InputError(
                    f"{table}:1: {what}; {found}", hint=f"the first line names the columns; or set data.{key}=NAME"
                )
        if self.split_column not in (*header, type(self).model_fields["split_column"].default):
            raise InputError(
                f"{table}:1: has no column '{self.split_column}'; {nearest(self.split_column, list(header))}",
                hint="leave data.split_column out, and the table is divided by data.test_fraction",
            )
        return [header.index(name) for name in wanted]


def _check_rows(table: Path, rows: Sequence[_Row]) -> None:
    """Raise an InputError that shows the first rows that cannot be used, with their lines."""
    wrong = []
    first: dict[str, _Row] = {}
    for row in rows:
        path = os.path.normpath(table.parent / row.path)
        before = first.setdefault(path, row)
        if not row.path:
            wrong.append((row, "the path is empty"))
        elif not row.label:
            wrong.append((row, "the label is empty"))
        elif row.part is not None and row.part not in _PARTS:
            wrong.append((row, f"the split is '{row.part}', not train, val or test"))
        elif before.label != row.label:
            wrong.append((row, f"{row.path} is '{row.label}' here and '{before.label}' in line {before.line}"))
        elif before.part != row.part:
            wrong.append((row, f"{row.path} is in split {row.part} here and in {before.part} in line {before.line}"))
        elif before is not row and row.part is None:
            wrong.append((row, f"{row.path} was named in line {before.line}, and could be trained on and tested with"))
        elif before is row and not os.path.isfile(path):
            wrong.append((row, f"no such file: {row.path}"))
    if not wrong:
        return
    more = [f"and {len(wrong) - _SHOWN:,} more"] if len(wrong) > _SHOWN else []
    lines = [f"{table}:{row.line}: {what}" for row, what in wrong[:_SHOWN]]
    message = lines[0] if len(wrong) == 1 else f"{len(wrong):,} of {len(rows):,} rows cannot be used:"
    raise InputError(
        "\n  ".join([message, *([] if len(wrong) == 1 else lines), *more]),
        hint=f"mend the lines; paths begin at {table.parent}",
    )
