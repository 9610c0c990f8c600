"""A file that leaves answers as the network does."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cakd_cli.errors import CheckFailedError
from cakd_cli.export import check, onnx_file, pt2_file
from cakd_cli.export.write import export
from cakd_cli.models import saving as saved_model


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_file_is_checked_on_real_images(cakd, toy_teacher, tmp_path, kind):
    result = cakd("export", toy_teacher, "--format", kind, "--out", tmp_path / f"m.{kind}", "--json")

    assert result.code == 0, result.err
    assert result.document["samples"] == 64
    assert result.document["agreement"] == 1
    assert result.document["largest_difference"] < 1e-4
    assert result.document["bytes"] == (tmp_path / f"m.{kind}").stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == [f"m.{kind}"]


def test_onnx_says_what_its_user_must_know(cakd, toy_teacher, tmp_path):
    import onnxruntime

    assert cakd("export", toy_teacher, "--format", "onnx", "--out", tmp_path / "m.onnx").code == 0
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    metadata = session.get_modelmeta().custom_metadata_map

    assert json.loads(metadata["class_names"]) == ["class 0", "class 1", "class 2", "class 3"]
    shown = json.loads(metadata["preprocessing"])
    assert len(shown["mean"]) == len(shown["std"]) == 1
    assert shown["size"] == [8, 8]
    for batch in (1, 2, 5):
        (logits,) = session.run(["logits"], {"images": np.zeros((batch, 1, 8, 8), np.float32)})
        assert logits.shape == (batch, 4)


def test_pt2_takes_any_batch_and_says_the_same(cakd, toy_teacher, tmp_path):
    assert cakd("export", toy_teacher, "--format", "pt2", "--out", tmp_path / "m.pt2").code == 0
    extra = {"cakd.json": ""}
    program = torch.export.load(tmp_path / "m.pt2", extra_files=extra)

    assert json.loads(extra["cakd.json"])["class_names"][3] == "class 3"
    assert program.module()(torch.zeros(1, 1, 8, 8)).shape == (1, 4)
    assert program.module()(torch.zeros(9, 1, 8, 8)).shape == (9, 4)


def test_hub_folder_alone_is_enough(cakd, toy_teacher, toy_file, tmp_path):
    assert cakd("export", toy_teacher, "--format", "safetensors", "--out", tmp_path / "hub").code == 0
    names = {path.name for path in (tmp_path / "hub").iterdir()}
    config = json.loads((tmp_path / "hub" / "config.json").read_text())

    assert names == {"model.safetensors", "config.json", "README.md"}
    assert (config["num_classes"], config["num_features"]) == (4, 64)
    assert config["pretrained_cfg"]["input_size"] == [1, 8, 8]
    assert config["pretrained_cfg"]["classifier"] == "fc"
    assert config["pretrained_cfg"]["crop_pct"] == 1.0
    # It is a teacher, and can be measured, given the data.
    words = ("--data", f"tensors:{toy_file}")
    report = cakd("eval", tmp_path / "hub", *words, "--teacher", tmp_path / "hub", "--json").document
    assert report["quality"] == cakd("eval", toy_teacher, "--json").document["quality"]
    assert report["teacher"]["fidelity"]["agreement"] == 1


def test_the_students_file_holds_the_student_alone(toy_teacher):
    saved = saved_model.read(toy_teacher)

    assert load_file(toy_teacher / "model.safetensors").keys() == saved.model.state_dict().keys()


def test_saved_weights_are_readable_by_others(toy_teacher):
    assert (toy_teacher / "model.safetensors").stat().st_mode & 0o044


def test_timm_reads_a_timm_student(cakd, toy_file, tmp_path):
    timm = pytest.importorskip("timm")
    result = cakd(
        *("train-teacher", "--data", f"tensors:{toy_file}", "--model", "timm:test_resnet.r160_in1k"),
        *("--epochs", 1, "--batch-size", 16, "--out", tmp_path / "run", "engine.precision=fp32"),
    )
    assert result.code == 0, result.err

    theirs = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).eval()

    ours = saved_model.read(tmp_path / "run").model
    images = torch.randn(2, 1, 64, 64)
    torch.testing.assert_close(theirs(images), ours(images))


@pytest.mark.parametrize("writer", [onnx_file, pt2_file])
def test_a_file_that_answers_differently_is_not_left(toy_teacher, tmp_path, monkeypatch, writer):
    original = writer.reload
    monkeypatch.setattr(writer, "reload", lambda path: lambda images: original(path)(images) + 0.01)
    saved = saved_model.read(toy_teacher)
    kind = "onnx" if writer is onnx_file else "pt2"

    with pytest.raises(CheckFailedError, match="answers differently"):
        export(saved, torch.randn(64, 1, 8, 8), tmp_path / f"m.{kind}", kind)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_answers_nan_is_refused():
    def broken(images):
        return images.flatten(1) * float("nan")

    with pytest.raises(CheckFailedError):
        check.compare(torch.nn.Flatten(), broken, torch.randn(8, 1, 2, 2), tolerance=1e-4)


def test_missing_extras_answer_with_the_pip_line(cakd, toy_teacher, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = cakd("export", toy_teacher, "--format", "onnx")

    assert result.code == 3
    assert "pip install 'cakd[export]'" in result.err
    assert not (toy_teacher / "model.onnx").exists()


def test_weights_that_are_not_the_configs_are_refused(cakd, toy_teacher, tmp_path):
    assert cakd("export", toy_teacher, "--format", "safetensors", "--out", tmp_path / "hub").code == 0
    state = load_file(tmp_path / "hub" / "model.safetensors")
    state["fc.bias"] += 1
    save_file(state, tmp_path / "hub" / "model.safetensors")

    result = cakd("eval", tmp_path / "hub", "--data", "digits")

    assert result.code == 4
    assert "is not the file that config.json describes" in result.err
