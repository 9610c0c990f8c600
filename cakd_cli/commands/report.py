"""cakd report."""

from pathlib import Path
from typing import Any

from cakd_cli.commands.compare import runs_in, sets_in
from cakd_cli.console import Console
from cakd_cli.errors import InputError, UsageError
from cakd_cli.report import finished, page
from cakd_cli.report.comparison import compare


def run(paths: list[str], *, out: str, against: str | None, different: bool, overwrite: bool, console: Console) -> None:
    """Compare finished runs and write the page about them."""
    if not out:
        raise UsageError("--out is empty")
    path = Path(out).expanduser()
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no file", hint="--out report.html")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists", hint="--overwrite replaces it")
    sets = sets_in(paths)
    if sets:
        raise InputError(
            f"{paths[0]} has runs of several recipes, and a page is about one: {', '.join(sets)}",
            hint=f"cakd report {next(iter(sets.values()))} (cakd compare {paths[0]} is a table of all)",
        )
    runs = runs_in(paths)
    document = compare(runs, finished.Evaluations(), against=against, different=different)
    path.parent.mkdir(parents=True, exist_ok=True)
    written: dict[str, Any] = {"out": str(path), **page.write(path, document, runs)}
    console.result(
        written | {"comparison": document},
        lambda stdout: stdout.print("\n".join([*written["summary"], f"\nreport in {path}"]), markup=False),
    )
