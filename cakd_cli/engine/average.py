"""An exponential moving average of a network's weights."""

import copy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """A second network that follows the first.

    torch's AveragedModel does the same, but keeps its count in a tensor that every update reads on the host.

    Args:
        model: The network to follow; the average starts as a copy of it.
        decay: Share of the average that an update keeps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(model)
        self._blend = get_ema_multi_avg_fn(decay)
        pairs = list(zip(self._tensors(self.network), self._tensors(model), strict=True))
        self._averaged = [(own, other) for own, other in pairs if own.is_floating_point()]
        self._copied = [(own, other) for own, other in pairs if not own.is_floating_point()]

    @staticmethod
    def _tensors(model: nn.Module) -> list[Tensor]:
        return [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]

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
