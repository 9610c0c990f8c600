"""Every recipe that ships can be run."""

import itertools

import pytest

from cakd_cli.models import ExternalSpec
from cakd_cli.recipe import shipped
from cakd_cli.recipe.resolve import resolve

NAMES = shipped.names()


def test_there_are_recipes():
    assert len(NAMES) >= 6
    assert len(NAMES) == len(list(shipped.folder().rglob("*.yaml")))


@pytest.mark.parametrize("name", NAMES)
def test_recipe_opens_with_its_goal_and_command(name):
    lines = (shipped.folder() / f"{name}.yaml").read_text().splitlines()
    comment = list(itertools.takewhile(lambda line: line.startswith("#"), lines))

    assert comment[0].endswith(".")
    assert any(line.startswith("# Needs") for line in comment)
    assert any(f" {name} " in line and line.startswith("#   cakd ") for line in comment)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_resolves_with_each_of_its_methods(name):
    text = (shipped.folder() / f"{name}.yaml").read_text()
    flags = {"teacher": "runs/t"} if "loss:" in text else {}
    if "data:" not in text.replace("--data", ""):
        flags["data"] = "folder:images"
    for method in ("cross-entropy", "kd", "dkd", "cakd") if flags.get("teacher") else (None,):
        recipe = resolve([name], flags | {"loss": method})
        sizes = {"in_channels": 3, "num_classes": 10}
        if isinstance(recipe.model, ExternalSpec):
            recipe.model.normalisation()
        assert recipe.model.build(**sizes) is not None
