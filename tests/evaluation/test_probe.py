"""cakd eval --probe, as a user calls it, and the optimum that it finds."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.optimize import minimize

from cakd_cli.models.linear import fit_linear
from tests.conftest import write_tensors_file


def test_other_images_are_told_apart_by_frozen_features(cakd, toy_teacher):
    weights = (toy_teacher / "model.safetensors").read_bytes()

    shown = cakd("eval", toy_teacher, "--probe", "digits")
    report = cakd("eval", toy_teacher, "--probe", "digits", "--json").document

    assert shown.code == 0, shown.err
    found = report["probe"]
    assert f"linear probe on digits: top-1 {found['top1']:.2%} of 360 test images" in shown.out
    assert (found["classes"], found["features"]) == (10, 64)
    assert found["top1"] > 0.3, "digits are no quarters, but neither are the features noise"
    assert (toy_teacher / "model.safetensors").read_bytes() == weights


def test_the_own_data_is_told_apart_as_the_network_does(cakd, toy_teacher, toy_file):
    report = cakd("eval", toy_teacher, "--probe", f"tensors:{toy_file}", "--json").document

    assert report["probe"]["top1"] >= report["quality"]["top1"] - 0.02


def test_images_of_another_size_are_resized(cakd, toy_teacher, tmp_path):
    large = write_tensors_file(tmp_path / "large.safetensors", size=16)

    report = cakd("eval", toy_teacher, "--probe", f"tensors:{large}", "--json").document

    assert report["probe"]["top1"] > 0.9


def test_the_optimum_is_scipys():
    generator = torch.Generator().manual_seed(0)
    features_ND = torch.randn(200, 6, generator=generator)
    labels_N = (features_ND @ torch.randn(6, 3, generator=generator)).argmax(1)

    classifier = fit_linear(features_ND, labels_N, 3, penalty=0.01)

    def loss(flat: np.ndarray) -> float:
        weight, bias = flat[:18].reshape(3, 6), flat[18:]
        logits = features_ND.double().numpy() @ weight.T + bias
        top = logits.max(1)
        log_sum = top + np.log(np.exp(logits - top[:, None]).sum(1))
        return float((log_sum - logits[np.arange(200), labels_N]).mean() + 0.005 * (weight**2).sum())

    found = minimize(loss, np.zeros(21), method="BFGS", options={"gtol": 1e-7}).x
    assert classifier.weight.numpy() == pytest.approx(found[:18].reshape(3, 6), abs=2e-3)


def test_data_that_does_not_fit(cakd, toy_teacher, tmp_path):
    colour = write_tensors_file(tmp_path / "colour.safetensors", channels=3)
    several = tmp_path / "several.safetensors"
    images, labels = torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.eye(4, dtype=torch.uint8).repeat(2, 1)
    parts = {
        f"{part}_{kind}": value
        for part in ("train", "test")
        for kind, value in (("images", images), ("labels", labels))
    }
    save_file(
        {name: value.clone() for name, value in parts.items()},
        several,
        metadata={"class_names": json.dumps(list("abcd"))},
    )

    for words, code, sentence in (
        ("cifar1000", 3, "--probe: data: no 'cifar1000' here; did you mean cifar100"),
        (f"tensors:{tmp_path}/none.safetensors", 4, "none.safetensors"),
        (f"tensors:{colour}", 3, "takes images of 1 channels, those of colour have 3"),
        (f"tensors:{several}", 3, "a probe needs one label an image"),
    ):
        result = cakd("eval", toy_teacher, "--probe", words)
        assert result.code == code, result.err
        assert sentence in result.err
        assert result.out == ""
