"""The learning rate, step by step."""

import pytest
import torch

from cakd_cli.engine.optimizer import learning_rate
from cakd_cli.recipe.schema import ConstantSchedule, CosineSchedule, StepSchedule


def rates(schedule, epochs=240, steps=2, peak=0.05):
    return [
        learning_rate(schedule, peak, step=step, steps_per_epoch=steps, epochs=epochs) for step in range(epochs * steps)
    ]


def test_step_is_the_literatures():
    by_epoch = rates(StepSchedule())[::2]

    # RepDistiller and mdistiller, epochs from 1: divided by 10 when epoch > 150, 180, 210.
    expected = [0.05 * 0.1 ** sum(epoch > decay for decay in (150, 180, 210)) for epoch in range(1, 241)]
    assert by_epoch == pytest.approx(expected)


def test_a_shortened_run_keeps_its_decays():
    assert len({round(rate, 9) for rate in rates(StepSchedule(), epochs=8)}) == 4


def test_cosine_is_torchs():
    ours = rates(CosineSchedule(final_factor=0.1), epochs=10, steps=7, peak=0.3)

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=70, eta_min=0.03)
    for rate in ours:
        assert rate == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("kind", [CosineSchedule, StepSchedule, ConstantSchedule])
def test_warm_up_grows_linearly_to_the_peak(kind):
    values = rates(kind(warmup_epochs=2.0), epochs=20, steps=5, peak=1.0)

    assert values[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert values[10] == 1.0


def test_constant():
    assert set(rates(ConstantSchedule(), epochs=3)) == {0.05}
