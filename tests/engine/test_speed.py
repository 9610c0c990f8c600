"""What makes a run faster must not make it another: forms, compiling, the stopwatch and its advice."""

import copy
import json
import time

import pytest
import torch

from cakd_cli.engine import compiling, hardware, limits, loop, teacher_forms
from cakd_cli.engine.stopwatch import Stopwatch
from cakd_cli.engine.teacher import Teacher
from cakd_cli.engine.teacher_forms import Form
from cakd_cli.errors import HardwareError
from cakd_cli.evaluation.predict import Normalisation
from cakd_cli.recipe.resolve import resolve
from cakd_cli.recipe.schema import EngineOptions
from tests.conftest import train_toy

FP32 = hardware.choose(EngineOptions(device="cpu", precision="fp32"))
BF16 = hardware.choose(EngineOptions(device="cpu", precision="bf16"))


def used_teacher(name, machine, classes=10):
    """A network whose batch norms have seen something."""
    torch.manual_seed(0)
    network = resolve([], {"data": "digits", "model": name}).model.build(in_channels=3, num_classes=classes)
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.3)
                layer.running_var.uniform_(0.5, 2)
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.normal_(0, 0.2)
    return Teacher(machine.place(network).eval(), (0.5,) * 3, (0.25,) * 3, name, name, "", sizes=(classes,))


@pytest.fixture
def images():
    return torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["resnet8", "resnet8x4", "wrn-16-1", "torchvision:mobilenet_v3_small"])
@pytest.mark.parametrize("form", ["folded", "folded-nchw"])
def test_folding_changes_rounding_only(images, name, form):
    teacher = used_teacher(name, FP32)
    plain, folded = Form(teacher, "plain", FP32), Form(teacher, form, FP32)

    expected, found = plain(images), folded(images)

    assert teacher_forms._distance(found, expected, [10]) < 1e-5
    kinds = [type(layer) for layer in folded._model.modules()]
    assert kinds.count(torch.nn.BatchNorm2d) < [type(x) for x in teacher.model.modules()].count(torch.nn.BatchNorm2d)
    # The teacher itself is as it was.
    assert torch.equal(plain(images), expected)


@pytest.mark.parametrize("form", ["folded", "folded-bf16", "folded-fp32", "folded-nchw"])
def test_forms_of_a_bf16_run_are_as_exact_as_its_plain_form(images, form):
    teacher = used_teacher("resnet20", BF16)
    exact = Form(teacher, "plain", FP32)(images)
    plain = teacher_forms._distance(Form(teacher, "plain", BF16)(images), exact, [10])
    answers = Form(teacher, form, BF16)(images)

    assert answers.dtype == torch.float32
    assert teacher_forms._distance(answers, exact, [10]) < 2 * plain


def test_short_runs_take_the_teacher_as_it_is(images):
    form, why = teacher_forms.choose(
        used_teacher("resnet8", FP32), FP32, images, asks=100, compiled="auto", float32=True
    )

    assert (form.name, why) == ("plain", "")


def test_the_fastest_form_that_agrees_is_taken_and_said(images, monkeypatch):
    monkeypatch.setattr(teacher_forms, "WORTH_MEASURING_SECONDS", 0.0)
    speeds = {"plain": 4.0, "folded": 1.0, "folded-nchw": 2.0}
    monkeypatch.setattr(teacher_forms, "_seconds", lambda form, images, machine: speeds[form.name])
    teacher = used_teacher("resnet8", FP32)
    form, why = teacher_forms.choose(teacher, FP32, images, asks=1, compiled="off", float32=True)
    assert form.name == "folded"
    assert why == "images/s: folded 8, folded-nchw 4, plain 2"

    # One that answers something else is not taken, however fast.
    original = teacher_forms._fold

    def wrong(model):
        folded = original(model)
        next(folded.parameters()).data *= 1.1
        return folded

    monkeypatch.setattr(teacher_forms, "_fold", wrong)
    form, why = teacher_forms.choose(teacher, FP32, images, asks=1, compiled="off", float32=True)
    assert form.name == "plain"
    assert "folded answers differently by" in why


class Untraceable(torch.nn.Module):
    """What torch.fx cannot follow: it decides by what it sees."""

    def forward(self, images):
        return images.mean((2, 3)) * (2 if images.sum() > 0 else 1)


def test_a_network_that_cannot_be_folded_stays_plain(images, monkeypatch, cakd, toy_file, toy_teacher, tmp_path):
    monkeypatch.setattr(teacher_forms, "WORTH_MEASURING_SECONDS", 0.0)
    teacher = Teacher(Untraceable(), (0.5,) * 3, (0.25,) * 3, "odd", "odd", "", sizes=(3,))

    form, why = teacher_forms.choose(teacher, FP32, images, asks=1, compiled="off", float32=True)

    assert form.name == "plain"
    assert "folded cannot be made" in why
    monkeypatch.setattr(teacher_forms, "_fold", lambda model: teacher_forms.fuse(Untraceable()))
    words = ("distill", "--data", f"tensors:{toy_file}", "--teacher", toy_teacher, "--student", "resnet8")
    result = cakd(*words, "--batch-size", 16, "--out", tmp_path / "run", "engine.teacher_form=folded")
    assert result.code == 3
    assert "the teacher cannot take the form 'folded'" in result.err
    assert "hint: engine.teacher_form=plain" in result.err
    assert not (tmp_path / "run").exists()


def test_a_measured_form_is_kept_by_the_run_and_by_the_memory(cakd, toy_file, toy_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_forms, "WORTH_MEASURING_SECONDS", 0.0)
    fastest = {"name": "folded"}
    monkeypatch.setattr(
        teacher_forms, "_seconds", lambda form, images, machine: 1.0 if form.name == fastest["name"] else 2.0
    )
    words = ("distill", "--data", f"tensors:{toy_file}", "--teacher", toy_teacher, "--student", "resnet8")
    words = (*words, "--batch-size", 16, "--epochs", 1, "engine.precision=fp32")
    first = cakd(*words, "--out", tmp_path / "one")
    fastest["name"] = "folded-nchw"
    second = cakd(*words, "--out", tmp_path / "two")
    live = cakd(*words, "--out", tmp_path / "three", "engine.teacher_memory=off")

    assert "engine.teacher_form: folded (images/s: folded 16" in first.err
    assert "engine.teacher_form: folded (as its remembered answers were computed)" in second.err
    assert "engine.teacher_form: folded-nchw (images/s" in live.err
    assert "teacher_form: folded\n" in (tmp_path / "two" / "recipe.yaml").read_text()
    assert "auto" not in (tmp_path / "two" / "recipe.yaml").read_text().replace("auto_", "")


def test_what_was_measured_stays_when_a_run_goes_on(cakd, toy_file, toy_teacher, tmp_path, monkeypatch):
    """The same answers to the bit, although the second start would measure something else."""

    class Killed(BaseException): ...

    monkeypatch.setattr(teacher_forms, "WORTH_MEASURING_SECONDS", 0.0)
    fastest = {"name": "folded"}
    monkeypatch.setattr(
        teacher_forms, "_seconds", lambda form, images, machine: 1.0 if form.name == fastest["name"] else 2.0
    )
    words = ("distill", "--data", f"tensors:{toy_file}", "--teacher", toy_teacher, "--student", "resnet8")
    words = (*words, "--batch-size", 16, "--epochs", 2, "engine.teacher_memory=off", "engine.checkpoint_seconds=0")
    assert cakd(*words, "--out", tmp_path / "straight").code == 0
    original = loop.Trainer._validate

    def dying(self):
        if self.epoch == 1:
            raise Killed
        return original(self)

    monkeypatch.setattr(loop.Trainer, "_validate", dying)
    with pytest.raises(Killed):
        cakd(*words, "--out", tmp_path / "killed")
    monkeypatch.setattr(loop.Trainer, "_validate", original)
    fastest["name"] = "folded-nchw"
    result = cakd(*words, "--out", tmp_path / "killed", "--resume")

    assert result.code == 0, result.err
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("straight", "killed")]
    for one, other in zip(*lines, strict=True):
        assert json.loads(one)["train"] == json.loads(other)["train"]


def toy_student():
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.Dropout(0.5),
        torch.nn.Flatten(),
        torch.nn.LazyLinear(5),
    )
    network(torch.zeros(2, 3, 32, 32))
    return network


def test_the_trial_leaves_the_student_and_the_random_numbers_as_they_were(images, monkeypatch):
    monkeypatch.setattr(compiling, "WORTH_TRYING_SECONDS", 0.0)
    monkeypatch.setattr(torch, "compile", lambda network, mode: network)
    student = toy_student()
    before, random = copy.deepcopy(student.state_dict()), torch.get_rng_state()
    normalise = Normalisation((0.5,) * 3, (0.25,) * 3, FP32)

    compiling.choose(student, normalise, FP32, images, steps=1000, parts=1, wanted="auto")

    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in student.parameters())
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("eager", "compiled", "steps", "wanted", "expected"),
    [
        (0.01, 0.005, 1000, "auto", False),  # 10 s in all: not even tried
        (1.0, 0.5, 1000, "auto", True),
        (1.0, 1.1, 1000, "auto", False),
        (1.0, 1.1, 1000, "on", True),
    ],
)
def test_compiling_is_decided_by_its_gain_over_the_run(images, monkeypatch, eager, compiled, steps, wanted, expected):
    class Compiled(torch.nn.Module):
        def forward(self, images):
            return images

    monkeypatch.setattr(torch, "compile", lambda network, mode: Compiled())
    monkeypatch.setattr(
        compiling, "_seconds", lambda network, images, machine: compiled if isinstance(network, Compiled) else eager
    )
    normalise = Normalisation((0.5,) * 3, (0.25,) * 3, FP32)
    chosen, why = compiling.choose(toy_student(), normalise, FP32, images, steps=steps, parts=1, wanted=wanted)

    assert chosen is expected
    if eager * steps < compiling.WORTH_TRYING_SECONDS:
        assert why == "about 10 s of steps would not pay for it"
    else:
        assert f"a step of {1000 * compiled:.0f} ms instead of {1000 * eager:.0f}" in why


@pytest.mark.parametrize("wanted", ["auto", "on"])
def test_a_compiler_that_fails_is_an_error_only_where_it_was_asked_for(images, monkeypatch, wanted):
    def fails(network, mode):
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(compiling, "WORTH_TRYING_SECONDS", 0.0)
    monkeypatch.setattr(torch, "compile", fails)
    ask = {"steps": 1000, "parts": 1, "wanted": wanted}
    normalise = Normalisation((0.5,) * 3, (0.25,) * 3, FP32)
    if wanted == "auto":
        assert compiling.choose(toy_student(), normalise, FP32, images, **ask) == (
            False,
            "it cannot be compiled: no C++ compiler",
        )
    else:
        with pytest.raises(HardwareError, match="the student cannot be compiled: no C"):
            compiling.choose(toy_student(), normalise, FP32, images, **ask)


@pytest.mark.slow
def test_a_compiled_run_learns_the_same(toy_file, toy_teacher, tmp_path):
    """Takes the better part of a minute, for the compiler."""
    losses = []
    for compiled in ("off", "on"):
        run = train_toy(
            toy_file, tmp_path / compiled, f"engine.compile={compiled}", teacher=str(toy_teacher), loss="kd"
        )
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["train"]["loss"] for line in lines])
        assert f"compile: {'on' if compiled == 'on' else 'off'}\n" in (run / "recipe.yaml").read_text().replace("'", "")

    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_the_stopwatch_tells_parts_apart():
    watch = Stopwatch(torch.device("cpu"))
    started = time.perf_counter()

    def slow_items():
        for item in range(3):
            time.sleep(0.02)
            yield item

    for _ in watch.each("data", slow_items()):
        with watch("student"):
            time.sleep(0.04)
    shares = watch.shares(time.perf_counter() - started)

    assert set(shares) == {"data", "student"}
    assert 0.95 < sum(shares.values()) <= 1
    assert shares["student"] > 1.3 * shares["data"]
    watch.reset()
    assert watch.shares(1.0) == {}


def test_metrics_say_where_the_time_went(toy_teacher, toy_file, tmp_path):
    run = train_toy(toy_file, tmp_path / "run", teacher=str(toy_teacher), loss="kd")

    for line in (run / "metrics.jsonl").read_text().splitlines():
        shares = json.loads(line)["time"]
        assert set(shares) == {"data", "teacher", "student", "loss", "backward", "optimizer"}
        assert 0.5 < sum(shares.values()) <= 1.001


@pytest.mark.parametrize(
    ("shares", "words", "said"),
    [
        ({"data": 0.7, "student": 0.3}, ["data.workers=0"], "would decode more images at a time (now 0)"),
        ({"data": 0.7, "student": 0.3}, ["data.workers=99"], "data.decoded_gb=20 would keep decoded images"),
        ({"data": 0.7, "student": 0.3}, ["data.workers=99", "data.decoded_gb=1"], "time: data 70%, student 30%"),
        ({"teacher": 0.7, "backward": 0.3}, ["engine.teacher_memory=off"], "data.views=8 would draw 8 crops"),
        ({"teacher": 0.7, "backward": 0.3}, ["data.views=8", "engine.teacher_memory=disk"], "its answers are kept"),
        ({"teacher": 0.2, "backward": 0.8}, ["engine.precision=fp32"], "engine.precision=bf16 is faster"),
        ({"teacher": 0.2, "backward": 0.8}, ["engine.precision=bf16"], "time: student 80%, teacher 20%"),
    ],
)
def test_the_limit_is_named_with_what_would_help(shares, words, said):
    flags = {"data": "folder:x", "model": "resnet8", "teacher": "runs/t", "loss": "kd"}

    found = limits.sentence(shares, resolve(words, flags))

    assert found == said if said.startswith("time:") else said in found


def test_a_long_epoch_says_its_limit_once(cakd, toy_file, toy_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_WORTH_A_LINE_SECONDS", 0.0)
    words = ("distill", "--data", f"tensors:{toy_file}", "--teacher", toy_teacher, "--student", "resnet8")
    result = cakd(*words, "--batch-size", 16, "--epochs", 2, "--out", tmp_path / "run")

    assert result.err.count("\ntime: ") == 1
