"""What would go wrong on a GPU, without one: tensors that only say that they are on it.

A step that waits for the device, or that mixes devices, raises there. Precision is float32: autocast needs a device.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from cakd_cli import losses
from cakd_cli.data import Batch, InputSpec
from cakd_cli.engine.task import Task, taps, teacher_looks
from cakd_cli.losses import Weights
from cakd_cli.machine.hardware import Hardware
from cakd_cli.models import layers
from cakd_cli.models.layers import LOGITS, SECOND_LOGITS
from cakd_cli.models.resnet import ResNetSpec
from cakd_cli.recipe.resolve import resolve
from cakd_cli.teachers import Teacher

CLASSES = 20


class Watch:
    """A stopwatch of nothing: events need a device."""

    def __call__(self, part):
        return contextlib.nullcontext()


def forward(name, multi_label):
    """The forward pass of a whole objective on cuda; autograd would ask for a real device."""
    device = torch.device("cuda")
    hardware = Hardware(device, "fp32")
    recipe = resolve([], {"data": "cifar100", "model": "resnet8", "teacher": "x", "loss": name, "engine.epochs": 240})
    if multi_label and not all(term.takes_several_labels for term in recipe.loss):
        pytest.skip("needs one label an image")
    data = SimpleNamespace(
        mean=(0.5,) * 3,
        std=(0.2,) * 3,
        num_classes=CLASSES,
        input=InputSpec((3, 16, 16)),
        multi_label=multi_label,
        train=SimpleNamespace(labels_by_number=lambda: None if multi_label else torch.arange(64) % CLASSES),
    )
    with FakeTensorMode(), torch.device("cuda"):
        student, model = (
            ResNetSpec(type=name).build(in_channels=3, num_classes=CLASSES) for name in ("resnet8", "resnet14")
        )
        terms = tuple(term.between(tuple(layers.stages(student)), tuple(layers.stages(model))) for term in recipe.loss)
        recipe = recipe.model_copy(update={"loss": terms})
        teacher = Teacher(model.eval(), data.mean, data.std, "", "", "", {LOGITS: (CLASSES,)})
        teacher = teacher.with_taps(taps(teacher_looks(recipe.loss)), data, hardware)
        task = Task(student, recipe.loss, data, hardware, teacher, 8)
        task.__dict__["watch"] = Watch()
        task.train()
        labels = torch.zeros(8, CLASSES, dtype=torch.bool) if multi_label else torch.zeros(8, dtype=torch.long)
        images = torch.zeros(8, 3, 16, 16, dtype=torch.uint8)
        answers = {key: torch.zeros(8, *shape) for key, shape in teacher.shapes.items()}
        strong = images if any(term.needs.second_view for term in recipe.loss) else None
        answers |= {} if strong is None else {SECOND_LOGITS: answers[LOGITS]}
        batch = Batch(images, labels, samples=torch.arange(8), strong=strong)
        done = task(batch, answers, Weights(recipe.loss).at(3), 3)
    return [*done.parts.values(), done.total]


@pytest.mark.parametrize("multi_label", [False, True], ids=["one label", "several labels"])
# CRD lays its banks out by the labels, on the host, before the first step.
@pytest.mark.parametrize("name", [name for name in losses.objectives() if name != "crd"])
def test_a_step_stays_on_the_device_and_never_waits(monkeypatch, name, multi_label):
    # Such tensors cannot be copied deeply or moved. The copy only keeps a probe's traces off the network, and what is
    # made inside is on the device.
    monkeypatch.setattr(nn.ModuleDict, "to", lambda modules, device: modules)
    monkeypatch.setattr(layers, "copy", SimpleNamespace(deepcopy=lambda network: network))
    for tensor in forward(name, multi_label):
        assert tensor.device.type == "cuda"


def test_a_wait_and_a_wrong_device_would_be_seen():
    with FakeTensorMode():
        there = torch.zeros(2, device="cuda")
        with pytest.raises(DataDependentOutputException):
            there.sum().item()
        with pytest.raises(RuntimeError, match="device"):
            there + torch.zeros(2)
