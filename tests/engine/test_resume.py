"""Nothing is lost: killed anywhere, a run ends as if it had not been killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cakd_cli.engine import files, loop, run_directory

COMMAND = (
    "distill",
    "optimizer.learning_rate=0.05",
    "engine.checkpoint_seconds=0",
    "engine.log_interval=1",
    "--student",
    "resnet8",
    "--loss",
    "cakd",
    "--epochs",
    "3",
    "--batch-size",
    "16",
    "--device",
    "cpu",
)


@pytest.fixture
def words(toy_file, toy_teacher):
    return (*COMMAND, "--data", f"tensors:{toy_file}", "--teacher", str(toy_teacher))


def assert_same_run(left: Path, right: Path):
    for name, tensor in load_file(left / "model.safetensors").items():
        assert torch.equal(tensor, load_file(right / "model.safetensors")[name]), name
    for one, other in zip(lines(left), lines(right), strict=True):
        assert one["train"] == other["train"]
        assert one["validation"] == other["validation"]
    metrics = [json.loads((path / "run.json").read_text())["metrics"] for path in (left, right)]
    assert metrics[0] == metrics[1]


def lines(path: Path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


class Killed(BaseException):
    """What no handler in the code under test may catch, as a kill would."""


# 9 steps an epoch, so these moments lie in the first, second and third epoch, and at their edges.
@pytest.mark.parametrize("moment", [0, 3, 9, 13, 18, 26])
@pytest.mark.parametrize(
    "settings", [(), ("engine.ema_decay=0.9", "optimizer={type: adamw}")], ids=["sgd", "adamw ema"]
)
def test_killed_after_any_step(cakd, words, tmp_path, monkeypatch, moment, settings):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert cakd(*words, *settings, "--out", straight).code == 0

    count = 0
    original = loop.Trainer._set_learning_rate

    def dying(self):
        nonlocal count
        count += 1
        if count == moment + 1:
            raise Killed
        return original(self)

    monkeypatch.setattr(loop.Trainer, "_set_learning_rate", dying)
    with pytest.raises(Killed):
        cakd(*words, *settings, "--out", killed)
    monkeypatch.setattr(loop.Trainer, "_set_learning_rate", original)
    result = cakd(*words, *settings, "--out", killed, "--resume")

    assert result.code == 0, result.err
    if moment:
        assert "resumed after" in result.err
    assert_same_run(straight, killed)


@pytest.mark.parametrize("moment", range(0, 60, 4))
def test_killed_in_the_middle_of_any_write(cakd, words, tmp_path, monkeypatch, moment):
    """Every flush to disk is a place to die at: before it nothing counts as written."""
    killed = tmp_path / "killed"
    count = 0
    original = files.flush

    def dying(path):
        nonlocal count
        count += 1
        if count == moment + 1:
            raise Killed
        original(path)

    monkeypatch.setattr(files, "flush", dying)
    with pytest.raises(Killed):
        cakd(*words, "--out", killed)
    monkeypatch.setattr(files, "flush", original)
    result = cakd(*words, "--out", killed, "--resume")

    assert result.code == 0, result.err
    # Against the run that the first call of this test module's session made.
    reference = tmp_path / "straight"
    assert cakd(*words, "--out", reference).code == 0
    assert_same_run(reference, killed)


def start(words, out, *more):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "cakd_cli.app", *map(str, words), "--out", str(out), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def wait_for(condition, process):
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_first_signal_saves_and_second_process_resumes(words, toy_file, tmp_path):
    words = [word if word != "3" else "100000" for word in words]
    process = start(words, tmp_path / "run")
    wait_for(lambda: len(list((tmp_path / "run" / "checkpoints").glob("epoch-*"))) > 0, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)

    assert process.returncode == 75, err
    assert "stopped by SIGTERM" in err
    assert "--resume" in err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["ended"] == "stopped"
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1

    process = start(["distill", "--resume"], tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    wait_for(lambda: len((tmp_path / "run" / "metrics.jsonl").read_text()) > len(before), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_a_finished_run_is_left_alone(cakd, words, tmp_path):
    assert cakd(*words, "--out", tmp_path / "run").code == 0
    before = (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns

    again = cakd(*words, "--out", tmp_path / "run", "--resume")
    short = cakd("distill", "--resume", "--out", tmp_path / "run")

    assert again.code == short.code == 0
    assert "already finished" in again.err
    assert (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns == before


def test_other_settings_are_refused(cakd, words, tmp_path):
    assert cakd(*words, "--out", tmp_path / "run").code == 0

    result = cakd(*words, "loss.1.beta=3", "--seed", 5, "--out", tmp_path / "run", "--resume")

    assert result.code == 3
    assert "loss.1.beta: 8.0 in the run, 3.0 now" in result.err
    assert "seed: 0 in the run, 5 now" in result.err


def test_a_directory_in_use_is_refused(cakd, words, tmp_path):
    directory = run_directory.RunDirectory.open(tmp_path / "run", overwrite=False)

    result = cakd(*words, "--out", tmp_path / "run")

    directory.close()
    assert result.code == 4
    assert "is in use by another cakd" in result.err


def test_a_full_disk_is_one_error_and_the_run_goes_on_later(cakd, words, tmp_path, monkeypatch):
    original = files.save_file

    def full(tensors, path, metadata):
        if "training" in str(path):
            raise OSError(28, "No space left on device", str(path))
        original(tensors, path, metadata=metadata)

    monkeypatch.setattr(files, "save_file", full)
    result = cakd(*words, "--out", tmp_path / "run")
    monkeypatch.setattr(files, "save_file", original)

    assert result.code == 4
    assert "No space left on device" in result.err
    assert "make room" in result.err
    assert [p.name for p in (tmp_path / "run").rglob("*.tmp*")] == []
    assert cakd(*words, "--out", tmp_path / "run", "--resume").code == 0


def test_a_damaged_checkpoint_is_named(cakd, words, tmp_path, monkeypatch):
    run = tmp_path / "run"
    original = loop.Trainer._validate
    monkeypatch.setattr(loop.Trainer, "_validate", lambda self: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        cakd(*words, "--out", run)
    monkeypatch.setattr(loop.Trainer, "_validate", original)
    (file,) = (run / "checkpoints").glob("epoch-*/training.safetensors")
    file.write_bytes(file.read_bytes()[:100])

    result = cakd(*words, "--out", run, "--resume")

    assert result.code == 4
    assert "damaged checkpoint" in result.err
    assert cakd(*words, "--out", run, "--overwrite").code == 0
