"""What limits a run, and what would help."""

import json

import pytest

from cakd_cli.engine import advice, loop
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

    found = advice.sentence(shares, resolve(words, flags))

    assert found == said if said.startswith("time:") else said in found


def test_a_long_epoch_says_its_limit_once(cakd, toy_file, toy_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_WORTH_A_LINE_SECONDS", 0.0)
    words = ("distill", "--data", f"tensors:{toy_file}", "--teacher", toy_teacher, "--student", "resnet8")
    result = cakd(*words, "--batch-size", 16, "--epochs", 2, "--out", tmp_path / "run")

    assert result.err.count("\ntime: ") == 1
