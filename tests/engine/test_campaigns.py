"""Many random accidents: what a few chosen ones in the other tests may have missed. Run with pytest -m slow -n0 -s."""

import collections
import json
import mmap
import os
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cakd_cli.engine import checkpoints, loop, run
from cakd_cli.export import onnx_file
from cakd_cli.process import main
from cakd_cli.teachers.memory import TeacherMemory
from tests.conftest import train_toy, write_tensors_file
from tests.engine.test_distributed import METHODS, ranks_below, run_ranks, torchrun, words
from tests.engine.test_resume import assert_same_run, command, start, wait_for

pytestmark = pytest.mark.slow
# What a child is doing, by its number in memory that both processes see.
DOING = {
    "a step": (loop.Trainer, "train_step"),
    "a checkpoint": (checkpoints.Checkpoints, "save"),
    "validation": (loop.Trainer, "validate"),
    "the end": (run, "_finish"),
    "recording answers": (TeacherMemory, "record"),
    "export": (onnx_file, "write"),
}


class Children:
    """Forks this process, which has imported everything, to run the command line; kills what it has forked."""

    def __init__(self, patch):
        self._doing = mmap.mmap(-1, 1)
        for number, (owner, name) in enumerate(DOING.values(), start=1):
            patch.setattr(owner, name, self._noted(getattr(owner, name), number))

    def _noted(self, function, number):
        def noted(*arguments, **options):
            before, self._doing[0] = self._doing[0], number
            try:
                return function(*arguments, **options)
            finally:
                self._doing[0] = before

        return noted

    def run(self, words, seconds=None):
        """Exit code; if it took longer than so many seconds, what it was doing when it was killed."""
        self._doing[0] = 0
        child = os.fork()
        if not child:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
            sys.argv = ["cakd", *map(str, words)]
            try:
                main()
            except SystemExit as stop:
                os._exit(stop.code)
        began = time.monotonic()
        while seconds is None or time.monotonic() - began < seconds:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return ("somewhere else", *DOING)[self._doing[0]]


def test_killed_at_two_hundred_instants(toy_file, toy_teacher, tmp_path, monkeypatch, capfd):
    """Fresh answers are asked for in every run; killed again and again until it ends, then exported."""
    draw, killed, runs = random.Random(0), collections.Counter(), 0
    words = (*command(toy_file, toy_teacher), "data.crop_padding=1", "engine.teacher_memory=disk")
    children = Children(monkeypatch)
    monkeypatch.setenv("CAKD_HOME", str(tmp_path / "home"))
    began = time.monotonic()
    assert children.run((*words, "--out", tmp_path / "straight")) == 0
    longest = time.monotonic() - began
    while killed.total() < 200:
        runs += 1
        monkeypatch.setenv("CAKD_HOME", str(tmp_path / f"home{runs}"))
        out = tmp_path / f"run{runs}"
        while (code := children.run((*words, "--out", out, "--resume"), draw.uniform(0, longest))) != 0:
            assert code in ("somewhere else", *DOING), code
            killed[code] += 1
        assert_same_run(tmp_path / "straight", out)
        exporting = ("export", out, "--format", "onnx", "--out", tmp_path / "net.onnx", "--overwrite")
        code = children.run(exporting, draw.uniform(0, 3))
        if code != 0:
            killed[code] += 1
            assert children.run(exporting) == 0
        assert [path.name for path in tmp_path.glob(".net*")] == []
        assert [path.name for path in out.rglob("*.tmp*")] == []
        shutil.rmtree(tmp_path / f"home{runs}", ignore_errors=True)
    with capfd.disabled():
        print(f"\n{killed.total()} kills in {runs} runs: {dict(killed)}; all ended bit-identical")  # noqa: T201 - the figure


def test_ranks_killed_at_twenty_instants(tmp_path, monkeypatch, capfd):
    toy = write_tensors_file(tmp_path / "toy.safetensors")
    train_toy(toy, tmp_path / "teacher")
    monkeypatch.setenv("CAKD_HOME", str(tmp_path / "home"))
    draw, seconds = random.Random(1), []
    job = (*words(tmp_path), *METHODS["kd"], "--epochs", 20, "engine.checkpoint_seconds=0")
    straight = torchrun(*job, "--out", tmp_path / "straight")
    assert (straight.communicate(timeout=120), straight.returncode)[1] == 0
    expected = load_file(tmp_path / "straight" / "model.safetensors")
    kills = 0
    while kills < 20:
        out = tmp_path / f"run{kills}"
        process = torchrun(*job, "--out", out, restarts=9)
        for _ in range(2):
            time.sleep(draw.uniform(3, 9))
            alive = ranks_below(process) if process.poll() is None else []
            if alive:
                os.kill(draw.choice(alive), signal.SIGKILL)
                kills, began = kills + 1, time.monotonic()
        _, err = process.communicate(timeout=240)
        seconds.append(time.monotonic() - began)
        assert process.returncode == 0, err
        for key, value in load_file(out / "model.safetensors").items():
            assert (value - expected[key]).abs().max() < 1e-3, key
        figures = [json.loads((path / "run.json").read_text())["metrics"] for path in (out, tmp_path / "straight")]
        assert figures[0]["test"]["top1"] == pytest.approx(figures[1]["test"]["top1"], abs=0.02)
    with capfd.disabled():
        print(f"\n{kills} kills of a rank; the run ended {min(seconds):.0f} to {max(seconds):.0f} s after its last")  # noqa: T201 - the figure


def test_asked_to_stop_at_twenty_instants(toy_file, toy_teacher, tmp_path, capfd):
    """Under load: another process computes beside it."""
    draw, seconds = random.Random(2), []
    words = [*command(toy_file, toy_teacher), "--epochs", "100000", "engine.compile=off", "--grace", "20"]
    load = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        for number in range(20):
            out = tmp_path / f"run{number}"
            process = start(words, out)
            wait_for(lambda out=out: len(list(out.glob("checkpoints/epoch-*"))) > 1, process)
            time.sleep(draw.uniform(0, 1))
            process.terminate()
            began = time.monotonic()
            _, err = process.communicate(timeout=60)
            seconds.append(time.monotonic() - began)
            assert process.returncode == 75, err
            assert seconds[-1] < 20
    finally:
        load.kill()
        load.wait()
    with capfd.disabled():
        print(f"\nstopped within {max(seconds):.1f} s at most, n {len(seconds)}")  # noqa: T201 - the figure


def test_five_hundred_wrong_bits(toy_file, toy_teacher, tmp_path, monkeypatch, capsys, cakd):
    """In checkpoints, the finished run and the teacher memory: never another result without a word."""
    draw, found = random.Random(3), collections.Counter()
    monkeypatch.setenv("CAKD_HOME", str(tmp_path / "home"))
    words = (*command(toy_file, toy_teacher), "engine.teacher_memory=disk")
    children = Children(monkeypatch)
    assert children.run((*words, "--out", tmp_path / "straight")) == 0
    while not list((tmp_path / "killed").glob("checkpoints/epoch-*-step-00000[1-9]")):
        if children.run((*words, "--out", tmp_path / "killed", "--resume"), draw.uniform(0.2, 1.5)) == 0:
            shutil.rmtree(tmp_path / "killed")  # it was too fast
    memory = next((tmp_path / "home" / "teacher-memory").iterdir())
    for number in range(500):
        kind = ("killed", "straight", "memory")[number % 3]
        folder = memory if kind == "memory" else tmp_path / kind
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy, copy_function=sparse_copy)
        file = draw.choice([path for path in sorted(copy.rglob("*")) if path.is_file() and path.stat().st_size])
        flip(file, draw)
        if kind == "memory":
            shutil.rmtree(folder)
            copy.rename(folder)
            result = children.run((*words, "--out", tmp_path / "run"))
            outcome = "same result" if result == 0 else f"exit {result}"
            if result == 0:
                assert_same_run(tmp_path / "straight", tmp_path / "run")
            shutil.rmtree(folder)
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            assert children.run((*words, "--out", tmp_path / "run")) == 0
            shutil.rmtree(tmp_path / "run")
        elif kind == "killed":
            result = children.run((*words, "--out", copy, "--resume"))
            outcome = "same result" if result == 0 else f"exit {result}"
            if result == 0:
                same = load_file(copy / "model.safetensors")
                assert all(v.equal(same[k]) for k, v in load_file(tmp_path / "straight/model.safetensors").items()), (
                    file
                )
        else:
            result = cakd("eval", copy, "--json")
            assert result.code in (0, 2, 3, 4), result.err
            assert "Traceback" not in result.err
            outcome = f"exit {result.code}"
            if result.code == 0 and file.name == "model.safetensors":
                same = cakd("eval", tmp_path / "straight", "--json").document["quality"]
                assert result.document["quality"] == same, file
        found[kind, outcome] += 1
        shutil.rmtree(copy, ignore_errors=True)
    assert {outcome for _, outcome in found} <= {"same result", "exit 0", "exit 2", "exit 3", "exit 4"}
    with capsys.disabled():
        print(f"\n{found.total()} wrong bits: {dict(found)}")  # noqa: T201 - the figure


def sparse_copy(source, target):
    shutil.copyfile(source, target)


def flip(file: Path, draw: random.Random) -> None:
    with file.open("r+b") as content:
        place = draw.randrange(file.stat().st_size)
        content.seek(place)
        byte = content.read(1)[0] ^ 1 << draw.randrange(8)
        content.seek(place)
        content.write(bytes([byte]))


# With a larger rate rounding grows from step to step: at 5e-4 to 5e-4 of the loss, whatever is compared.
@pytest.mark.parametrize("sync", ["true", "false"])
def test_two_hundred_steps_on_one_two_and_four_processes(tmp_path, monkeypatch, capfd, sync):
    """The same losses, with a connector too; without the batch norms of all, how many images a second."""
    toy = write_tensors_file(tmp_path / "toy.safetensors")
    train_toy(toy, tmp_path / "teacher", model="resnet8x4")
    features = ("loss=cakd", "loss.2.mask=activation", "loss.2.layers=[{student: layer3, teacher: layer3}]")
    methods = {"kd": ("loss=kd",), "cakd": features, "ctkd": ("loss=ctkd",)}
    more = ("--epochs", "67", "optimizer.learning_rate=0.000002", f"engine.sync_batch_norm={sync}")
    losses, rates = {}, {}
    for count in (1, 2, 4):
        monkeypatch.setenv("CAKD_HOME", str(tmp_path / f"home{count}"))
        outs = {name: tmp_path / f"{count}{name}" for name in methods}
        jobs = [(*words(tmp_path), *methods[name], *more, "--out", out) for name, out in outs.items()]
        results, said = run_ranks(count, jobs, tmp_path / f"jobs{count}")
        assert [result["code"] for result in results] == [0, 0, 0], said
        for (name, out), result in zip(outs.items(), results, strict=True):
            losses[count, name] = torch.tensor(result["losses"])[:, 0]
            lines = (out / "metrics.jsonl").read_text().splitlines()
            rates[count, name] = statistics.median(json.loads(line)["images_per_second"] for line in lines)
    apart = {(count, name): float((losses[count, name] / losses[1, name] - 1).abs().max()) for count, name in losses}
    with capfd.disabled():
        for (count, name), difference in apart.items():
            rate = f"{rates[count, name]:.0f} images/s"
            print(f"\nof all: {sync}, {name} on {count}, {len(losses[1, name])} steps: {difference:.1e}, {rate}")  # noqa: T201
    assert len(losses[1, "kd"]) == 201
    # A wrong factor on a gradient would be seen: the loss moves by far more than what is allowed.
    assert all(abs(float(losses[1, name][-3:].mean() / losses[1, name][:3].mean()) - 1) > 1e-3 for name in methods)
    assert sync == "false" or max(apart.values()) < 1e-5, apart


def test_torchrun_is_asked_to_stop(tmp_path, monkeypatch, capfd):
    """By a signal to torchrun, as a scheduler sends it: every rank saves, and the next start goes on."""
    toy = write_tensors_file(tmp_path / "toy.safetensors")
    train_toy(toy, tmp_path / "teacher")
    monkeypatch.setenv("CAKD_HOME", str(tmp_path / "home"))
    job = (
        *words(tmp_path),
        *METHODS["kd"],
        "--epochs",
        4000,
        "engine.compile=off",
        "--grace",
        20,
        "--out",
        tmp_path / "run",
    )
    process = torchrun(*job, "engine.checkpoint_seconds=0")
    wait_for(lambda: len(list((tmp_path / "run").glob("checkpoints/epoch-*"))) > 1, process)
    process.terminate()
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    with capfd.disabled():
        print(f"\ntorchrun ended with {process.returncode} after {time.monotonic() - began:.1f} s")  # noqa: T201 - the figure

    assert err.count("stopped by SIGTERM after epoch") == 1, err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["ended"] == "stopped"


HOSTS = """
set -e
ip netns add cakd0; ip netns add cakd1
trap 'ip netns del cakd0; ip netns del cakd1' EXIT
ip link add veth0 netns cakd0 type veth peer name veth1 netns cakd1
for i in 0 1; do
  ip -n cakd$i addr add 10.77.0.$((i + 1))/24 dev veth$i; ip -n cakd$i link set veth$i up; ip -n cakd$i link set lo up
done
for i in 1 0; do
  GLOO_SOCKET_IFNAME=veth$i ip netns exec cakd$i torchrun --nnodes 2 --node-rank $i --nproc-per-node 1 \\
    --master-addr 10.77.0.1 --master-port 29511 -m cakd_cli {words} --out {out}$([ $i = 1 ] && echo -of-the-other) &
done
wait -n; wait -n
"""


def test_two_hosts(tmp_path, monkeypatch):
    """Two network namespaces of one machine, and no folder in common but the data; where the user may make them."""
    toy = write_tensors_file(tmp_path / "toy.safetensors")
    train_toy(toy, tmp_path / "teacher")
    monkeypatch.setenv("CAKD_HOME", str(tmp_path / "home"))
    job = (*words(tmp_path), *METHODS["kd"])
    script = HOSTS.format(words=shlex.join(map(str, job)), out=tmp_path / "run")
    probe = subprocess.run(["unshare", "-n", "ip", "link"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("no right to make network namespaces, or no ip")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = ["bash", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)
    if "Operation not permitted" in done.stderr:
        pytest.skip(done.stderr)
    (one,), said = run_ranks(1, [(*job, "--out", tmp_path / "one")], tmp_path / "jobs")

    assert done.returncode == 0, done.stderr
    assert one["code"] == 0, said
    assert not (tmp_path / "run-of-the-other").exists()
    expected = load_file(tmp_path / "one" / "model.safetensors")
    for key, value in load_file(tmp_path / "run" / "model.safetensors").items():
        assert torch.allclose(value, expected[key], atol=1e-4), key
