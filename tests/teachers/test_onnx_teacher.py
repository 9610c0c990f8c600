"""A teacher in an ONNX file, and files of weights that do not say of which network."""

import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models

from cakd_cli.evaluation.predict import predict
from cakd_cli.machine.hardware import choose_hardware
from cakd_cli.models import names, saving
from cakd_cli.models.normalisation import Normalisation
from cakd_cli.recipe.resolve import resolve
from cakd_cli.teachers import load_teacher
from cakd_cli.teachers.memory import identify
from tests.conftest import write_tensors_file

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

CPU = choose_hardware("cpu", "fp32")
FLOAT, HALF, PIXELS = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.UINT8
LEARN = ("--student", "resnet8", "--epochs", 1, "--batch-size", 16, "data.crop_padding=0", "engine.precision=fp32")


@pytest.fixture(scope="module")
def exported(toy_teacher, tmp_path_factory):
    """cakd's own export of a trained network."""
    from cakd_cli.commands.export import export_run

    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    export_run(str(toy_teacher), format="onnx", out=str(path))
    return path


def hand_made(path, shape=("N", 1, 8, 8), kind=FLOAT, *, end=(), inputs=("images",), outputs=("y",), classes=4):
    """A linear classifier of flat images, in ONNX's own words."""
    generator = np.random.default_rng(0)
    side = int(np.prod(shape[1:])) if all(isinstance(size, int) for size in shape[1:]) else 64
    weight = generator.normal(size=(side, classes)).astype(np.float32)
    nodes = [
        onnx.helper.make_node("Cast", [inputs[0]], ["float"], to=FLOAT),
        onnx.helper.make_node("Flatten", ["float"], ["flat"]),
        onnx.helper.make_node("MatMul", ["flat", "weight"], ["y" if not end else "before"]),
        *(onnx.helper.make_node(name, ["before"], ["y"]) for name in end),
        *(onnx.helper.make_node("Identity", ["y"], [name]) for name in outputs if name != "y"),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "hand-made",
        [onnx.helper.make_tensor_value_info(name, kind, shape) for name in inputs],
        [onnx.helper.make_tensor_value_info(name, FLOAT, None) for name in outputs],
        [onnx.numpy_helper.from_array(weight, "weight")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)
    return path


def images_of(toy_file):
    data = resolve([], {"data": f"tensors:{toy_file}", "model": "resnet8"}).data.load()
    (batch,) = data.train.ordered_batches(batch_size=len(data.train), device=torch.device("cpu"))
    return data, batch.images


def load(path, data, *words):
    flags = {"data": "digits", "model": "resnet8", "teacher": str(path)}
    return load_teacher(resolve([*words], flags).teacher, data, CPU)


def logits_of(teacher, data):
    found, _ = predict(teacher.model, data.train, Normalisation(teacher.mean, teacher.std, CPU), CPU, batch_size=60)
    return found


def answers_of(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return torch.from_numpy(session.run([session.get_outputs()[0].name], {given.name: images})[0])


def test_an_export_of_cakd_answers_as_the_run_does(exported, toy_teacher, toy_file):
    data, _ = images_of(toy_file)
    own = saving.read(toy_teacher)

    teacher = load(exported, data)

    assert (teacher.mean, teacher.std) == (own.preprocessing.mean, own.preprocessing.std)
    expected = logits_of(load(toy_teacher, data), data)
    torch.testing.assert_close(logits_of(teacher, data), expected, atol=1e-4, rtol=1e-4)
    assert (teacher.mapped, teacher.notes) == (None, ())


@pytest.mark.parametrize("shape", [("N", 1, 8, 8), (1, 1, 8, 8), (7, 1, 8, 8), (None, None, None, None)])
def test_any_batch_is_answered_as_onnxruntime_does(toy_file, tmp_path, shape):
    data, images = images_of(toy_file)
    path = hand_made(tmp_path / "net.onnx", shape)
    shown = ((images.float() / 255 - 0.4) / 0.2).numpy()

    teacher = load(f"onnx:{path}", data, "teacher.mean=[0.4]", "teacher.std=[0.2]")

    free = hand_made(tmp_path / "free.onnx")
    torch.testing.assert_close(logits_of(teacher, data), answers_of(free, shown), atol=1e-4, rtol=1e-5)


def test_without_words_the_normalisation_is_the_datas(toy_file, tmp_path):
    data, _ = images_of(toy_file)

    teacher = load(hand_made(tmp_path / "net.onnx"), data)

    assert (teacher.mean, teacher.std) == (data.mean, data.std)


@pytest.mark.parametrize("kind", [HALF, PIXELS])
def test_halves_and_pixels_are_shown_as_they_are_wanted(toy_file, tmp_path, kind):
    data, images = images_of(toy_file)
    path = hand_made(tmp_path / "net.onnx", kind=kind)
    shown = images.numpy() if kind == PIXELS else Normalisation(data.mean, data.std, CPU)(images).numpy()

    found = logits_of(load(path, data), data)

    expected = answers_of(path, shown.astype(np.uint8 if kind == PIXELS else np.float16))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-5)


@pytest.mark.slow
def test_a_file_from_pixels_to_probabilities_is_a_teacher(toy_file, toy_teacher, tmp_path):
    from cakd_cli.commands.export import export_run

    data, _ = images_of(toy_file)
    path = tmp_path / "pixels.onnx"
    export_run(str(toy_teacher), format="onnx-uint8", out=str(path))

    teacher = load(path, data, "teacher.probabilities=true")

    expected = logits_of(load(toy_teacher, data), data).softmax(1)
    torch.testing.assert_close(logits_of(teacher, data).softmax(1), expected, atol=1e-5, rtol=0)
    assert teacher.mapped is None


def test_channels_may_be_last(toy_file, tmp_path):
    data, images = images_of(toy_file)
    path = hand_made(tmp_path / "net.onnx", ("N", 8, 8, 1))
    shown = Normalisation(data.mean, data.std, CPU)(images).permute(0, 2, 3, 1).contiguous()

    found = logits_of(load(path, data), data)

    torch.testing.assert_close(found, answers_of(path, shown.numpy()), atol=1e-4, rtol=1e-5)


def test_of_probabilities_the_logarithm_is_taken(toy_file, tmp_path):
    data, _ = images_of(toy_file)
    plain = logits_of(load(hand_made(tmp_path / "logits.onnx"), data), data)

    teacher = load(hand_made(tmp_path / "net.onnx", end=["Softmax"]), data, "teacher.probabilities=true")

    found = logits_of(teacher, data)
    assert found.isfinite().all()
    torch.testing.assert_close(found.softmax(1), plain.softmax(1), atol=1e-5, rtol=0)


def test_images_are_resized_to_the_size_of_the_file(toy_file, tmp_path):
    big = write_tensors_file(tmp_path / "big.safetensors", size=16)
    data, images = images_of(big)
    path = hand_made(tmp_path / "net.onnx")
    shown = Normalisation(data.mean, data.std, CPU)(images)
    shown = nn.functional.interpolate(shown, (8, 8), mode="bilinear", antialias=True)

    teacher = load(path, data)

    torch.testing.assert_close(logits_of(teacher, data), answers_of(path, shown.numpy()), atol=1e-4, rtol=1e-5)
    assert "sees images of 8 x 8, resized from 16 x 16" in teacher.notes[0]


def test_answers_are_remembered_of_one_file_alone(toy_file, tmp_path):
    data, _ = images_of(toy_file)
    first, second = hand_made(tmp_path / "a.onnx"), hand_made(tmp_path / "b.onnx", end=["Relu"])
    copied = shutil.copy(first, tmp_path / "c.onnx")

    def key(path):
        teacher = load(path, data)
        return teacher.weights_hash, identify(teacher, data, CPU, form="plain", stored="fp32").key

    assert key(first) == key(copied)
    assert not {*key(first)} & {*key(second)}


def test_weights_beside_the_file_are_part_of_it(toy_file, tmp_path):
    data, _ = images_of(toy_file)
    path = hand_made(tmp_path / "net.onnx")
    plain = load(path, data)
    big = onnx.load(path)
    onnx.save(big, path, save_as_external_data=True, location="net.weights", size_threshold=0)
    apart = load(path, data)
    weights = np.frombuffer((tmp_path / "net.weights").read_bytes(), np.float32)
    (tmp_path / "net.weights").write_bytes((2 * weights).tobytes())

    doubled = load(path, data)

    torch.testing.assert_close(logits_of(apart, data), logits_of(plain, data))
    torch.testing.assert_close(logits_of(doubled, data), 2 * logits_of(plain, data))
    assert doubled.weights_hash != apart.weights_hash


def test_a_student_learns_and_is_compared(cakd, exported, toy_file, tmp_path):
    words = ("--data", f"tensors:{toy_file}", "--teacher", exported, *LEARN, "--loss", "kd")
    planned = cakd("distill", *words, "--dry-run")
    run = tmp_path / "run"

    result = cakd("distill", *words, "--out", run)

    assert (planned.code, result.code) == (0, 0), result.err
    assert f"onnx:{exported}, trained: unknown parameters and FLOP" in planned.out
    assert "no smaller" not in planned.out + planned.err
    recorded = json.loads((run / "run.json").read_text())["teacher"]
    assert recorded["name"] == f"onnx:{exported}"
    measured = cakd("eval", run, "--teacher", exported)
    assert measured.code == 0, measured.err
    assert measured.out.count("unknown") == 2
    assert cakd("compare", run).code == 0
    again = cakd("distill", *words, "--out", run, "--resume")
    assert (again.code, "already finished" in again.err) == (0, True), again.err


def test_it_answers_beside_others(cakd, exported, toy_teacher, toy_file, tmp_path):
    words = ("--data", f"tensors:{toy_file}", "--teacher", exported, "--teacher", toy_teacher, *LEARN, "--loss", "kd")

    result = cakd("distill", *words, "--out", tmp_path / "run")

    assert result.code == 0, result.err
    assert f"teacher onnx:{exported} and resnet8 of {toy_teacher}: top-1" in result.err


def with_metadata(path, **changes):
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"producer": "cakd 1", **changes})
    onnx.save(model, path)


def text(path):
    path.write_text("no ONNX")


WRONG = [
    (lambda path: None, (), 4, "no such ONNX file: "),
    (text, (), 4, "not an ONNX file that onnxruntime can run: "),
    (lambda path: path.write_bytes(b""), (), 4, "not an ONNX file that onnxruntime can run: "),
    (lambda path: hand_made(path, inputs=("a", "b")), (), 3, "takes 2 inputs (a, b), and cakd shows it images alone"),
    (lambda path: hand_made(path, outputs=("y", "z")), (), 3, "has 2 outputs (y, z), and none is called logits"),
    (lambda path: hand_made(path, ("N", 64)), (), 3, "takes an input of 2 dimensions, not images"),
    (lambda path: hand_made(path, end=["Sigmoid"]), (), 3, "in [0, 1] that do not sum to one, as those of a sigmoid"),
    (lambda path: hand_made(path, ("N", 3, 8, 8)), (), 3, "takes images of 3 channels, those of toy have 1"),
    (lambda path: hand_made(path, ("N", 1, None, 4)), (), 3, "cannot take the images of toy: "),
    (lambda path: hand_made(path, kind=onnx.TensorProto.INT64), (), 3, "takes tensor(int64), and cakd gives"),
    (lambda path: hand_made(path, classes=5), (), 3, "has 5 classes, toy has 4, and which is which is not known"),
    (lambda path: hand_made(path, end=["Softmax"]), (), 3, "answers with probabilities: of 8 images"),
    (lambda path: hand_made(path, end=["Softmax"]), (), 3, "hint: teacher.probabilities=true"),
    (hand_made, ("teacher.probabilities=true",), 3, "hint: leave it out: these are logits"),
    (hand_made, ("teacher.mean=[0.5]",), 3, "teacher.std: has 0 numbers, and mean has 1; give both"),
    (hand_made, ("teacher.mean=[0.5]", "teacher.std=[0]"), 3, "teacher.std: must be above 0, and mean finite"),
    (hand_made, ("teacher.mean=[1, 2]", "teacher.std=[1, 2]"), 3, "teacher.mean has 2 numbers, and onnx:"),
    (hand_made, ("teacher.weights=a.pth",), 3, "teacher.weights: unknown key"),
    (hand_made, ("engine.teacher_form=folded",), 3, "cannot take the form 'folded': it has no weights"),
    (
        lambda path: hand_made(path, kind=PIXELS),
        ("teacher.mean=[0]", "teacher.std=[1]"),
        3,
        "takes pixels of 0 to 255, which it normalises itself",
    ),
    (
        lambda path: with_metadata(hand_made(path), preprocessing="{}", class_names="[]"),
        (),
        4,
        "its metadata is not what cakd writes: 'mean'",
    ),
    (
        lambda path: with_metadata(
            hand_made(path), preprocessing='{"mean": [0], "std": [1]}', class_names='["a", "b", "c", "d"]'
        ),
        (),
        3,
        "has no class for 4 of the 4 classes of toy",
    ),
    (hand_made, ("--loss", "cakd"), 3, "is an ONNX file, which shows no layers, and the term cakd-features compares"),
    (hand_made, ("--loss", "fitnet"), 3, "is an ONNX file, which shows no layers"),
]


@pytest.mark.parametrize(("write", "words", "code", "message"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_file_is_one_error(cakd, toy_file, tmp_path, write, words, code, message):
    path = tmp_path / "net.onnx"
    write(path)
    if "--loss" not in words:
        words = ("--loss", "kd", *words)

    # Not a dry run: what the form refuses is said when it is made.
    result = cakd(
        "distill", "--data", f"tensors:{toy_file}", "--teacher", path, *LEARN, *words, "--out", tmp_path / "run"
    )

    assert (result.code, message in result.err) == (code, True), result.err
    assert "Traceback" not in result.err
    assert result.err.count("error: ") == 1


def save_pickled(path, content):
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("name", "network", "missing"),
    [
        ("resnet18.pth", "", "--teacher torchvision:resnet18 teacher.weights={}"),
        ("resnet18-f37072fd.pth", "", "--teacher torchvision:resnet18 teacher.weights={}"),
        ("resnet18.pth", "resnet18", "--teacher resnet18 teacher.weights={}"),
        ("my_resnet56_best.pth", "resnet8", "--teacher resnet56 teacher.weights={}"),
        ("wide_resnet50_2.pt", "resnet8", "--teacher torchvision:wide_resnet50_2 teacher.weights={}"),
        ("resnet8.safetensors", "resnet8", "--teacher resnet8 teacher.weights={}"),
        ("epoch.pth", "resnet8", "--teacher NAME teacher.weights={}"),
    ],
)
def test_a_file_of_weights_names_the_words_that_are_missing(cakd, toy_file, tmp_path, name, network, missing):
    path = tmp_path / name
    state = names()[network](type=network).build(in_channels=1, num_classes=4) if network else models.resnet18()
    save_pickled(path, state.state_dict())
    if path.suffix == ".safetensors":
        saving.write_tensors(path, state.state_dict())

    result = cakd("distill", "--data", f"tensors:{toy_file}", "--teacher", path, *LEARN, "--dry-run")

    assert result.code == 4
    assert f"{path} holds weights, and does not say of which network" in result.err
    assert missing.format(path) in " ".join(result.err.split())


@pytest.mark.parametrize(
    ("name", "message"), [("net.pth", "not a file of plain tensors"), ("net.zip", "is a file, and no network")]
)
def test_a_file_that_holds_more_than_weights_is_refused(cakd, toy_file, tmp_path, name, message):
    path = save_pickled(tmp_path / name, nn.Linear(2, 2))

    result = cakd("distill", "--data", f"tensors:{toy_file}", "--teacher", path, *LEARN, "--dry-run")

    assert (result.code, message in result.err) == (4, True), result.err
