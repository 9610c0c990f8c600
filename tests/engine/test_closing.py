"""What a run opens it closes: files, hooks, generators."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from cakd_cli.errors import StoppedError
from cakd_cli.machine.hardware import Hardware
from cakd_cli.models.layers import Tapped
from cakd_cli.teachers import memory as teacher_memory
from tests.engine.test_loop import make_trainer
from tests.teachers.test_memory import FACTS, IDENTITY

__all__ = ["make_trainer"]


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_twenty_runs_in_one_process_leave_nothing_open(cakd, toy_file, toy_teacher, tmp_path, monkeypatch):
    made = []
    original = Tapped.__init__

    def noted(self, *arguments):
        made.append(self)
        original(self, *arguments)

    monkeypatch.setattr(Tapped, "__init__", noted)
    words = ("distill", "--data", f"tensors:{toy_file}", "--teacher", toy_teacher, "--student", "resnet8")
    words = (*words, "--batch-size", 48, "--epochs", 1)
    assert cakd(*words, "--loss", "cakd", "--out", tmp_path / "first").code == 0
    before = open_files()

    for number in range(20):
        loss = ("kd", "cakd", "ctkd", "fitnet")[number % 4]
        result = cakd(*words, "--loss", loss, "--out", tmp_path / str(number))
        assert result.code == 0, result.err

    assert open_files() <= before
    assert len(made) > 40
    assert sum(len(tapped._handles) for tapped in made) == 0


def test_a_stopped_epoch_closes_its_answers_at_once(make_trainer, monkeypatch):
    trainer = make_trainer("engine.teacher_memory=ram")
    flushed = []
    monkeypatch.setattr(type(trainer.source), "flush", lambda self: flushed.append(trainer.step))
    trainer.stop.number = signal.SIGTERM

    with pytest.raises(StoppedError) as stopped:
        trainer.train_epoch()

    # While the error is still held, which keeps every frame alive.
    assert stopped.value is not None
    assert flushed == [1]


def test_a_check_is_written_under_the_memorys_lock(home):
    teacher_memory.TeacherMemory.open(IDENTITY, FACTS).close()
    lock = teacher_memory.folder_of(IDENTITY) / "lock"
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    checked = {"top1": 0.5, "samples": 10}
    writing = threading.Thread(target=teacher_memory.write_check, args=(IDENTITY, {"name": "d"}, checked))
    writing.start()
    writing.join(0.3)

    assert writing.is_alive()
    other.communicate(b"\n")
    writing.join(10)
    assert teacher_memory.read_check(IDENTITY, {"name": "d"}) == checked


@pytest.mark.parametrize(("kind", "takes_device"), [("xpu", True), ("mps", False), ("cuda", True)])
def test_random_numbers_of_every_accelerator_are_saved(monkeypatch, kind, takes_device):
    class Module:
        state = torch.arange(4, dtype=torch.uint8)

        @classmethod
        def get_rng_state(cls, *device):
            assert len(device) == takes_device
            return cls.state.clone()

        @classmethod
        def set_rng_state(cls, state, *device):
            assert len(device) == takes_device
            cls.state = state

    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    machine = Hardware(torch.device(kind), "fp32")
    states = machine.random_state()
    Module.state = torch.zeros(4, dtype=torch.uint8)
    machine.restore_random_state(states)

    assert set(states) == {"cpu", kind}
    assert Module.state.tolist() == [0, 1, 2, 3]
    # A run that goes on elsewhere has no state of that device.
    machine.restore_random_state({"cpu": states["cpu"]})


def test_the_loop_ticks_with_every_step(make_trainer, monkeypatch):
    trainer = make_trainer("engine.log_interval=100")
    ticks = []
    monkeypatch.setattr(trainer.progress, "tick", lambda **where: ticks.append(where["step"]), raising=False)

    trainer.train_epoch()

    assert ticks == list(range(1, 10))
