"""The forms of a frozen teacher: faster, and the same answers."""

import json

import pytest
import torch

from cakd_cli.engine import loop
from cakd_cli.machine.hardware import choose_hardware
from cakd_cli.models.layers import LOGITS
from cakd_cli.recipe.resolve import resolve
from cakd_cli.teachers import Teacher, forms
from cakd_cli.teachers.forms import Form

FP32 = choose_hardware("cpu", "fp32")
BF16 = choose_hardware("cpu", "bf16")


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
    return Teacher(machine.place(network).eval(), (0.5,) * 3, (0.25,) * 3, name, name, "", {LOGITS: (classes,)})


@pytest.fixture
def images():
    return torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["resnet8", "resnet8x4", "wrn-16-1", "torchvision:mobilenet_v3_small"])
@pytest.mark.parametrize("form", ["folded", "folded-nchw"])
def test_folding_changes_rounding_only(images, name, form):
    teacher = used_teacher(name, FP32)
    plain, folded = Form(teacher, "plain", FP32), Form(teacher, form, FP32)

    expected, found = plain.answers_to(images), folded.answers_to(images)

    assert forms._distance(found, expected) < 1e-5
    kinds = [type(layer) for layer in folded._model.modules()]
    assert kinds.count(torch.nn.BatchNorm2d) < [type(x) for x in teacher.model.modules()].count(torch.nn.BatchNorm2d)
    # The teacher itself is as it was.
    assert torch.equal(plain.answers_to(images)[LOGITS], expected[LOGITS])


@pytest.mark.parametrize("form", ["folded", "folded-bf16", "folded-fp32", "folded-nchw"])
def test_forms_of_a_bf16_run_are_as_exact_as_its_plain_form(images, form):
    teacher = used_teacher("resnet20", BF16)
    exact = Form(teacher, "plain", FP32).answers_to(images)
    plain = forms._distance(Form(teacher, "plain", BF16).answers_to(images), exact)
    answers = Form(teacher, form, BF16).answers_to(images)

    assert answers[LOGITS].dtype == torch.float32
    assert forms._distance(answers, exact) < 2 * plain


def test_short_runs_take_the_teacher_as_it_is(images):
    form, why = forms.fastest_form(used_teacher("resnet8", FP32), FP32, images, asks=100, compiled="auto", float32=True)

    assert (form, why) == ("plain", "")


def test_the_fastest_form_that_agrees_is_taken_and_said(images, monkeypatch):
    monkeypatch.setattr(forms, "WORTH_MEASURING_SECONDS", 0.0)
    speeds = {"plain": 4.0, "folded": 1.0, "folded-nchw": 2.0}
    monkeypatch.setattr(forms, "_seconds", lambda form, images, machine: speeds[form.name])
    teacher = used_teacher("resnet8", FP32)
    form, why = forms.fastest_form(teacher, FP32, images, asks=1, compiled="off", float32=True)
    assert form == "folded"
    assert why == "images/s: folded 8, folded-nchw 4, plain 2"

    # One that answers something else is not taken, however fast.
    original = forms._fold

    def wrong(model):
        folded = original(model)
        next(folded.parameters()).data *= 1.1
        return folded

    monkeypatch.setattr(forms, "_fold", wrong)
    form, why = forms.fastest_form(teacher, FP32, images, asks=1, compiled="off", float32=True)
    assert form == "plain"
    assert "folded answers differently by" in why


def test_forms_are_measured_at_the_batch_that_they_will_see(monkeypatch):
    """A form may be the fastest of 64 images and not of 128."""
    monkeypatch.setattr(forms, "WORTH_MEASURING_SECONDS", 0.0)
    sizes = []

    def seconds(form, images, machine):
        sizes.append(len(images))
        return {"plain": 4.0, "folded": 8.0 if len(images) <= 64 else 1.0, "folded-nchw": 9.0}[form.name]

    monkeypatch.setattr(forms, "_seconds", seconds)
    images = torch.zeros(128, 3, 8, 8, dtype=torch.uint8)

    form, why = forms.fastest_form(used_teacher("resnet8", FP32), FP32, images, asks=1, compiled="off", float32=True)

    assert set(sizes) == {128}
    assert form == "folded"
    assert why.startswith("images/s: folded 128")


class Untraceable(torch.nn.Module):
    """What torch.fx cannot follow: it decides by what it sees."""

    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.ones(()))

    def forward(self, images):
        return self.factor * images.mean((2, 3)) * (2 if images.sum() > 0 else 1)


def test_a_network_that_cannot_be_folded_stays_plain(images, monkeypatch, cakd, toy_file, toy_teacher, tmp_path):
    monkeypatch.setattr(forms, "WORTH_MEASURING_SECONDS", 0.0)
    teacher = Teacher(Untraceable(), (0.5,) * 3, (0.25,) * 3, "odd", "odd", "", {LOGITS: (3,)})

    form, why = forms.fastest_form(teacher, FP32, images, asks=1, compiled="off", float32=True)

    assert form == "plain"
    assert "folded cannot be made" in why
    monkeypatch.setattr(forms, "_fold", lambda model: forms.fuse(Untraceable()))
    words = ("distill", "--data", f"tensors:{toy_file}", "--teacher", toy_teacher, "--student", "resnet8")
    result = cakd(*words, "--batch-size", 16, "--out", tmp_path / "run", "engine.teacher_form=folded")
    assert result.code == 3
    assert "the teacher cannot take the form 'folded'" in result.err
    assert "hint: engine.teacher_form=plain" in result.err
    assert not (tmp_path / "run").exists()


def test_a_measured_form_is_kept_by_the_run_and_by_the_memory(cakd, toy_file, toy_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(forms, "WORTH_MEASURING_SECONDS", 0.0)
    fastest = {"name": "folded"}
    monkeypatch.setattr(forms, "_seconds", lambda form, images, machine: 1.0 if form.name == fastest["name"] else 2.0)
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

    monkeypatch.setattr(forms, "WORTH_MEASURING_SECONDS", 0.0)
    fastest = {"name": "folded"}
    monkeypatch.setattr(forms, "_seconds", lambda form, images, machine: 1.0 if form.name == fastest["name"] else 2.0)
    words = ("distill", "--data", f"tensors:{toy_file}", "--teacher", toy_teacher, "--student", "resnet8")
    words = (*words, "--batch-size", 16, "--epochs", 2, "engine.teacher_memory=off", "engine.checkpoint_seconds=0")
    assert cakd(*words, "--out", tmp_path / "straight").code == 0
    original = loop.Trainer.validate

    def dying(self):
        if self.epoch == 1:
            raise Killed
        return original(self)

    monkeypatch.setattr(loop.Trainer, "validate", dying)
    with pytest.raises(Killed):
        cakd(*words, "--out", tmp_path / "killed")
    monkeypatch.setattr(loop.Trainer, "validate", original)
    fastest["name"] = "folded-nchw"
    result = cakd(*words, "--out", tmp_path / "killed", "--resume")

    assert result.code == 0, result.err
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("straight", "killed")]
    for one, other in zip(*lines, strict=True):
        assert json.loads(one)["train"] == json.loads(other)["train"]
