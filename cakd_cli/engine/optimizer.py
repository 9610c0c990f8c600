"""The optimizer of a recipe, and its state as plain tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cakd_cli.recipe.schema import AdamWOptions, SGDOptions


def make_optimizer(options: SGDOptions | AdamWOptions, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Make the recipe's optimizer in its fused form."""
    if isinstance(options, SGDOptions):
        return torch.optim.SGD(
            parameters,
            lr=options.learning_rate,
            momentum=options.momentum,
            nesterov=options.nesterov,
            weight_decay=options.weight_decay,
            fused=True,
        )
    return torch.optim.AdamW(
        parameters,
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        weight_decay=options.weight_decay,
        fused=True,
    )


def flat_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Tensors of an optimizer by ``parameter number.name``; the optimizers here keep nothing else."""
    return {
        f"{number}.{name}": value
        for number, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
        if value is not None
    }


def load_flat_state(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Restore what :func:`flat_state` gave.

    Raises:
        KeyError, ValueError, IndexError: If the tensors are not this optimizer's.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        parameter = parameters[int(number)].detach()
        if tensor.shape == parameter.shape:
            # Fused kernels walk through memory: a moment must lie in memory as its parameter does.
            tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
