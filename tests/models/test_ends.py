"""Networks that end with what a method has put there: their parts, and whole runs."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional
from torch.testing import assert_close

from cakd_cli.engine import build
from cakd_cli.errors import RecipeError
from cakd_cli.models import TimmSpec, card, saving
from cakd_cli.models.ends import ReusedClassifier
from cakd_cli.models.layers import LOGITS, Tap, Tapped, locate
from cakd_cli.models.preprocessing import Preprocessing
from cakd_cli.recipe.resolve import resolve
from tests.engine.test_resume import assert_same_run, killed_after
from tests.teachers.test_classes import renamed


@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet8", None), ("resnet8", (2, 2)), ("wrn-16-1", (2, 2)), ("mobilenet-v2", None), ("shufflenet-v2", None)],
)
def test_a_reused_classifier_sees_the_projected_map(name, size):
    spec = resolve([], {"data": "digits", "model": name}).model
    end = ReusedClassifier(channels=6, size=size, reduction=3)
    network = spec.model_copy(update={"end": end}).network(in_channels=3, num_classes=10).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = locate(network, [Tap("", "map"), Tap("")], 10, images[:1], name="it")
    answers = Tapped(network, found.taps)(images)
    projected, pooled = (answers[str(tap)] for tap in found.taps)
    classifier = network.get_submodule(found.taps[1].layer)

    assert projected.shape[1] == 6
    assert size is None or tuple(projected.shape[2:]) == size
    assert_close(pooled, projected.mean((2, 3)))
    assert_close(answers[LOGITS], functional.linear(pooled, classifier.weight, classifier.bias))
    frozen = {key for key, parameter in network.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"{found.taps[1].layer}.{key}" for key in ("weight", "bias")}
    assert sum("projection" in key for key in dict(network.named_parameters())) == 9


def test_a_network_without_an_end_says_nothing_of_one():
    spec = resolve([], {"data": "digits", "model": "resnet8"}).model

    assert "end" not in spec.model_dump(mode="json")
    assert "end" not in spec.architecture


def test_an_end_needs_a_last_map():
    spec = resolve([], {"data": "digits", "model": "resnet8"}).model.model_copy(
        update={"end": ReusedClassifier(channels=6)}
    )

    with pytest.raises(RecipeError, match="resnet8 does not tell which map its classifier sees the average of"):
        spec.ended(torch.nn.Sequential(torch.nn.Linear(4, 10)), 10)


def test_timm_reads_no_network_with_an_end():
    spec = TimmSpec(type="timm", name="resnet18")
    shown = Preprocessing((3, 32, 32), (0.5,) * 3, (0.5,) * 3)
    for end, expected in ((None, "resnet18"), (ReusedClassifier(channels=6), "cakd_timm_resnet18")):
        model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        saved = saving.SavedModel(model, spec.model_copy(update={"end": end}), ("a", "b"), shown, {})

        assert saving.config(saved)["architecture"] == expected
        assert ("create_model" in card.model_card(saved)) == (end is None)


# Whole runs.


@pytest.fixture
def words(toy_file, toy_teacher):
    return (
        *("distill", "--data", f"tensors:{toy_file}", "--teacher", toy_teacher, "--student", "wrn-16-1"),
        *("--loss", "simkd", "--epochs", 2, "--batch-size", 16, "--device", "cpu", "engine.checkpoint_seconds=0"),
    )


# Before the first checkpoint, when nothing is left but the recipe, and after it.
@pytest.mark.slow
@pytest.mark.parametrize("moment", [4, 13])
def test_a_student_that_ends_with_its_teachers_classifier_is_resumed(cakd, words, tmp_path, moment):
    cakd(*words, "--out", tmp_path / "straight")
    with killed_after(moment):
        cakd(*words, "--out", tmp_path / "killed")
    result = cakd(*words, "--out", tmp_path / "killed", "--resume")

    assert result.code == 0, result.err
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


def test_a_student_keeps_its_teachers_classifier(cakd, words, toy_teacher, tmp_path):
    result = cakd(*words, "--out", tmp_path / "straight")

    assert result.code == 0, result.err
    lines = [json.loads(line) for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()]
    assert 0 < lines[1]["train"]["simkd"] < lines[0]["train"]["simkd"]
    files = [safe_open(path / "model.safetensors", "pt") for path in (tmp_path / "straight", toy_teacher)]
    for key in ("fc.weight", "fc.bias"):
        assert torch.equal(*(file.get_tensor(key) for file in files))
    assert saving.read(tmp_path / "straight").spec.end == ReusedClassifier(channels=64)
    assert "then the linear classifier of the teacher (SimKD" in (tmp_path / "straight" / "README.md").read_text()
    assert cakd("eval", tmp_path / "straight").code == 0
    assert cakd(*words, "--teacher", tmp_path / "straight", "--loss", "kd", "--dry-run").code == 0


@pytest.mark.parametrize("loss", ["simkd", "cat-kd", "sdd-kd", "sdd-dkd", "sdd-nkd"])
def test_weights_that_must_be_whole_are_not_cut_over_processes(loss):
    flags = {"data": "digits", "model": "resnet8", "teacher": "x", "loss": loss, "engine.parallel": "fsdp"}
    recipe = resolve([], flags)

    build._check_ranks(recipe, SimpleNamespace(count=1))
    with pytest.raises(RecipeError, match=f"{loss} needs the student's weights whole, and each of 2 processes"):
        build._check_ranks(recipe, SimpleNamespace(count=2))


NET = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes, in_channels):
        super().__init__(nn.Conv2d(in_channels, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
"""


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["loss.0.reduction=65"], "simkd does not fit: reduction must be from 1 to 64, got 65"),
        (["engine.quantize=int8"], "simkd adds convolutions to the student, which engine.quantize=int8 does not round"),
        (
            ["--data", "tensors:{here}/two.safetensors", "class_map={here}/map.yaml"],
            "simkd needs a teacher with a linear classifier, one weight for each class of two",
        ),
        (
            ["--student", "python:{here}/net.py:Net"],
            "the student does not tell which map its classifier sees the average of",
        ),
    ],
)
def test_what_cannot_take_over_a_classifier(cakd, words, toy_file, tmp_path, more, message):
    renamed(toy_file, tmp_path / "two.safetensors", {"class 1": "odd", "class 2": "even"})
    (tmp_path / "map.yaml").write_text("even: [class 0, class 2]\nodd: [class 1, class 3]\n")
    (tmp_path / "net.py").write_text(NET)
    more = [word.format(here=tmp_path) for word in more]

    result = cakd(*words, *more, "--out", tmp_path / "run")

    assert (result.code, message in result.err) == (3, True), result.err
    assert not (tmp_path / "run").exists()
