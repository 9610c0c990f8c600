"""Networks of a person's own: python:FILE.py:FUNCTION as student, model and teacher, and what is not executed."""

import hashlib
import json
import shutil

import pytest
import torch
import yaml
from torch.nn import functional

from cakd_cli.evaluation.predict import predict
from cakd_cli.machine.hardware import choose_hardware
from cakd_cli.models import own_code
from cakd_cli.models.normalisation import Normalisation
from cakd_cli.recipe.resolve import resolve
from cakd_cli.teachers import load_teacher

CPU = choose_hardware("cpu", "fp32")
NET = """
from pathlib import Path

import torch
from torch import nn

from blocks import body

print("made")
with open(Path(__file__).with_name("executed"), "a") as file:
    file.write("x")


def build(in_channels, num_classes):
    return nn.Sequential(body(in_channels), nn.Linear(16, num_classes))


def trained():
    network = build(1, 4)
    network.load_state_dict(torch.load(Path(__file__).with_name("trained.pth"), weights_only=True))
    return network


def trained_of_five():
    return nn.Sequential(trained(), nn.ConstantPad1d((1, 0), -50.0))
"""
BLOCKS = """
from torch import nn


def body(channels):
    return nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
"""
SHORT = ("--epochs", 1, "--batch-size", 16, "data.crop_padding=0", "engine.precision=fp32")


def labelled(toy_file):
    data = resolve([], {"data": f"tensors:{toy_file}", "model": "resnet8"}).data.load()
    (batch,) = data.train.ordered_batches(batch_size=len(data.train), device=torch.device("cpu"))
    return data, Normalisation(data.mean, data.std, CPU)(batch.images), batch.labels


@pytest.fixture(scope="module")
def written(toy_file, tmp_path_factory):
    """A folder with net.py, what it imports, and weights that tell the classes apart."""
    folder = tmp_path_factory.mktemp("code")
    (folder / "net.py").write_text(NET)
    (folder / "blocks.py").write_text(BLOCKS)
    _, images, labels = labelled(toy_file)
    network = network_of(folder)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    torch.save(network.state_dict(), folder / "trained.pth")
    (folder / "executed").unlink()
    return folder


@pytest.fixture
def code(written, tmp_path):
    return shutil.copytree(written, tmp_path / "code")


def network_of(folder, function="build", **sizes):
    """The network as its own file makes it."""
    own_code.begin(trust=False)
    sizes = sizes or {"in_channels": 1, "num_classes": 4}
    spec = resolve([], {"data": "digits", "model": f"python:{folder / 'net.py'}:{function}"}).model
    torch.manual_seed(0)
    network = spec.build(**sizes)
    own_code.begin(trust=False)
    return network


@pytest.fixture
def trained(cakd, code, toy_file, tmp_path):
    """A finished run whose network is the file's."""
    words = ("--data", f"tensors:{toy_file}", "--model", f"python:{code / 'net.py'}:build", *SHORT)
    result = cakd("train-teacher", *words, "--out", tmp_path / "run", "--json")
    assert result.code == 0, result.err
    assert result.document["model"]["name"] == "python:net.py:build"
    assert "made" in result.err  # what it prints is no result
    (code / "executed").unlink()
    return tmp_path / "run"


def test_a_student_of_ones_own_is_trained_and_saved(trained, code):
    recipe, config = (
        yaml.safe_load((trained / "recipe.yaml").read_text()),
        json.loads((trained / "config.json").read_text()),
    )

    sha256 = hashlib.sha256((code / "net.py").read_bytes()).hexdigest()
    for recorded in (recipe["model"], config["cakd"]["model"]):
        assert recorded["file"] == str(code / "net.py")
        assert (recorded["function"], recorded["sha256"]) == ("build", sha256)
    assert "# python:net.py:build" in (trained / "README.md").read_text()


def commands(run, data, out):
    learn = ("--data", f"tensors:{data}", "--student", "resnet8", "--loss", "kd", *SHORT)
    return {
        "eval": ("eval", run),
        "export": ("export", run, "--format", "safetensors"),
        "compare": ("compare", run),
        "resume": ("train-teacher", "--resume", "--out", run),
        "learn": ("distill", "--teacher", run, *learn, "--dry-run"),
        "recipe": ("train-teacher", run / "recipe.yaml", "--out", out, "--dry-run"),
    }


@pytest.mark.parametrize("name", ["eval", "export", "compare", "resume", "learn", "recipe"])
def test_what_only_a_run_names_is_executed_where_the_person_trusts_it(cakd, trained, code, toy_file, tmp_path, name):
    words = commands(trained, toy_file, tmp_path / "again")[name]

    refused = cakd(*words)

    assert (refused.code, (code / "executed").exists()) == (3, False), refused.err
    assert "python:net.py:build is Python code that a run names" in refused.err
    assert "--trust" in refused.err
    done = cakd(*words, "--trust")
    assert done.code == 0, done.err
    assert (code / "executed").exists()


def test_a_file_that_has_changed_is_not_executed(cakd, trained, code):
    (code / "net.py").write_text(NET + "\n# changed\n")

    changed = cakd("eval", trained, "--trust")

    assert (changed.code, "net.py has changed since the run began" in changed.err) == (4, True), changed.err
    (code / "net.py").unlink()
    gone = cakd("eval", trained, "--trust")
    assert (gone.code, "net.py, which makes the network: No such file" in gone.err) == (4, True), gone.err
    assert not (code / "executed").exists()


def test_a_run_without_a_hash_is_no_way_around(cakd, trained, code):
    config = json.loads((trained / "config.json").read_text())
    del config["cakd"]["model"]["sha256"]
    (trained / "config.json").write_text(json.dumps(config))

    assert cakd("eval", trained).code == 3
    assert not (code / "executed").exists()


def test_the_same_words_resume_a_run(cakd, trained, code, toy_file):
    words = ("--data", f"tensors:{toy_file}", "--model", f"python:{code / 'net.py'}:build", *SHORT)

    result = cakd("train-teacher", *words, "--out", trained, "--resume")

    assert (result.code, "already finished" in result.err) == (0, True), result.err


@pytest.mark.parametrize(
    ("function", "words"), [("build", "teacher.weights={}/trained.pth"), ("trained", "teacher.pretrained=true")]
)
def test_a_teacher_answers_as_the_persons_own_module(cakd, code, toy_file, function, words):
    data, images, _ = labelled(toy_file)
    expected = network_of(code, "trained").eval()
    flags = {"data": "digits", "model": "resnet8", "teacher": f"python:{code / 'net.py'}:{function}"}

    teacher = load_teacher(resolve([words.format(code)], flags).teacher, data, CPU)

    found, _ = predict(teacher.model, data.train, Normalisation(teacher.mean, teacher.std, CPU), CPU, batch_size=64)
    with torch.no_grad():
        torch.testing.assert_close(found, expected(images), atol=1e-5, rtol=1e-5)


def test_a_student_learns_from_a_teacher_of_other_classes(cakd, code, toy_file, tmp_path):
    teacher = f"python:{code / 'net.py'}:trained_of_five"
    words = (
        "distill",
        "--data",
        f"tensors:{toy_file}",
        "--teacher",
        teacher,
        "teacher.pretrained=true",
        "--loss",
        "kd",
    )
    words = (*words, "--student", f"python:{code / 'net.py'}:build", *SHORT, "--out", tmp_path / "run")
    (tmp_path / "map.yaml").write_text("".join(f"class {i}: {i + 1}\n" for i in range(4)))

    unmapped = cakd(*words)
    result = cakd(*words, "--class-map", tmp_path / "map.yaml")

    assert (unmapped.code, "has 5 classes, toy has 4, and which is which is not known" in unmapped.err) == (3, True)
    assert result.code == 0, result.err
    assert "4 of its 5 classes are the data's" in result.err
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["teacher"]["name"] == "python:net.py:trained_of_five"


BUILD = "from torch import nn\ndef build(in_channels, num_classes):\n    "
WRONG = [
    ("", "python:", 3, "lacks its file and function; write python:FILE.py:FUNCTION"),
    ("", "python", 3, "lacks its file and function"),
    ("", "python:own.py", 3, "lacks its function; write python:FILE.py:FUNCTION"),
    ("", "python:own.py:", 3, "lacks its function"),
    ("", "python:nowhere.py:build", 3, "model.file: no such Python file: nowhere.py"),
    ("", "python:.:build", 3, "no such Python file: ."),
    ("def built(): pass", "python:own.py:build", 3, "own.py has no function 'build'"),
    ("def built(): pass", "python:own.py:build", 3, "did you mean built?"),
    ("import os", "python:own.py:build", 3, "it defines no function"),
    ("build = 3", "python:own.py:build", 3, "build is int, not a function"),
    ("def build(width): pass", "python:own.py:build", 3, "needs width, and cakd gives in_channels and num_classes"),
    ("def build(a, b): pass", "python:own.py:build", 3, "needs a and b"),
    (f"{BUILD}return 3", "python:own.py:build", 3, "gives int, not a network"),
    (f"{BUILD}return nn.Linear", "python:own.py:build", 3, "gives type, not a network"),
    (f"{BUILD}return nn.Flatten()", "python:own.py:build", 3, "does not answer with one logit for each of 4 classes"),
    (f"{BUILD}return nn.Identity()", "python:own.py:build", 3, "does not answer with logits, one for each class"),
    (f"{BUILD}return nn.Linear(3, 4)", "python:own.py:build", 3, "cannot take images of 1 x 8 x 8"),
    (f"{BUILD}raise KeyError('x')", "python:own.py:build", 3, "own.py:3: KeyError: 'x'"),
    ("x = 1 / 0", "python:own.py:build", 3, "own.py:1: ZeroDivisionError: division by zero"),
    ("import sys; sys.exit(0)", "python:own.py:build", 3, "own.py:1: SystemExit: 0"),
    ("import nowhere", "python:own.py:build", 3, "own.py:1: ModuleNotFoundError: No module named 'nowhere'"),
    ("x = 1\ndef build(:", "python:own.py:build", 3, "own.py:2: invalid syntax"),
    ("\0", "python:own.py:build", 3, "source code string cannot contain null bytes"),
    (
        "from torch import nn\nclass build(nn.Module):\n    def __init__(self, num_classes): super().__init__()\n"
        "    def forward(self, images):\n        raise ValueError('tired')",
        "python:own.py:build",
        3,
        "own.py:5: tired",
    ),
]


@pytest.mark.parametrize(("text", "model", "code", "message"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_file_is_one_error(cakd, toy_file, tmp_path, monkeypatch, text, model, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(text)

    result = cakd("train-teacher", "--data", f"tensors:{toy_file}", "--model", model, *SHORT, "--dry-run")

    assert (result.code, message in result.err) == (code, True), result.err
    assert "Traceback" not in result.err


def test_an_error_in_the_middle_of_training_names_the_persons_line(cakd, toy_file, tmp_path):
    text = f"{BUILD}return Net(num_classes)\nclass Net(nn.Module):\n    def __init__(self, classes):\n"
    text += "        super().__init__()\n        self.last = nn.Linear(64, classes)\n    def forward(self, images):\n"
    text += "        if len(images) == 16: raise KeyError('sixteen')\n        return self.last(images.flatten(1))\n"
    (tmp_path / "own.py").write_text(text)
    words = ("--data", f"tensors:{toy_file}", "--model", f"python:{tmp_path / 'own.py'}:build", *SHORT)

    result = cakd("train-teacher", *words, "engine.compile=off", "--out", tmp_path / "run")

    assert (result.code, "own.py:9: KeyError: 'sixteen'" in result.err) == (3, True), result.err
    assert "bug" not in result.err


def test_a_teacher_of_fresh_weights_is_refused(cakd, code, toy_file):
    words = ("--data", f"tensors:{toy_file}", "--student", "resnet8", *SHORT, "--dry-run")

    result = cakd("distill", *words, "--teacher", f"python:{code / 'net.py'}:build")

    assert result.code == 3
    assert "give teacher.weights=FILE, or teacher.pretrained=true" in result.err
    assert not (code / "executed").exists()
