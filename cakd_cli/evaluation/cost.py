"""What a network costs: parameters, FLOPs, memory and time."""

import copy
import statistics
import time
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cakd_cli.machine.hardware import Hardware

# How long a latency is measured.
_SECONDS = 1.0


def flops(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Floating-point operations of one image's forward pass, 2 per multiply-add (papers often count 1).

    0 where torch does not see them, as in an ONNX file.
    """
    image = torch.zeros(1, *image_shape, device=next(chain(model.parameters(), model.buffers())).device)
    was_training = model.training
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.eval()(image)
    model.train(was_training)
    return int(counter.get_total_flops())


def latency(model: nn.Module, image_shape: tuple[int, int, int], hardware: Hardware, batch_size: int) -> dict[str, Any]:
    """Time of a forward pass in milliseconds: median and quartiles of repeated runs after a warm-up.

    Runs for about a second, five times at least.
    """
    images = torch.rand(batch_size, *image_shape, device=hardware.device)
    if hardware.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    model.eval()
    times: list[float] = []
    with torch.inference_mode(), hardware.autocast():
        for _ in range(3):
            model(images)
        start = time.perf_counter()
        while len(times) < 5 or (time.perf_counter() - start < _SECONDS and len(times) < 200):
            hardware.wait()
            before = time.perf_counter()
            model(images)
            hardware.wait()
            times.append(1000 * (time.perf_counter() - before))
    quartiles = statistics.quantiles(times, n=4)
    return {
        "batch_size": batch_size,
        "median_ms": quartiles[1],
        "quartiles_ms": [quartiles[0], quartiles[2]],
        "n": len(times),
    }


def saved_bytes_per_image(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Bytes that one image's forward pass keeps for the backward pass, in float32; measured on a batch of two."""
    probe = copy.deepcopy(model).cpu().train()
    own = {parameter.untyped_storage().data_ptr() for parameter in probe.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = probe(torch.zeros(2, *image_shape))
    del out
    return sum(kept.values()) // 2
