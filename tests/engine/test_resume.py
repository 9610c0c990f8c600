"""Nothing is lost: killed anywhere, a run ends as if it had not been killed."""

import contextlib
import io
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cakd_cli import files
from cakd_cli.engine import loop, run, stopping
from cakd_cli.process import main
from cakd_cli.teachers import answers
from tests.conftest import some_daily, train_toy

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
    "24",
    "--device",
    "cpu",
)


def command(toy_file, toy_teacher):
    return (*COMMAND, "--data", f"tensors:{toy_file}", "--teacher", str(toy_teacher))


@pytest.fixture
def words(toy_file, toy_teacher):
    return command(toy_file, toy_teacher)


def assert_same_run(left: Path, right: Path):
    for name, tensor in load_file(left / "model.safetensors").items():
        assert torch.equal(tensor, load_file(right / "model.safetensors")[name]), name
    for one, other in zip(lines(left), lines(right), strict=True):
        assert one["train"] == other["train"]
        assert one.get("gradient_norm") == other.get("gradient_norm")
        assert [one.get(part) for part in ("validation", "test")] == [
            other.get(part) for part in ("validation", "test")
        ]
    metrics = [json.loads((path / "run.json").read_text())["metrics"] for path in (left, right)]
    assert metrics[0] == metrics[1]


def lines(path: Path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


class Killed(BaseException):
    """What no handler in the code under test may catch, as a kill would."""


@contextlib.contextmanager
def killed_after(steps):
    """Kill what trains inside after so many steps."""
    done = []
    original = loop.Trainer.train_step

    def dying(self, batch, answers):
        if len(done) == steps:
            raise Killed
        done.append(self.step)
        return original(self, batch, answers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "train_step", dying)
        with pytest.raises(Killed):
            yield


EVERYTHING = (
    *("engine.ema_decay=0.9", "optimizer={type: adamw, decay_norms: false}", "loss.1.beta={type: adaptive, base: 8}"),
    "loss.2={type: ctkd}",
)


@pytest.fixture(scope="session", params=[(), EVERYTHING], ids=["sgd", "everything that a checkpoint may hold"])
def undisturbed(request, toy_file, toy_teacher, tmp_path_factory):
    """Settings, and a run with them that nothing disturbs."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["cakd", *command(toy_file, toy_teacher), *request.param, "--out", str(out)])
        with pytest.raises(SystemExit) as stop:
            main()
    assert stop.value.code == 0
    return request.param, out


# 6 steps an epoch, so these moments lie in the first, second and third epoch, and at their edges.
@pytest.mark.parametrize("moment", some_daily([0, 2, 6, 8, 12, 17], 2, 6, 17))
def test_killed_after_any_step(cakd, words, undisturbed, tmp_path, moment):
    settings, straight = undisturbed
    killed = tmp_path / "killed"

    with killed_after(moment):
        cakd(*words, *settings, "--out", killed)
    result = cakd(*words, *settings, "--out", killed, "--resume")

    assert result.code == 0, result.err
    assert_same_run(straight, killed)
    facts = json.loads((killed / "run.json").read_text())
    if moment:
        assert "resumed after" in result.err
        assert "--resume" not in facts["command"]
        assert [again["command"][-1] for again in facts["resumed"]] == ["--resume"]


@pytest.fixture(scope="session", params=["off", "ram", "disk"])
def half_known(request, toy_file, toy_teacher, tmp_path_factory):
    """Settings, and a run with them that nothing disturbs."""
    folder = tmp_path_factory.mktemp("half-known")
    settings = (f"engine.teacher_memory={request.param}", "data.crop_padding=1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAKD_HOME", str(folder / "home"))
        patch.setattr(answers, "_WINDOW_IMAGES", 40)
        words = [*command(toy_file, toy_teacher), *settings, "--out", str(folder / "run")]
        patch.setattr(sys, "argv", ["cakd", *words])
        with pytest.raises(SystemExit) as stop:
            main()
    assert stop.value.code == 0
    return settings, folder / "run"


@pytest.mark.parametrize("moment", some_daily([2, 8, 15], 8))
def test_killed_with_answers_half_known(cakd, words, half_known, tmp_path, monkeypatch, moment):
    """Several windows an epoch, and a home of its own: the resumed run asks about other views together."""
    monkeypatch.setattr(answers, "_WINDOW_IMAGES", 40)
    settings, straight = half_known
    killed = tmp_path / "killed"
    with killed_after(moment):
        cakd(*words, *settings, "--out", killed)
    result = cakd(*words, *settings, "--out", killed, "--resume")

    assert result.code == 0, result.err
    assert "resumed after" in result.err
    assert_same_run(straight, killed)


class Disk:
    """Counts flushes and dies at one: from then on nothing is written, and nothing is cleaned up either."""

    def __init__(self, monkeypatch, dies_at=None):
        self.count = 0
        self.dead = False
        for name, target in (("flush", files), ("unlink", files.Path), ("rmtree", files.shutil)):
            original = getattr(target, name)
            monkeypatch.setattr(target, name, self._mortal(original, dies_at if name == "flush" else None))

    def _mortal(self, original, dies_at):
        def call(*arguments, **options):
            if dies_at is not None or original.__name__ == "flush":
                self.dead = self.dead or self.count == dies_at
                self.count += 1
            if self.dead:
                raise Killed
            return original(*arguments, **options)

        return call


@pytest.fixture(scope="session")
def straight(toy_file, toy_teacher, tmp_path_factory):
    """A run that nothing disturbs, and how often it flushes."""
    out = tmp_path_factory.mktemp("straight") / "run"
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        patch.setattr(sys, "argv", ["cakd", *command(toy_file, toy_teacher), "--out", str(out)])
        with pytest.raises(SystemExit) as stop:
            main()
    assert stop.value.code == 0
    return out, disk.count


# Shares of all flushes, then the last ones one by one: model, config, card and facts.
@pytest.mark.parametrize(
    "moment",
    some_daily(
        [0, 1, 2, 3, 4, 0.1, 0.3, 0.5, 0.7, 0.9, -10, -8, -6, -5, -4, -3, -2, -1], 0, 3, 0.3, 0.7, -8, -5, -3, -1
    ),
)
def test_killed_in_the_middle_of_any_write(cakd, words, straight, tmp_path, moment):
    reference, flushes = straight
    dies_at = round(moment * flushes) if isinstance(moment, float) else moment % flushes
    killed = tmp_path / "killed"
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, dies_at)
        with pytest.raises(Killed):
            cakd(*words, "--out", killed)
    assert disk.dead

    result = cakd(*words, "--out", killed, "--resume")

    assert result.code == 0, result.err
    assert_same_run(reference, killed)
    assert [path.name for path in killed.rglob("*.tmp*")] == []


@pytest.mark.parametrize("moment", range(4))
def test_killed_while_another_run_is_replaced(cakd, words, straight, tmp_path, moment):
    run = tmp_path / "run"
    shutil.copytree(straight[0], run)
    removed = 0
    original = Path.unlink

    def dying(path, missing_ok=False):
        nonlocal removed
        if path.parent == run and removed == moment:
            raise Killed
        removed += path.parent == run
        original(path, missing_ok=missing_ok)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", dying)
        with pytest.raises(Killed):
            cakd(*words, "--out", run, "--overwrite")
    result = cakd(*words, "--out", run, "--overwrite")

    assert result.code == 0, result.err
    assert_same_run(straight[0], run)


def start(words, out, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "cakd_cli", *map(str, words), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def wait_for(condition, process):
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_first_signal_saves_and_second_process_resumes(words, toy_file, tmp_path):
    # So long a run would try whether compiling pays.
    words = [*(word if word != "3" else "100000" for word in words), "engine.compile=off", "engine.teacher_form=plain"]
    process = start(words, tmp_path / "run")
    wait_for(lambda: len(list((tmp_path / "run" / "checkpoints").glob("epoch-*"))) > 0, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)

    assert process.returncode == 75, err
    assert "stopped by SIGTERM" in err
    assert "--resume" in err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["ended"] == "stopped"
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) <= 2

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


HOLD = """
import sys, time
from pathlib import Path
from cakd_cli.engine.run_directory import RunDirectory
directory = RunDirectory.open(Path(sys.argv[1]), resume=True, overwrite=False)
print(1, flush=True)
input()
"""


def test_a_directory_in_use_is_refused_with_its_holder(cakd, words, tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    other.stdout.readline()

    result = cakd(*words, "--out", tmp_path / "run")

    assert result.code == 4
    assert f"is in use by another cakd: process {other.pid} on {socket.gethostname()}, started 2" in result.err
    other.kill()
    other.communicate()
    after = cakd(*words, "--out", tmp_path / "run", "--epochs", 1)
    assert after.code == 0
    assert f"was left by process {other.pid}" in after.err
    assert "was left by" not in cakd(*words, "--out", tmp_path / "run", "--epochs", 1, "--overwrite").err


def test_a_run_that_cannot_begin_leaves_no_folder(cakd, words, tmp_path):
    bad = train_toy(
        Path(words[words.index("--data") + 1].removeprefix("tensors:")),
        tmp_path / "bad",
        "optimizer.learning_rate=1e-9",
    )

    result = cakd(*words[: words.index("--teacher")], "--teacher", bad, "--out", tmp_path / "run")

    assert (result.code, "near chance" in result.err) == (4, True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("what", "changed"), [("data", "train images"), ("teacher", "teacher")])
def test_other_data_or_another_teacher_is_refused(cakd, tmp_path, toy_file, what, changed):
    data = tmp_path / "data.safetensors"
    data.write_bytes(toy_file.read_bytes())
    teacher = train_toy(data, tmp_path / "teacher")
    words = (*command(data, teacher), "--out", tmp_path / "run")
    with killed_after(9):
        cakd(*words)
    if what == "data":
        tensors = load_file(data)
        tensors["train_images"][0] += 1
        save_file(tensors, data, metadata={"class_names": json.dumps([f"class {i}" for i in range(4)])})
    else:
        shutil.rmtree(teacher)
        train_toy(data, teacher, seed=1)

    result = cakd(*words, "--resume")

    assert result.code == 4
    assert f"not the same as when it began: its {changed}" in result.err


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


def test_every_ending_is_noted(cakd, words, tmp_path, monkeypatch):
    for error, code, ended in (
        (torch.OutOfMemoryError("full"), 7, "hardware"),
        (OSError(28, "No space left on device"), 4, "failed"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ):
        monkeypatch.setattr(loop.Trainer, "validate", lambda self, error=error: (_ for _ in ()).throw(error))
        out = tmp_path / ended
        assert cakd(*words, "--out", out).code == code
        assert json.loads((out / "run.json").read_text())["ended"] == ended


@pytest.mark.slow
def test_a_signal_to_the_whole_group_saves_with_workers_too(tmp_path):
    """Ctrl-C, slurm and systemd signal the workers as well."""
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for i in range(20):
                Image.new("RGB", (300 + i, 300)).save(tmp_path / "images" / part / name / f"{i}.png")
    words = ("train-teacher", "--data", f"folder:{tmp_path / 'images'}", "data.image_size=32", "data.workers=1")
    words += ("--model", "resnet8", "--batch-size", "4", "engine.checkpoint_seconds=0", "engine.log_interval=1")
    process = start([*words, "--epochs", "1000"], tmp_path / "run", start_new_session=True)
    wait_for(lambda: len(list((tmp_path / "run" / "checkpoints").glob("epoch-*"))) > 0, process)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)

    assert process.returncode == 75, err
    assert "Traceback" not in err


def test_a_signal_at_the_end_of_an_epoch_saves(cakd, words, straight, tmp_path, monkeypatch):
    original = loop.Trainer.validate

    def signalled(self):
        os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    monkeypatch.setattr(loop.Trainer, "validate", signalled)
    result = cakd(*words, "--out", tmp_path / "run")
    assert (result.code, "after epoch 1, step 0; checkpoint saved" in result.err) == (75, True), result.err
    monkeypatch.setattr(loop.Trainer, "validate", original)

    assert cakd(*words, "--out", tmp_path / "run", "--resume").code == 0
    assert_same_run(straight[0], tmp_path / "run")


SLOW_STEPS = """
import sys, time
from cakd_cli.engine import loop, run, stopping
from cakd_cli.process import main
original = loop.Trainer.train_step
def slow(self, *arguments):
    original(self, *arguments)
    if self.epoch == 0 and self.step == {step}:
        print("slow", flush=True)
        time.sleep(60)
loop.Trainer.train_step = slow
main()
"""


@pytest.mark.parametrize(("saved", "code"), [(True, 75), (False, 130)])
def test_the_grace_says_whether_there_is_a_checkpoint(monkeypatch, capsys, saved, code):
    left = threading.Event()
    monkeypatch.setattr(stopping.os, "_exit", lambda code: (codes.append(code), left.set()))
    codes = []
    request = stopping.StopRequest(0.01, lambda: saved)
    request._note(signal.SIGTERM, None)

    assert left.wait(10)
    assert codes == [code]
    assert ("--resume" if saved else "there is no checkpoint") in capsys.readouterr().err


@pytest.mark.slow
def test_the_grace_ends_a_step_that_takes_too_long(words, tmp_path):
    out = tmp_path / "run"
    words = [*map(str, words), "--grace", "1", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_STEPS.format(step=3), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "slow\n"
    process.send_signal(signal.SIGUSR1)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)

    assert process.returncode == 75, err
    assert time.monotonic() - began < 20
    assert "1 s after SIGUSR1 the step was not done" in err
    assert len(list(out.glob("checkpoints/epoch-*"))) == 2


@pytest.mark.slow
def test_the_second_signal_leaves_at_once(words, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_STEPS.format(step=3), *map(str, words), "--out", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "slow\n"
    process.terminate()
    time.sleep(2 * stopping._ONE_REQUEST_SECONDS)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)

    assert (process.returncode, "error: interrupted" in err) == (130, True), err


def test_one_request_may_come_twice(monkeypatch):
    """From a scheduler, and from the launcher that it has signalled too."""
    now = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    request = stopping.StopRequest()
    request._note(signal.SIGTERM, None)
    request._note(signal.SIGTERM, None)
    now[0] += 1
    with pytest.raises(KeyboardInterrupt):
        request._note(signal.SIGTERM, None)
    assert request.number == signal.SIGTERM


BEFORE_TRAINING = """
import os, signal, sys
from cakd_cli.commands import train
from cakd_cli.process import main
train.read_inputs = lambda *arguments, **options: os.kill(os.getpid(), signal.{name})
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_before_training_leaves_with_a_line(words, tmp_path, name):
    process = subprocess.run(
        [sys.executable, "-c", BEFORE_TRAINING.format(name=name), *map(str, words), "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
    )

    assert process.returncode == 130
    assert process.stderr.endswith(f"error: interrupted by {name}\n")
    assert not (tmp_path / "run").exists()


class Gone(io.StringIO):
    """A terminal that somebody has closed."""

    def write(self, text):
        raise BrokenPipeError


def test_who_reads_only_the_beginning_does_not_end_the_run(cakd, words, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Gone())
    result = cakd(*words, "--out", tmp_path / "run")

    assert result.code == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["ended"] == "completed"


def test_a_batch_that_does_not_fit_is_cut_when_told(cakd, words, tmp_path, monkeypatch):
    """Full after some steps, as where another process takes memory: it goes on from the last checkpoint."""
    original = loop.Trainer._learn

    def full(self, batch, answers):
        if self.recipe.engine.gradient_accumulation < 4 and self.epoch == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        original(self, batch, answers)

    monkeypatch.setattr(loop.Trainer, "_learn", full)
    failed = cakd(*words, "--out", tmp_path / "failed")
    result = cakd(*words, "--out", tmp_path / "run", "engine.out_of_memory=accumulate")

    assert failed.code == 7
    assert "full with 24 images at a time" in failed.err
    assert "hint: cut the batch into parts of 12: engine.gradient_accumulation=2; engine.out_of_mem" in failed.err
    assert result.code == 0, result.err
    for parts in (2, 4):
        assert (
            f"warning: the device's memory is full: the batch is cut into {parts} parts of {24 // parts}" in result.err
        )
    assert "resumed after epoch 1, step 0" in result.err
    assert "gradient_accumulation: 4" in (tmp_path / "run" / "recipe.yaml").read_text()
    again = cakd(*words, "--out", tmp_path / "run", "engine.out_of_memory=accumulate", "--resume")
    assert "already finished" in again.err, again.err


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
def test_a_worker_that_dies_is_an_error(cakd, tmp_path, monkeypatch):
    """As where the system kills the largest process because memory is short."""
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (30, 30)).save(tmp_path / "images" / part / name / f"{i}.png")
    original = loop.Trainer.train_step

    def deadly(self, *arguments):
        original(self, *arguments)
        for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)

    monkeypatch.setattr(loop.Trainer, "train_step", deadly)
    words = ("train-teacher", "--data", f"folder:{tmp_path / 'images'}", "data.image_size=24", "data.workers=1")
    words = (*words, "--model", "resnet8", "--batch-size", 2, "--epochs", 1, "--out", tmp_path / "run")
    result = cakd(*words)
    monkeypatch.undo()

    assert result.code == 7
    assert "a process that decodes images died" in result.err
    assert cakd(*words, "--resume").code == 0


def test_another_number_of_threads_is_said(cakd, words, tmp_path, monkeypatch):
    with killed_after(8):
        cakd(*words, "--out", tmp_path / "run")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    result = cakd(*words, "--out", tmp_path / "run", "--resume")

    assert result.code == 0
    assert "began with 1 threads and goes on with 2: the last digits may differ" in result.err


def test_a_folder_that_cannot_be_written_is_one_error(cakd, words, tmp_path, monkeypatch):
    original = files.save_file
    for error, sentence in (
        (OSError(30, "Read-only file system"), "Read-only"),
        (OSError(122, "Disk quota exc"), "quota"),
    ):

        def refused(tensors, path, metadata, error=error):
            raise error

        monkeypatch.setattr(files, "save_file", refused)
        result = cakd(*words, "--out", tmp_path / "run", "--overwrite")
        assert (result.code, sentence in result.err) == (4, True), result.err
    monkeypatch.setattr(files, "save_file", original)
    assert cakd(*words, "--out", tmp_path / "run", "--resume").code == 0


MOUNT = """
set -e
mount -t tmpfs -o size=16m tmpfs {mount}
dd if=/dev/zero of={mount}/filler bs=1K count={used} status=none
"{python}" -m cakd_cli {words} --out {mount}/run > {mount}.txt 2>&1 && exit 9
cat {mount}.txt >&2
find {mount}/run -name '*.tmp*' -printf 'left over: %p' >&2
rm {mount}/filler
"{python}" -m cakd_cli {words} --out {mount}/run --resume
cp {mount}/run/model.safetensors {mount}.safetensors
"""


@pytest.mark.slow
@pytest.mark.parametrize("room", [100, 900, 1500, 2500])
def test_a_file_system_that_fills_in_the_middle_of_a_checkpoint(words, straight, tmp_path, room):
    """A real one of 16 MB, where the user may mount: with so many KB left when the run begins."""
    mount = tmp_path / "mount"
    mount.mkdir()
    used = 16 * 1024 - room
    script = MOUNT.format(mount=mount, python=sys.executable, words=shlex.join(map(str, words)), used=used)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = ["unshare", "-rm", "bash", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if "unshare failed" in done.stderr or "permission denied" in done.stderr:
        pytest.skip(done.stderr)

    assert done.returncode == 0, done.stderr
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert "left over" not in done.stderr
    for name, tensor in load_file(straight[0] / "model.safetensors").items():
        assert torch.equal(tensor, load_file(f"{mount}.safetensors")[name]), name


def test_cutting_batches_within_an_epoch_leaves_its_means_right(cakd, words, undisturbed, tmp_path, monkeypatch):
    settings, straight = undisturbed
    if settings:
        pytest.skip("its weights follow the means, which differ in their last digits")
    original = loop.Trainer._learn

    def full(self, batch, answers):
        if self.recipe.engine.gradient_accumulation == 1 and (self.epoch, self.step) == (0, 4):
            raise torch.OutOfMemoryError("CUDA out of memory")
        original(self, batch, answers)

    monkeypatch.setattr(loop.Trainer, "_learn", full)
    result = cakd(*words, "--out", tmp_path / "run", "engine.out_of_memory=accumulate")

    assert result.code == 0, result.err
    assert "resumed after epoch 0, step 4" in result.err
    one, other = (lines(path)[0]["train"] for path in (straight, tmp_path / "run"))
    # Four steps of six are the same, and batch norms see half a batch in the others.
    assert other["cross_entropy"] == pytest.approx(one["cross_entropy"], rel=0.2)


def test_a_full_device_before_training_replaces_nothing(cakd, words, straight, tmp_path, monkeypatch):
    shutil.copytree(straight[0], tmp_path / "run")

    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run, "_build", full)
    result = cakd(*words, "--out", tmp_path / "run", "--overwrite", "engine.out_of_memory=accumulate")

    assert (result.code, "already finished" in result.err) == (7, False), result.err
    assert_same_run(straight[0], tmp_path / "run")
