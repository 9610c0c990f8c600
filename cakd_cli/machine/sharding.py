"""Networks cut over the processes of a run (FSDP2): each holds a share of every weight, and of what belongs to it.

A weight is cut along its first dimension. What a checkpoint or a file holds is whole.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

# A part of a network with so many weights is gathered, and let go again, by itself.
_WORTH_A_GROUP = 100_000


def shard(network: nn.Module) -> None:
    """Cut a network over all processes, beginning with the weights of rank 0; every process must call it.

    What stands in a sequence or list of modules and has many weights is gathered alone, just before it computes, so
    that a device never holds more than the largest of them beside its own shares. What has no dimension cannot be cut:
    it stays whole, and its gradient is averaged as the others' are.
    """
    for tensor in (*network.parameters(), *network.buffers()):
        if is_cut(tensor):  # a part that has been cut before
            continue
        tensor.data = tensor.data.contiguous()  # FSDP2 cuts nothing that lies in channels last
        distributed.broadcast(tensor.data, src=0)
    scalars = {parameter for parameter in network.parameters() if parameter.ndim == 0}
    for scalar in scalars:
        scalar.register_post_accumulate_grad_hook(_average_gradient)
    for module in reversed(list(network.modules())):  # what is inside first
        if isinstance(module, nn.Sequential | nn.ModuleList):
            for block in module:
                uncut = sum(weight.numel() for weight in block.parameters() if not is_cut(weight))
                if uncut >= _WORTH_A_GROUP:
                    fully_shard(block, ignored_params=scalars)
    fully_shard(network, ignored_params=scalars)


def _average_gradient(parameter: Tensor) -> None:
    assert parameter.grad is not None
    distributed.all_reduce(parameter.grad)
    parameter.grad /= distributed.get_world_size()


def is_cut(tensor: Tensor) -> bool:
    """Whether each process holds a share of a tensor."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Put a tensor together from its shares, on every process; one that is whole stays as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_share(tensor: Tensor) -> Tensor:
    """Give this process's share of a tensor, in the same memory; a tensor that is whole stays as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def share_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Cut this process's share out of a whole tensor, as another one is cut."""
    if not isinstance(like, DTensor):
        return tensor
    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).to_local()


def put_together(share: Tensor, like: Tensor) -> Tensor:
    """Put a whole tensor together from each process's share, where another one is cut so."""
    if not isinstance(like, DTensor):
        return share
    return DTensor.from_local(
        share, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    ).full_tensor()


def whole_state(network: nn.Module) -> dict[str, Tensor]:
    """Collect the whole state of a network; where it is cut, every process must call it."""
    return {name: whole(tensor.detach()) for name, tensor in network.state_dict().items()}


@torch.no_grad()
def load_whole(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a whole state, of which each process keeps its shares.

    Raises:
        RuntimeError: If names or shapes are others.
    """
    own = network.state_dict()
    if not any(map(is_cut, own.values())):
        network.load_state_dict(state)
        return
    odd = [name for name in own.keys() | state.keys() if name not in own or name not in state]
    odd += [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if odd:
        raise RuntimeError(f"the state does not fit: {', '.join(sorted(odd))}")
    for name, tensor in own.items():
        own_share(tensor).copy_(share_of(state[name], tensor))
