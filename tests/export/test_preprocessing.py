"""A file says all that its user must know: how a picture is shown to it, and what its answers mean."""

import json

import numpy as np
import onnxruntime
import pytest
import torch

from cakd_cli.export import onnx_uint8, pt2_file
from cakd_cli.models import ResNetSpec, TimmSpec, saving
from cakd_cli.models.card import model_card
from cakd_cli.models.preprocessing import Preprocessing
from cakd_cli.models.saving import SavedModel

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
TRAINED = {"data": {"name": "pets"}, "metrics": {"test": {"top1": 0.5, "top5": 1.0, "nll": 1.0, "ece": 0.1}}}
SEVERAL = {"data": {"name": "scenes"}, "metrics": {"test": {"map": 0.5, "top1": 0.5, "nll": 1.0}}}
PUBLISHED = {"teacher": {"name": "torchvision:resnet50@IMAGENET1K_V1", "origin": "torchvision's published weights"}}
OF_A_RUN = {"teacher": {"name": "resnet20 of runs/teacher", "origin": "trained on pets"}}


def a_network(facts=TRAINED, *, spec=None, classes=("cat", "dög")):
    torch.manual_seed(0)
    spec = spec or ResNetSpec(type="resnet8")
    shown = Preprocessing((3, 24, 24), MEAN, STD, 0.875, resized=True)
    return SavedModel(spec.build(in_channels=3, num_classes=len(classes)).eval(), spec, classes, shown, facts)


def test_a_pt2_file_holds_everything(tmp_path):
    pt2_file.write(a_network(SEVERAL), tmp_path / "net.pt2")
    extra = {"cakd.json": ""}
    torch.export.load(tmp_path / "net.pt2", extra_files=extra)

    told = json.loads(extra["cakd.json"])

    assert told.pop("producer").startswith("cakd ")
    assert told == {
        "class_names": ["cat", "dög"],
        "preprocessing": {
            "colour": "RGB",
            "resize": 27,
            "interpolation": "bilinear",
            "antialias": True,
            "centre_crop": [24, 24],
            "divide_by": 255,
            "mean": [0.4, 0.5, 0.6],
            "std": [0.2, 0.3, 0.1],
            "layout": "NCHW, float32",
        },
        "probabilities": "sigmoid",
    }


def test_pixels_in_probabilities_out(tmp_path):
    saved = a_network()
    onnx_uint8.write(saved, tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    shown = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])

    for batch in (1, 3):
        pixels = np.random.default_rng(batch).integers(0, 256, (batch, 24, 24, 3), np.uint8)
        (answers,) = session.run(["probabilities"], {"images": pixels})
        mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
        images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std
        expected = saved.model(images).softmax(1)
        np.testing.assert_allclose(answers, expected.detach().numpy(), atol=1e-5)
    # Nothing that the graph does itself is left to the user.
    assert shown["layout"] == "NHWC, uint8"
    assert not {"mean", "std", "divide_by"} & shown.keys()


def test_what_it_is_compared_on_are_the_pixels_of_the_images():
    saved = a_network()
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
    pixels = torch.arange(256).repeat(27)[: 4 * 3 * 24 * 24].reshape(4, 3, 24, 24).to(torch.uint8)

    _, found = onnx_uint8.from_pixels(saved, (pixels / 255 - mean) / std)

    assert torch.equal(found, pixels.permute(0, 2, 3, 1))


def test_a_file_of_pixels_is_checked(cakd, toy_teacher, tmp_path, monkeypatch):
    words = ("export", toy_teacher, "--format", "onnx-uint8", "--out", tmp_path / "net.onnx")
    monkeypatch.setattr(onnx_uint8, "write", lambda saved, path: path.write_bytes(b"x"))
    monkeypatch.setattr(onnx_uint8, "reload", lambda path: lambda pixels: torch.full((len(pixels), 4), 0.25))

    failed = cakd(*words)

    assert (failed.code, "answers differently" in failed.err) == (6, True)
    assert not (tmp_path / "net.onnx").exists()


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        (TRAINED, "licence: not stated; that of the training images may bind"),
        (
            TRAINED | PUBLISHED,
            "teacher: torchvision:resnet50@IMAGENET1K_V1; torchvision's published weights; see",
        ),
        (TRAINED | OF_A_RUN, "teacher: resnet20 of runs/teacher; trained on pets\n"),
        (TRAINED | {"teacher": {"name": "of an older cakd"}}, "weights of unknown origin"),
        (TRAINED, "ece is the expected calibration error"),
        (SEVERAL, "each class is decided by itself"),
    ],
)
def test_the_card_says(facts, says):
    assert says in model_card(a_network(facts))


def test_the_card_says_who_reads_the_folder():
    pytest.importorskip("timm")
    of_timm = TimmSpec(type="timm", name="test_resnet")

    assert "local-dir:" in model_card(a_network(spec=of_timm))
    own = model_card(a_network())
    assert "cakd reads this folder" in own
    assert "local-dir:" not in own


def test_the_card_of_many_classes_is_short():
    """Names are in the file, and need not be copied out of the card."""
    few, many = (model_card(a_network(classes=tuple(f"class {i}" for i in range(n)))) for n in (10, 1000))

    assert len(many) - len(few) < 20


def test_a_run_records_where_its_teacher_is_from(cakd, toy_teacher, toy_file, tmp_path):
    words = ("--data", f"tensors:{toy_file}", "--teacher", toy_teacher, "--student", "resnet8", "--epochs", 1)
    result = cakd("distill", *words, "--batch-size", 16, "--out", tmp_path / "run", "engine.precision=fp32")
    assert result.code == 0, result.err

    assert saving.read(tmp_path / "run").facts["teacher"]["origin"] == "trained on toy"
    assert "; trained on toy\n" in (tmp_path / "run" / "README.md").read_text()
