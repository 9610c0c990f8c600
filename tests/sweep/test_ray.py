"""A sweep on a Ray cluster that loses a node, or is stopped. Needs ray; run with pytest -m slow."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from cakd_cli.engine.run_directory import RunDirectory

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def cluster(monkeypatch):
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    monkeypatch.setenv("RAY_ADDRESS", found.address)
    yield found
    ray.shutdown()
    found.shutdown()


def test_a_node_that_is_killed_costs_no_run(cluster, toy_file, toy_teacher, tmp_path, cakd):
    second = cluster.add_node(num_cpus=1)
    sweep = ("sweep", "--data", f"tensors:{toy_file}", "--teacher", toy_teacher, "--student", "resnet8")
    sweep += ("engine.precision=fp32", "engine.compile=off", "data.crop_padding=0", "engine.checkpoint_seconds=1")
    sweep += ("--epochs", 60, "--batch-size", 16, "--device", "cpu", "--loss", "kd", "--seeds", 2)
    out, killed = tmp_path / "sweep", []

    def kill():
        deadline = time.monotonic() + 200
        while len(list(out.glob("*/checkpoints/epoch-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
        killed.append(sorted(path.parent.parent.name for path in out.glob("*/checkpoints/epoch-*")))
        cluster.remove_node(second, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    result = cakd(*sweep, "--out", out, "--on", "ray", "--json")
    killer.join()

    assert result.code == 0, result.err
    assert len(killed[0]) >= 2  # runs under way
    assert {group["name"]: group["seeds"] for group in result.document["comparison"]["groups"]} == {
        "cross-entropy": [0, 1],
        "kd": [0, 1],
    }
    resumed = [path.name for path in out.iterdir() if RunDirectory(path).facts().get("resumed")]
    assert resumed  # what the killed node had begun went on elsewhere


def test_no_cluster_is_said(toy_file, toy_teacher, tmp_path, cakd, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    sweep = ("sweep", "--data", f"tensors:{toy_file}", "--teacher", toy_teacher, "--student", "resnet8")

    result = cakd(*sweep, "--out", tmp_path / "sweep", "--on", "ray")

    assert result.code == 7
    assert "no Ray cluster" in result.err


def test_ctrl_c_stops_the_runs_where_they_can_go_on(cluster, toy_file, toy_teacher, tmp_path):
    out = tmp_path / "sweep"
    command = [
        sys.executable,
        "-m",
        "cakd_cli",
        "sweep",
        "--data",
        f"tensors:{toy_file}",
        "--teacher",
        str(toy_teacher),
    ]
    command += ["--student", "resnet8", "--loss", "kd", "--seeds", "1", "--epochs", "400", "--batch-size", "16"]
    command += ["--device", "cpu", "engine.precision=fp32", "engine.compile=off", "engine.checkpoint_seconds=1"]
    process = subprocess.Popen([*command, "--out", str(out), "--on", "ray"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not list(out.glob("*/checkpoints/epoch-*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    begun = next(out.glob("*/checkpoints")).parent

    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=100)

    assert process.returncode == 75, said
    assert "the same command goes on" in said
    assert RunDirectory(begun).facts()["ended"] == "stopped"
