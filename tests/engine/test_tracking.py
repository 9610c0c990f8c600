import sys
from types import SimpleNamespace

import pytest

from cakd_cli.engine.run_directory import RunDirectory
from cakd_cli.files import read_json
from tests.conftest import train_toy

SHORT = ("optimizer.learning_rate=0.001",)


class Service(SimpleNamespace):
    """As wandb and trackio are called."""

    def __init__(self, **failing):
        super().__init__(begun=[], logged=[], finished=0, failing=failing)

    def init(self, **options):
        print("hello from the service")  # noqa: T201
        if "init" in self.failing:
            raise RuntimeError("not logged in")
        self.begun.append(options)

    def log(self, numbers, step):
        if "log" in self.failing:
            raise ConnectionError("no network")
        self.logged.append((step, numbers))

    def finish(self):
        self.finished += 1


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_every_epoch_and_the_end_are_passed_on(toy_file, tmp_path, monkeypatch, kind):
    service = Service()
    monkeypatch.setitem(sys.modules, kind, service)

    run = train_toy(toy_file, tmp_path / "run", *SHORT, f"engine.tracking={kind}", **{"engine.epochs": 2})

    (begun,) = service.begun
    assert (begun["project"], begun["name"][:4], begun["resume"]) == ("cakd", "run-", "allow")
    assert begun["config"]["model"]["type"] == "resnet8"
    lines = RunDirectory(run).metrics()
    assert [step for step, _ in service.logged] == [*(line["step"] for line in lines), lines[-1]["step"]]
    for line, (_, numbers) in zip(lines, service.logged, strict=False):
        assert numbers["train/loss"] == line["train"]["loss"]
        assert numbers["validation/top1"] == line["validation"]["top1"]
    assert service.logged[-1][1]["test/top1"] == read_json(run / "run.json")["metrics"]["test"]["top1"]
    assert service.finished == 1


def test_a_service_that_fails_costs_a_warning(cakd, toy_file, tmp_path, monkeypatch):
    words = ("train-teacher", "--data", f"tensors:{toy_file}", "--model", "resnet8", "--batch-size", 16, "--epochs", 2)
    words += (*SHORT, "engine.precision=fp32", "--device", "cpu")
    monkeypatch.setitem(sys.modules, "wandb", Service(log=True))

    result = cakd(*words, "--out", tmp_path / "run", "engine.tracking=wandb")

    assert result.code == 0
    assert "hello" not in result.out
    assert result.err.count("figures are not tracked any more: no network") == 1
    monkeypatch.setitem(sys.modules, "wandb", Service(init=True))
    refused = cakd(*words, "--out", tmp_path / "other", "engine.tracking=wandb")
    assert refused.code == 3
    assert "wandb cannot begin: not logged in" in refused.err
    monkeypatch.setitem(sys.modules, "trackio", None)
    missing = cakd(*words, "--out", tmp_path / "third", "engine.tracking=trackio")
    assert (missing.code, "pip install 'cakd[trackio]'" in missing.err) == (3, True)


def test_tensorboard_files_can_be_read(toy_file, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    run = train_toy(toy_file, tmp_path / "run", *SHORT, "engine.tracking=tensorboard", **{"engine.epochs": 2})

    events = accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    lines = RunDirectory(run).metrics()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(line["step"], pytest.approx(line["train"]["loss"])) for line in lines]
    assert events.Scalars("test/top1")
