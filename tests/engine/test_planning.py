"""What a run would do, and what a user should know before it begins."""

import json
import shutil

import pytest
import torch

from cakd_cli.engine import choices, planning, rehearsal
from cakd_cli.engine.build import read_inputs
from cakd_cli.recipe.resolve import resolve

SMALL = ("--student", "resnet8", "--batch-size", 16, "--epochs", 3)


@pytest.fixture
def inputs(toy_file, toy_teacher):
    flags = {"data": f"tensors:{toy_file}", "model": "resnet8", "engine.batch_size": 16, "engine.epochs": 3}

    def inputs(*words, **more):
        return read_inputs(resolve(list(words), flags | {"teacher": str(toy_teacher)} | more))

    return inputs


def test_a_rehearsal_changes_nothing(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read = inputs(loss="cakd")
    assert read.teacher is not None
    networks = {"student": read.student, "teacher": read.teacher.model}
    before = {name: {key: value.clone() for key, value in net.state_dict().items()} for name, net in networks.items()}

    planning.plan(read)

    for name, network in networks.items():
        assert before[name].keys() == network.state_dict().keys()
        assert all(torch.equal(value, network.state_dict()[key]) for key, value in before[name].items()), name
    assert not any(module._forward_hooks for network in networks.values() for module in network.modules())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "remembered", "total", "first", "later"),
    [
        (["engine.teacher_memory=off"], 1.0, 27.0, 9.0, 9.0),
        # One view an image: after the first epoch nothing is asked.
        (["data.crop_padding=0"], 0.5, 9 + 2 * 4.5, 9.0, 4.5),
        # Nine views: of them an image has met 9 (1 - (8/9)^3) = 2.679 in three epochs.
        (["data.crop_padding=1"], 0.5, 3 * 4.5 + 2.679 * 4.5, 9.0, 8.279),
    ],
)
def test_later_epochs_ask_about_what_is_not_remembered(inputs, words, remembered, total, first, later, monkeypatch):
    seconds = iter([1.0, remembered])
    monkeypatch.setattr(rehearsal, "_timed", lambda *given: rehearsal._Step(next(seconds), 5, False, None))
    timing = rehearsal.rehearse(choices.decide(inputs(*words, loss="kd"), measure=False))

    assert timing.as_dict() == pytest.approx(
        {"steps": 5, "total": total, "first_epoch": first, "later_epochs": later}, abs=2e-2
    )


def test_time_is_told_by_the_dry_run(cakd, toy_file, toy_teacher):
    words = ("distill", "--data", f"tensors:{toy_file}", "--teacher", toy_teacher, *SMALL, "--loss", "kd", "--dry-run")
    seconds = cakd(*words, "--json").document["seconds"]

    assert seconds["steps"] == 8
    assert 0 < seconds["later_epochs"] <= seconds["first_epoch"] < 60
    assert seconds["total"] == pytest.approx(seconds["first_epoch"] + 2 * seconds["later_epochs"], abs=0.01)
    assert "time      about " in cakd(*words).out


def test_a_first_step_that_takes_too_long_is_the_one_that_is_told(inputs, monkeypatch):
    monkeypatch.setattr(rehearsal, "_SECONDS", 0.0)
    timing = rehearsal.rehearse(choices.decide(inputs(loss="kd"), measure=False))

    assert timing.steps == 1
    assert timing.first_epoch == timing.later_epochs > 0


def test_a_step_that_cannot_be_taken_is_an_error_of_the_recipe(cakd, toy_file):
    words = ("train-teacher", "--data", f"tensors:{toy_file}", "--model", "vgg8", "--batch-size", 1, "--dry-run")
    result = cakd(*words)

    assert (result.code, "batch norm has nothing to average over" in result.err) == (3, True), result.err


def test_the_student_alone_beside_the_run_is_compared_with_the_teacher(inputs, toy_teacher, tmp_path):
    run, read = tmp_path / "alone", inputs(loss="kd")
    shutil.copytree(toy_teacher, run)
    facts = json.loads((toy_teacher / "run.json").read_text())
    teacher, facts["metrics"]["validation"]["top1"] = facts["metrics"]["validation"]["top1"], 0.995

    def compared():
        return [line for line in planning.worth_knowing(read, tmp_path / "run") if "student alone" in line]

    assert compared() == [], "of the teacher's own run"
    facts["weights_hash"] = "another"
    (run / "run.json").write_text(json.dumps(facts))
    (told,) = compared()
    assert f"{teacher:.1%} for the teacher and 99.5% for the student alone" in told
    # Figures of other images, and files of others, say nothing.
    for text in (json.dumps(facts | {"data": {"fingerprints": {"train": "x"}}}), "[]", "{", '{"teacher": null}'):
        (run / "run.json").write_text(text)
        assert compared() == [], text


def test_what_is_worth_knowing_is_said_as_the_run_begins(cakd, toy_file, toy_teacher, tmp_path):
    words = ("distill", "--data", f"tensors:{toy_file}", "--teacher", toy_teacher, *SMALL, "--loss", "kd")
    result = cakd(*words, "--epochs", 1, "--out", tmp_path / "run")

    assert "144 training images are few" in result.err
    assert "the student is no smaller than its teacher: 77,364 parameters, and 77,364" in result.err


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18"])
def test_networks_of_both_libraries_start_the_same_way(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    hint = f"{name} starts from fresh weights; model.pretrained=true takes published ones"
    flags = {"data": "noise", "model": name, "engine.batch_size": 4}
    small = ["data.image_size=32", "data.images=16", "data.classes=3"]
    fresh = read_inputs(resolve(small, flags))

    assert fresh.recipe.model.origin == "fresh weights"
    assert planning.worth_knowing(fresh, tmp_path / "run") == [hint]
    published = read_inputs(resolve([*small, "model.pretrained=true"], flags), fetch=False)
    assert published.recipe.model.origin == f"{name.partition(':')[0]}'s published weights"
    assert planning.worth_knowing(published, tmp_path / "run") == []


def test_a_dry_run_of_train_teacher_speaks_of_no_student(cakd, toy_file, toy_teacher):
    words = ("--data", f"tensors:{toy_file}", "--batch-size", 16, "--dry-run")
    alone = cakd("train-teacher", *words, "--model", "resnet8").out
    distilled = cakd("distill", *words, "--student", "resnet8", "--teacher", toy_teacher, "--loss", "kd").out

    assert ("student" in alone, "teacher   " in alone, "network   resnet8" in alone) == (False, False, True)
    assert ("student   resnet8" in distilled, "teacher   resnet8 of" in distilled) == (True, True)
