"""A file that says which of a teacher's classes are each class of the data.

YAML, a line a class of the data: the name of the teacher's class, its number from 0, or a list of them.
"""

from pathlib import Path
from typing import Any

from cakd_cli.errors import InputError, RecipeError
from cakd_cli.recipe import strict_yaml
from cakd_cli.teachers import ClassMap


def read(file: str | None) -> ClassMap | None:
    """Read the file; none without one.

    Raises:
        InputError: If it is missing or is no text.
        RecipeError: If it is not such a file; every mistake is listed with its line.
    """
    if file is None:
        return None
    try:
        with Path(file).expanduser().open(encoding="utf-8") as text:
            document = strict_yaml.parse(text.read(strict_yaml.MOST_CHARACTERS + 1))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the class map {file}: {error}") from error
    wrong = list(document.problems)
    if not wrong and not (isinstance(document.value, dict) and document.value):
        wrong.append((1, "must map each class of the data to the teacher's, as cat: tabby"))
    entries: dict[str, tuple[str | int, ...]] = {}
    lines = {}
    for name, value in document.value.items() if isinstance(document.value, dict) else ():
        words: list[Any] = value if isinstance(value, list) else [value]
        for place, word in enumerate(words):
            line = lines[name, place] = document.lines.get((name, place), document.lines[name,])
            if not isinstance(word, str | int) or isinstance(word, bool):
                wrong.append((line, f"{name}: must be the name or the number of a class, or a list of them"))
        if not words:
            wrong.append((document.lines[name,], f"{name}: names no class"))
        entries[name] = tuple(words)
    if wrong:
        count = "a mistake" if len(wrong) == 1 else f"{len(wrong)} mistakes"
        told = [f"{file}:{line}: {message}" for line, message in sorted(wrong)]
        raise RecipeError("\n  ".join([f"the class map has {count}:", *told]))
    return ClassMap(file, entries, lines)
