"""From words to a recipe: file, overrides and flags, and every mistake at once.

Precedence: default < recipe file < KEY=VALUE < flag. A deeper key refines what a shallower one chose, so
``--loss dkd loss.1.beta=4`` does what it says.
"""

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from cakd_cli import data, losses, models, options
from cakd_cli.errors import RecipeError, UsageError, nearest
from cakd_cli.recipe import published, shipped, strict_yaml
from cakd_cli.recipe.schema import Keys, Recipe
from cakd_cli.teachers import EnsembleTeacher, single_teachers


@dataclass(frozen=True)
class _Assignment:
    keys: Keys
    value: Any
    origin: str


class _Mistakes:
    """Collects what is wrong, and finds where each part of the recipe came from."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str]] = []
        self.origins: dict[Keys, str] = {}

    def add(self, origin: str, message: str) -> None:
        if (origin, message) not in self.found:
            self.found.append((origin, message))

    def origin(self, keys: Keys) -> str:
        for length in range(len(keys), -1, -1):
            if keys[:length] in self.origins:
                return self.origins[keys[:length]]
        return ""

    def report(self) -> None:
        if self.found:
            count = len(self.found)
            title = "the recipe has a mistake" if count == 1 else f"the recipe has {count} mistakes"
            # In the order of the file, then what was typed.
            ordered = sorted(self.found, key=lambda mistake: _line_number(mistake[0]))
            lines = [f"{origin}: {message}" if origin else message for origin, message in ordered]
            raise RecipeError("\n  ".join([title + ":", *lines]))


def _line_number(origin: str) -> float:
    number = origin.rpartition(":")[2]
    return int(number) if number.isdecimal() else float("inf")


def resolve(
    words: list[str],
    flags: Mapping[str, Any],
    *,
    file: Path | None = None,
    defaults: Mapping[str, Any] | None = None,
    flag_names: Mapping[str, str] | None = None,
    note: Callable[[str], None] | None = None,
) -> Recipe:
    """Make a recipe from what a user typed.

    Args:
        words: At most one recipe (a path, or the name of one that ships) and any number of KEY=VALUE.
        flags: Values of flags by dotted key; None = not given.
        file: A recipe that is known to be one, whatever its name looks like.
        flag_names: What a user calls a flag, by dotted key, where it is not the key's last word.
        defaults: Values by key for what neither a file nor a word sets.
        note: Takes a line for the user.

    Returns:
        The recipe; what the machine and the files decide, under ``engine`` and ``data``, may still be ``auto``.

    Raises:
        UsageError: If two recipes are named.
        RecipeError: If there is no such recipe, or with every mistake in one message.
    """
    names, overrides = _sort_words([*([str(file)] if file else []), *words])
    mistakes = _Mistakes()
    raw = _read(names[0], mistakes) if names else {}
    called = {"data.root": "--data-root"} | dict(flag_names or {})
    row, own = raw.get("published"), raw.get("methods")
    methods = _methods(raw, mistakes)
    for key, value in ({"loss": "cross-entropy"} | dict(defaults or {})).items():
        raw.setdefault(key, value)
    from_file = raw["loss"]
    for key in list(raw):
        raw[key] = _expand(key, raw[key], methods, mistakes, mistakes.origin((key,)))

    assignments = [_parse_override(word, mistakes) for word in overrides]
    assignments += [
        _Assignment(tuple(dotted.split(".")), value, called.get(dotted, _flag_name(dotted)))
        for dotted, value in flags.items()
        if value is not None and value != ()
    ]
    asked = next((a.value for a in reversed(assignments) if a is not None and a.keys == ("loss",)), from_file)
    if row in published.names() and isinstance(asked, str) and not (isinstance(own, dict) and asked in own):
        assignments = [*_published_keys(row, asked, assignments), *assignments]
        if note is not None:
            _note_what_is_not_published(row, asked, note)
    # Stable: shallow keys first, and at one depth flags after words.
    for assignment in sorted((a for a in assignments if a is not None), key=lambda a: len(a.keys)):
        _assign(raw, assignment, methods, mistakes)
    for key in ("optimizer", "schedule"):
        if isinstance(raw.get(key), dict):
            raw[key].setdefault("type", Recipe.model_fields[key].get_default(call_default_factory=True).type)
    recipe = _validate(raw, mistakes)
    mistakes.report()
    assert recipe is not None
    of_run = names and (file is not None or _is_of_run(names[0]))
    _allow_own_code(recipe, mistakes, names[0] if of_run else None)
    # The length of the run is known here: what depends on it alone is no longer automatic.
    update: dict[str, Any] = {"loss": tuple(term.over(recipe.engine.epochs) for term in recipe.loss)}
    if recipe.protocol == "literature":
        update["data"] = recipe.data.model_copy(update={"validation_fraction": 0.0})
    return recipe.model_copy(update=update)


def _is_of_run(name: str) -> bool:
    return os.path.isfile(os.path.join(os.path.dirname(os.path.expanduser(name)), "run.json"))


def _allow_own_code(recipe: Recipe, mistakes: _Mistakes, run: str | None) -> None:
    """Let the Python files be executed that a person named; those that the recipe of a run names are not."""
    teachers = single_teachers(recipe.teacher)
    several = isinstance(recipe.teacher, EnsembleTeacher)
    places: dict[Keys, Any] = {("teacher", *(("members", i) if several else ())): t for i, t in enumerate(teachers)}
    for keys, spec in {("model",): recipe.model, **places}.items():
        asked = run is None or not mistakes.origin((*keys, "file")).startswith(f"{run}:")
        if isinstance(spec, models.OwnCodeSpec) and asked:
            spec.allow()


def _published_keys(row: str, method: str, typed: Sequence[_Assignment | None]) -> list[_Assignment]:
    """Take the keys that a method was published with, but of sections that somebody replaced."""
    replaced = {assignment.keys[0] for assignment in typed if assignment is not None and len(assignment.keys) == 1}
    keys = {tuple(dotted.split(".")): value for dotted, value in published.other_keys(row, method).items()}
    return [_Assignment(path, value, f"published: {row}") for path, value in keys.items() if path[0] not in replaced]


def _note_what_is_not_published(row: str, method: str, note: Callable[[str], None]) -> None:
    if method in losses.objectives() and method != "cross-entropy" and not published.has_settings(row, method):
        note(f"no settings of {method} were published for {row}: cakd's own are taken, as in cakd list losses {method}")


def _flag_name(dotted: str) -> str:
    return "--" + dotted.split(".")[-1].replace("_", "-")


def names_recipe(word: str) -> bool:
    """Tell a recipe from KEY=VALUE: a file is a recipe whatever its name looks like."""
    try:
        return "=" not in word or Path(word).is_file()
    except OSError:  # too long to be a path
        return False


def _sort_words(words: list[str]) -> tuple[list[str], list[str]]:
    names = [word for word in words if names_recipe(word)]
    if len(names) > 1:
        raise UsageError(f"more than one recipe: {', '.join(names)}", hint="give one recipe, and settings as KEY=VALUE")
    return names, [word for word in words if word not in names]


def _read(name: str, mistakes: _Mistakes) -> dict[str, Any]:
    try:
        path, title = shipped.find(name)
    except RecipeError as error:
        if name.partition(":")[0] not in data.names() and os.path.isdir(os.path.expanduser(name)):
            name = f"folder:{name}"
        if name.partition(":")[0] in data.names() and ":" in name:
            error.hint = f"data is given by --data {shlex.quote(name)}"
        raise
    try:
        with path.open(encoding="utf-8") as file:
            document = strict_yaml.parse(file.read(strict_yaml.MOST_CHARACTERS + 1))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {title}: {error}") from error
    for line, message in document.problems:
        mistakes.add(f"{title}:{line}", message)
    mistakes.origins.update({keys: f"{title}:{line}" for keys, line in document.lines.items()})
    if document.value is None and not document.problems:
        return {}
    if not isinstance(document.value, dict):
        mistakes.add(f"{title}:1", "a recipe is a mapping of keys to values")
        mistakes.report()
    return dict(document.value)


def _methods(raw: dict[str, Any], mistakes: _Mistakes) -> dict[str, Any]:
    """What ``--loss NAME`` stands for: the recipe's own ``methods:``, then its row of published settings, then ours."""
    known: Mapping[str, Any] = losses.objectives()
    row = raw.pop("published", None)
    if row is not None and row not in published.names():
        place = mistakes.origin(("published",))
        mistakes.add(place, f"published: no settings of '{row}'; {nearest(str(row), published.names())}")
    elif row is not None:
        known = published.objectives(row, known)
    own = raw.pop("methods", {})
    if not isinstance(own, dict):
        mistakes.add(mistakes.origin(("methods",)), "methods: must map names to lists of loss terms")
        own = {}
    return {name: [dict(term) for term in terms] for name, terms in known.items()} | own


def _parse_override(word: str, mistakes: _Mistakes) -> _Assignment | None:
    dotted, _, text = word.partition("=")
    keys: Keys = tuple(int(part) if part.isdecimal() else part for part in dotted.split("."))
    document = strict_yaml.parse(text)
    for _, message in document.problems:
        mistakes.add(word, message)
    if "" in keys:
        mistakes.add(word, "the key is empty")
    if document.problems or "" in keys:
        return None
    return _Assignment(keys, document.value, word)


def _expand(key: str | int, value: Any, methods: Mapping[str, Any], mistakes: _Mistakes, origin: str) -> Any:
    """Turn short forms (``digits``, ``folder:PATH``, ``torchvision:NAME@WEIGHTS``, ``dkd``) into mappings and lists."""
    if key == "teacher" and isinstance(value, tuple):  # a flag that was given once or more
        value = list(value) if len(value) > 1 else value[0]
    if key == "teacher" and isinstance(value, list):
        value = {"type": "ensemble", "members": value}
    if key == "teacher" and isinstance(value, dict) and isinstance(value.get("members"), list):
        if any(isinstance(member, list) for member in value["members"]):
            mistakes.add(origin, "teacher: a list of teachers cannot hold another list")
            return {"type": "run", "path": "."}
        members = [_expand(key, member, methods, mistakes, origin) for member in value["members"]]
        return {**value, "members": members}
    if not isinstance(value, str):
        return value
    if key in ("model", "teacher") and (value.startswith("python:") or (key, value) == ("model", "python")):
        return _own_code(value, str(key), mistakes, origin)
    if key == "data":
        return _expand_spec(value, data.names(), "data", mistakes, origin)
    if key == "model":
        return _with_weights(_expand_spec(value, models.names(), "model", mistakes, origin))
    if key in ("optimizer", "schedule"):
        return {"type": value}
    if key == "teacher":
        return _expand_teacher(value, mistakes, origin)
    if key == "loss":
        return _expand_method(value, methods, mistakes, origin)
    return value


def _expand_teacher(value: str, mistakes: _Mistakes, origin: str) -> dict[str, Any]:
    if not value:
        mistakes.add(origin, "teacher: is empty")
    if value.startswith("["):
        mistakes.add(origin, "teacher: several are --teacher given again, or teacher=[a, b]")
    name, _, argument = value.partition(":")
    if name in ("torchvision", "timm") and argument:
        return _with_weights({"type": name, "name": argument, "pretrained": True})
    if name == "hf-hub":
        return {"type": name, "name": argument}
    if name == "clip" and argument:
        return {"type": name, "model": argument}
    if name == "probe" and argument:
        return {"type": name, "backbone": argument}
    if name in ("onnx", "logits") and argument:
        return {"type": name, "path": argument}
    if value.endswith(".onnx") and not os.path.isdir(os.path.expanduser(value)):
        return {"type": "onnx", "path": value}
    if value in models.names() and not Path(value).exists():
        return {"type": value}
    return {"type": "run", "path": value}


def _own_code(value: str, key: str, mistakes: _Mistakes, origin: str) -> dict[str, Any]:
    """Take ``python:FILE.py:FUNCTION`` apart; another file, or another state of it, is not the one before."""
    file, _, function = value.partition(":")[2].rpartition(":")
    if not file or not function:
        lacking = "its function" if file or function else "its file and function"
        mistakes.add(origin, f"{key}: '{value}' lacks {lacking}; write python:FILE.py:FUNCTION")
        return {"type": "run", "path": "."} if key == "teacher" else {"type": "resnet8"}
    return {"type": "python", "file": file, "function": function, "sha256": None}


def _expand_method(value: str, methods: Mapping[str, Any], mistakes: _Mistakes, origin: str) -> Any:
    if value not in methods:
        wrong = f"no method '{value}'; {nearest(value, sorted(methods))}"
        if "," in value:
            wrong = f"a run has one method, got '{value}'; several are for cakd sweep --loss {value}"
        mistakes.add(origin, f"loss: {wrong}")
        return [{"type": "cross-entropy"}]
    terms = methods[value]
    return [dict(term) if isinstance(term, dict) else term for term in terms] if isinstance(terms, list) else terms


def _expand_spec(
    value: str, specs: Mapping[str, type[Any]], what: str, mistakes: _Mistakes, origin: str
) -> dict[str, Any]:
    meant = _meant_data(value) if what == "data" else ""
    if meant in specs:
        mistakes.add(origin, f"{what}: '{value}' does not say what kind of data it is; write {meant}:{value}")
        return {"type": meant, str(specs[meant].shorthand): value}
    if what == "model" and value not in specs and os.path.exists(os.path.join(value, "config.json")):
        mistakes.add(origin, f"model: '{value}' is a run; name its network, and model.weights={value}")
        return {"type": "resnet8"}
    name, colon, argument = value.partition(":")
    shorthand = specs[name].shorthand if name in specs else None
    if name in specs and shorthand and not argument:
        mistakes.add(origin, f"{what}: '{value}' lacks its {shorthand}; write {name}:{shorthand.upper()}")
        return {"type": name, shorthand: ""}
    if name in specs and colon and not shorthand:
        mistakes.add(origin, f"{what}: '{name}' takes nothing after a colon, got '{argument}'")
    return {"type": name, shorthand: argument} if shorthand else {"type": name}


# The kind of data that a file is, by the end of its name.
_KINDS_OF_FILES = {".csv": "csv", ".safetensors": "tensors", ".tar": "wds"}


def _meant_data(value: str) -> str:
    """Guess the kind of data that a path without its kind is of; empty if it is no path."""
    if value.partition(":")[0] in data.names():
        return ""
    # Unlike Path's, these functions take whatever somebody may type.
    path = os.path.expanduser(value)
    return "folder" if os.path.isdir(path) else _KINDS_OF_FILES.get(os.path.splitext(path)[1].lower(), "")


def _with_weights(spec: dict[str, Any]) -> dict[str, Any]:
    """Take ``torchvision:NAME@WEIGHTS`` apart."""
    if spec["type"] != "torchvision" or "@" not in spec["name"]:
        return spec
    name, _, weights = spec["name"].partition("@")
    return {**spec, "name": name, "pretrained": weights}


def _assign(raw: dict[str, Any], assignment: _Assignment, methods: Mapping[str, Any], mistakes: _Mistakes) -> None:
    *parents, last = assignment.keys
    node: Any = raw
    for depth, key in enumerate(parents):
        if isinstance(node, dict) and isinstance(key, str):
            if node.get(key) is None:
                node[key] = {}
                mistakes.origins[assignment.keys[: depth + 1]] = assignment.origin
            node = node[key]
        elif isinstance(node, list) and isinstance(key, int) and key < len(node):
            node = node[key]
        else:
            mistakes.add(assignment.origin, _no_place(node, assignment.keys[:depth], key))
            return
    if isinstance(node, dict) and isinstance(last, str):
        value = assignment.value
        if len(assignment.keys) == 1:
            value = _expand(last, value, methods, mistakes, assignment.origin)
            before = node.get(last)
            if isinstance(value, dict) and isinstance(assignment.value, str | tuple) and isinstance(before, dict):
                # A short form of the same kind changes what it names and keeps the other settings.
                value = {**before, **value} if before.get("type") == value["type"] else value
        node[last] = value
    elif isinstance(node, list) and isinstance(last, int) and last < len(node):
        node[last] = assignment.value
    else:
        mistakes.add(assignment.origin, _no_place(node, assignment.keys[:-1], last))
        return
    keys = assignment.keys
    mistakes.origins = {known: origin for known, origin in mistakes.origins.items() if known[: len(keys)] != keys}
    mistakes.origins[keys] = assignment.origin


def _no_place(node: Any, keys: Keys, key: str | int) -> str:
    where = _dotted(keys)
    if isinstance(node, list):
        return f"{where}: there is no entry {key}, it has {len(node)}, counted from 0"
    return f"{where}: holds {node!r}, which has no key '{key}'"


def _validate(raw: dict[str, Any], mistakes: _Mistakes) -> Recipe | None:
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        details = error.errors()
    else:
        return recipe
    places = [(_place(detail, raw), detail) for detail in details]
    by_place: dict[Keys, list[Any]] = {}
    for keys, detail in places:
        if not _follows(keys, detail, places):
            by_place.setdefault(keys, []).append(detail)
    for keys, group in by_place.items():
        mistakes.add(mistakes.origin(keys), f"{_dotted(keys)}: {_explain(keys, group, raw)}")
    return None


def _follows(keys: Keys, detail: Any, places: list[tuple[Keys, Any]]) -> bool:
    """Whether a mistake is no more than what another brings with it.

    A list is too short when its members are wrong. Where a number or a mapping may stand, only what was given can be
    wrong in its own way.
    """
    within = [(place, other) for place, other in places if place[: len(keys)] == keys]
    if detail["type"] == "too_short":
        return any(len(place) > len(keys) for place, _ in within)
    return _other_kind(detail) and not all(_other_kind(other) for _, other in within)


def _other_kind(detail: Any) -> bool:
    wanted = {"float_type": float, "int_type": int, "model_attributes_type": dict, "model_type": dict}
    kind = wanted.get(detail["type"])
    return kind is not None and isinstance(detail["input"], dict) != (kind is dict)


def _place(detail: Any, raw: Any) -> Keys:
    """Path in the user's recipe; pydantic's own also names the members of unions."""
    keys: list[str | int] = []
    node = raw
    for i, part in enumerate(detail["loc"]):
        if (isinstance(node, dict) and part in node) or (
            isinstance(node, list) and isinstance(part, int) and part < len(node)
        ):
            node = node[part]
            keys.append(part)
        elif detail["type"] in ("missing", options.MISTAKE) and i == len(detail["loc"]) - 1:
            keys.append(part)
    return tuple(keys)


def _explain(keys: Keys, group: list[Any], raw: Any) -> str:
    kinds = {detail["type"]: detail for detail in group}
    section = _section_at(keys[:-1], raw)
    if "extra_forbidden" in kinds:
        known = list(section.model_fields) if section else []
        inside = _sections_with(str(keys[-1])) if len(keys) == 1 else []
        if inside:
            return f"unknown key; did you mean {' or '.join(inside)}?"
        return f"unknown key; {nearest(str(keys[-1]), known)}"
    described = section.model_fields.get(str(keys[-1])) if section and keys else None
    note = f" ({described.description})" if described is not None and described.description else ""
    if "missing" in kinds:
        flag = {"data": "; give --data", "model": "; give --model or --student"}.get(_dotted(keys), "")
        return f"is missing{note}{flag}"
    if options.MISTAKE in kinds:  # a whole sentence, of a key that may not be there
        return "; ".join(detail["ctx"]["message"] for detail in group if detail["type"] == options.MISTAKE)
    given = _value_at(keys, raw)
    if "union_tag_invalid" in kinds and len(kinds) == 1:
        return _no_such_word(kinds["union_tag_invalid"]["ctx"]["tag"], _tags(section, keys)) + note
    if set(kinds) == {"literal_error"} and described is not None:
        return _no_such_word(str(given), [str(word) for word in _words_of(described.annotation)]) + note
    if "union_tag_not_found" in kinds:
        return f"needs a key 'type', got {given!r}"
    message = " or ".join(dict.fromkeys(_in_words(detail) for detail in group))
    return f"{message}, got {given!r}{note}"


def _sections_with(key: str) -> list[str]:
    """Find a key that was given without its section; of a loss it is most often the second term's."""
    found = [
        f"{name}.1.{key}" if name == "loss" else f"{name}.{key}"
        for name, field in Recipe.model_fields.items()
        if key != "type" and any(key in section.model_fields for section in _sections_in(field.annotation))
    ]
    return [place for place in found if not place.startswith("loss")] or found


def _no_such_word(word: str, known: list[str]) -> str:
    return f"no '{word}' here; {nearest(word, known)}"


def _tags(section: type[BaseModel] | None, keys: Keys) -> list[str]:
    """Every ``type`` that may stand in a place."""
    name = next(key for key in reversed(keys) if isinstance(key, str))
    section = section if section is not None and name in section.model_fields else Recipe
    return [str(tag) for option in _sections_in(section.model_fields[name].annotation) for tag in _literals(option)]


def _words_of(annotation: Any) -> list[Any]:
    return [word for argument in (annotation, *get_args(annotation)) for word in _literal_values(argument)]


def _literal_values(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()


# What is wrong, by pydantic's type of error, with the limits that it names.
_WORDS = {
    "int_type": "input should be a valid integer",
    "int_from_float": "input should be a valid integer",
    "float_type": "input should be a valid number",
    "bool_type": "input should be true or false",
    "string_type": "input should be a word",
    "tuple_type": "input should be a list",
    "finite_number": "input should be a finite number",
    "model_type": "input should be a mapping",
    "model_attributes_type": "input should be a mapping, as {{type: NAME}}",
    "literal_error": "input should be {expected}",
    "greater_than": "input should be greater than {gt}",
    "greater_than_equal": "input should be greater than or equal to {ge}",
    "less_than": "input should be less than {lt}",
    "less_than_equal": "input should be less than or equal to {le}",
    "too_short": "list should have at least {min_length} items, not {actual_length}",
    "string_too_short": "input should not be empty",
}


def _in_words(detail: Any) -> str:
    sentence = _WORDS.get(detail["type"])
    if sentence is None:
        # Of a validator that raised a plain ValueError pydantic would say that it did.
        text = str(detail.get("ctx", {}).get("error", detail["msg"]))
        return text[:1].lower() + text[1:]
    return sentence.format(**{name: _number(value) for name, value in detail.get("ctx", {}).items()})


def _number(value: Any) -> Any:
    return f"{value:g}" if isinstance(value, float) else value


def _value_at(keys: Keys, raw: Any) -> Any:
    for key in keys:
        raw = raw[key]
    return raw


def _section_at(keys: Keys, raw: Any) -> type[BaseModel] | None:
    """Options class that describes a place, as far as the recipe's own ``type`` keys tell."""
    section: type[BaseModel] = Recipe
    candidates: list[type[BaseModel]] = []
    for key in keys:
        raw = _value_at((key,), raw) if isinstance(raw, dict | list) else None
        if isinstance(key, str):
            if key not in section.model_fields:
                return None
            candidates = _sections_in(section.model_fields[key].annotation)
        if isinstance(raw, list):
            continue
        kind = raw.get("type") if isinstance(raw, dict) else None
        fitting = [c for c in candidates if "type" in c.model_fields and kind in _literals(c)] or candidates
        if not fitting:
            return None
        section = fitting[0]
    return section


def _literals(section: type[BaseModel]) -> tuple[Any, ...]:
    return get_args(section.model_fields["type"].annotation)


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _sections_in(argument)]


def _dotted(keys: Keys) -> str:
    return ".".join(map(str, keys)) or "the recipe"
