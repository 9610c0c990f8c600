"""The literature's protocol: all training images, the last batch whatever its size, last epoch and best on test."""

import json

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from cakd_cli.data import Share
from cakd_cli.engine import loop
from cakd_cli.engine.optimizer import learning_rate
from cakd_cli.recipe.resolve import resolve
from tests.data.test_sets import cifar_archive
from tests.engine.test_resume import assert_same_run, killed_after, lines

LITERATURE = ("model=resnet8", "--device", "cpu", "engine.precision=fp32", "protocol=literature")


@pytest.fixture
def seen(monkeypatch):
    """What every step of a run in this process is given."""
    steps = []
    original = loop.Trainer.train_step

    def noted(self, batch, answers):
        rate = self.optimizer.learning_rate(self.epoch * self.steps_per_epoch + self.step)
        steps.append((self.epoch, rate, batch.images.clone(), batch.labels.clone(), batch.samples.clone()))
        return original(self, batch, answers)

    monkeypatch.setattr(loop.Trainer, "train_step", noted)
    return steps


def test_a_run_is_what_a_plain_loop_would_be(cakd, tmp_path, monkeypatch, seen):
    cifar_archive(tmp_path, monkeypatch)
    schedule = "schedule={type: step, milestones: [0.5], gamma: 0.1}"
    words = ("--data", "cifar100", "--data-root", tmp_path, "--epochs", 2, "--batch-size", 64, schedule)

    result = cakd("train-teacher", *LITERATURE, *words, "optimizer.learning_rate=0.05", "--out", tmp_path / "run")

    assert result.code == 0, result.err
    flags = {"data": "cifar100", "data.root": str(tmp_path), "model": "resnet8", "protocol": "literature"}
    data = resolve([], flags).data.load()
    padded = functional.pad(data.train.images_NCHW, [4] * 4)
    # As the literature says it: every image once an epoch, in batches of 64 and what is left of them, the rate a tenth
    # from the milestone's epoch on, every image cropped at random from its padded self, and mirrored or not.
    for epoch in range(2):
        steps = [step for step in seen if step[0] == epoch]
        assert [len(images) for _, _, images, _, _ in steps] == [64, 64, 64, 8]
        assert [rate for _, rate, _, _, _ in steps] == pytest.approx([0.05 if epoch == 0 else 0.005] * 4)
        numbers = torch.cat([samples for *_, samples in steps])
        assert sorted(numbers.tolist()) == list(range(200))
        assert torch.equal(torch.cat([labels for _, _, _, labels, _ in steps]), data.train.labels_N[numbers])
        for image, number in zip(torch.cat([images for _, _, images, _, _ in steps]), numbers, strict=True):
            crops = padded[number].unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 32, 32)
            assert ((crops == image) | (crops == image.flip(2))).flatten(1).all(1).any()
    orders = [torch.cat([samples for e, *_, samples in seen if e == epoch]) for epoch in range(2)]
    assert not torch.equal(*orders)


def test_the_steps_and_rates_of_the_papers():
    share = Share(incomplete=True)
    steps = share.steps(50_000, 64)
    schedule = resolve(["cifar100/resnet56-resnet20"], {"teacher": "t"}).schedule

    assert steps == 782
    for epoch in (1, 150, 151, 180, 181, 210, 211, 240):
        expected = 0.05 * 0.1 ** sum(epoch > milestone for milestone in (150, 180, 210))
        for step in ((epoch - 1) * steps, epoch * steps - 1):
            assert_close(learning_rate(schedule, 0.05, step=step, steps_per_epoch=steps, epochs=240), expected)


@pytest.mark.parametrize(("ranks", "parts"), [(1, 1), (2, 1), (1, 2), (4, 2)])
@pytest.mark.parametrize("count", [64, 72, 69, 127])
def test_processes_share_the_last_batch_equally(ranks, parts, count):
    samples = torch.arange(count)
    shares = [Share(rank, ranks, parts, incomplete=True) for rank in range(ranks)]
    taken = [share.of(samples, 64) for share in shares]

    together = torch.cat(taken).sort().values
    assert len({len(part) for part in taken}) == 1
    assert torch.equal(together, samples[: len(together)])
    assert count - len(together) < ranks * parts
    assert shares[0].steps(count, 64) == -(-len(together) // 64)
    for part in taken:
        assert (len(part) % (64 // ranks)) % parts == 0


def test_the_last_epoch_is_kept_and_the_best_on_test_told(cakd, toy_file, toy_teacher, tmp_path):
    words = ("distill", *LITERATURE, "--data", f"tensors:{toy_file}", "--teacher", toy_teacher, "--loss", "dkd")
    words = (*words, "--epochs", 4, "--batch-size", 48, "optimizer.learning_rate=0.05", "loss.1.warmup_epochs=0")

    result = cakd(*words, "--out", tmp_path / "dkd-seed0")

    assert result.code == 0, result.err
    assert "top-1" in result.err.partition(" of 64 test images")[0]
    assert "the best epoch on the test set is told beside the last" in result.err
    facts = json.loads((tmp_path / "dkd-seed0" / "run.json").read_text())
    curve = [line["test"]["top1"] for line in lines(tmp_path / "dkd-seed0")]
    assert facts["data"]["train"] == 160
    assert facts["metrics"]["test"]["top1"] == pytest.approx(curve[-1])
    assert facts["best_on_test"]["top1"] == max(curve)
    assert curve[facts["best_on_test"]["epoch"] - 1] == max(curve)
    assert facts["best"] == {"epoch": 4}
    assert "validation" not in facts["metrics"]
    assert "best on test" in (tmp_path / "dkd-seed0" / "README.md").read_text()

    table = cakd("compare", tmp_path / "dkd-seed0", "--markdown")
    assert "best on test %" in table.out
    assert "chosen" in table.out or "chose" in table.out


@pytest.mark.slow
def test_what_was_published_stands_beside_what_was_measured(cakd, tmp_path, monkeypatch):
    cifar_archive(tmp_path, monkeypatch)
    more = ("--data-root", tmp_path, "--epochs", 1, "--batch-size", 100, "--device", "cpu", "engine.precision=fp32")
    teacher = tmp_path / "teacher"
    monkeypatch.setattr("cakd_cli.evaluation.metrics.near_chance", lambda *_: False)
    assert cakd("train-teacher", "cifar100/teacher", "--model", "resnet56", *more, "--out", teacher).code == 0
    words = ("distill", "cifar100/resnet56-resnet20", "--teacher", teacher, *more)
    for method in ("kd", "cross-entropy", "cmkd"):
        result = cakd(*words, "--loss", method, "--out", tmp_path / "runs" / f"{method}-seed0")
        assert result.code == 0, result.err
        assert ("no settings of cmkd were published" in result.err) == (method == "cmkd")

    result = cakd("compare", tmp_path / "runs", "--json")

    published = {
        group["name"]: (group["published"], group["best_on_test"]["mean"]) for group in result.document["groups"]
    }
    assert {name: figure for name, (figure, _) in published.items()} == {
        "kd": 70.66,
        "cross-entropy": 69.06,
        "cmkd": None,
    }
    table = cakd("compare", tmp_path / "runs", "--markdown").out
    assert "| published | to it |" in table
    assert f"| 70.66 | {100 * published['kd'][1] - 70.66:+.2f} |" in table
    assert "published" in cakd("compare", tmp_path / "runs").out


@pytest.mark.slow
def test_a_killed_run_goes_on_as_it_would_have(cakd, toy_file, toy_teacher, tmp_path):
    words = ("distill", *LITERATURE, "--data", f"tensors:{toy_file}", "--teacher", toy_teacher, "--loss", "kd")
    words = (*words, "--epochs", 3, "--batch-size", 48, "engine.checkpoint_seconds=0", "engine.log_interval=1")
    cakd(*words, "--out", tmp_path / "straight")

    for moment in (3, 6, 9):
        out = tmp_path / f"killed-{moment}"
        with killed_after(moment):
            cakd(*words, "--out", out)
        assert cakd(*words, "--out", out, "--resume").code == 0
        assert_same_run(tmp_path / "straight", out)
        facts = [json.loads((path / "run.json").read_text()) for path in (tmp_path / "straight", out)]
        assert facts[0]["best_on_test"] == facts[1]["best_on_test"]


def test_holding_images_out_contradicts_it(cakd, toy_file, tmp_path):
    words = ("train-teacher", *LITERATURE, "--data", f"tensors:{toy_file}", "--out", tmp_path / "run")

    result = cakd(*words, "data.validation_fraction=0.2")

    assert result.code == 3
    assert "data.validation_fraction=0.2: data.validation_fraction: holds images out" in result.err


def test_runs_of_two_protocols_are_no_fair_comparison(cakd, toy_file, tmp_path):
    words = ("train-teacher", "--model", "resnet8", "--data", f"tensors:{toy_file}", "--epochs", 1, "--batch-size", 32)
    for name, more in (("one-seed0", ()), ("two-seed0", ("protocol=literature",))):
        assert cakd(*words, *more, "--device", "cpu", "--out", tmp_path / name).code == 0

    result = cakd("compare", tmp_path / "one-seed0", tmp_path / "two-seed0")

    assert result.code == 3
    assert "protocol: held-out or literature" in result.err
