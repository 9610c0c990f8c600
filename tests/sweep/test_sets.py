"""A sweep of several recipes: a folder each, and a table of methods by recipes."""

import pytest

from cakd_cli.errors import UsageError
from cakd_cli.sweep.plan import make_plan
from tests.conftest import train_toy

RECIPE = "data: digits\nmodel: resnet8\nteacher: runs/{name}\n"


def test_every_recipe_has_a_folder_of_its_own(tmp_path):
    recipes = []
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(RECIPE.format(name=name))
        recipes.append(str(tmp_path / f"{name}.yaml"))

    units = make_plan([*recipes, "engine.epochs=3"], {}, losses=["kd"], seeds=[0, 1])

    names = [f"{method}-seed{seed}" for seed in (0, 1) for method in ("cross-entropy", "kd")]
    assert [unit.name for unit in units] == [f"{recipe}/{name}" for recipe in ("one", "two") for name in names]
    for unit in units:
        own = [word for word in unit.words if word in recipes]
        assert own == [str(tmp_path / f"{unit.name.partition('/')[0]}.yaml")]
        assert "engine.epochs=3" in unit.words
    with pytest.raises(UsageError, match="the list of recipes names one twice: one,one"):
        make_plan([recipes[0], recipes[0].replace("/one", "/./one")], {}, losses=["kd"], seeds=[0])


def test_a_folder_of_sets_is_one_table(cakd, toy_file, toy_teacher, tmp_path):
    for recipe, model in (("wide", "resnet8x4"), ("narrow", "resnet8")):
        for loss in ("cross-entropy", "kd"):
            out = tmp_path / "table" / recipe / f"{loss}-seed0"
            train_toy(toy_file, out, model=model, teacher=str(toy_teacher), loss=loss, **{"engine.epochs": 1})

    result = cakd("compare", tmp_path / "table", "--json")
    table = cakd("compare", tmp_path / "table", "--markdown").out
    latex = cakd("compare", tmp_path / "table", "--latex").out
    shown = cakd("compare", tmp_path / "table").out

    assert result.code == 0, result.err
    assert set(result.document["sets"]) == {"wide", "narrow"}
    figures = {
        recipe: {group["name"]: f"{100 * group['figures']['top1']['mean']:.2f}" for group in found["groups"]}
        for recipe, found in result.document["sets"].items()
    }
    assert "| student | narrow | wide |" in table
    assert f"| kd | {figures['narrow']['kd']} | {figures['wide']['kd']} |" in table
    assert "student alone" in table
    assert "teacher" in table
    assert "lrr" in latex
    assert "cakd compare FOLDER/RECIPE" in shown

    page = cakd("report", tmp_path / "table", "--out", tmp_path / "page.html")
    assert page.code == 4
    assert "has runs of several recipes, and a page is about one: narrow, wide" in page.err
    assert not (tmp_path / "page.html").exists()
