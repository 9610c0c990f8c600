"""The learning rate as a function of the step: no state to save."""

import math

from cakd_cli.recipe.schema import ConstantSchedule, CosineSchedule, StepSchedule


def learning_rate(
    schedule: CosineSchedule | StepSchedule | ConstantSchedule,
    peak: float,
    *,
    step: int,
    steps_per_epoch: int,
    epochs: int,
) -> float:
    """Rate of one optimizer step.

    Args:
        schedule: The recipe's settings.
        peak: Rate after the warm-up.
        step: From 0, over the whole run.
        steps_per_epoch: Optimizer steps in an epoch.
        epochs: Length of the run.

    Returns:
        The rate. Cosine moves every step over what remains after the warm-up; step changes at epochs only: the
        first epoch at the lower rate is the first that begins at or after the milestone.
    """
    warmup = round(schedule.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return peak * (step + 1) / warmup
    total = steps_per_epoch * epochs
    if isinstance(schedule, CosineSchedule):
        progress = (step - warmup) / max(1, total - warmup)
        return peak * (schedule.final_factor + (1 - schedule.final_factor) * (1 + math.cos(math.pi * progress)) / 2)
    if isinstance(schedule, StepSchedule):
        # Rounded, because 0.07 of 100 epochs is 7.000000000000001.
        passed = sum(step // steps_per_epoch >= round(milestone * epochs, 9) for milestone in schedule.milestones)
        return float(peak * schedule.gamma**passed)
    return peak
