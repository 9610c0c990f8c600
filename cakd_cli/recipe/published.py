"""What papers published, by data set, pair and method: settings, and accuracies. recipes/published.yaml."""

import copy
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cakd_cli.recipe import shipped, strict_yaml

# The row of every pair of a data set.
_EVERY_PAIR = "*"
Entry = Mapping[str, Any] | Sequence[Mapping[str, Any]]


def _settings() -> Mapping[str, Mapping[str, Mapping[str, Entry]]]:
    """Read the settings: data set -> pair -> method -> settings."""
    return _read(shipped.folder() / f"{shipped.PUBLISHED}.yaml")["settings"]  # type: ignore[no-any-return]


def figures(data: str, pair: str) -> dict[str, float]:
    """Look up the test top-1 in percent of a pair by method, ``teacher`` and ``student`` (alone) among them.

    Each is of the epoch that was best on the test set. Empty where nothing was published.
    """
    known = _read(shipped.folder() / f"{shipped.PUBLISHED}.yaml")["figures"]
    return dict(known.get(data, {}).get(pair, {}))


@functools.cache
def _read(path: Path) -> dict[str, Any]:
    return strict_yaml.parse(path.read_text(encoding="utf-8")).value  # type: ignore[no-any-return]


def names() -> list[str]:
    """Name every row, as ``data set/pair``."""
    return [f"{data}/{pair}" for data, pairs in _settings().items() for pair in pairs if pair != _EVERY_PAIR]


def objectives(name: str, known: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Whole objectives of a row, by method.

    Args:
        name: As of :func:`names`.
        known: What each method stands for by itself; a row may refine it.

    Raises:
        KeyError: If there is no such row.
    """
    found = {method: [dict(term) for term in terms] for method, terms in known.items()}
    for row in _rows(name):
        for method, entry in row.items():
            if isinstance(entry, Mapping):
                _refined(found[method], method, entry)
            else:
                found[method] = [dict(term) for term in copy.deepcopy(entry)]
    return found


def _rows(name: str) -> tuple[Mapping[str, Entry], Mapping[str, Entry]]:
    """Look up what is said of every pair of a data set, and of this one."""
    data, _, pair = name.partition("/")
    rows = _settings()[data]
    return rows.get(_EVERY_PAIR, {}), rows[pair]


def other_keys(name: str, method: str) -> dict[str, Any]:
    """List keys of a recipe beside its loss, dotted, that a method was published with for a row."""
    entries = [row[method] for row in _rows(name) if method in row]
    return {
        key: value for entry in entries if isinstance(entry, Mapping) for key, value in entry.get("recipe", {}).items()
    }


def has_settings(name: str, method: str) -> bool:
    """Whether settings of a method were published for a row, or for every pair of its data set."""
    return any(method in row for row in _rows(name))


def _refined(terms: list[dict[str, Any]], method: str, entry: Mapping[str, Any]) -> None:
    """Refine the term that a row names by its ``type``; without one, that of the method's own name, or the last."""
    kind = entry.get("type", method)
    named = [term for term in terms if term["type"] == kind]
    (named or terms)[-1].update({key: copy.deepcopy(value) for key, value in entry.items() if key != "recipe"})


def of_method(method: str) -> list[dict[str, Any]]:
    """List the rows that say something of a method: ``pair`` and ``settings``."""
    return [
        {"pair": f"{data}/{pair}", "settings": row[method]}
        for data, pairs in _settings().items()
        for pair, row in pairs.items()
        if method in row
    ]
