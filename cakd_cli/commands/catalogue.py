"""cakd list."""

from typing import Any

from cakd_cli import data, losses, models
from cakd_cli.console import Console
from cakd_cli.report import tables


def run(what: str, *, console: Console) -> None:
    """List names with one line each."""
    rows = {"models": _models, "losses": _losses, "data": _data}[what]()
    console.result(rows, lambda stdout: tables.show_catalogue(stdout, rows))


def _line(documented: type[Any]) -> str:
    return (documented.__doc__ or "").strip().splitlines()[0]


def _specs(specs: dict[str, type[Any]]) -> list[dict[str, str]]:
    return [
        {"name": f"{name}:{spec.shorthand.upper()}" if spec.shorthand else name, "summary": _line(spec)}
        for name, spec in specs.items()
    ]


def _models() -> list[dict[str, str]]:
    return _specs(dict(models.names()))


def _data() -> list[dict[str, str]]:
    return _specs(dict(data.names()))


def _losses() -> list[dict[str, str]]:
    return [{"name": term.model_fields["type"].default, "summary": _line(term)} for term in losses.TERMS]
