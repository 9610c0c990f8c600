"""One call a step: learning rate, guard against values that are not finite, optimizer, average; it never waits."""

import math
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cakd_cli.engine.distributed import ALONE, Ranks
from cakd_cli.engine.task import Step, Task
from cakd_cli.machine.sharding import is_cut, load_whole, own_share, put_together, share_of, whole_state
from cakd_cli.recipe.schema import (
    AdamWOptions,
    ConstantSchedule,
    CosineSchedule,
    Recipe,
    SGDOptions,
    StepSchedule,
)


class Optimizer:
    """The recipe's optimizer over everything that a task trains.

    Values that are not finite never reach the weights: fused optimizers skip their step while ``found_inf`` is 1, which
    is how gradient scalers use them. Once raised the flag stays, so the weights remain those of the last good step
    until the host looks.

    Args:
        task: What is trained.
        recipe: Its settings.
        steps_per_epoch: Steps in an epoch.
        ranks: The processes of the run, which leave out a step together.
        average: A copy of the student that becomes the average of its weights; none without one.

    Attributes:
        parameters: By name, the student's first; this process's share of each.
        average: An average of the student's weights, or none.
        raised: 1 once a value was not finite, on the device.
        first_bad_step: The step at which that happened, on the device; -1 before.
    """

    def __init__(
        self,
        task: Task,
        recipe: Recipe,
        steps_per_epoch: int,
        ranks: Ranks = ALONE,
        average: nn.Module | None = None,
    ) -> None:
        self._recipe, self._ranks = recipe, ranks
        self.steps_per_epoch = steps_per_epoch
        self._whole = {name: weight for name, weight in task.named_parameters() if weight.requires_grad}
        self.parameters = {name: _own_parameter(parameter) for name, parameter in self._whole.items()}
        self.torch_optimizer = make_optimizer(recipe.optimizer, list(self.parameters.values()))
        self._of_teacher = OwnMomentum(self.parameters, recipe) if recipe.delta else None
        self.average = None if average is None else Average(average, task.student, recipe.engine.ema_decay)
        self._scale = LossScale(task.hardware.device) if task.hardware.precision == "fp16" else None
        self.raised = torch.zeros((), device=task.hardware.device)
        self.first_bad_step = torch.full((), -1.0, device=task.hardware.device)
        for optimizer in self._optimizers.values():
            optimizer.found_inf = self.raised  # type: ignore[attr-defined]
            # A first step that is left out would leave the fused kernel's own buffers as memory happened to be.
            for group in optimizer.param_groups:
                for parameter in group["params"] if group.get("momentum") else ():
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @property
    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Torch's, by the name that a checkpoint gives them."""
        both: dict[str, torch.optim.Optimizer] = {"optimizer.": self.torch_optimizer}
        return both if self._of_teacher is None else both | {"teacher.": self._of_teacher.torch_optimizer}

    def backward(self, step: Step, parts: int) -> None:
        """Add the gradient of a part of a batch.

        Args:
            step: Its loss.
            parts: Into which the batch is cut.
        """
        total = step.total
        if self._of_teacher is not None:
            total = self._of_teacher.take(step, self._scaled, parts)
        (self._scaled(total) / parts).backward()

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self._scale is None else loss * self._scale.factor

    def step(self, number: int, loss: Tensor) -> None:
        """Take one step, unless the loss or a gradient is not finite.

        Args:
            number: Of the step, from 0 over the whole run.
            loss: Its value, or a sum that holds it.
        """
        rate = self.learning_rate(number)
        for optimizer in self._optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate
        for own, parameter in zip(self.parameters.values(), self._whole.values(), strict=True):
            if own is not parameter:
                own.grad = None if parameter.grad is None else own_share(parameter.grad)
                parameter.grad = None
        self._look(loss, number)
        self.torch_optimizer.step()
        self.torch_optimizer.zero_grad(set_to_none=True)
        if self._of_teacher is not None:
            self._of_teacher.step()
        if self.average is not None:
            self.average.update(first=number == 0)

    def _look(self, loss: Tensor, number: int) -> None:
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        gradients += [] if self._of_teacher is None else list(self._of_teacher.gradients.values())
        if self._scale is None:
            norm = torch.nn.utils.get_total_norm(gradients)
            bad = ~(loss.detach().isfinite() & norm.isfinite())
        else:
            # A gradient that overflows is why the scale gets smaller, and is an error only where that does not help.
            overflown = self._scale.unscale(gradients, self._ranks)
            bad = ~loss.detach().isfinite() | (self._scale.factor < _LEAST_SCALE)
        bad = self._ranks.largest(bad.float())
        self.first_bad_step.copy_(torch.where(bad > self.raised, float(number), self.first_bad_step))
        self.raised.copy_(torch.maximum(self.raised, bad))
        if self._scale is not None:
            for optimizer in self._optimizers.values():
                optimizer.found_inf = torch.maximum(self.raised, overflown)  # type: ignore[attr-defined]

    def learning_rate(self, number: int) -> float:
        """Rate of a step, from 0 over the whole run."""
        return learning_rate(
            self._recipe.schedule,
            self._recipe.optimizer.learning_rate,
            step=number,
            steps_per_epoch=self.steps_per_epoch,
            epochs=self._recipe.engine.epochs,
        )

    def state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint keeps, by parameter name and whole; the optimizers here keep nothing else."""
        tensors = {
            f"{prefix}{names[number]}.{kind}": self._put_together(value, names[number])
            for prefix, optimizer in self._optimizers.items()
            for names in [self._names(optimizer)]
            for number, entry in optimizer.state_dict()["state"].items()
            for kind, value in entry.items()
            if value is not None
        }
        if self._scale is not None:
            tensors |= {"scale.factor": self._scale.factor, "scale.good_steps": self._scale.good_steps}
        if self.average is not None:
            tensors |= {f"average.{name}": value for name, value in whole_state(self.average.network).items()}
        return tensors

    def _names(self, optimizer: torch.optim.Optimizer) -> list[str]:
        """Name the parameters in the order in which torch counts them."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]

    def _put_together(self, value: Tensor, name: str) -> Tensor:
        # What AdamW counts has no dimension, and is no share of anything.
        return put_together(value, self._whole[name]) if value.ndim else value

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state` gave.

        Raises:
            KeyError, RuntimeError, ValueError: If the tensors are not this optimizer's.
        """
        for prefix, optimizer in self._optimizers.items():
            self._restore(optimizer, under(prefix, tensors))
        if self._scale is not None:
            self._scale.factor.copy_(tensors["scale.factor"])
            self._scale.good_steps.copy_(tensors["scale.good_steps"])
        if self.average is not None:
            load_whole(self.average.network, under("average.", tensors))

    def _restore(self, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
        numbers = {name: number for number, name in enumerate(self._names(optimizer))}
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, kind = key.rpartition(".")
            parameter = self.parameters[name].detach()
            if tensor.shape == self._whole[name].shape:
                tensor = share_of(tensor, self._whole[name])
                # Fused kernels walk through memory: a moment must lie in memory as its parameter does.
                tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
            state.setdefault(numbers[name], {})[kind] = tensor
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def _own_parameter(parameter: nn.Parameter) -> nn.Parameter:
    """Give what this process trains of a parameter: all of it, unless it is cut over the processes."""
    return nn.Parameter(own_share(parameter.detach())) if is_cut(parameter) else parameter


class OwnMomentum:
    """The teacher's half of DOT (arXiv 2307.08436): its gradient, and the momentum that is its own.

    A step moves the weights by both halves. What only the teacher's terms train, as a connector, has the momentum
    between both and the weight decay, as in the official code; weights of the student have their decay in the labels'
    half.

    Args:
        parameters: By name, as a task has them.
        recipe: Whose optimizer has a delta.

    Attributes:
        gradients: Of the teacher's terms, of the batch under way, by parameter.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], recipe: Recipe) -> None:
        options = recipe.optimizer
        assert isinstance(options, SGDOptions)
        self._asks = [bool(term.needs.teacher) for term in recipe.loss]
        shared = [parameter for name, parameter in parameters.items() if name.startswith("student.")]
        own = [parameter for name, parameter in parameters.items() if not name.startswith("student.")]
        groups: list[dict[str, Any]] = [{"params": shared, "momentum": options.momentum + options.delta}]
        if own:
            groups.append({"params": own, "momentum": options.momentum, "weight_decay": options.weight_decay})
        self._parameters = [*shared, *own]
        self.torch_optimizer = torch.optim.SGD(groups, lr=options.learning_rate, fused=True)
        self.gradients: dict[nn.Parameter, Tensor] = {}

    def take(self, step: Step, scaled: Callable[[Tensor], Tensor], parts: int) -> Tensor:
        """Add the gradient of the teacher's terms, and give the loss of the others."""
        of_teacher = torch.stack([term for term, asks in zip(step.terms, self._asks, strict=True) if asks]).sum()
        others = torch.stack([term for term, asks in zip(step.terms, self._asks, strict=True) if not asks]).sum()
        found = torch.autograd.grad(scaled(of_teacher) / parts, self._parameters, retain_graph=True, allow_unused=True)
        for parameter, gradient in zip(self._parameters, found, strict=True):
            if gradient is not None:
                known = self.gradients.get(parameter)
                self.gradients[parameter] = gradient if known is None else known + gradient
        return others

    def step(self) -> None:
        """Move the weights, and forget the gradients."""
        for parameter, gradient in self.gradients.items():
            parameter.grad = gradient
        self.torch_optimizer.step()
        self.torch_optimizer.zero_grad(set_to_none=True)
        self.gradients = {}


# Gradients that overflow at this scale overflow without one.
_LEAST_SCALE = 1.0


class LossScale:
    """The factor of a loss whose gradients are fp16, which would lose what is small: torch's rule, without a wait.

    torch's own GradScaler reads on the host whether a step was left out.

    Attributes:
        factor: On the device.
        good_steps: Since it last changed.
    """

    def __init__(self, device: torch.device) -> None:
        self.factor = torch.full((), 2.0**16, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def unscale(self, gradients: list[Tensor], ranks: Ranks = ALONE) -> Tensor:
        """Divide gradients by the factor, then adapt it.

        Returns:
            1 if one of them is not finite on any process, and the step must be left out; else 0.
        """
        overflown = torch.zeros((), device=self.factor.device)
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, overflown, self.factor.reciprocal())
        overflown = ranks.largest(overflown)  # each may have looked at its own shares alone
        torch._amp_update_scale_(self.factor, self.good_steps, overflown, 2.0, 0.5, 2000)
        return overflown


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pick the tensors whose names begin so, without the beginning."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def make_optimizer(options: SGDOptions | AdamWOptions, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Make the recipe's optimizer in its fused form.

    With ``decay_norms: false`` what has one dimension or none, the weights of norms and biases, is a group of its own
    without weight decay.
    """
    groups = [{"params": parameters}]
    if not options.decay_norms:
        groups = [{"params": [parameter for parameter in parameters if parameter.ndim > 1]}]
        groups.append({"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0})  # type: ignore[dict-item]
    if isinstance(options, SGDOptions):
        return torch.optim.SGD(
            groups,
            lr=options.learning_rate,
            momentum=options.momentum - options.delta,
            nesterov=options.nesterov,
            weight_decay=options.weight_decay,
            fused=True,
        )
    return torch.optim.AdamW(
        groups,
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        weight_decay=options.weight_decay,
        fused=True,
    )


def learning_rate(
    schedule: CosineSchedule | StepSchedule | ConstantSchedule,
    peak: float,
    *,
    step: int,
    steps_per_epoch: int,
    epochs: int,
) -> float:
    """Rate of one optimizer step: a function of the step, with no state to save.

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


class Average:
    """An exponential moving average of a network's weights: a second network that follows the first.

    torch's AveragedModel does the same, but keeps its count in a tensor that every update reads on the host.

    Args:
        network: A copy of the network to follow, and cut over processes like it.
        model: The network to follow.
        decay: Share of the average that an update keeps.
    """

    def __init__(self, network: nn.Module, model: nn.Module, decay: float) -> None:
        self.network = network
        self._blend = get_ema_multi_avg_fn(decay)
        tensors = [list(chain(network.parameters(), network.buffers())) for network in (network, model)]
        pairs = [(own_share(own.detach()), own_share(other.detach())) for own, other in zip(*tensors, strict=True)]
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, *, first: bool) -> None:
        """Move towards the network; the first update of a run takes its weights over."""
        own, other = ([pair[i] for pair in self._averaged] for i in (0, 1))
        if first:
            torch._foreach_copy_(own, other)
        else:
            self._blend(own, other, 0)
        for counter, current in self._copied:
            counter.copy_(current)
