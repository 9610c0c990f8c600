"""cakd bench."""

from collections.abc import Mapping
from typing import Any

from cakd_cli.bench.measure import measure
from cakd_cli.console import Console
from cakd_cli.recipe.resolve import names_recipe, resolve
from cakd_cli.report import tables

# What is measured unless the user names a recipe or settings of their own.
_DEFAULT = "bench/resnet32x4-resnet8x4"


def run(words: list[str], flags: Mapping[str, Any], *, against: str | None, console: Console) -> None:
    """Measure a recipe's step, on the default recipe if none is named."""
    named = any(map(names_recipe, words)) or flags["data"] is not None
    recipe = resolve(
        words if named else [_DEFAULT, *words],
        flags,
        defaults={"loss": "cakd"} if named else None,
        flag_names={"model": "--student"},
    )
    report = measure(recipe, console, plain=against == "plain")
    console.result(report, lambda stdout: tables.show_bench(stdout, report))
