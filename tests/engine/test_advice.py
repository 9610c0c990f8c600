"""What limits a run, and what would help."""

import json

import pytest
import torch

from cakd_cli.engine import advice, loop
from cakd_cli.losses import dkd
from cakd_cli.recipe.resolve import resolve
from tests.conftest import train_toy


def test_metrics_say_where_the_time_went(toy_teacher, toy_file, tmp_path):
    run = train_toy(toy_file, tmp_path / "run", teacher=str(toy_teacher), loss="kd")

    for line in (run / "metrics.jsonl").read_text().splitlines():
        shares = json.loads(line)["time"]
        assert set(shares) == {"data", "teacher", "student", "loss", "backward", "optimizer"}
        assert 0.5 < sum(shares.values()) <= 1.001


@pytest.mark.parametrize(
    ("shares", "words", "said"),
    [
        ({"data": 0.7, "student": 0.3}, ["data.workers=0"], "would decode more images at a time (now 0)"),
        ({"data": 0.7, "student": 0.3}, ["data.workers=99"], "data.decoded_gb=20 would keep decoded images"),
        ({"data": 0.7, "student": 0.3}, ["data.workers=99", "data.decoded_gb=1"], "time: data 70%, student 30%"),
        ({"teacher": 0.7, "backward": 0.3}, ["engine.teacher_memory=off"], "data.views=8 would draw 8 crops"),
        ({"teacher": 0.7, "backward": 0.3}, ["data.views=8", "engine.teacher_memory=disk"], "its answers are kept"),
        ({"teacher": 0.2, "backward": 0.8}, ["engine.precision=fp32"], "engine.precision=bf16 is faster"),
        ({"teacher": 0.2, "backward": 0.8}, ["engine.precision=bf16"], "time: student 80%, teacher 20%"),
    ],
)
def test_the_limit_is_named_with_what_would_help(shares, words, said):
    flags = {"data": "folder:x", "model": "resnet8", "teacher": "runs/t", "loss": "kd"}

    found = advice.sentence(shares, resolve(words, flags), fast_bf16=True)

    assert found == said if said.startswith("time:") else said in found


def test_a_precision_that_is_no_faster_here_is_not_advised():
    recipe = resolve(["engine.precision=fp32"], {"data": "folder:x", "model": "resnet8"})

    assert advice.sentence({"student": 1.0}, recipe, fast_bf16=False) == "time: student 100%"


USUAL = advice.Case(
    classes=10,
    training_images=5000,
    student_parameters=10_000,
    teacher_parameters=100_000,
    terms=frozenset({"dkd"}),
    teacher_top1=0.95,
    alone_top1=0.9,
)


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ({"classes": 2}, "of two classes a teacher's logits tell how sure it is"),
        ({"classes": 2}, "DKD's NCKD is zero"),
        ({"training_images": 499}, "499 training images are few"),
        ({"student_parameters": 100_000}, "no smaller than its teacher: 100,000 parameters, and 100,000"),
        ({"alone_top1": 0.945}, "95.0% for the teacher and 94.5% for the student alone: there is little to gain"),
        ({"alone_top1": 0.96}, "there is nothing to gain in accuracy"),
    ],
)
def test_what_speaks_against_distilling_is_said(known, said):
    (line,) = advice.before_distilling(USUAL._replace(**known))

    assert said in line


@pytest.mark.parametrize(
    "known",
    [
        {},
        {"classes": 3},
        {"training_images": 500},
        {"teacher_parameters": 0},
        {"alone_top1": None},
        {"teacher_top1": None},
    ],
)
def test_where_all_is_well_nothing_is_said(known):
    assert advice.before_distilling(USUAL._replace(**known)) == []


def test_two_classes_leave_the_rest_of_dkd_nothing():
    """What the sentence about two classes says."""
    student, teacher = torch.randn(2, 8, 2)
    parts = dkd(student, teacher, torch.arange(8) % 2, temperature=4, alpha=1, beta=8).parts

    assert parts["nckd"] == 0
    assert parts["tckd"] > 0


def test_a_long_epoch_says_its_limit_once(cakd, toy_file, toy_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_WORTH_A_LINE_SECONDS", 0.0)
    words = ("distill", "--data", f"tensors:{toy_file}", "--teacher", toy_teacher, "--student", "resnet8")
    result = cakd(*words, "--batch-size", 16, "--epochs", 2, "--out", tmp_path / "run")

    assert result.err.count("\ntime: ") == 1
