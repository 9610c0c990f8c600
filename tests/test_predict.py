"""cakd predict, as a user calls it."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cakd_cli.commands.train import Wish, train
from cakd_cli.console import Console
from cakd_cli.evaluation import pictures
from cakd_cli.export import onnx_uint8
from cakd_cli.models import saving
from tests.conftest import some_daily, train_toy, write_tensors_file


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Pictures of many sizes, kinds and colours, hard enough that a small network is sometimes wrong."""
    folder = tmp_path_factory.mktemp("pictures") / "my images"
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 20), ("test", 30)):
        for label, name in enumerate(("cat", "dög", "fox")):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                height, width = (int(x) for x in torch.randint(20, 60, (2,), generator=generator))
                pixels = torch.randint(0, 256, (height, width, 3), generator=generator).float()
                pixels[..., label] += 9
                picture = Image.fromarray(pixels.clamp(max=255).to(torch.uint8).numpy())
                mode = ("RGB", "RGB", "RGBA", "P", "CMYK")[i % 5]
                suffix = "jpg" if mode == "CMYK" else "png"
                picture.convert(mode).save(folder / part / name / f"{i:02}.{suffix}")
    return folder


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """A finished run on them."""
    words = ("engine.precision=fp32", "data.image_size=24", "data.workers=0", "optimizer.learning_rate=0.05")
    flags = {"data": f"folder:{images}", "model": "resnet8", "engine.epochs": 3, "engine.batch_size": 9}
    out = tmp_path_factory.mktemp("runs") / "run"
    train([*words], flags, Wish(distil=False, out=str(out)), console=Console(quiet=True))
    return out


def top1(found):
    """The share of pictures whose folder is the first answer."""
    answers = [(each["classes"][0]["name"], each["path"].split("/")[-2]) for each in found]
    return sum(answer == truth for answer, truth in answers) / len(answers)


@pytest.mark.parametrize("kind", some_daily(["run", "safetensors", "onnx", "onnx-uint8"], "run", "onnx"))
def test_predictions_have_the_accuracy_of_eval(cakd, run, images, tmp_path, kind):
    network = run
    if kind != "run":
        network = tmp_path / ("net.onnx" if "onnx" in kind else "net")
        assert cakd("export", run, "--format", kind, "--out", network).code == 0

    report = cakd("predict", network, images / "test", "--json").document

    measured = cakd("eval", run, "--json").document
    assert 0.34 < measured["quality"]["top1"] < 1, "otherwise the same figure says little"
    assert top1(report["pictures"]) == measured["quality"]["top1"]
    for name, share in measured["per_class"].items():
        assert top1([each for each in report["pictures"] if f"/{name}/" in each["path"]]) == share


@pytest.mark.slow
def test_a_file_in_8_bits_answers_too(cakd, run, images, tmp_path):
    exported = cakd("export", run, "--format", "onnx-int8", "--out", tmp_path / "net.onnx", "--json").document

    report = cakd("predict", tmp_path / "net.onnx", images / "test", "--json").document

    assert top1(report["pictures"]) == pytest.approx(exported["after"]["top1"])


def test_a_line_for_people(cakd, run, images):
    result = cakd("predict", run, images / "test" / "fox" / "01.png")

    assert (result.code, result.err, len(result.out.splitlines())) == (0, "", 1)
    for name in ("01.png", "cat", "dög", "fox", "%"):
        assert name in result.out


def test_files_and_folders_each_once_in_order(cakd, run, images, monkeypatch):
    monkeypatch.setattr(pictures, "BATCH", 7)
    one = images / "test" / "fox" / "05.png"

    found = cakd("predict", run, one, images / "test", "--top", 1, "--json").document

    paths = [each["path"] for each in found["pictures"]]
    assert paths == [str(one), *(str(path) for path in sorted((images / "test").rglob("*.*")) if path != one)]
    assert all(len(each["classes"]) == 1 for each in found["pictures"])
    assert (found["failed"], found["several_labels"]) == ([], False)


@pytest.mark.parametrize("kind", some_daily(["run", "onnx-uint8"], "run"))
def test_digits_of_another_size_are_resized_and_said(cakd, toy_teacher, toy_file, tmp_path, kind):
    network = toy_teacher
    if kind != "run":
        network = tmp_path / "net.onnx"
        assert cakd("export", toy_teacher, "--format", kind, "--out", network).code == 0
    tensors, folder = load_file(toy_file), tmp_path / "digits"
    folder.mkdir()
    for number, image in enumerate(tensors["test_images"]):
        Image.fromarray(image[0].numpy()).save(folder / f"{number:02}.png")

    report = cakd("predict", network, folder, "--json").document

    right = [
        each["classes"][0]["name"] == f"class {label}"
        for each, label in zip(report["pictures"], tensors["test_labels"].tolist(), strict=True)
    ]
    assert sum(right) / len(right) == cakd("eval", toy_teacher, "--json").document["quality"]["top1"]
    assert "notes" not in report
    Image.new("RGB", (9, 12)).save(tmp_path / "large.png")
    assert "1 of 65 pictures were not 8 x 8" in cakd("predict", network, folder, tmp_path / "large.png").err


def test_classes_of_several_labels_are_decided_one_by_one(cakd, toy_teacher, tmp_path):
    """The same network once answers for one label and once for several."""
    shutil.copytree(toy_teacher, tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())
    config["cakd"]["metrics"]["test"] = {"map": 0.5, "top1": 0.5, "nll": 1.0}
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    Image.new("L", (8, 8), 77).save(tmp_path / "one.png")
    saved = saving.read(tmp_path / "run")
    shown = saved.preprocessing
    logits = saved.model((torch.full((1, 1, 8, 8), 77 / 255) - shown.mean[0]) / shown.std[0])[0].double()
    expected = {name: value.item() for name, value in zip(saved.class_names, logits.sigmoid(), strict=True)}
    onnx_uint8.write(saved, tmp_path / "net.onnx")

    for network in (tmp_path / "run", tmp_path / "net.onnx"):
        found = cakd("predict", network, tmp_path / "one.png", "--json").document
        assert found["several_labels"]
        classes = {each["name"]: each["probability"] for each in found["pictures"][0]["classes"]}
        assert classes == pytest.approx(expected, abs=1e-5)


@pytest.fixture
def box(toy_teacher, tmp_path, monkeypatch):
    """A folder with all that can be wrong, in which the command runs."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(toy_teacher, "run")
    Path("unfinished").mkdir()
    shutil.copy("run/recipe.yaml", "unfinished")
    Image.new("L", (8, 8), 9).save("good.png")
    Path("corrupt.png").write_bytes(Path("good.png").read_bytes()[:50])
    Path("text.png").write_text("no picture")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save("deep.png")
    Image.new("L", (1, 1_200_000)).save("narrow.png")
    Path("empty").mkdir()
    Path("broken.onnx").write_bytes(b"no graph")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["images"], ["logits"])],
        "other",
        [onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [1, 4])],
        [onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [1, 4])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, "other.onnx")
    onnx.helper.set_model_props(model, {"producer": "cakd 0.1", "preprocessing": "[1", "class_names": "[]"})
    onnx.save(model, "damaged.onnx")
    os.mkfifo("pipe.png")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["nowhere", "good.png"], 4, "no such run directory: nowhere"),
        (["unfinished", "good.png"], 4, "its run is not finished"),
        (["run/model.safetensors", "good.png"], 4, "is neither the folder of a run nor an .onnx file"),
        (["nowhere.onnx", "good.png"], 4, "no such ONNX file: nowhere.onnx"),
        (["broken.onnx", "good.png"], 4, "broken.onnx: not an ONNX file that onnxruntime can run"),
        (["other.onnx", "good.png"], 4, "other.onnx: not written by cakd"),
        (["damaged.onnx", "good.png"], 4, "damaged.onnx: its metadata are not what cakd writes"),
        (["run"], 2, "Missing argument 'IMAGE...'"),
        (["run", ""], 4, ": no such file or folder"),
        (["run", "gone.png"], 4, "gone.png: no such file or folder"),
        (["run", "empty"], 4, "empty: no picture in this folder"),
        (["run", "pipe.png"], 4, "pipe.png: not a file"),
        (["run", "text.png"], 4, "text.png: cannot be read as an image"),
        (["run", "corrupt.png"], 4, "corrupt.png: cannot be read as an image"),
        (["run", "deep.png"], 4, "deep.png: has more than 8 bits a channel"),
        (["run", "narrow.png"], 4, "narrow.png: 1 x 1200000 pixels are too long and narrow"),
        (["run", "good.png", "--top", "0"], 2, "Invalid value for '--top'"),
        (["run", "good.png", "--top", "5"], 2, "--top is 5, and run knows 4 classes"),
    ],
)
def test_what_is_wrong_is_said_once(cakd, box, words, code, says):
    result = cakd("predict", *words)

    assert (result.code, says in result.err) == (code, True), result.err
    assert "Traceback" not in result.err
    assert result.err.count("error:") <= 1


def test_what_cannot_be_read_does_not_stop_the_others(cakd, box):
    frames = [Image.new("L", (8, 8), value) for value in (9, 200)]
    frames[0].save("moves.gif", save_all=True, append_images=frames[1:])
    words = ("predict", "run", "text.png", "good.png", "gone.png", "moves.gif")

    result, document = cakd(*words), cakd(*words, "--json").document

    assert result.code == 4
    assert [line.split()[0] for line in result.out.splitlines()] == ["good.png", "moves.gif"]
    assert "2 of 4 could not be used" in result.err
    assert "1 of 3 files holds several pictures: the first was taken" in result.err.replace("hold ", "holds ")
    assert [each["path"] for each in document["failed"]] == ["gone.png", "text.png"]
    good, moves = document["pictures"]
    assert (good["classes"], document["error"]["code"]) == (moves["classes"], "input")


def test_a_network_of_more_channels_takes_no_pictures(cakd, tmp_path):
    data = write_tensors_file(tmp_path / "data.safetensors", channels=4)
    train_toy(data, tmp_path / "run", **{"engine.epochs": 1})
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")

    result = cakd("predict", tmp_path / "run", tmp_path / "one.png")

    assert (result.code, "takes images of 4 channels, and pictures have 1 or 3" in result.err) == (4, True)
