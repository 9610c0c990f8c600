"""Settings that papers published, by data set, pair and method: recipes/published.yaml."""

import copy
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cakd_cli.recipe import shipped, strict_yaml

# The row of every pair of a data set.
_EVERY_PAIR = "*"
Entry = Mapping[str, Any] | Sequence[Mapping[str, Any]]


def table() -> dict[str, dict[str, dict[str, Entry]]]:
    """Read the table: data set -> pair -> method -> settings."""
    # A copy, whose terms a recipe may change.
    return copy.deepcopy(_read(shipped.folder() / f"{shipped.PUBLISHED}.yaml"))


@functools.cache
def _read(path: Path) -> dict[str, dict[str, dict[str, Entry]]]:
    return strict_yaml.parse(path.read_text(encoding="utf-8")).value  # type: ignore[no-any-return]


def names() -> list[str]:
    """Name every row, as ``data set/pair``."""
    return [f"{data}/{pair}" for data, pairs in table().items() for pair in pairs if pair != _EVERY_PAIR]


def objectives(name: str, known: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Whole objectives of a row, by method.

    Args:
        name: As of :func:`names`.
        known: What each method stands for by itself; a row may refine it.

    Raises:
        KeyError: If there is no such row.
    """
    data, _, pair = name.partition("/")
    rows = table()[data]
    found = {method: [dict(term) for term in terms] for method, terms in known.items()}
    for row in (rows.get(_EVERY_PAIR, {}), rows[pair]):
        for method, entry in row.items():
            if isinstance(entry, Mapping):
                _refined(found[method], method, entry)
            else:
                found[method] = [dict(term) for term in entry]
    return found


def _refined(terms: list[dict[str, Any]], method: str, entry: Mapping[str, Any]) -> None:
    """Refine the term that a row names by its ``type``; without one, that of the method's own name, or the last."""
    kind = entry.get("type", method)
    named = [term for term in terms if term["type"] == kind]
    (named or terms)[-1].update(entry)


def of_method(method: str) -> list[dict[str, Any]]:
    """List the rows that say something of a method: ``pair`` and ``settings``."""
    return [
        {"pair": f"{data}/{pair}", "settings": row[method]}
        for data, pairs in table().items()
        for pair, row in pairs.items()
        if method in row
    ]
