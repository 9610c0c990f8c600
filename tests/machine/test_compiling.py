"""Whether compiling pays is measured."""

import json

import pytest
import torch

from cakd_cli.errors import HardwareError
from cakd_cli.machine import compiling
from cakd_cli.machine.compiling import Trial, worth_compiling
from cakd_cli.machine.hardware import choose_hardware
from cakd_cli.models.normalisation import Normalisation
from tests.conftest import train_toy

FP32 = choose_hardware("cpu", "fp32")


@pytest.fixture
def images():
    return torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


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


def test_the_trial_leaves_the_random_numbers_as_they_were(images, monkeypatch):
    monkeypatch.setattr(compiling, "WORTH_TRYING_SECONDS", 0.0)
    monkeypatch.setattr(torch, "compile", lambda network, **how: network)
    student = toy_student()
    random = torch.get_rng_state()
    normalise = Normalisation((0.5,) * 3, (0.25,) * 3, FP32)

    worth_compiling(Trial(student, normalise(images), 1000, 1), FP32, asked_for=False)

    assert torch.equal(torch.get_rng_state(), random)


def test_each_size_of_a_batch_is_compiled_for_itself(monkeypatch):
    """Kernels for any size, made when the last batch is a smaller one, would serve full batches from then on."""
    sizes = []
    original = torch.compile

    def backend(graph, inputs):
        sizes.extend(len(x) for x in inputs if isinstance(x, torch.Tensor) and x.shape[1:] == (6,))
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda network, **how: original(network, backend=backend, **how))
    network = compiling.compiled(torch.nn.ReLU(), graphed=False)
    for count in (8, 5, 8, 3):
        network(torch.zeros(count, 6))

    assert sizes == [8, 5, 3]


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

    monkeypatch.setattr(torch, "compile", lambda network, **how: Compiled())
    monkeypatch.setattr(
        compiling, "_seconds", lambda network, images, machine: compiled if isinstance(network, Compiled) else eager
    )
    normalise = Normalisation((0.5,) * 3, (0.25,) * 3, FP32)
    trial = Trial(toy_student(), normalise(images), steps, 1)
    chosen, why = worth_compiling(trial, FP32, asked_for=wanted == "on")

    assert chosen is expected
    if eager * steps < compiling.WORTH_TRYING_SECONDS:
        assert why == "about 10 s of steps would not pay for it"
    else:
        assert f"a step of {1000 * compiled:.0f} ms instead of {1000 * eager:.0f}" in why


@pytest.mark.parametrize("wanted", ["auto", "on"])
def test_a_compiler_that_fails_is_an_error_only_where_it_was_asked_for(images, monkeypatch, wanted):
    def fails(network, **how):
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(compiling, "WORTH_TRYING_SECONDS", 0.0)
    monkeypatch.setattr(torch, "compile", fails)
    normalise = Normalisation((0.5,) * 3, (0.25,) * 3, FP32)
    trial = Trial(toy_student(), normalise(images), 1000, 1)
    if wanted == "auto":
        assert worth_compiling(trial, FP32, asked_for=False) == (False, "it cannot be compiled: no C++ compiler")
    else:
        with pytest.raises(HardwareError, match="the student cannot be compiled: no C"):
            worth_compiling(trial, FP32, asked_for=True)


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
