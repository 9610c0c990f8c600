"""A student in 8 bits: what it loses is measured, and said."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cakd_cli.engine import run_directory
from cakd_cli.export import check, onnx_file, onnx_int8, write
from cakd_cli.export.formats import FORMATS
from cakd_cli.models import int8, saving
from tests.conftest import train_toy, write_tensors_file

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(autouse=True)
def _short_latency(monkeypatch):
    monkeypatch.setattr(check, "_SECONDS", 0.01)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory, toy_teacher):
    """A run with its float32 and its 8-bit file, and what was said of the latter."""
    from cakd_cli.commands import export

    run = tmp_path_factory.mktemp("quantised") / "run"
    shutil.copytree(toy_teacher, run)
    export.export_run(str(run), format="onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "_SECONDS", 0.01)
        return run, export.export_run(str(run), format="onnx-int8", max_drop=0.05)


@pytest.fixture
def written(quantised, monkeypatch):
    """The float32 file of the toy's run, written once: the exporter is slow, and has tests of its own."""
    run, _ = quantised
    monkeypatch.setattr(onnx_file, "write", lambda saved, path: shutil.copy(run / "model.onnx", path))


def test_weights_and_activations_are_8_bit_integers(quantised):
    run, _ = quantised
    model = onnx.load(run / "model.int8.onnx")
    kinds = {node.op_type for node in model.graph.node}
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    convolutions = [value for value in weights.values() if value.ndim == 4]

    assert {"QuantizeLinear", "DequantizeLinear", "Conv"} <= kinds
    assert "BatchNormalization" not in kinds
    # One of each convolution of the network; the range of 7 bits adds up exactly on every CPU.
    assert len(convolutions) == 9
    assert all(value.dtype == np.int8 and np.abs(value.astype(int)).max() <= 64 for value in convolutions)
    scales = [value for name, value in weights.items() if name.endswith("weight_scale") or "weight" in name]
    assert any(value.dtype == np.float32 and value.shape == (64,) for value in scales), "a scale an output channel"


def test_the_report_is_what_the_two_files_do(quantised, toy_file):
    """Against onnxruntime alone."""
    run, report = quantised
    shown = saving.read(run).preprocessing
    tensors = load_file(toy_file)
    images = ((tensors["test_images"].numpy() / 255 - shown.mean[0]) / shown.std[0]).astype(np.float32)
    answers = [
        onnxruntime.InferenceSession(run / name).run(["logits"], {"images": images})[0].argmax(1)
        for name in ("model.onnx", "model.int8.onnx")
    ]
    for when, answer, name in zip(("before", "after"), answers, ("model.onnx", "model.int8.onnx"), strict=True):
        assert report[when]["top1"] == pytest.approx((answer == tensors["test_labels"].numpy()).mean())
        assert report[when]["bytes"] == pytest.approx((run / name).stat().st_size, abs=4096)
        assert report[when]["latency_ms"] > 0
    assert report["agreement"] == pytest.approx((answers[0] == answers[1]).mean())
    assert report["drop"] == pytest.approx(report["before"]["top1"] - report["after"]["top1"])
    assert report["bytes"] == report["after"]["bytes"] < report["before"]["bytes"] / 2
    assert (report["samples"], report["calibration_images"], report["metric"]) == (64, 144, "top1")


def test_training_rounds_weights_as_the_file_does(quantised):
    """The file's batch norms are folded into its convolutions."""
    run, _ = quantised
    model, network = onnx.load(run / "model.int8.onnx"), saving.read(run).model
    stored = {tensor.name: torch.tensor(onnx.numpy_helper.to_array(tensor)) for tensor in model.graph.initializer}
    layers = dict(network.named_modules())
    norms = {"conv1": "bn1", "conv2": "bn2", "downsample.0": "downsample.1"}
    found = [name for name in layers if f"{name}.weight_quantized" in stored]

    assert len(found) == 10
    for name in found:
        rounded = int8.rounded_weight(layers[name].weight.detach())
        norm = next((layers[name.removesuffix(c) + n] for c, n in norms.items() if name.endswith(c)), None)
        if norm is not None:
            rounded *= (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()[:, None, None, None]
        integers, scale_C = stored[f"{name}.weight_quantized"], stored[f"{name}.weight_scale"]
        expected = integers.float() * scale_C.reshape(-1, *(1 for _ in integers.shape[1:]))
        # One integer apart where a weight lies in the middle between two.
        assert ((rounded - expected).abs() > 1e-5 * expected.abs().max()).float().mean() < 0.001, name


def test_logits_are_not_rounded(quantised):
    """A file that rounds them gives 256 different numbers at most."""
    run, _ = quantised
    images = np.random.default_rng(0).normal(size=(512, 1, 8, 8)).astype(np.float32)

    (logits,) = onnxruntime.InferenceSession(run / "model.int8.onnx").run(["logits"], {"images": images})
    assert len(np.unique(logits)) > 256


def test_metadata_are_those_of_the_float_file(quantised):
    run, _ = quantised
    before, after = (
        onnxruntime.InferenceSession(run / name).get_modelmeta().custom_metadata_map
        for name in ("model.onnx", "model.int8.onnx")
    )

    assert after == before
    assert json.loads(after["class_names"])[3] == "class 3"


def test_quantising_twice_gives_one_file(quantised, tmp_path):
    run, _ = quantised
    saved, data = saving.read(run), run_directory.read_recipe(run).data.load()
    images = check.real_images(saved, data.train, 64)
    for name in ("a.onnx", "b.onnx"):
        onnx_int8.quantise(run / "model.onnx", tmp_path / name, images)

    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_the_line_says_all_of_it(cakd, toy_teacher, written, tmp_path):
    result = cakd("export", toy_teacher, "--format", "onnx-int8", "--out", tmp_path / "small.onnx")

    assert result.code == 0, result.err
    (line,) = result.out.splitlines()
    for words in ("MB instead of", "top-1 is", "64 test images", "agreement", "ms instead of", "1 thread", "144 train"):
        assert words in line
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == ["small.onnx"]


def bent(original):
    """A quantisation that is wrong for one image in eight."""

    def reload(path):
        answers = original(path)

        def ask(images):
            logits = answers(images)
            if "int8" in path.name or "small" in path.name:
                logits[::8] = logits[::8].roll(1, 1)
            return logits

        return ask

    return reload


def test_a_drop_beyond_the_limit_leaves_no_file(cakd, toy_teacher, written, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_int8, "reload", bent(onnx_int8.reload))
    words = ("export", toy_teacher, "--format", "onnx-int8", "--out", tmp_path / "small.onnx")

    failed = cakd(*words, "--max-drop", 0.01, "--json")
    document = json.loads(failed.out)
    assert failed.code == 6
    assert document["error"]["code"] == "check-failed"
    assert document["drop"] == pytest.approx(0.125, abs=0.03)
    assert "more than --max-drop 0.01 allows; nothing was written" in " ".join(failed.err.split())
    assert not (tmp_path / "small.onnx").exists()

    warned = cakd(*words)
    assert warned.code == 0
    assert "warning: in 8 bits top-1 is" in warned.err
    assert "--max-drop 0.01 makes that an error" in " ".join(warned.err.split())
    assert (tmp_path / "small.onnx").is_file()
    assert cakd(*words, "--overwrite", "--max-drop", 0.2).code == 0


def test_calibration_images_are_spread_over_classes_and_never_test_images(toy_file):
    from cakd_cli.data import names

    data = names()["tensors"](type="tensors", path=str(toy_file)).load()
    batches = list(check.spread(data.train, 20).ordered_batches(batch_size=64, device=torch.device("cpu")))
    own = {image.numpy().tobytes() for image in data.train.images_NCHW}

    assert torch.cat([batch.labels for batch in batches]).bincount().tolist() == [5, 5, 5, 5]
    assert all(image.numpy().tobytes() in own for batch in batches for image in batch.images)
    assert len(check.spread(data.train, 10**6)) == len(data.train)


@pytest.mark.slow
def test_several_labels_are_compared_by_map(cakd, tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for part, count in (("train", 96), ("test", 48)):
        labels = torch.rand(count, 3, generator=generator) < 0.5
        labels[:, 0] |= ~labels.any(1)
        images = torch.randint(0, 60, (count, 3, 8, 8), generator=generator)
        tensors |= {f"{part}_images": (images + 150 * labels[:, :, None, None]).to(torch.uint8)}
        tensors |= {f"{part}_labels": labels.long()}
    save_file(tensors, tmp_path / "several.safetensors")
    run = train_toy(tmp_path / "several.safetensors", tmp_path / "run", **{"engine.epochs": 1})

    report = cakd("export", run, "--format", "onnx-int8", "--json").document

    assert report["metric"] == "map"
    assert report["drop"] == pytest.approx(report["before"]["map"] - report["after"]["map"])
    assert "top1" not in report["before"]
    assert (run / "model.int8.onnx").is_file()


def folder_of_pictures(root):
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 12), ("test", 6)):
        for label, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 256, (40, 36 + i, 3), generator=generator) // (1 + label)
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(root / part / name / f"{i}.png")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("model", ["torchvision:mobilenet_v3_small", "torchvision:resnet18"])
def test_a_folder_and_torchvisions_networks(cakd, tmp_path, model):
    words = ("train-teacher", "--data", f"folder:{folder_of_pictures(tmp_path / 'images')}", "data.workers=0")
    words = (*words, "data.image_size=32", "--model", model, "--batch-size", 8, "--epochs", 1)
    assert cakd(*words, "engine.precision=fp32", "--out", tmp_path / "run").code == 0

    result = cakd("export", tmp_path / "run", "--format", "onnx-int8", "--json")

    assert result.code == 0, result.err
    assert result.document["bytes"] < result.document["before"]["bytes"] / 2
    # One of the twelve training images of each class is held out.
    assert (result.document["samples"], result.document["calibration_images"]) == (12, 22)


@pytest.mark.slow
def test_timms_networks(cakd, tmp_path):
    pytest.importorskip("timm")
    data = write_tensors_file(tmp_path / "toy.safetensors", channels=3, size=32)
    run = train_toy(data, tmp_path / "run", model="timm:test_resnet.r160_in1k", **{"engine.epochs": 1})

    assert cakd("export", run, "--format", "onnx-int8", "--json").document["samples"] == 64


def test_latencies_are_medians_of_rounds_in_turn(monkeypatch):
    order, clock = [], iter(range(10**6))
    monkeypatch.setattr(check.time, "perf_counter", lambda: 0.001 * next(clock))
    monkeypatch.setattr(check, "_CALLS", 1)

    times, rounds = check.latencies([lambda _: order.append("a"), lambda _: order.append("b")], torch.zeros(1))

    assert order[:8] == ["a", "a", "b", "b"] * 2
    assert rounds >= 5
    assert times == [pytest.approx(1), pytest.approx(1)]


def test_the_list_of_formats(cakd, monkeypatch):
    rows = cakd("export", "--format", "list", "--json").document

    assert [row["format"] for row in rows] == list(FORMATS)
    assert all(row["installed"] is True for row in rows)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("COLUMNS", "80")
    lines = cakd("export", "--format", "list").out.splitlines()
    assert len(lines) == 1 + len(FORMATS), "each fits into a line"
    (line,) = [line for line in lines if line.startswith("onnx-int8")]
    assert line.split()[-2:] == ["cakd[export]", "(missing)"]


INT8 = ("export", "{run}", "--format", "onnx-int8")
WRONG = [
    (2, "missing argument RUN", ("export", "--format", "onnx-int8")),
    (2, "is not one of", ("export", "{run}", "--format", "int8")),
    (2, "--max-drop is for quantised files", ("export", "{run}", "--format", "onnx", "--max-drop", "0.01")),
    (2, "less than or equal to 1", (*INT8, "--max-drop", "5")),
    (2, "greater than or equal to 0", (*INT8, "--max-drop", "-0.1")),
    (2, "valid number", (*INT8, "--max-drop", "1%")),
    (2, "--format list writes nothing", ("export", "{run}", "--format", "list")),
    (2, "--format list writes nothing", ("export", "--format", "list", "--max-drop", "0.1")),
    (3, "does not end in .onnx", (*INT8, "--out", "{tmp}/small.int8")),
    (4, "no such run directory", ("export", "{tmp}/none", "--format", "onnx-int8")),
    (4, "no such data file", ("export", "{moved}", "--format", "onnx-int8")),
]


@pytest.mark.parametrize(("code", "message", "words"), WRONG, ids=[f"{c} {m[:30]}" for c, m, _ in WRONG])
def test_wrong_words_get_one_clear_error(cakd, toy_teacher, tmp_path, code, message, words):
    shutil.copytree(toy_teacher, tmp_path / "moved")
    recipe = tmp_path / "moved" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("toy.safetensors", "gone.safetensors"))
    places = {"run": toy_teacher, "tmp": tmp_path, "moved": tmp_path / "moved"}

    result = cakd(*(word.format(**places) for word in words))

    assert result.code == code, result.err
    assert message in " ".join(result.err.split()), result.err
    assert "Traceback" not in result.err
    assert result.out == ""
    assert not list(tmp_path.rglob("*.onnx"))


def test_without_the_extra_nothing_is_left(cakd, toy_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = cakd("export", toy_teacher, "--format", "onnx-int8", "--out", tmp_path / "small.onnx")

    assert result.code == 3
    assert "pip install 'cakd[export]'" in result.err
    assert not (tmp_path / "small.onnx").exists()


def test_what_onnxruntime_cannot_quantise_is_one_line(cakd, toy_teacher, written, tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("no scale\nfor a tensor")

    monkeypatch.setattr(onnx_int8, "quantise", fail)
    monkeypatch.setattr(write, "CALIBRATION_SAMPLES", 16)
    result = cakd("export", toy_teacher, "--format", "onnx-int8", "--out", tmp_path / "small.onnx")

    assert result.code == 6
    assert "error: onnxruntime cannot quantise resnet8: no scale\n" in result.err
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == []
