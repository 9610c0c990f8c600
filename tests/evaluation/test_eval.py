"""cakd eval, as a user calls it."""

import json

import pytest

from tests.conftest import train_toy


def test_eval_repeats_what_the_run_recorded(cakd, toy_teacher):
    recorded = json.loads((toy_teacher / "run.json").read_text())["metrics"]

    for split, name in (("test", "test"), ("val", "validation")):
        report = cakd("eval", toy_teacher, "--split", split, "--json").document
        assert report["quality"] == pytest.approx(recorded[name], abs=1e-6)


def test_eval_against_itself_is_perfect_fidelity(cakd, toy_teacher):
    result = cakd("eval", toy_teacher, "--teacher", toy_teacher, "--json")

    fidelity = result.document["teacher"]["fidelity"]
    assert fidelity["agreement"] == 1
    assert abs(fidelity["kl"]) < 1e-9
    assert [timing["batch_size"] for timing in result.document["cost"]["latency"]] == [1, 64]
    assert result.err == ""


def test_eval_for_people(cakd, toy_teacher):
    result = cakd("eval", toy_teacher, "--teacher", toy_teacher)

    assert result.code == 0
    for word in ("top-1", "top-5", "NLL", "ECE", "parameters", "FLOP", "agreement", "BCD", "SCD", "WCD", "class 0"):
        assert word in result.out


def test_bar(cakd, toy_teacher, toy_file, tmp_path):
    poor = train_toy(toy_file, tmp_path / "poor", "optimizer.learning_rate=1e-9", **{"engine.epochs": 1})
    assert cakd("eval", toy_teacher, "--min-top1", 0.5).code == 0

    for words in (("--json",), ()):
        failed = cakd("eval", poor, "--min-top1", 0.99, *words)
        assert failed.code == 6
        assert "below --min-top1 0.99" in failed.err
        assert "top" in failed.out
    document = cakd("eval", poor, "--min-top1", 0.99, "--json").document
    assert document["quality"]["top1"] < 0.99
    assert document["error"]["code"] == "check-failed"


def test_training_images_come_without_augmentation(cakd, toy_teacher):
    report = cakd("eval", toy_teacher, "--split", "train", "--json").document

    assert report["samples"] == 144
