"""cakd list."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cakd_cli import data, losses, models
from cakd_cli.console import Console
from cakd_cli.errors import UsageError, nearest
from cakd_cli.losses import Term
from cakd_cli.models import sizes
from cakd_cli.recipe import published
from cakd_cli.report import tables


def run(what: str, name: str | None, *, console: Console) -> None:
    """List names with one line each, or describe one loss.

    Raises:
        UsageError: If there is no such loss, or something else than a loss is named.
    """
    if name is None:
        if what == "models":
            sized = _models()
            console.result(sized, lambda stdout: tables.show_models(stdout, sized, sizes.CLASSES))
            return
        rows = {"losses": _losses, "data": _data}[what]()
        console.result(rows, lambda stdout: tables.show_catalogue(stdout, rows))
        return
    if what != "losses":
        raise UsageError(f"cakd list {what} takes no name, got '{name}'", hint=f"cakd list {what}")
    document = _describe(name)
    console.result(document, lambda stdout: tables.show_loss(stdout, document))


def _line(documented: type[Any]) -> str:
    return (documented.__doc__ or "").strip().splitlines()[0]


def _specs(specs: dict[str, type[Any]]) -> list[dict[str, str]]:
    return [
        {"name": f"{name}:{spec.shorthand.upper()}" if spec.shorthand else name, "summary": _line(spec)}
        for name, spec in specs.items()
    ]


def _models() -> list[dict[str, Any]]:
    rows = zip(_specs(dict(models.names())), models.names(), strict=True)
    return [{**row, **_size(sizes.SIZES.get(name))} for row, name in rows]


def _size(size: sizes.Size | None) -> dict[str, Any]:
    if size is None:  # a library has too many networks to list them
        return {}
    image = [sizes.CHANNELS, size.side, size.side]
    return {"parameters": size.parameters, "flops_per_image": size.flops, "image": image}


def _data() -> list[dict[str, str]]:
    return _specs(dict(data.names()))


def _losses() -> list[dict[str, str]]:
    return [
        {"name": name, "summary": term.summaries.get(name, _line(term))}
        for term in losses.TERMS
        for name in term.objectives
    ]


def _describe(name: str) -> dict[str, Any]:
    """All about a method: what it stands for, and each of the terms that it is made of."""
    owners = {method: term for term in losses.TERMS for method in term.objectives}
    kinds = {kind.model_fields["type"].default: kind for kind in losses.TERMS}
    if name not in owners | kinds:
        raise UsageError(f"no loss '{name}'; {nearest(name, sorted(owners))}", hint="cakd list losses")
    term = owners.get(name) or kinds[name]
    # A term that no method is named after stands for itself in a recipe's list.
    entries = term.objectives.get(name, ())
    used = [kinds[kind] for kind in dict.fromkeys(entry["type"] for entry in entries)] or [term]
    return {
        "name": name,
        "summary": term.summaries.get(name, _line(term)),
        "objective": [dict(entry) for entry in entries],
        # Everybody knows cross-entropy, unless it is what was asked about.
        "terms": [_term(kind) for kind in used if kind is not losses.CrossEntropyTerm or len(used) == 1],
        "published": published.of_method(name),
    }


def _term(term: type[Term]) -> dict[str, Any]:
    schema = term.model_json_schema()
    settings = [
        {
            "name": name,
            "default": field.get("default", "label" if name == "grouping" else None),
            "range": _range(field, schema.get("$defs", {}), adaptive=name in term.weighs),
            "meaning": field.get("description", ""),
        }
        for name, field in schema["properties"].items()
        if name != "type"
    ]
    kind = schema["properties"]["type"]["const"]
    return {"type": kind, "formula": term.formula, "paper": term.paper, "settings": settings}


def _range(schema: Mapping[str, Any], definitions: Mapping[str, Any], *, adaptive: bool = False) -> str:
    """Say what a setting may be, from its JSON schema; ``adaptive`` where a weight may be."""
    for key in ("anyOf", "oneOf"):
        if key in schema:
            kinds = [_range(member, definitions, adaptive=adaptive) for member in schema[key] if "$ref" not in member]
            return " or ".join(dict.fromkeys([*kinds, *_mappings(schema[key], definitions, adaptive=adaptive)]))
    if "$ref" in schema:
        return " or ".join(_mappings([schema], definitions, adaptive=adaptive))
    if "enum" in schema or "const" in schema:
        return " or ".join(map(str, schema.get("enum", [schema.get("const")])))
    if schema["type"] == "array":
        return f"a list, each {_range(schema['items'], definitions)}"
    words = {"boolean": "true or false", "null": "none", "integer": "a whole number", "number": "a number"}
    return " ".join(filter(None, [words.get(schema["type"], schema["type"]), _bounds(schema)]))


def _mappings(schemas: Sequence[Mapping[str, Any]], definitions: Mapping[str, Any], *, adaptive: bool) -> Iterator[str]:
    """Say the keys of the mappings among the schemas; those that differ in their type alone together."""
    kinds: dict[tuple[str, ...], list[str]] = {}
    for schema in schemas:
        if "$ref" in schema:
            properties = dict(definitions[schema["$ref"].rpartition("/")[2]]["properties"])
            kind = properties.pop("type", {}).get("const", "")
            if adaptive or kind != "adaptive":
                kinds.setdefault(tuple(properties), []).append(kind)
    for keys, names in kinds.items():
        kind = " | ".join(filter(None, names))
        yield "{" + ", ".join([*([f"type: {kind}"] if kind else []), *keys]) + "}"


def _bounds(schema: Mapping[str, Any]) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    return ", ".join(f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema)
