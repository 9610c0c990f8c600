"""A network that is trained for 8 bits (quantization-aware training, arXiv 1712.05877).

While it trains, each convolution and linear layer rounds its input and its weight as onnxruntime will in the file of
``cakd export --format onnx-int8``, so that the weights learn to bear it. Rounding has the gradient 1. In eval mode the
network is the float32 one that it was: its parameters, their names and its buffers are the same, and there is no state.
The range of an input is that of the batch; the file has one range, from the images that calibrate it.

A batch norm need not be folded into its convolution first, as the file has it: a factor on an output channel changes
the scale of that channel's weights, and none of the integers. What the file also rounds, the terms of a sum and what a
pooling gives to no layer, is not rounded here.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from cakd_cli.errors import RecipeError

# Integers of an activation are 0 to 255; those of a weight have 7 bits, for the reason told in export/onnx_int8.py.
ACTIVATION_LARGEST = 255
WEIGHT_LARGEST = 64
# What is zero throughout has a scale too.
_LEAST_SCALE = torch.finfo(torch.float32).tiny


def train_in_int8(network: nn.Module, *, name: str) -> None:
    """Let a network round while it trains; nothing changes in eval mode.

    Args:
        network: Its convolutions and linear layers are replaced in place, each with the parameters that it has.
        name: What the network is called in an error.

    Raises:
        RecipeError: If it has weights that are in neither kind of layer, so that they would not be rounded.
    """
    layers = {key: module for key, module in network.named_modules() if type(module) in _ROUNDED}
    covered = {id(module.weight) for module in layers.values()}
    for key, parameter in network.named_parameters():
        if parameter.ndim > 1 and id(parameter) not in covered:
            raise RecipeError(
                f"engine.quantize is int8, and {name} has weights in other layers than nn.Conv2d and nn.Linear: {key}",
                hint="leave out engine.quantize; cakd export --format onnx-int8 needs no training",
            )
    for module in layers.values():
        module.__class__ = _ROUNDED[type(module)]


def rounded_weight(weight: Tensor) -> Tensor:
    """Round a weight (outputs, ...) to -64, ..., 64 times a scale of each output channel."""
    with torch.no_grad():
        largest = weight.abs().amax(tuple(range(1, weight.ndim)), keepdim=True)
        scale = (largest / WEIGHT_LARGEST).clamp(min=_LEAST_SCALE)
        rounded = (weight / scale).round() * scale
    return weight + (rounded - weight.detach())


def rounded_input(values: Tensor) -> Tensor:
    """Round a layer's input to 256 values, evenly spaced over its range and zero, which is one of them; to float32."""
    values = values.float()
    with torch.no_grad():
        least, largest = values.aminmax()
        least, largest = least.clamp(max=0), largest.clamp(min=0)
        scale = ((largest - least) / ACTIVATION_LARGEST).clamp(min=_LEAST_SCALE)
        zero = (-least / scale).round()
        rounded = (((values / scale).round() + zero).clamp(0, ACTIVATION_LARGEST) - zero) * scale
    return values + (rounded - values.detach())


class _Conv2d(nn.Conv2d):
    def forward(self, values: Tensor) -> Tensor:
        if not self.training:
            return super().forward(values)
        answer: Tensor = self._conv_forward(rounded_input(values), rounded_weight(self.weight), self.bias)
        return answer


class _Linear(nn.Linear):
    def forward(self, values: Tensor) -> Tensor:
        if not self.training:
            return super().forward(values)
        return functional.linear(rounded_input(values), rounded_weight(self.weight), self.bias)


_ROUNDED: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: _Conv2d, nn.Linear: _Linear}
