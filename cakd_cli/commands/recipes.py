"""cakd recipes."""

import sys
from pathlib import Path

from cakd_cli.console import Console
from cakd_cli.errors import InputError
from cakd_cli.recipe import shipped


def list_all(*, console: Console) -> None:
    """List names with the first line of each."""
    rows = [{"name": name, "summary": shipped.goal(name)} for name in shipped.names()]
    from cakd_cli.report.tables import show_catalogue

    console.result(rows, lambda stdout: show_catalogue(stdout, rows))


def show(name: str) -> None:
    """Print a recipe as it stands."""
    sys.stdout.write(_text(shipped.find(name)[0]))


def copy(name: str, path: str | None) -> None:
    """Copy a recipe with its comments; never over another file.

    Raises:
        InputError: If the file exists.
    """
    source, _ = shipped.find(name)
    target = Path(path).expanduser() if path else Path(source.name)
    if target.is_dir():
        target = target / source.name
    if target.exists():
        raise InputError(f"{target} exists", hint="choose another name: cakd recipes copy NAME PATH")
    target.parent.mkdir(parents=True, exist_ok=True)
    text = _text(source)
    try:
        target.write_text(text, encoding="utf-8")
    except OSError:
        target.unlink(missing_ok=True)
        raise
    sys.stdout.write(f"{target}\n")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the recipe {path}: {error}") from error
