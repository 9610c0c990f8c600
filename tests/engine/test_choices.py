"""Everything automatic: decided once, said with its reason, and the same when a run goes on."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from cakd_cli.engine import choices as choices_module
from cakd_cli.engine.build import read_inputs
from cakd_cli.engine.choices import as_begun, decide
from cakd_cli.machine import compiling
from cakd_cli.models.layers import Tap
from cakd_cli.recipe.resolve import resolve
from cakd_cli.teachers import forms
from cakd_cli.teachers import memory as teacher_memory
from cakd_cli.teachers.forms import Form
from tests.conftest import train_toy


@pytest.fixture
def recipe(toy_file, toy_teacher):
    def make(*words, loss="kd", teacher=None):
        flags = {"data": f"tensors:{toy_file}", "model": "resnet8", "loss": loss}
        flags |= {"teacher": teacher or str(toy_teacher), "engine.epochs": 3, "engine.batch_size": 16}
        return resolve(["engine.device=cpu", *words], flags)

    return make


def test_nothing_stays_automatic_and_nothing_is_written(recipe, home):
    choices = decide(read_inputs(recipe()))

    assert "auto" not in choices.recipe.model_dump(mode="json")["engine"].values()
    assert set(choices.reasons) == {"engine.precision", "engine.teacher_memory", "engine.compile"}
    assert not home.exists()


@pytest.mark.parametrize("loss", ["kd", "cakd", "fitnet"])
def test_measuring_leaves_the_networks_and_the_random_numbers_as_they_were(recipe, monkeypatch, loss):
    monkeypatch.setattr(compiling, "WORTH_TRYING_SECONDS", 0.0)
    monkeypatch.setattr(forms, "WORTH_MEASURING_SECONDS", 0.0)
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda network, **how: compiled.append(network) or network)
    inputs = read_inputs(recipe(loss=loss))
    networks = (inputs.student, inputs.teacher.model)
    before, random = [copy.deepcopy(network.state_dict()) for network in networks], torch.get_rng_state()

    decide(inputs)

    assert compiled
    assert torch.equal(torch.get_rng_state(), random)
    for network, state in zip(networks, before, strict=True):
        assert all(parameter.grad is None for parameter in network.parameters())
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_what_an_earlier_start_chose_takes_the_place_of_auto(recipe):
    begun = decide(read_inputs(recipe("engine.precision=fp32", "engine.teacher_form=folded"))).recipe

    again = as_begun(recipe(), begun)

    for key in ("precision", "teacher_form", "teacher_memory", "teacher_memory_features", "compile"):
        assert getattr(again.engine, key) == getattr(begun.engine, key)
    # What was asked for stays what was asked for, and the device may be another one.
    assert as_begun(recipe("engine.compile=on"), begun).engine.compile == "on"
    assert as_begun(recipe("engine.device=auto"), begun).engine.device == "auto"


def test_an_average_longer_than_the_run_is_shortened_and_said(cakd, recipe, toy_file, tmp_path):
    short, long = (decide(read_inputs(recipe(f"engine.ema_decay={decay}"))) for decay in (0.8, 0.999))

    assert (short.recipe.engine.ema_decay, short.warnings) == (0.8, ())
    assert long.recipe.engine.ema_decay**27 == pytest.approx(0.05, rel=1e-3)
    assert "averages over 1,000 steps, and the run has 27" in long.warnings[0]
    words = ("train-teacher", "--data", f"tensors:{toy_file}", "--model", "resnet8", "--batch-size", 16, "--epochs", 3)
    result = cakd(*words, "engine.ema_decay=0.999", "--out", tmp_path / "run")
    assert "warning: engine.ema_decay=0.999 averages over 1,000 steps" in result.err
    assert f"ema_decay: {long.recipe.engine.ema_decay}" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_reasons_and_warnings_are_on_record(cakd, toy_file, toy_teacher, tmp_path):
    words = ("distill", "--data", f"tensors:{toy_file}", "--student", "resnet8", "--teacher", toy_teacher)
    words = (*words, "--batch-size", 16, "--epochs", 1, "--loss", "gdkd", "--out", tmp_path / "run")
    document = cakd(*words, "--json").document

    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["chosen"]["engine.teacher_memory"].startswith("at most ")
    assert facts["warnings"] == ["loss.1: the top 5 are all 4 classes, and leave no rest"]
    assert document["warnings"] == facts["warnings"]
    # What a person reads on stderr is part of the document.
    assert any(note.startswith("teacher resnet8 of") for note in document["notes"])


@pytest.mark.parametrize(
    ("words", "loss", "stored"),
    [
        ((), "kd", "fp16"),
        (("engine.precision=fp32",), "kd", "fp32"),
        (("engine.teacher_form=folded-fp32",), "kd", "fp32"),
        (("engine.teacher_memory_precision=fp32",), "kd", "fp32"),
        (("loss.2={type: cakd-features, mask: grad-cam}",), "cakd", "fp32"),
        (("loss.1={type: fitnet}",), "kd", "fp16"),
    ],
)
def test_answers_are_kept_in_half_the_room_only_where_that_loses_nothing(recipe, words, loss, stored):
    precision = () if any("precision=fp32" in word for word in words[:1]) else ("engine.precision=bf16",)
    if words == ("engine.teacher_memory_precision=fp32",):
        precision = ("engine.precision=bf16",)

    choices = decide(read_inputs(recipe(*precision, *words, loss=loss)))

    assert choices.recipe.engine.teacher_memory_precision == stored


def test_several_teachers_are_kept_in_float32(recipe, toy_teacher):
    choices = decide(read_inputs(recipe("engine.precision=bf16", teacher=(str(toy_teacher), str(toy_teacher)))))

    assert choices.recipe.engine.teacher_memory_precision == "fp32"


def test_averaged_maps_have_more_digits_than_half(recipe):
    inputs = read_inputs(recipe("engine.precision=bf16"))
    images = inputs.first_images()
    wide = inputs.teacher.with_taps((Tap(""), Tap("layer2", "map")), inputs.data, inputs.hardware)
    averaged = inputs.teacher.with_taps((Tap("layer2"),), inputs.data, inputs.hardware)

    assert not forms.loses_digits_in_half(Form(wide, "plain", inputs.hardware).answers_to(images))
    assert forms.loses_digits_in_half(Form(averaged, "plain", inputs.hardware).answers_to(images))


def test_room_that_another_form_has_taken_counts_only_where_it_may_be_used(recipe, monkeypatch):
    asked = []
    monkeypatch.setattr(teacher_memory, "known_form", lambda identity, *, compiled: asked.append(compiled) or None)
    for compiled in ("on", "off"):
        inputs = read_inputs(recipe(f"engine.compile={compiled}"))
        decide(inputs, measure=False)

    assert set(asked[: len(asked) // 2]) == {True}
    assert set(asked[len(asked) // 2 :]) == {False}


def test_a_memory_without_features_can_be_asked_for(recipe):
    narrow = decide(read_inputs(recipe("engine.teacher_memory_features=false")))
    wide = decide(read_inputs(recipe()))

    assert list(narrow.inputs.teacher.shapes) == ["logits"]
    assert list(wide.inputs.teacher.shapes) == ["logits", "input of fc"]
    assert wide.recipe.engine.teacher_memory_features is True


def test_a_plan_measures_nothing(recipe, monkeypatch):
    monkeypatch.setattr(forms, "fastest_form", lambda *arguments, **options: pytest.fail("measured"))
    monkeypatch.setattr(choices_module, "worth_compiling", lambda *arguments, **options: pytest.fail("measured"))

    choices = decide(read_inputs(recipe()), measure=False)

    assert choices.recipe.engine.teacher_form == choices.recipe.engine.compile == "auto"


def test_the_same_students_with_and_without_decay_of_norms_differ(toy_file, tmp_path):
    runs = [
        train_toy(toy_file, tmp_path / name, f"optimizer.decay_norms={name}", "optimizer.weight_decay=0.1")
        for name in ("true", "false")
    ]

    one, other = (load_file(run / "model.safetensors") for run in runs)
    # Without decay the norms' weights stay nearer to 1.
    assert other["bn1.weight"].mean() > one["bn1.weight"].mean()
