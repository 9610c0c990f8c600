"""Several processes train the run that one would have trained."""

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cakd_cli.data import Share
from cakd_cli.engine import distributed
from cakd_cli.engine.optimizer import LossScale
from cakd_cli.errors import HardwareError, RecipeError
from tests.engine.test_resume import wait_for

WORKER = Path(__file__).with_name("ranks.py")
COMMON = (
    "--student",
    "resnet8",
    "--batch-size",
    "48",
    "--device",
    "cpu",
    "--epochs",
    "2",
    "optimizer.learning_rate=0.002",
)
DIVERGES = ("optimizer.learning_rate=100", "optimizer.momentum=0.99", "optimizer.weight_decay=1")
METHODS = {
    "kd": ("--loss", "kd"),
    "cakd": ("--loss", "cakd", "loss.1.beta={type: adaptive, base: 8}", "engine.ema_decay=0.8"),
    "ctkd": ("--loss", "ctkd", "engine.gradient_accumulation=2"),
    "shares": ("--loss", "cakd", "engine.ema_decay=0.8", "engine.parallel=fsdp", "engine.teacher_memory=ram"),
    "own batch norms": ("--loss", "kd", "engine.sync_batch_norm=false"),
}
SLOW = ("ctkd", "shares")


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def launch(count, jobs, folder, *, stop_after=0):
    """Start the processes as torchrun would, without its own."""
    folder.mkdir(exist_ok=True)
    described = [{"words": list(map(str, job)), "port": free_port(), "stop_after": stop_after} for job in jobs]
    (folder / "jobs.json").write_text(json.dumps(described))
    environment = os.environ | {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder / "jobs.json")],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def run_ranks(count, jobs, folder, *, stop_after=0):
    said = [process.communicate(timeout=580) for process in launch(count, jobs, folder, stop_after=stop_after)]
    return json.loads((folder / "results.json").read_text()), said


@pytest.fixture(scope="session")
def trained(toy_file, toy_teacher, tmp_path_factory):
    """Methods on one process and on two, with what was said; the test processes share it."""
    folder = tmp_path_factory.getbasetemp().parent / f"ranks-{os.environ.get('PYTEST_XDIST_TESTRUNUID')}"
    return trained_in(folder, [name for name in METHODS if name not in SLOW], toy_file, toy_teacher)


@pytest.fixture(scope="session")
def trained_slowly(toy_file, toy_teacher, tmp_path_factory):
    """The other methods likewise."""
    folder = tmp_path_factory.getbasetemp().parent / f"slow-ranks-{os.environ.get('PYTEST_XDIST_TESTRUNUID')}"
    return trained_in(folder, SLOW, toy_file, toy_teacher)


def trained_in(folder, names, toy_file, toy_teacher):
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        if not (folder / "done.json").exists():
            # Of this process, and the others read them.
            shutil.copy(toy_file, folder / "toy.safetensors")
            shutil.copytree(toy_teacher, folder / "teacher")
            (folder / "done.json").write_text(json.dumps({count: train(count, names, folder) for count in (1, 2)}))
    return folder, {int(count): done for count, done in json.loads((folder / "done.json").read_text()).items()}


def train(count, names, folder):
    jobs = {name: (*words(folder), *METHODS[name], "--out", folder / f"{count} {name}") for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAKD_HOME", str(folder / f"home{count}"))
        results, said = run_ranks(count, jobs.values(), folder / f"jobs{count}")
    assert [result["code"] for result in results] == [0] * len(jobs), said
    return {name: result["losses"] for name, result in zip(jobs, results, strict=True)}, said


def words(folder):
    data = ("--data", f"tensors:{folder / 'toy.safetensors'}", "--teacher", folder / "teacher")
    return ("distill", *COMMON, *data, "engine.teacher_memory=disk")


def lines(folder, count, name):
    return [json.loads(line) for line in (folder / f"{count} {name}" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["kd", "cakd", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_two_processes_train_the_same_run(request, name):
    folder, done = request.getfixturevalue("trained_slowly" if name in SLOW else "trained")
    one, two = (torch.tensor(done[count][0][name]) for count in (1, 2))

    assert one.shape == two.shape
    assert ((one - two).abs() <= 1e-5 * one.abs().clamp(min=1)).all()
    for alone, together in zip(lines(folder, 1, name), lines(folder, 2, name), strict=True):
        assert together["train"] == pytest.approx(alone["train"], abs=1e-4)
        assert together["validation"] == pytest.approx(alone["validation"], abs=1e-4)
        assert together.get("gradient_norm", {}) == pytest.approx(alone.get("gradient_norm", {}), rel=1e-3)
        # Every view is asked about once by whoever meets it first, and later runs find it.
        assert together["teacher"] == alone["teacher"]
    for key, value in load_file(folder / f"1 {name}" / "model.safetensors").items():
        assert torch.allclose(value, load_file(folder / f"2 {name}" / "model.safetensors")[key], atol=1e-4), key


def test_own_batch_norms_are_another_run(trained):
    _, done = trained
    one, two = (torch.tensor(done[count][0]["own batch norms"]) for count in (1, 2))

    assert (one - two).abs().max() > 1e-3
    assert two[:, 0].isfinite().all()


def test_one_process_speaks(trained):
    folder, done = trained
    (out, err), (other_out, other_err) = done[2][1]

    assert out.count("test top-1") == len(METHODS) - len(SLOW)
    assert "epoch 1/2" in err
    assert (other_out, other_err) == ("", "")
    facts = json.loads((folder / "2 kd" / "run.json").read_text())
    assert facts["hardware"]["ranks"] == 2
    assert facts["hardware"]["hosts"] == [socket.gethostname()]


@pytest.mark.slow
def test_the_processes_fail_with_one_voice(toy_file, toy_teacher, tmp_path):
    """What both see is said once, what rank 0 alone sees as well; a batch that cannot be shared is refused."""
    common = ("distill", *COMMON, "--data", f"tensors:{toy_file}", "--teacher", toy_teacher, "--loss", "kd")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "diary.txt").write_text("dear diary")
    jobs = [
        (*common, "--out", tmp_path / "taken"),
        (*common, "--out", tmp_path / "odd", "--batch-size", 47),
        (*common, "--out", tmp_path / "wrong", "optimizer.learning_rte=1"),
        (*common, "--out", tmp_path / "diverged", "engine.epochs=30", *DIVERGES),
        ("bench", *COMMON[:4], "loss=kd", "--data", f"tensors:{toy_file}", "--teacher", toy_teacher),
    ]

    results, said = run_ranks(2, jobs, tmp_path / "jobs")

    assert [result["code"] for result in results] == [4, 3, 3, 5, 7]
    text = "".join(err for _, err in said)
    for sentence in (
        "holds files that are not a run's: diary.txt",
        "engine.batch_size is 47, which 2 processes cannot share equally\n",
        "unknown key; did you mean learning_rate?",
        "not finite",
    ):
        assert text.count(sentence) == 1, text
    assert "Traceback" not in text


def test_a_batch_is_shared_without_gaps():
    order, size = torch.randperm(50), 24
    shares = [Share(rank, 4, parts=2).of(order, size).view(2, 2, 3) for rank in range(4)]

    assert torch.equal(torch.cat(shares, dim=2).flatten(), order[:48])
    assert torch.equal(Share(parts=3).of(order, size), order[:48])


def test_a_launcher_that_says_too_little_is_named(cakd, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")

    result = cakd("distill", "--loss", "kd")

    assert result.code == 7
    assert "WORLD_SIZE is 2, and RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set" in result.err
    assert "torchrun" in result.err


def test_batch_norm_of_all_is_batch_norm(monkeypatch):
    """With one process the sum over all is its own."""
    monkeypatch.setattr(distributed.distributed, "all_reduce", lambda tensor: None)
    monkeypatch.setattr(distributed.distributed, "get_world_size", lambda: 1)
    torch.manual_seed(0)
    plain, images = nn.BatchNorm2d(3, dtype=torch.float64), torch.randn(5, 3, 4, 4, dtype=torch.float64)
    nn.init.normal_(plain.weight)
    same = nn.BatchNorm2d(3, dtype=torch.float64)
    same.load_state_dict(plain.state_dict())
    (same,) = distributed.synchronise_batch_norms(nn.Sequential(same), torch.device("cpu"))
    given = [images.clone().requires_grad_() for _ in range(2)]
    for network, input_ in ((plain, given[0]), (same, given[1])):
        network(input_).pow(3).sum().backward()

    assert torch.allclose(given[0].grad, given[1].grad, atol=1e-12)
    assert torch.allclose(plain.weight.grad, same.weight.grad)
    for key, value in plain.state_dict().items():
        assert torch.allclose(value, same.state_dict()[key]), key
    assert torch.allclose(plain.eval()(images), same.eval()(images))


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(2, 1), (1, 2, 4, 1)], ids=str)
def test_another_number_of_processes_goes_on(trained, tmp_path, monkeypatch, counts):
    """One asks to stop and all do; the last one ends as one alone does."""
    monkeypatch.setenv("CAKD_HOME", str(trained[0] / "home1"))
    resumed = (*words(trained[0]), *METHODS["kd"], "--resume", "--out", tmp_path / "run")
    losses = []
    for number, count in enumerate(counts):
        steps, code = (1, 75) if number < len(counts) - 1 else (0, 0)
        results, said = run_ranks(count, [resumed], tmp_path / f"jobs{number}", stop_after=steps)
        assert results[0]["code"] == code, said
        text = "".join(err for _, err in said)
        assert text.count("stopped by SIGTERM after epoch") == (code == 75), text
        losses += results[0]["losses"]

    straight = torch.tensor(trained[1][1][0]["kd"])
    assert (straight - torch.tensor(losses)).abs().max() < 1e-5
    one = load_file(trained[0] / "1 kd" / "model.safetensors")
    for key, value in load_file(tmp_path / "run" / "model.safetensors").items():
        assert torch.allclose(value, one[key], atol=1e-4), key
    begun = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (begun["hardware"].get("ranks", 1), len(begun["resumed"])) == (counts[0], len(counts) - 1)


SHARDED = {
    "cakd": (*METHODS["cakd"], "optimizer.type=adamw", "engine.teacher_memory=ram"),
    "ctkd": (*METHODS["ctkd"], "engine.ema_decay=0.8", "engine.teacher_memory=off"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cakd", "ctkd"])
def test_shares_of_a_network_train_the_same_run(toy_file, toy_teacher, tmp_path, name):
    """What each process holds of the student, the connectors, the average and the live teacher changes no number."""
    wide = ("distill", *COMMON, "--student", "wrn-16-2", "--data", f"tensors:{toy_file}", "--teacher", toy_teacher)
    jobs = {
        parallel: (*wide, *SHARDED[name], f"engine.parallel={parallel}", "--out", tmp_path / parallel)
        for parallel in ("ddp", "fsdp")
    }
    results, said = run_ranks(2, jobs.values(), tmp_path / "jobs")
    assert [result["code"] for result in results] == [0] * len(jobs), said
    ddp, fsdp = (torch.tensor(result["losses"]) for result in results)
    assert (ddp - fsdp).abs().max() < 1e-5
    state = load_file(tmp_path / "ddp" / "model.safetensors")
    for key, value in load_file(tmp_path / "fsdp" / "model.safetensors").items():
        assert torch.allclose(value, state[key], atol=1e-5), key
    if name == "cakd":
        return

    # Cut over two, then whole in one: a checkpoint knows nothing of shares.
    resumed = (*wide, *SHARDED[name], "engine.parallel=fsdp", "--resume", "--out", tmp_path / "resumed")
    stopped, said = run_ranks(2, [resumed], tmp_path / "first", stop_after=4)
    assert stopped[0]["code"] == 75, said
    finished, said = run_ranks(1, [resumed], tmp_path / "second")
    assert finished[0]["code"] == 0, said
    both = torch.tensor(stopped[0]["losses"] + finished[0]["losses"])
    assert (both - ddp).abs().max() < 1e-4


def torchrun(*words, count=2, restarts=3):
    command = ["torchrun", "--nproc-per-node", count, "--max-restarts", restarts, "--master-port", free_port()]
    return subprocess.Popen(
        [*map(str, command), "-m", "cakd_cli", *map(str, words)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ranks_below(process):
    """The processes that torchrun has started, youngest last."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children if b"cakd_cli" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
def test_torchrun_restarts_what_was_killed(trained, tmp_path, monkeypatch):
    """Without --resume: a restarted process goes on."""
    monkeypatch.setenv("CAKD_HOME", str(trained[0] / "home1"))
    process = torchrun(*words(trained[0]), *METHODS["kd"], "engine.checkpoint_seconds=0", "--out", tmp_path / "run")
    wait_for(lambda: len(list((tmp_path / "run").glob("checkpoints/epoch-*"))) > 0, process)
    os.kill(ranks_below(process)[-1], signal.SIGKILL)
    out, err = process.communicate(timeout=120)

    assert process.returncode == 0, err
    assert out.count("test top-1") == 1
    assert "Traceback" not in err
    one = load_file(trained[0] / "1 kd" / "model.safetensors")
    for key, value in load_file(tmp_path / "run" / "model.safetensors").items():
        assert torch.allclose(value, one[key], atol=1e-4), key


def test_batch_norms_that_do_more_are_refused():
    """timm's hold an activation, which a plain one would lose."""
    norm = pytest.importorskip("timm.layers").BatchNormAct2d(4)

    for device in ("cpu", "cuda"):
        with pytest.raises(RecipeError, match="BatchNormAct2d"):
            distributed.synchronise_batch_norms(nn.Sequential(norm), torch.device(device))


def test_batch_norm_of_all_in_sixteen_bits(monkeypatch):
    monkeypatch.setattr(distributed.distributed, "all_reduce", lambda tensor: None)
    monkeypatch.setattr(distributed.distributed, "get_world_size", lambda: 1)
    network = distributed.synchronise_batch_norms(nn.Sequential(nn.BatchNorm2d(3)), torch.device("cpu"))
    images = torch.randn(5, 3, 4, 4)

    assert network(images.bfloat16()).dtype == torch.bfloat16
    assert torch.allclose(network(images.bfloat16()).float(), nn.BatchNorm2d(3)(images), atol=0.05)


def test_processes_that_see_different_things_are_refused(monkeypatch):
    ranks = distributed.Ranks(0, 2)
    monkeypatch.setattr(distributed.Ranks, "gathered", lambda self, facts: [facts, {**facts, "precision": "fp16"}])

    ranks.check_alike(images={"train": "a"})
    with pytest.raises(HardwareError, match="differ in precision: bf16, fp16"):
        ranks.check_alike(images={"train": "a"}, precision="bf16")


def test_a_gradient_that_overflows_on_one_process_is_left_out_by_all(monkeypatch):
    """Each may look at its own share of the gradients alone."""
    ranks = distributed.Ranks(0, 2)
    monkeypatch.setattr(distributed.Ranks, "largest", lambda self, tensor: torch.ones_like(tensor))
    scale = LossScale(torch.device("cpu"))
    before = scale.factor.clone()

    assert scale.unscale([torch.ones(3)], ranks) == 1
    assert scale.factor == before / 2
