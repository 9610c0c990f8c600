"""A network that sees data of another size, or tells other classes apart, than it was made for.

It stays the module that it is, so that its layers keep their names; what it is shown, and what it answers, is changed
in its own forward, so that every form of it, traced or compiled, computes the same.

Shape suffixes: B batch, C classes of the data, G members of the largest group.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def fitted(model: nn.Module, size: tuple[int, int] | None, groups: Sequence[Sequence[int]] | None) -> nn.Module:
    """Fit a network, in place, to images of any size and to other classes.

    Args:
        model: From images (batch, channels, height, width) to logits.
        size: Height and width to which images are resized before it sees them, bilinear and antialiased; none = as they
            are.
        groups: Of each class of the data, the network's own; none = its own classes. The logit of a class with one is
            that one's, with several their logsumexp: the logarithm of their mass, up to what softmax ignores.

    Returns:
        The network itself, of another class.
    """
    kind: Any = type(model)
    if groups is not None:
        _register(model, groups)

    def forward(self: Any, images: Tensor) -> Tensor:
        if size is not None:
            images = functional.interpolate(images.float(), size, mode="bilinear", antialias=True).to(images.dtype)
        logits: Tensor = kind.forward(self, images)
        if groups is None:
            return logits
        if not several:
            return logits[:, self.cakd_members[:, 0]]
        members_BCG = logits.float()[:, self.cakd_members] + self.cakd_padding
        groups_BC: Tensor = members_BCG.logsumexp(2)
        return groups_BC

    several = groups is not None and any(len(group) > 1 for group in groups)
    # As torch's own FSDP2 and parametrisations do.
    model.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return model


def _register(model: nn.Module, groups: Sequence[Sequence[int]]) -> None:
    """Keep the groups where the network goes, beside its weights and not among them."""
    largest = max(map(len, groups))
    members_CG = torch.tensor([[*group, *[group[0]] * (largest - len(group))] for group in groups])
    padding_CG = torch.zeros(members_CG.shape)
    for row, group in enumerate(groups):
        padding_CG[row, len(group) :] = -torch.inf
    model.register_buffer("cakd_members", members_CG, persistent=False)
    model.register_buffer("cakd_padding", padding_CG, persistent=False)
