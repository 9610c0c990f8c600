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
from cakd_cli.errors import HardwareError
from cakd_cli.losses import Weights
from cakd_cli.machine import compiling, hardware
from cakd_cli.machine.hardware import Hardware, choose_hardware
from cakd_cli.models import layers
from cakd_cli.models.layers import LOGITS, SECOND_LOGITS
from cakd_cli.models.resnet import ResNetSpec
from cakd_cli.recipe.resolve import resolve
from cakd_cli.teachers import Teacher
from cakd_cli.teachers.answers import AnswerSource

CLASSES = 20


class Watch:
    """A stopwatch of nothing: events need a device."""

    def __call__(self, part):
        return contextlib.nullcontext()


def forward(name, multi_label):
    """The forward pass of a whole objective on cuda; autograd would ask for a real device."""
    device = torch.device("cuda")
    machine = Hardware(device, "fp32")
    recipe = resolve([], {"data": "cifar100", "model": "resnet8", "teacher": "x", "loss": name, "engine.epochs": 240})
    if multi_label and not all(term.takes_several_labels for term in recipe.loss):
        pytest.skip("needs one label an image")
    data = SimpleNamespace(
        mean=(0.5,) * 3,
        std=(0.2,) * 3,
        num_classes=CLASSES,
        input=InputSpec((3, 16, 16)),
        multi_label=multi_label,
        labelled=True,
        train=SimpleNamespace(labels_by_number=lambda: None if multi_label else torch.arange(64) % CLASSES),
    )
    with FakeTensorMode(), torch.device("cuda"):
        student, model = (
            ResNetSpec(type=name).build(in_channels=3, num_classes=CLASSES) for name in ("resnet8", "resnet14")
        )
        terms = tuple(term.between(tuple(layers.stages(student)), tuple(layers.stages(model))) for term in recipe.loss)
        recipe = recipe.model_copy(update={"loss": terms})
        teacher = Teacher(model.eval(), data.mean, data.std, "", "", "", {LOGITS: (CLASSES,)})
        teacher = teacher.with_taps(taps(teacher_looks(recipe.loss)), data, machine)
        task = Task(student, recipe.loss, data, machine, teacher, 8)
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


class Stream:
    """Notes what is ordered on it."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self):
        self.log.append(f"{self.name} is done")
        return f"what {self.name} did"

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")

    def train(self):
        self.log.append(f"{self.name} trains")


def test_a_teacher_answers_on_one_stream_a_batch_ahead_in_all_epochs(monkeypatch):
    """What is freed on a stream is used again by that stream alone: a new one an epoch would take more and more."""
    log = []
    streams = [Stream("main", log)]
    made = []

    @contextlib.contextmanager
    def on(stream):
        streams.append(stream)
        yield
        streams.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[-1])
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(Stream(f"side{len(made)}", log)) or made[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: log.append(f"kept for {stream.name}"))

    def answer(batch):
        log.append(f"{streams[-1].name} answers")
        return {LOGITS: batch.images.float().mean((2, 3))}

    teacher = SimpleNamespace(answer=answer)
    source = AnswerSource(teacher, None, torch.device("cuda"), print)
    for _ in range(3):
        batches = (Batch(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2)) for _ in range(2))
        for _ in source.beside(batches, Watch()):
            streams[-1].train()

    ask = ["side0 waits for main", "side0 answers", "kept for side0", "kept for main", "side0 is done"]
    train = ["main waits for what side0 did", "main trains"]
    assert len(made) == 1
    assert log == (ask + ask + train + train) * 3


TODAY = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


@pytest.mark.parametrize(
    ("built", "capability", "can"),
    [
        (TODAY, (7, 5), True),
        (TODAY, (8, 9), True),  # a later member of a generation
        (TODAY, (10, 3), True),
        (TODAY, (7, 0), False),
        (TODAY, (6, 1), False),
        (TODAY, (11, 0), False),
        (["sm_80", "sm_90a"], (9, 0), True),
        (["sm_80", "sm_90a"], (9, 1), False),
        (["sm_80", "sm_100f"], (10, 3), True),
        (["sm_80", "compute_80"], (12, 0), True),  # compiled there, from PTX
        (["sm_80", "compute_80"], (7, 5), False),
        (["gfx90a", "gfx942"], (9, 0), True),  # nothing can be said
        ([], (9, 0), True),
    ],
)
def test_a_gpu_without_kernels_is_named_before_the_first_one(monkeypatch, built, capability, can):
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old One")
    monkeypatch.setattr(hardware, "_find_device", lambda name, reasons: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **how: True)

    if can:
        assert choose_hardware().precision == "bf16"
        return
    with pytest.raises(HardwareError) as caught:
        choose_hardware()
    major, minor = capability
    assert f"no kernels for Old One, of compute capability {major}.{minor}: it is built for" in str(caught.value)
    assert str(caught.value).endswith(built[-1])
    assert "--device cpu" in caught.value.hint


def test_a_gpu_without_kernels_ends_a_run_before_it_begins(cakd, toy_file, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: TODAY)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla P40")
    monkeypatch.setattr(hardware, "_find_device", lambda name, reasons: torch.device("cuda"))
    result = cakd("train-teacher", "--data", f"tensors:{toy_file}", "--model", "resnet8", "--out", tmp_path / "run")

    assert result.code == 7
    assert "has no kernels for Tesla P40, of compute capability 6.1" in result.err
    assert "hint: install a torch that is built for it" in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("gfx900", "fp32"),
        ("gfx906:sramecc-:xnack-", "fp32"),
        ("gfx1030", "fp32"),
        ("gfx908", "bf16"),
        ("gfx90a:sramecc+:xnack-", "bf16"),
        ("gfx942", "bf16"),
        ("gfx1100", "bf16"),
        ("gfx1201", "bf16"),
    ],
)
def test_an_amd_gpu_computes_in_bf16_where_it_has_the_cores(monkeypatch, name, precision):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["gfx900", "gfx942"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "AMD")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=name))
    monkeypatch.setattr(hardware, "_find_device", lambda name, reasons: torch.device("cuda"))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)

    assert choose_hardware().precision == precision
    assert torch.backends.cudnn.benchmark


@pytest.mark.parametrize("native", [True, False])
def test_an_xpu_computes_in_bf16_where_it_says_that_it_can(monkeypatch, native):
    monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda *, including_emulation: native or including_emulation)
    monkeypatch.setattr(hardware, "_find_device", lambda name, reasons: torch.device("xpu"))

    assert choose_hardware().precision == ("bf16" if native else "fp32")
    if native:
        assert choose_hardware(precision="bf16").precision == "bf16"
        return
    with pytest.raises(HardwareError, match="xpu cannot compute in bf16"):
        choose_hardware(precision="bf16")


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_a_compile_trial_leaves_the_random_numbers_of_every_accelerator(monkeypatch, kind):
    states = {"now": torch.zeros(1)}
    module = SimpleNamespace(
        get_rng_state=lambda *device: states["now"], set_rng_state=lambda state, *device: states.update(now=state)
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(compiling, "_seconds", lambda *trial: states.update(now=states["now"] + 1) or 1.0)
    monkeypatch.setattr(compiling, "compiled_student", lambda network, device, parts: network)
    trial = compiling.Trial(nn.Linear(2, 2), torch.zeros(1, 2), 1000, 1)

    compiling.worth_compiling(trial, Hardware(torch.device(kind), "fp32"), asked_for=False)

    assert states["now"].item() == 0
