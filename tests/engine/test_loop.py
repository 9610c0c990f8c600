"""The loop: what a step does, what it does not wait for, and what it refuses to learn from."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from cakd_cli.engine.build import make_job, make_source, read_inputs
from cakd_cli.engine.choices import decide
from cakd_cli.engine.loop import Trainer
from cakd_cli.engine.optimizer import make_optimizer
from cakd_cli.engine.progress import Silent
from cakd_cli.engine.run_directory import RunDirectory
from cakd_cli.engine.stopping import StopRequest
from cakd_cli.errors import DivergedError
from cakd_cli.losses import CrossEntropyTerm, Weights
from cakd_cli.machine import hardware
from cakd_cli.models.layers import LOGITS
from cakd_cli.recipe.resolve import resolve


@pytest.fixture
def make_trainer(toy_file, toy_teacher, tmp_path):
    opened = []

    def make(*words, loss="dkd", **flags):
        defaults = {
            "loss": loss,
            "data": f"tensors:{toy_file}",
            "model": "resnet8",
            "teacher": str(toy_teacher),
            "engine.epochs": 2,
            "engine.batch_size": 16,
        }
        words = ("engine.precision=fp32", "engine.device=cpu", *words)
        choices = decide(read_inputs(resolve(list(words), defaults | flags)))
        inputs, recipe = choices.inputs, choices.recipe
        job = make_job(inputs, recipe, make_source(inputs, recipe, Silent().note, table=choices.table))
        run = RunDirectory.open(tmp_path / f"run{len(opened)}", resume=False, overwrite=False)
        opened.append(run)
        trainer = Trainer(job, run, Silent(), StopRequest())
        trainer.teacher = inputs.teacher
        return trainer

    yield make
    for run in opened:
        run.close()


def test_the_loop_is_a_plain_pytorch_loop(make_trainer):
    """Same weights after two epochs as the loop that anyone would write."""
    # A small rate, so that rounding does not grow from step to step.
    words = ("optimizer.learning_rate=0.002", "engine.channels_last=false")
    trainer = make_trainer(*words)
    trainer.fit()

    other = make_trainer(*words)
    student, teacher, data = other.task.student, other.teacher.model, other.data
    mean, std = (torch.tensor(x).reshape(1, -1, 1, 1) for x in (data.mean, data.std))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.002, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=18)
    student.train()
    for epoch in range(2):
        for images, labels, *_ in data.train.train_batches(
            batch_size=16, seed=0, epoch=epoch, start=0, device=torch.device("cpu")
        ):
            x = (images.float() / 255 - mean) / std
            z = student(x)
            with torch.no_grad():
                t = teacher(x)
            p, q = (t / 4).softmax(1), (z / 4).softmax(1)
            py, qy = p.gather(1, labels[:, None]), q.gather(1, labels[:, None])
            tckd = (py * (py / qy).log() + (1 - py) * ((1 - py) / (1 - qy)).log()).mean()
            rest = torch.ones_like(z).scatter(1, labels[:, None], 0).bool()
            p_rest = t[rest].reshape(16, -1).div(4).log_softmax(1)
            q_rest = z[rest].reshape(16, -1).div(4).log_softmax(1)
            nckd = (p_rest.exp() * (p_rest - q_rest)).sum(1).mean()
            # Warm-up over a twelfth of two epochs: full weight from the first.
            loss = functional.cross_entropy(z, labels) + 16 * (tckd + 8 * nckd)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    for (name, ours), theirs in zip(
        trainer.task.student.state_dict().items(), student.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("words", "free"),
    [
        (("engine.teacher_memory=off",), None),
        (("engine.teacher_memory=ram", "engine.ema_decay=0.9", "optimizer={type: adamw}"), None),
        (("engine.teacher_memory=disk",), 10**9),
    ],
    ids=["sgd", "adamw ema memory", "memory on the device"],
)
def test_no_step_waits_for_the_device(make_trainer, monkeypatch, words, free):
    """On an accelerator every .item(), .tolist() and truth value is a wait: one a logging interval at the most."""
    calls = []

    def counted(name, original):
        def call(tensor, *arguments):
            # The names of views, and which are known, never leave the host.
            if Path(sys._getframe(1).f_code.co_filename).parent.name != "teachers":
                calls.append(name)
            else:
                assert not tensor.is_floating_point()
            return original(tensor, *arguments)

        return call

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
    monkeypatch.setattr(hardware.Hardware, "free_bytes", lambda machine: free)
    trainer = make_trainer("engine.log_interval=3", *words)
    assert (trainer.source._table is not None) == bool(free)
    calls.clear()

    trainer.train_epoch()

    assert trainer.step == 9
    # Steps 3 and 6, and the end of the epoch.
    assert calls == ["tolist"] * 3


def test_accumulated_batches_give_the_gradient_of_the_whole(make_trainer):
    """Equal but for batch norm, which sees the parts: so it is frozen here."""
    gradients = []
    for parts in (1, 4):
        trainer = make_trainer(f"engine.gradient_accumulation={parts}")
        trainer.task.student.eval()
        trainer.task.student.train = lambda mode=True: None
        parameters = list(trainer.optimizer.parameters.values())
        trainer.optimizer.torch_optimizer.step = lambda p=parameters: gradients.append([x.grad.clone() for x in p])
        trainer.train_epoch()

    one, four = gradients[0], gradients[9]
    for whole, summed in zip(one, four, strict=True):
        torch.testing.assert_close(whole, summed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_value_that_is_not_finite_never_reaches_the_weights(make_trainer, optimizer):
    trainer = make_trainer(f"optimizer={{type: {optimizer}}}", "engine.log_interval=100")
    good, weights = trainer.task.forward, []

    def bad(*batch, **how):
        weights.append([p.detach().clone() for p in list(trainer.optimizer.parameters.values())])
        step = good(*batch, **how)
        return step._replace(total=step.total * float("nan")) if trainer.step == 4 else step

    trainer.task.forward = bad
    with pytest.raises(DivergedError, match=r"not finite at step 4 \(epoch 1\)"):
        trainer.fit()

    assert len(weights) == 9
    for before, after in zip(weights[4], list(trainer.optimizer.parameters.values()), strict=True):
        assert after.isfinite().all()
        assert torch.equal(before, after)
    assert not (trainer.run.path / "checkpoints").exists()


def test_a_loss_that_is_finite_with_a_gradient_that_is_not_stops_too(make_trainer):
    trainer = make_trainer()
    good = trainer.task.forward

    def bad(*batch, **how):
        step = good(*batch, **how)
        return step._replace(total=step.total + (next(trainer.task.parameters()).sum() * 0).sqrt())

    trainer.task.forward = bad
    with pytest.raises(DivergedError, match="step 0"):
        trainer.fit()


def test_training_too_fast_says_where_it_diverged(cakd, toy_file, tmp_path):
    result = cakd(
        "train-teacher",
        *("--data", f"tensors:{toy_file}", "--model", "resnet8", "--out", tmp_path / "run", "--batch-size", 16),
        *("optimizer.learning_rate=100", "optimizer.momentum=0.99"),
        *("optimizer.weight_decay=1", "engine.precision=fp32", "--epochs", 30),
    )

    assert result.code == 5
    assert "not finite at step" in result.err
    assert "hint: lower optimizer.learning_rate" in result.err.replace("\n", " ").replace("  ", " ")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["ended"] == "diverged"


def test_the_average_follows_the_weights(make_trainer):
    trainer = make_trainer("engine.ema_decay=0.5", **{"engine.epochs": 1})
    expected = None
    original = trainer.optimizer.torch_optimizer.step

    def step():
        nonlocal expected
        original()
        now = [p.detach().clone() for p in list(trainer.optimizer.parameters.values())]
        expected = now if expected is None else [0.5 * e + 0.5 * n for e, n in zip(expected, now, strict=True)]

    trainer.optimizer.torch_optimizer.step = step
    trainer.fit()

    for mean, parameter in zip(expected, trainer.network.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach(), mean)


def test_the_average_has_the_counters_of_the_network(make_trainer):
    trainer = make_trainer("engine.ema_decay=0.5", **{"engine.epochs": 1})
    trainer.fit()

    assert trainer.network.bn1.num_batches_tracked == trainer.task.student.bn1.num_batches_tracked == 9


def test_held_out_answers_that_are_not_finite_stop_the_run(make_trainer):
    trainer = make_trainer()
    original = trainer.validate

    def poisoned():
        trainer.network.bn1.running_var.fill_(float("nan"))
        return original()

    trainer.validate = poisoned
    with pytest.raises(DivergedError, match="held-out images are not finite after epoch 1"):
        trainer.fit()


def test_terms_are_weighted_summed_and_named(make_trainer):
    terms = "loss=[{type: cross-entropy, weight: 0.5}, {type: kd, weight: 2}, {type: kd, temperature: 2}]"
    trainer = make_trainer(terms, "engine.teacher_memory=off", loss=None)
    batch = next(trainer.data.train.train_batches(batch_size=16, seed=0, epoch=0, start=0, device=torch.device("cpu")))

    teacher = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    total, parts, weighted, norms = trainer.task(batch, {LOGITS: teacher}, trainer.weights.at(1), 1, norms=True)

    assert list(parts) == ["loss", "top1", "cross_entropy", "kd", "kd_2"]
    expected = 0.5 * parts["cross_entropy"] + 2 * parts["kd"] + parts["kd_2"]
    torch.testing.assert_close(total.detach(), expected)
    torch.testing.assert_close(torch.stack(weighted).sum(), total)
    assert norms.shape == (3,)


def test_warm_up_counts_epochs_from_one():
    term = CrossEntropyTerm(weight=2.0, warmup_epochs=20.0)

    weights = Weights([term, CrossEntropyTerm()])
    assert [weights.at(epoch)[0].weight for epoch in (1, 10, 20, 21)] == pytest.approx([0.1, 1.0, 2.0, 2.0])
    assert weights.at(1)[1].weight == 1


def test_teacher_stays_in_eval_mode_and_is_never_trained(make_trainer):
    trainer = make_trainer()
    before = {name: tensor.clone() for name, tensor in trainer.teacher.model.state_dict().items()}
    trainer.fit()

    assert not trainer.teacher.model.training
    assert not any(parameter.requires_grad for parameter in trainer.teacher.model.parameters())
    for name, tensor in trainer.teacher.model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_optimizers_are_fused():
    recipe = resolve([], {"data": "digits", "model": "resnet8"})

    assert make_optimizer(recipe.optimizer, [torch.nn.Parameter(torch.zeros(1))]).param_groups[0]["fused"]


def test_a_full_device_says_what_to_do(cakd, toy_file, tmp_path, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "_learn", full)
    words = ("train-teacher", "--data", f"tensors:{toy_file}", "--model", "resnet8", "--batch-size", 16)
    result = cakd(*words, "--out", tmp_path / "run")

    assert result.code == 7
    assert "engine.gradient_accumulation=2" in result.err


def test_half_precision_scales_the_loss(make_trainer):
    """fp16 as on GPUs without bf16: begins with steps that overflow, and learns as fp32 does."""
    half, full = make_trainer("engine.precision=fp16"), make_trainer()
    half.optimizer._scale.factor.fill_(2.0**40)
    before = {name: tensor.clone() for name, tensor in half.task.student.named_parameters()}
    batches = half._batches()
    half.train_step(*next(batches))

    # Left out: neither the weights nor the momentum have moved, and the scale is smaller.
    assert float(half.optimizer._scale.factor) == 2.0**39
    assert all(torch.equal(tensor, before[name]) for name, tensor in half.task.student.named_parameters())
    assert all(not state["momentum_buffer"].any() for state in half.optimizer.torch_optimizer.state.values())
    assert float(half.optimizer.raised) == 0
    half.optimizer._scale.factor.fill_(2.0**10)
    half.step, half.sums = 0, None
    half.fit()
    full.fit()

    assert half.best["top1"] == pytest.approx(full.best["top1"], abs=0.2)
    assert half.best["nll"] == pytest.approx(full.best["nll"], rel=0.1)


def test_half_precision_that_overflows_without_a_scale_is_an_error(make_trainer, monkeypatch):
    trainer = make_trainer("engine.precision=fp16")
    trainer.optimizer._scale.factor.fill_(0.5)

    with pytest.raises(DivergedError, match="is not finite"):
        trainer.fit()


def test_the_scale_goes_on_with_the_run(make_trainer):
    one, other = make_trainer("engine.precision=fp16"), make_trainer("engine.precision=fp16")
    one.optimizer._scale.factor.fill_(8.0)
    one.train_epoch()
    other.optimizer.restore(one.optimizer.state())

    assert float(other.optimizer._scale.factor) == float(one.optimizer._scale.factor)
    assert int(other.optimizer._scale.good_steps) == one.steps_per_epoch


def test_gpus_without_bf16_train_in_fp16(monkeypatch):
    monkeypatch.setattr(hardware, "describe", lambda device: "T4")
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert hardware._best_precision(device, "") == ("fp16", "tensor cores, and no native bf16 on T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert hardware._best_precision(device, "")[0] == "fp32"
    assert hardware._best_precision(device, "tensor cores")[0] == "bf16"
