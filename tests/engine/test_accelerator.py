"""The same result on an accelerator, and no waiting for it. Skipped where there is none."""

import json
import warnings

import pytest
import torch

from cakd_cli.engine.loop import Trainer
from tests.engine.test_loop import make_trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
__all__ = ["make_trainer"]


def waits(trainer: Trainer) -> int:
    """Count what torch itself calls a synchronisation in an epoch."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train_epoch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.hardware.device.type == "cuda"
    return sum("synchronizing" in str(warning.message) for warning in caught)


def test_waits_do_not_grow_with_the_steps(make_trainer):
    words = ("engine.device=cuda", "engine.log_interval=1000", "engine.ema_decay=0.9")
    few, many = make_trainer(*words), make_trainer(*words, **{"engine.batch_size": 4})

    for trainer in (few, many):
        trainer.train_epoch()
        trainer.step, trainer.sums = 0, None
    assert few.steps_per_epoch == 9
    assert many.steps_per_epoch == 36
    # The order of the epoch goes to the device, and the means come back.
    assert waits(few) == waits(many) <= 3


@pytest.mark.parametrize("where", ["off", "ram"])
def test_asking_the_teacher_does_not_wait_either(make_trainer, where):
    words = ("engine.device=cuda", "engine.log_interval=1000", f"engine.teacher_memory={where}")
    few, many = make_trainer(*words), make_trainer(*words, **{"engine.batch_size": 4})
    for trainer in (few, many):
        trainer.train_epoch()
        # Views of this epoch are not known yet.
        trainer.epoch, trainer.step, trainer.sums = 1, 0, None

    assert waits(few) == waits(many) <= 3


def test_what_is_kept_is_what_the_teacher_says(make_trainer):
    trainer = make_trainer("engine.device=cuda", "engine.teacher_memory=ram", "data.crop_padding=1")
    trainer.fit()
    answers = trainer.source
    batches = trainer.data.train.train_batches(batch_size=16, seed=0, epoch=0, start=0, device=trainer.hardware.device)
    for batch in batches:
        kept, known = answers.memory.recall(batch.views)
        assert known.all()
        said = answers.memory.pack(answers._teacher.answer(batch))
        torch.testing.assert_close(kept, said.cpu(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_compiled_run_learns_the_same(make_trainer, parts):
    """Also from a compiled teacher that answers on its own stream while the student works."""
    losses = []
    for compiled in (False, True):
        form = f"engine.teacher_form={'compiled' if compiled else 'plain'}"
        words = ("engine.device=cuda", "engine.teacher_memory=off", form, f"engine.gradient_accumulation={parts}")
        trainer = make_trainer(*words)
        if compiled:
            trainer.task.compile_student(parts)
        losses.append(trainer.train_epoch()["train"]["loss"])

    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_both_devices_see_the_same_views(make_trainer):
    batches = []
    for device in ("cpu", "cuda"):
        trainer = make_trainer(f"engine.device={device}", "data.crop_padding=2", "data.horizontal_flip=true")
        epoch = trainer.data.train.train_batches(
            batch_size=16, seed=3, epoch=5, start=0, device=trainer.hardware.device
        )
        batches.append([(batch.images.cpu(), batch.labels.cpu()) for batch in epoch])

    for (left, one), (right, other) in zip(*batches, strict=True):
        assert torch.equal(left, right)
        assert torch.equal(one, other)


def test_both_devices_learn_the_same(make_trainer):
    lines = []
    for device in ("cpu", "cuda"):
        trainer = make_trainer(f"engine.device={device}", "optimizer.learning_rate=0.01")
        trainer.fit()
        lines.append([json.loads(line) for line in (trainer.run.path / "metrics.jsonl").read_text().splitlines()])

    for one, other in zip(*lines, strict=True):
        for name, value in one["train"].items():
            assert other["train"][name] == pytest.approx(value, rel=0.02, abs=0.02), name
