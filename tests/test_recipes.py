"""Every recipe that ships can be run."""

import itertools

import pytest
from pydantic import TypeAdapter

from cakd_cli import losses
from cakd_cli.errors import RecipeError
from cakd_cli.models import ExternalSpec
from cakd_cli.recipe import published, shipped
from cakd_cli.recipe.resolve import resolve

NAMES = shipped.names()


def test_there_are_recipes():
    assert len(NAMES) >= 6
    # All files but the table of published settings.
    assert len(NAMES) == len(list(shipped.folder().rglob("*.yaml"))) - 1


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
    networks = set()
    for method in losses.objectives() if flags.get("teacher") else (None,):
        networks.add(resolve([name], flags | {"loss": method}).model)
    (network,) = networks
    if isinstance(network, ExternalSpec):
        network.published_form()
    assert network.build(in_channels=3, num_classes=10) is not None


# The CIFAR-100 pairs of the literature, and ImageNet's two.
PAIRS = (
    *("resnet56-resnet20", "resnet110-resnet32", "resnet32x4-resnet8x4", "wrn-40-2-wrn-16-2", "wrn-40-2-wrn-40-1"),
    *("vgg13-vgg8", "resnet32x4-shufflenet-v1", "resnet32x4-shufflenet-v2", "wrn-40-2-shufflenet-v1"),
    *("vgg13-mobilenet-v2", "resnet50-mobilenet-v2"),
    *("resnet110-resnet20", "resnet32x4-wrn-16-2", "resnet32x4-wrn-40-2", "wrn-40-2-resnet8x4"),
    "wrn-40-2-mobilenet-v2",
)


def test_every_pair_has_published_settings_and_a_recipe():
    names = published.names()

    assert {f"cifar100/{pair}" for pair in PAIRS} <= set(NAMES)
    assert [name for name in names if name.startswith("cifar100/")] == [f"cifar100/{pair}" for pair in PAIRS]
    assert {"imagenet/resnet34-resnet18", "imagenet/resnet50-mobilenet-v1"} <= set(NAMES) & set(names)


@pytest.mark.parametrize("name", published.names())
def test_published_settings_are_settings(name):
    adapter = TypeAdapter(tuple[losses.LossOptions, ...])

    for method, entries in published.objectives(name, losses.objectives()).items():
        terms = adapter.validate_python(tuple(entries))
        assert terms, method


@pytest.mark.parametrize(
    ("recipe", "loss", "expected"),
    [
        ("cifar100/resnet32x4-resnet8x4", "gdkd", {"w0": 1, "w1": 2, "w2": 8, "k": 5, "temperature": 4}),
        ("cifar100/wrn-40-2-wrn-16-2", "gdkd", {"w1": 2, "w2": 6, "warmup_epochs": 20}),
        ("recipes/cifar100/resnet56-resnet20", "dkd", {"alpha": 1, "beta": 2}),
        ("cifar100/resnet110-resnet32", "gdkd-auto-w", {"m1": 3, "m2": 2}),
        ("cifar100/wrn-40-2-wrn-40-1", "ls-kd", {"weight": 9, "temperature": 2, "standardise": True}),
        ("cifar100/wrn-40-2-wrn-40-1", "dist", {"beta": 2, "gamma": 2, "temperature": 4}),
        ("imagenet/resnet34-resnet18", "gdkd", {"w0": 0.5, "w1": 1, "w2": 1, "temperature": 1, "warmup_epochs": 1}),
        ("imagenet/resnet34-resnet18", "kd", {"weight": 0.5, "temperature": 1}),
    ],
)
def test_a_recipe_takes_the_papers_weights(recipe, loss, expected):
    flags = {"teacher": "runs/t", "loss": loss, **({"data": "folder:x"} if "imagenet" in recipe else {})}

    term = resolve([recipe], flags).loss[-1]

    assert {key: getattr(term, key) for key in expected} == expected


@pytest.mark.parametrize(("method", "said"), [("cmkd", True), ("gdkd", False), ("cross-entropy", False), ("nkd", True)])
def test_what_was_not_published_is_said(method, said):
    lines = []

    resolve(["imagenet/resnet34-resnet18"], {"loss": method, "data": "folder:x"}, note=lines.append)

    assert (
        lines
        == [
            f"no settings of {method} were published for imagenet/resnet34-resnet18: cakd's own are taken, "
            f"as in cakd list losses {method}"
        ]
        * said
    )


@pytest.mark.parametrize(
    ("words", "rate"),
    [
        ([], 0.025),
        (["loss=kd"], 0.05),
        (["optimizer.learning_rate=0.1"], 0.1),
        (["optimizer={type: adamw}"], 1e-3),
        (["loss=[{type: kd}]"], 0.05),
    ],
)
def test_a_method_brings_the_keys_that_it_was_published_with(words, rate):
    recipe = resolve(["cifar100/resnet56-resnet20", *words], {"loss": None if "loss" in str(words) else "mlkd"})

    assert recipe.optimizer.learning_rate == rate


def test_published_figures_are_of_pairs_with_settings_and_of_methods():
    for data in ("cifar100", "imagenet"):
        for name in published.names():
            if name.startswith(f"{data}/") and not name.endswith("/vit"):
                figures = published.figures(data, name.partition("/")[2])
                assert {"teacher", "student", "kd", "dkd"} <= set(figures), name
                assert set(figures) - {"teacher", "student"} <= set(losses.objectives())
                assert all(60 < value < 80 for value in figures.values())
    assert published.figures("cifar100", "resnet32x4-resnet8x4")["ls-dkd"] == 77.01
    assert published.figures("digits", "a-b") == {}


def test_a_row_that_is_not_there(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("data: digits\nmodel: resnet8\npublished: cifar100/resnet32x4-resnet8\n")

    with pytest.raises(RecipeError, match=r"mine.yaml:3: published: no settings of 'cifar100/resnet32x4-resnet8'"):
        resolve([str(path)], {})


def test_a_row_refines_the_term_that_it_names(monkeypatch):
    """Of an objective of several terms that distil, the last is not always meant."""
    rows = {
        "set": {"a-b": {"cakd": {"beta": 6}, "kd": {"type": "cross-entropy", "weight": 0.3}, "cmkd": {"weight": 5}}}
    }
    monkeypatch.setattr(published, "_settings", lambda: rows)

    found = published.objectives("set/a-b", losses.objectives())

    assert [term.get("beta") for term in found["cakd"]] == [None, 6, None]
    assert [term["weight"] for term in found["kd"]] == [0.3, 0.9]
    assert found["cmkd"][-1]["weight"] == 5
