"""What of a run changes while it runs, as a checkpoint holds it: by name, whatever the number of processes."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cakd_cli.engine.checkpoints import Checkpoint
from cakd_cli.engine.optimizer import under
from cakd_cli.errors import InputError
from cakd_cli.machine.sharding import load_whole, whole_state

if TYPE_CHECKING:
    from cakd_cli.engine.loop import Trainer


def snapshot(trainer: "Trainer") -> Checkpoint:
    """Copy a moment between two steps; every process of the run must call it."""
    training = trainer.optimizer.state()
    training |= {f"terms.{key}": tensor for key, tensor in whole_state(trainer.task.term_modules).items()}
    training |= {f"random.{kind}": state for kind, state in trainer.hardware.random_state().items()}
    if trainer.sums is not None:
        training["sums"] = trainer.ranks.mean(trainer.sums)
    training["gradient_norms"] = trainer.norms
    state = {
        "epoch": trainer.epoch,
        "step": trainer.step,
        "part_names": trainer.part_names,
        "best": trainer.best,
        "weights": trainer.weights.state(),
        "gradient_norms": {"epoch": trainer.norms_epoch, "said": trainer.balance_said},
    }
    return Checkpoint(whole_state(trainer.task.student), training, trainer.best_state, state)


def restore(trainer: "Trainer", checkpoint: Checkpoint) -> None:
    """Go on from a saved moment.

    Raises:
        InputError: If its parts do not fit the run.
    """
    try:
        _restore(trainer, checkpoint.model, checkpoint.training, checkpoint.state)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(
            f"{trainer.run.path}: damaged checkpoint: {what}", hint="start again with --overwrite"
        ) from error
    trainer.best_state = checkpoint.best


def _restore(
    trainer: "Trainer", model: dict[str, Tensor], training: dict[str, Tensor], state: Mapping[str, Any]
) -> None:
    device = trainer.hardware.device
    load_whole(trainer.task.student, model)
    trainer.optimizer.restore(training)
    load_whole(trainer.task.term_modules, under("terms.", training))
    trainer.sums = training["sums"].to(device) if "sums" in training else None
    trainer.norms = training["gradient_norms"].to(device)
    epoch, step = int(state["epoch"]), int(state["step"])
    if not (0 <= epoch <= trainer.recipe.engine.epochs and 0 <= step < trainer.steps_per_epoch):
        raise ValueError(f"epoch {epoch}, step {step} lies outside the run")
    trainer.epoch, trainer.step = epoch, step
    trainer.part_names, trainer.best = state["part_names"], state["best"]
    trainer.weights.restore(state["weights"])
    trainer.norms_epoch, trainer.balance_said = state["gradient_norms"]["epoch"], state["gradient_norms"]["said"]
    if trainer.ranks.first:
        trainer.hardware.restore_random_state(under("random.", training))
    else:
        seed_of_rank(trainer)


def seed_of_rank(trainer: "Trainer") -> None:
    """Give every process but the first random numbers of its own: those of this moment, whoever began the run."""
    if not trainer.ranks.first:
        moment = trainer.epoch * trainer.steps_per_epoch + trainer.step
        torch.manual_seed(trainer.recipe.seed + 7919 * moment + 104729 * trainer.ranks.rank)
