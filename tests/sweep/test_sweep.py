"""cakd sweep as it is typed; its runs are processes, so these tests take seconds."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from cakd_cli.engine import run_directory
from cakd_cli.process import main
from cakd_cli.sweep import here
from cakd_cli.sweep.plan import Unit

SHORT = ("engine.precision=fp32", "data.crop_padding=0", "engine.compile=off", "--epochs", 2, "--batch-size", 16)


@pytest.fixture
def words(toy_file, toy_teacher):
    return (
        "--data",
        f"tensors:{toy_file}",
        "--teacher",
        toy_teacher,
        "--student",
        "resnet8",
        "--device",
        "cpu",
        *SHORT,
    )


def forked(self, command, environment, log):
    """Stand in for a process that would import everything again."""
    child = os.fork()
    if not child:
        with log.open("wb") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        sys.argv = ["cakd", *command[3:]]
        try:
            main()
        except SystemExit as stop:
            os._exit(stop.code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_sweep_goes_on_until_all_is_compared(cakd, words, tmp_path, monkeypatch):
    monkeypatch.setattr(here.Processes, "call", forked)
    sweep = ("sweep", *words, "--loss", "kd", "--seeds", 1, "--out", tmp_path / "sweep")
    (tmp_path / "sweep" / "kd-seed0").mkdir(parents=True)
    (tmp_path / "sweep" / "kd-seed0" / "diary.txt").write_text("dear diary")

    failed = cakd(*sweep, "--json")

    assert failed.code == 6
    assert failed.document["error"]["message"] == "1 of 2 runs failed: kd-seed0"
    assert failed.document["failed"][0]["exit"] == 4
    assert "diary.txt" in failed.document["failed"][0]["said"]
    assert [group["name"] for group in failed.document["comparison"]["groups"]] == ["cross-entropy"]

    (tmp_path / "sweep" / "kd-seed0" / "diary.txt").unlink()
    result = cakd(*sweep, "--json")

    assert result.code == 0, result.err
    comparison = result.document["comparison"]
    assert {(group["name"], *group["seeds"]) for group in comparison["groups"]} == {("cross-entropy", 0), ("kd", 0)}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").glob("*/run.json")}

    again = cakd(*sweep)

    assert "2 runs in" in again.err
    assert "2 of them finished before" in again.err
    assert "inconclusive" in again.out
    assert "6 seeds are needed" in again.out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").glob("*/run.json")} == before

    other = cakd(*sweep, "--epochs", 3)

    assert other.code == 6
    assert "exit 3: error: " in other.err
    assert "2 of 2 runs failed" in other.err


def test_a_signal_stops_all_and_starts_no_other(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text("#!/bin/bash\ntrap 'exit 75' TERM\necho begun\nsleep 60 & wait\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    units = [Unit(f"kd-seed{seed}", "kd", seed, ()) for seed in range(5)]
    logs, ended = tmp_path / "sweep" / "logs", []

    def stop():
        while len([log for log in logs.glob("*.txt") if log.read_text()]) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    number = here.run_all(units, tmp_path / "sweep", jobs=2, started=lambda unit: None, ended=ended.append)

    assert number == signal.SIGTERM
    assert [outcome.code for outcome in ended] == [75] * 5
    assert len([outcome for outcome in ended if outcome.seconds > 0]) <= 4
    assert len(list(logs.glob("*.txt"))) == 2


@pytest.mark.slow
def test_a_stopped_sweep_says_how_it_goes_on(cakd, words, tmp_path):
    command = [sys.executable, "-m", "cakd_cli", "sweep", *map(str, words), "--loss", "kd", "--seeds", "1"]
    command += ["--out", str(tmp_path / "sweep"), "--jobs", "2", "--epochs", "400"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "sweep").glob("*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)

    assert process.returncode == 75, err
    assert "the same command goes on with it" in err
    assert list((tmp_path / "sweep").glob("*/checkpoints/epoch-*"))
    assert not any(run_directory.holder(path) for path in (tmp_path / "sweep").iterdir())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--seeds", "0"), "not a number of seeds"),
        (("--seeds", "many"), "not a number of seeds"),
        (("--seeds", "4294967295"), "so many seeds"),
        (("--seeds", ""), "not a number of seeds"),
        (("--out", ""), "--out is empty"),
        (("--on", "ray"), "pip install 'cakd[ray]'"),
    ],
)
def test_wrong_words(cakd, words, tmp_path, monkeypatch, extra, message):
    monkeypatch.setitem(sys.modules, "ray", None)
    result = cakd("sweep", *words, "--out", tmp_path / "sweep", *extra)

    assert result.code in (2, 3)
    assert message in result.err


def test_a_sweep_is_not_written_into_a_run(cakd, words, toy_teacher):
    result = cakd("sweep", *words, "--out", toy_teacher)

    assert result.code == 4
    assert "is a run, not a sweep" in result.err


@pytest.mark.slow
def test_who_trains_a_run_already_is_waited_for(tmp_path, monkeypatch):
    """Two sweeps in one folder share the work; so does one whose first start was killed, and left a run behind."""
    monkeypatch.setattr(here, "_WAIT_SECONDS", 0.05)
    out = tmp_path / "kd-seed0"
    code = (
        "import sys, time; from pathlib import Path; from cakd_cli.engine.run_directory import RunDirectory\n"
        "run = RunDirectory.open(Path(sys.argv[1]), resume=True, overwrite=False)\n"
        "print('locked', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    assert str(other.pid) in run_directory.holder(out)
    called = []
    monkeypatch.setattr(here.Processes, "call", lambda self, *_: called.append(run_directory.holder(out)) or 0)
    worker = threading.Thread(target=here.train, args=(Unit("kd-seed0", "kd", 0, ()), tmp_path, here.Processes()))
    worker.start()
    time.sleep(0.3)
    assert not called
    other.kill()
    other.communicate()
    worker.join(timeout=10)

    assert called == [""]


def test_runs_are_divided_over_devices_and_cores(tmp_path, monkeypatch):
    places = []
    monkeypatch.setattr(here, "devices", lambda: ["cuda:0", "cuda:1"])
    monkeypatch.setattr(os, "cpu_count", lambda: 8)

    def call(self, command, environment, log):
        places.append((command[-1], environment["OMP_NUM_THREADS"]))
        time.sleep(0.05)
        return 0

    monkeypatch.setattr(here.Processes, "call", call)
    units = [Unit(f"kd-seed{seed}", "kd", seed, ()) for seed in range(6)]
    ended = []
    assert here.run_all(units, tmp_path, jobs=2, started=lambda unit: None, ended=ended.append) == 0

    assert sorted(places) == [("cuda:0", "4")] * 3 + [("cuda:1", "4")] * 3
    assert len(ended) == 6


def test_slurm_runs_the_array(cakd, words, tmp_path, monkeypatch):
    """Stand-ins for sbatch and srun run every task of the script with bash; one for cakd notes how it is called."""
    programs = {
        "srun": '#!/bin/bash\nexec "$@"\n',
        "sbatch": "#!/bin/bash\nlast=$(grep -o 'array=0-[0-9]*' \"$2\" | cut -d- -f2)\n"
        'for i in $(seq 0 "$last"); do SLURM_ARRAY_TASK_ID=$i bash "$2"; done >&2\necho "4711;here"\n',
        "scontrol": '#!/bin/bash\necho "$@" >> "$(dirname "$0")/requeued"\n',
        "python": '#!/bin/bash\nprintf "%s\\n" "$*" >> "$(dirname "$0")/called"\nexit 75\n',
    }
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4711")
    sweep = ("sweep", *words, "--loss", "kd", "--seeds", 1, "--out", tmp_path / "my sweep", "--on", "slurm")

    result = cakd(*sweep, "--json")

    assert result.code == 0, result.err
    assert (result.document["job"], result.document["said"][:16]) == ("4711", "job 4711, 2 runs")
    called = (tmp_path / "bin" / "called").read_text().splitlines()
    assert [line.split()[2] for line in called] == ["distill", "distill"]
    assert called[1].endswith(f"--loss kd --seed 0 --out {tmp_path}/my sweep/kd-seed0 --resume -q --grace 100")
    assert (tmp_path / "bin" / "requeued").read_text() == "requeue 4711_0\nrequeue 4711_1\n"
    monkeypatch.setenv("PATH", "/nowhere")
    assert (
        f"sbatch is not here; on a machine that has it: sbatch '{tmp_path}/my sweep/sweep.sbatch'" in cakd(*sweep).out
    )
