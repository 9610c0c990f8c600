"""YAML read strictly: what a person sees is what a program gets.

Differences from PyYAML's default, which is YAML 1.1: ``1e-3`` is a number; ``yes``, ``on``, ``010``, ``12:30`` and
dates are strings; a key given twice, an anchor, an alias or a tag is an error. Nothing is executed.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

Path = tuple[str | int, ...]

# Far more than any recipe needs; a parser in Python takes a second for so much.
MOST_CHARACTERS = 1_000_000

_RESOLVERS = (
    ("tag:yaml.org,2002:null", re.compile(r"^(~|null|)$"), ["~", "n", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$"), ["t", "f"]),
    ("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"^[-+]?(\.inf|\.nan|[0-9]+\.[0-9]*([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.[0-9]+([eE][-+]?[0-9]+)?)$"
        ),
        list("-+.0123456789"),
    ),
)
_MAPPING, _SEQUENCE = "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML declares it so


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML declares it so

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)


@dataclass
class Document:
    """A parsed text.

    Attributes:
        value: Plain dicts, lists and scalars.
        lines: Line number, from 1, of each path in ``value``.
        problems: (line, message) of everything that strict YAML refuses; the value then lacks those parts.
    """

    value: Any = None
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)


def parse(text: str) -> Document:
    """Parse one YAML document; never raises for wrong text, but lists what is wrong."""
    document = Document()
    if len(text) > MOST_CHARACTERS:
        document.problems.append((1, f"has {len(text):,} characters; a recipe has at most {MOST_CHARACTERS:,}"))
        return document
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:
        document.problems.append((1, f"not readable as YAML: {str(error).splitlines()[0]}"))
        return document
    try:
        node = loader.get_single_node()
        if node is not None:
            document.value = _build(node, (), document, loader, set())
    except RecursionError:
        document.problems.append((1, "nested too deeply"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or "not readable as YAML"
        document.problems.append((mark.line + 1 if mark else 1, what))
    finally:
        loader.dispose()
    return document


def _build(node: yaml.Node, path: Path, document: Document, loader: _Loader, seen: set[int]) -> Any:
    line = node.start_mark.line + 1
    document.lines.setdefault(path, line)
    if id(node) in seen:
        document.problems.append((line, "anchors and aliases are not supported; write the value out"))
        return None
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode) and node.tag == _MAPPING:
        return _build_mapping(node, path, document, loader, seen)
    if isinstance(node, yaml.SequenceNode) and node.tag == _SEQUENCE:
        return [_build(item, (*path, i), document, loader, seen) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode) and node.tag == _implicit_tag(node, loader):
        if "\0" in node.value:
            document.problems.append((line, "a text holds a NUL character"))
            return None
        try:
            return loader.construct_object(node)
        except ValueError:
            document.problems.append((line, f"not a number that can be read: {node.value[:40]}"))
            return None
    document.problems.append((line, f"the tag {node.tag} is not supported"))
    return None


def _implicit_tag(node: yaml.ScalarNode, loader: _Loader) -> str:
    plain = node.style is None
    return str(loader.resolve(yaml.ScalarNode, node.value, (plain, not plain)))  # type: ignore[no-untyped-call]


def _build_mapping(
    node: yaml.MappingNode, path: Path, document: Document, loader: _Loader, seen: set[int]
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key, line = key_node.value, key_node.start_mark.line + 1
        if not isinstance(key, str):
            document.problems.append((line, "a key must be a word"))
            continue
        if key in result:
            first = document.lines[(*path, key)]
            dotted = ".".join(map(str, (*path, key)))
            document.problems.append((line, f"{dotted}: given twice, first on line {first}"))
            continue
        document.lines[(*path, key)] = line
        result[key] = _build(value_node, (*path, key), document, loader, seen)
    return result


def dump(value: Any) -> str:
    """Write plain values as YAML that :func:`parse` reads back as the same values."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
