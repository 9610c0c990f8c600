"""A file that leaves answers as the network does."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cakd_cli.engine import run_directory
from cakd_cli.errors import CheckFailedError
from cakd_cli.export import check, hub_folder, onnx_file, pt2_file
from cakd_cli.export.formats import FORMATS
from cakd_cli.export.write import export
from cakd_cli.models import saving as saved_model
from tests.conftest import some_daily


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
    saved, data = saved_model.read(toy_teacher), run_directory.read_recipe(toy_teacher).data.load()
    kind = "onnx" if writer is onnx_file else "pt2"

    with pytest.raises(CheckFailedError, match="answers differently"):
        export(saved, data, tmp_path / f"m.{kind}", kind)
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


def script_of(run):
    """The script that the model card shows, with its file's path."""
    card = (run / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert len(code.splitlines()) <= 17
    names = {}
    exec(code.replace("model.onnx", str(run / "model.onnx")), names)
    return names["classify"]


def test_the_cards_script_gives_the_accuracy_of_a_folder(cakd, tmp_path):
    """Pictures of many sizes, resized and cropped by Pillow alone."""
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 30), ("test", 25)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for i in range(count):
                height, width = (int(x) for x in torch.randint(30, 60, (2,), generator=generator))
                pixels = torch.randint(0, 256, (height, width, 3), generator=generator) // (1 + label)
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(tmp_path / "images" / part / name / f"{i}.png")
    run = tmp_path / "run"
    words = ("train-teacher", "--data", f"folder:{tmp_path / 'images'}", "data.image_size=24", "data.workers=0")
    words = (*words, "--model", "resnet8", "--batch-size", 9, "--epochs", 2, "optimizer.learning_rate=0.01")
    assert cakd(*words, "--out", run).code == 0
    assert cakd("export", run, "--format", "onnx").code == 0
    classify = script_of(run)
    right = [classify(path) == path.parent.name for path in sorted((tmp_path / "images" / "test").rglob("*.png"))]

    top1 = json.loads((run / "run.json").read_text())["metrics"]["test"]["top1"]
    assert sum(right) / len(right) == pytest.approx(top1)
    shown = json.loads((run / "config.json").read_text())["cakd"]["preprocessing"]
    assert (shown["resize"], shown["centre_crop"], shown["interpolation"]) == (27, [24, 24], "bilinear")


@pytest.mark.slow
def test_the_cards_script_gives_the_accuracy_of_tensors(cakd, toy_teacher, toy_file, tmp_path):
    shutil.copytree(toy_teacher, tmp_path / "run")
    assert cakd("export", tmp_path / "run", "--format", "onnx").code == 0
    classify = script_of(tmp_path / "run")
    tensors = load_file(toy_file)
    right = []
    for image, label in zip(tensors["test_images"], tensors["test_labels"].tolist(), strict=True):
        Image.fromarray(image[0].numpy()).save(tmp_path / "one.png")
        right.append(classify(tmp_path / "one.png") == f"class {label}")

    top1 = json.loads((tmp_path / "run" / "run.json").read_text())["metrics"]["test"]["top1"]
    assert sum(right) / len(right) == pytest.approx(top1)


def test_the_hub_folder_is_checked_too(cakd, toy_teacher, tmp_path, monkeypatch):
    result = cakd("export", toy_teacher, "--format", "safetensors", "--out", tmp_path / "hub", "--json")
    assert result.document["largest_difference"] == 0
    assert result.document["agreement"] == 1

    monkeypatch.setattr(hub_folder, "reload", lambda path: lambda images: torch.zeros(len(images), 4))
    failed = cakd("export", toy_teacher, "--format", "safetensors", "--out", tmp_path / "other")
    assert failed.code == 6
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


def test_the_table_of_formats_is_whole():
    for name, row in FORMATS.items():
        middle = f".{name.split('-')[1]}" if "-" in name else ""
        assert row.default == (f"model{middle}{row.suffix}" if row.suffix else "export"), name
        assert row.original in FORMATS if row.tolerance is None else 0 < row.tolerance <= 1e-3
        assert row.default in run_directory._OWN_NAMES


@pytest.mark.parametrize("kind", some_daily(["onnx", "safetensors"], "safetensors"))
def test_what_is_there_is_replaced_only_when_told(cakd, toy_teacher, tmp_path, kind):
    target = tmp_path / ("net.onnx" if kind == "onnx" else "net")
    words = ("export", toy_teacher, "--format", kind, "--out", target)
    assert cakd(*words).code == 0
    # As a killed export leaves it.
    left = tmp_path / (".net.12345678.tmp.onnx" if kind == "onnx" else ".net.12345678.tmp")
    left.mkdir() if kind == "safetensors" else left.write_text("half")

    refused = cakd(*words)
    replaced = cakd(*words, "--overwrite")

    assert (refused.code, "exists" in refused.err, "--overwrite" in refused.err) == (4, True, True)
    assert replaced.code == 0
    assert [path.name for path in tmp_path.iterdir() if path != tmp_path / "home"] == [target.name]
