"""Values that are not finite never reach the weights."""

import torch
from torch import Tensor, nn


class Guard:
    """Keeps the optimizer from using values that are not finite, without waiting for the device.

    Fused optimizers skip their step while ``found_inf`` is 1, which is how gradient scalers use them. Once raised it
    stays, so the weights remain those of the last good step until the host looks.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.raised = torch.zeros((), device=device)
        self.first_bad_step = torch.full((), -1.0, device=device)
        optimizer.found_inf = self.raised  # type: ignore[attr-defined]

    def look(self, loss: Tensor, parameters: list[nn.Parameter], step: int) -> None:
        """Raise the flag if the loss or a gradient is not finite; the first such step is kept for the host."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        bad = ~(loss.detach().isfinite() & norm.isfinite())
        self.first_bad_step.copy_(torch.where(bad & (self.raised == 0), float(step), self.first_bad_step))
        self.raised.copy_(torch.maximum(self.raised, bad.float()))
