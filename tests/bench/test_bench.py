"""cakd bench: that it measures what it says; how fast anything is decides no test."""

import copy

import pytest
import torch
from PIL import Image

from cakd_cli.bench import measure as module
from cakd_cli.bench.plain import PlainLoop
from cakd_cli.engine.build import read_inputs
from cakd_cli.engine.choices import decide
from cakd_cli.losses import Lesson
from cakd_cli.machine.hardware import Hardware
from cakd_cli.recipe.resolve import resolve
from cakd_cli.teachers.forms import Form
from tests.conftest import some_daily

WORDS = (
    "data={type: noise, image_size: 8, classes: 4, images: 64, validation_fraction: 0}",
    "model=resnet8",
    "teacher=resnet8",
    "optimizer.learning_rate=1e-6",
    "engine.batch_size=16",
    "engine.compile=off",
)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(module, "_SECONDS", 0.02)
    monkeypatch.setattr(module, "_peak_in_its_own_process", lambda recipe, way: {"resident": 10**9})


@pytest.mark.slow
def test_rates_ratios_and_shares(cakd, quick):
    result = cakd("bench", *WORDS, "loss=kd", "--against", "plain", "--json")

    assert result.code == 0, result.err
    report = result.document
    assert report["rounds"] >= 5
    assert list(report["images_per_second"]) == ["plain", "live", "memory_warm"]
    for name in ("live", "memory_warm"):
        spread = report["ratio_spread"][name]
        assert spread["min"] <= report["ratio"][name] == spread["median"] <= spread["max"]
        rates = report["images_per_second"]
        assert rates[name]["min"] / rates["plain"]["max"] <= spread["min"]
        assert spread["max"] <= rates[name]["max"] / rates["plain"]["min"]
        assert 0.5 < sum(report["time"][name].values()) <= 1.001
        assert report["share_of_peak"][name] > 0
    flops = report["flops_per_image"]
    assert flops["live"] == 3 * flops["student"] + flops["teacher"]
    assert flops["memory_warm"] == 3 * flops["student"]
    assert report["engine"]["compile"] == "off"
    text = cakd("bench", *WORDS, "loss=kd", "--against", "plain").out
    for word in ("images/s", "to plain", "of peak", "peak memory", "teacher live", "memory warm", "backward"):
        assert word in text


@pytest.mark.parametrize("made_up", [False, True])
def test_what_is_remembered_is_on_the_device_as_in_a_run(monkeypatch, made_up):
    choices = decide(read_inputs(resolve([*WORDS, "engine.teacher_memory=off"], {"loss": "kd"})))
    for free, tables in ((None, [False, False]), (10**9, [False, True])):
        monkeypatch.setattr(Hardware, "free_bytes", lambda machine, free=free: free)
        jobs = [module._job(choices, warm=warm, made_up=made_up) for warm in (False, True)]

        assert [job.source._table is not None for job in jobs] == tables
        for job in jobs:
            job.close()


def test_the_memory_is_warm_when_the_rounds_begin(cakd, quick, monkeypatch):
    asked, runs = [], {}
    ask, rounds = Form.answer, module._rounds
    monkeypatch.setattr(Form, "answer", lambda self, images: (asked.append(0), ask(self, images))[1])

    def counted(name, way):
        def run(steps):
            asked.clear()
            seconds = way.run(steps)
            runs.setdefault(name, []).append((steps, len(asked)))
            return seconds

        return module._Way(run, way.shares)

    monkeypatch.setattr(
        module, "_rounds", lambda ways, *rest: rounds({name: counted(name, way) for name, way in ways.items()}, *rest)
    )
    assert cakd("bench", *WORDS, "loss=kd", "--json").code == 0

    measured = {name: counts[-module.ROUNDS :] for name, counts in runs.items()}
    assert all(steps == asks > 0 for steps, asks in measured["live"])
    assert [asks for _, asks in measured["memory_warm"]] == [0] * module.ROUNDS


def test_the_plain_loop_learns_what_the_engine_learns():
    """One step from the same weights, float32, without augmentation: the same weights."""
    words = [*WORDS, "loss=kd", "data.crop_padding=0", "data.horizontal_flip=false", "engine.precision=fp32"]
    recipe = resolve([*words, "optimizer.learning_rate=0.1", "optimizer.nesterov=false", "data.images=16"], {})
    inputs = read_inputs(recipe)
    student, teacher = copy.deepcopy(inputs.student), inputs.teacher.model
    expected = copy.deepcopy(student)
    PlainLoop(recipe, inputs.data, student, teacher, torch.device("cpu")).run(1)

    batch = next(inputs.data.train.train_batches(batch_size=16, seed=0, epoch=0, start=0, device=torch.device("cpu")))
    optimizer = torch.optim.SGD(expected.train().parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    mean, std = (torch.tensor(x).reshape(1, -1, 1, 1) for x in (inputs.data.mean, inputs.data.std))
    x = (batch.images.float() / 255 - mean) / std
    lesson = Lesson(expected(x), teacher(x).detach(), batch.labels)
    sum(term.weight * term(lesson).total for term in recipe.loss).backward()
    optimizer.step()
    for one, other in zip(student.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_peak_memory_is_that_of_a_process_of_its_own():
    recipe = resolve([*WORDS, "loss=kd"], {})
    inputs = read_inputs(recipe)
    recipe = decide(inputs).recipe

    assert 10**8 < module._peak_in_its_own_process(recipe, "memory_warm")["resident"] < 10**10
    for way in ("plain", "live"):
        assert module._peak(recipe, way, threads=1)["resident"] > 10**8


@pytest.mark.slow
def test_views_without_end_have_no_warm_memory(cakd, quick, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "ROUNDS", 1)
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (20, 20), (10 * i, 0, 0)).save(tmp_path / part / name / f"{i}.png")
    words = ("--data", f"folder:{tmp_path}", "--batch-size", 4, "data.image_size=8", "data.workers=0")
    teacher = tmp_path / "teacher"
    trained = cakd("train-teacher", *words, "--model", "resnet8", "--epochs", 1, "--out", teacher)
    assert trained.code == 0, trained.err
    words = (*words, "--student", "resnet8", "--teacher", teacher, "engine.compile=off")
    result = cakd("bench", "loss=kd", *words, "--against", "plain")
    warm = cakd("bench", *words, "data.views=2", "--json")

    assert result.code == 0, result.err
    assert "memory_warm: not measured, every epoch draws new views; data.views=8 would record some" in result.err
    assert "memory warm" not in result.out
    assert set(warm.document["images_per_second"]) == {"live", "memory_warm"}


def test_without_a_teacher_there_is_nothing_to_measure(cakd):
    result = cakd("bench", "--data", "digits", "--student", "resnet8", "loss=cross-entropy")

    assert result.code == 3
    assert "no term of the loss needs a teacher" in result.err


def test_the_plain_loop_knows_no_features(cakd):
    result = cakd("bench", *WORDS, "loss=kd", "loss.1={type: cakd-features}", "--against", "plain")

    assert result.code == 3
    assert "the plain loop compares logits alone" in result.err
    assert "the plain loop compares logits alone" in cakd("bench", *WORDS, "loss=at", "--against", "plain").err
    assert "the plain loop has one view of each image" in cakd("bench", *WORDS, "loss=mlkd", "--against", "plain").err
    assert "loss=cakd-logits" in result.err


@pytest.mark.parametrize(
    "loss", some_daily(["ctkd", "dkd", "[{type: kd, weight: {type: linear, start: 1, end: 0}}]"], "ctkd")
)
def test_the_plain_loop_knows_every_loss_of_logits(cakd, quick, monkeypatch, loss):
    """Warm-up, scheduled weights and a learnt temperature among them."""
    monkeypatch.setattr(module, "ROUNDS", 1)
    result = cakd("bench", *WORDS, f"loss={loss}", "--against", "plain", "--json")

    assert result.code == 0, result.err
    assert result.document["ratio"]["live"] > 0
