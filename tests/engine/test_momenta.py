"""DOT: the teacher's terms have a momentum of their own."""

import pytest
import torch
from safetensors.torch import load_file

from cakd_cli.engine.optimizer import Optimizer
from cakd_cli.engine.task import Step
from cakd_cli.recipe.resolve import resolve
from tests.conftest import train_toy
from tests.engine.test_resume import assert_same_run, killed_after

DELTA = ("optimizer.nesterov=false", "optimizer.delta=0.075")


class _Task(torch.nn.Module):
    """What an optimizer needs of a task: a student, and a module that the teacher's terms alone train."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.student = torch.nn.Linear(3, 2)
        self.term_modules = torch.nn.ModuleDict({"1": torch.nn.Linear(2, 2, bias=False)})
        self.hardware = type("Hardware", (), {"device": torch.device("cpu"), "precision": "fp32"})

    def losses(self, number):
        generator = torch.Generator().manual_seed(number)
        answers = self.student(torch.randn(8, 3, generator=generator))
        goal = torch.randn(8, 2, generator=generator)
        return (answers - 1).square().mean(), (self.term_modules["1"](answers) - goal).square().mean()


def recipe(*words):
    return resolve(
        ["model=resnet8", "loss=kd", "teacher=resnet8", "teacher.weights=w", *DELTA, *words], {"data": "digits"}
    )


def test_steps_are_the_official_codes():
    """As mdistiller's engine/dot.py: decay in the labels' half, the mean momentum where one half is missing."""
    task, settings = _Task(), recipe("optimizer.learning_rate=0.1", "schedule=constant")
    optimizer = Optimizer(task, settings, steps_per_epoch=100)
    weights = {name: value.detach().clone() for name, value in task.named_parameters()}
    of_labels, of_teacher = (dict.fromkeys(weights) for _ in range(2))
    for number in range(5):
        labels, teacher = task.losses(number)
        gradients = [
            torch.autograd.grad(loss, task.parameters(), retain_graph=True, allow_unused=True)
            for loss in (labels, teacher)
        ]
        for (name, weight), from_labels, from_teacher in zip(weights.items(), *gradients, strict=True):
            both = from_labels is not None and from_teacher is not None
            moves = []
            for gradient, momentum, buffers in ((from_labels, 0.825, of_labels), (from_teacher, 0.975, of_teacher)):
                if gradient is None:
                    continue
                if gradient is from_labels or not both:
                    gradient = gradient + 5e-4 * weight
                before = buffers[name]
                buffers[name] = gradient if before is None else before * (momentum if both else 0.9) + gradient
                moves.append(buffers[name])
            weight -= 0.1 * sum(moves)
        optimizer.backward(Step(labels + teacher, {}, (labels, teacher)), 1)
        optimizer.step(number, labels.detach())

        for name, value in task.named_parameters():
            assert torch.allclose(value, weights[name], atol=1e-6), (number, name)


def test_no_delta_is_plain_momentum(toy_file, toy_teacher, tmp_path):
    """With equal momenta both halves move the weights as their sum does."""
    flags = {"teacher": str(toy_teacher), "loss": "kd", "engine.epochs": 2}
    plain, tiny = (
        train_toy(toy_file, tmp_path / f"delta {delta}", DELTA[0], f"optimizer.delta={delta}", **flags)
        for delta in (0, 1e-9)
    )
    for name, value in load_file(plain / "model.safetensors").items():
        assert torch.allclose(value.float(), load_file(tiny / "model.safetensors")[name].float(), atol=1e-4), name


def test_a_killed_run_goes_on_as_it_would_have(cakd, toy_file, toy_teacher, tmp_path):
    words = ("distill", "--data", f"tensors:{toy_file}", "--teacher", toy_teacher, "--student", "resnet8", *DELTA)
    words = (*words, "--loss", "fitnet", "--epochs", 2, "--batch-size", 48, "engine.gradient_accumulation=2")
    words = (*words, "engine.checkpoint_seconds=0", "engine.log_interval=1", "engine.precision=fp32")
    assert cakd(*words, "--out", tmp_path / "straight").code == 0
    with killed_after(4):
        cakd(*words, "--out", tmp_path / "killed")

    assert cakd(*words, "--out", tmp_path / "killed", "--resume").code == 0

    assert_same_run(tmp_path / "straight", tmp_path / "killed")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("optimizer.nesterov=true",), "optimizer.nesterov: does not go with two momenta"),
        (("optimizer.momentum=0.95",), "optimizer.delta: is 0.075: momentum 0.95 +- delta leaves [0, 1)"),
        (("optimizer.momentum=0.05",), "optimizer.delta: is 0.075: momentum 0.05 +- delta leaves [0, 1)"),
        (("loss=cross-entropy",), "optimizer.delta: tells the teacher's terms from the labels'"),
        (("engine.compile=on",), "engine.compile: is on, and two momenta"),
        (("optimizer.delta=-1",), "greater than or equal to 0"),
    ],
)
def test_what_does_not_go_together(words, sentence):
    with pytest.raises(Exception, match="the recipe has a mistake") as caught:
        recipe(*words)

    assert sentence in str(caught.value)
