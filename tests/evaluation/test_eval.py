"""cakd eval, as a user calls it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cakd_cli.evaluation import metrics
from cakd_cli.models import saving
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


def test_a_share_is_what_it_says():
    logits, labels = torch.eye(2)[[0] * 252 + [1] * 108], torch.zeros(360, dtype=torch.long)

    assert metrics.brief(logits, labels)["top1"] == 252 / 360


def test_other_images_than_the_run_recorded_are_said(cakd, toy_teacher, toy_file, tmp_path):
    data = tmp_path / "data.safetensors"
    tensors = load_file(toy_file)
    tensors["test_images"][0] += 1
    save_file(tensors, data, metadata={"class_names": json.dumps([f"class {i}" for i in range(4)])})

    other = cakd("eval", toy_teacher, "--data", f"tensors:{data}", "--json").document
    training = cakd("eval", toy_teacher, "--data", f"tensors:{data}", "--split", "val", "--json").document

    assert (other["as_recorded"], training["as_recorded"]) == (False, True)
    assert "are not those that" in other["warnings"][0]


def test_a_network_of_nan_is_refused(cakd, toy_teacher, tmp_path):
    shutil.copytree(toy_teacher, tmp_path / "run")
    state = load_file(tmp_path / "run/model.safetensors")
    state["fc.weight"][0, 0] = float("nan")
    save_file(state, tmp_path / "run/model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "run/config.json").read_text())
    config["cakd"]["weights_hash"] = saving.weights_hash(state)
    (tmp_path / "run/config.json").write_text(json.dumps(config))

    for words in (("eval", tmp_path / "run"), ("export", tmp_path / "run", "--format", "safetensors")):
        result = cakd(*words, "--json")
        assert (result.code, "not finite" in result.err) == (4, True), result.err
        assert json.loads(result.out, parse_constant=pytest.fail)["error"]["code"] == "input"
