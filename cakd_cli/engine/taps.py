"""What the inside of a network says: its layers, tapped by name, beside its logits.

A tapped network answers with one row an image: the logits, then a vector for each tap. A map (channels, height, width)
is averaged over its positions, tokens (tokens, channels) over the tokens. So a teacher's features are remembered
as its logits are, and a compiler sees a function from images to rows.

Shape suffixes: B batch, C classes, D elements of a layer.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cakd_cli.errors import RecipeError, nearest
from cakd_cli.losses import LossTerm


@dataclass(frozen=True)
class Tap:
    """A layer to listen to.

    Attributes:
        layer: Name of a module; empty for the classifier that :func:`locate` finds, whose input is meant then.
        of_input: Whether its input is meant, not its output.
        importance: Whether the row also holds how much each element speaks for the predicted class: gradient times
            activation, where positive, averaged as the layer is. Grad-CAM (arXiv 1610.02391) averages the gradient
            first; taken place by place, as HiResCAM (arXiv 2011.08891) does, it tells where an element matters.
    """

    layer: str
    of_input: bool = False
    importance: bool = False

    def __str__(self) -> str:
        """As a person says it."""
        return ("input of " if self.of_input else "") + self.layer + (" with grad-cam" if self.importance else "")


class Tapped(nn.Module):
    """A network that answers with rows.

    Args:
        network: Any module from images to logits.
        taps: Where to listen.

    Raises:
        AttributeError: If a layer does not exist.
    """

    def __init__(self, network: nn.Module, taps: Sequence[Tap]) -> None:
        super().__init__()
        self.network = network
        self.taps = tuple(taps)
        self._heard: list[Tensor | None] = []
        self._listening = False
        self._handles: list[RemovableHandle] = []
        self._listen()

    def _listen(self) -> None:
        for number, tap in enumerate(self.taps):
            module = self.network.get_submodule(tap.layer)
            if tap.of_input:
                self._handles.append(module.register_forward_pre_hook(self._input_hook(number)))
            else:
                self._handles.append(module.register_forward_hook(self._output_hook(number)))

    # Functions, not methods: who copies the network beneath must not copy this one with it.

    def _input_hook(self, number: int) -> Callable[..., tuple[Any, ...]]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (self._hear(number, inputs[0]), *inputs[1:])

        return hook

    def _output_hook(self, number: int) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            return self._hear(number, output)

        return hook

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tapped":
        # A copied hook would still tell the original.
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        try:
            return Tapped(copy.deepcopy(self.network, memo), self.taps)
        finally:
            self._listen()

    def _hear(self, number: int, value: Tensor) -> Tensor:
        if not self._listening:
            return value
        if self.taps[number].importance and not value.requires_grad:
            value = value.detach().requires_grad_()
        self._heard[number] = value
        # What follows may work in place.
        return value.clone()

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images to rows (batch, classes + elements of every tap), float32."""
        if any(tap.importance for tap in self.taps):
            return self._with_importance(images)
        logits_BC, heard = self._ask(images)
        return torch.cat([logits_BC.float(), *(pooled(value).float() for value in heard)], dim=1)

    def _ask(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        self._heard = [None] * len(self.taps)
        self._listening = True
        try:
            logits_BC = self.network(images)
        finally:
            self._listening = False
        heard = [value for value in self._heard if value is not None]
        self._heard = []
        if len(heard) < len(self.taps):
            raise RuntimeError("a tapped layer was not used")
        return logits_BC, heard

    def _with_importance(self, images: Tensor) -> Tensor:
        with torch.enable_grad():
            logits_BC, heard = self._ask(images)
            wanted = [value for value, tap in zip(heard, self.taps, strict=True) if tap.importance]
            # Samples do not know of each other, so the sum's gradient is that of each one's own largest logit.
            gradients = iter(torch.autograd.grad(logits_BC.float().amax(1).sum(), wanted))
        row = [logits_BC.detach().float()]
        for value, tap in zip(heard, self.taps, strict=True):
            value = value.detach().float()
            row.append(pooled(value))
            if tap.importance:
                row.append(pooled((next(gradients).float() * value).relu()))
        return torch.cat(row, dim=1)


def pooled(value: Tensor) -> Tensor:
    """Average a layer's answer over positions or tokens, to (batch, elements).

    Of a map with channels last, as Swin's, two equal sizes in the middle give the positions away; any other is taken
    for one with channels first.
    """
    if value.ndim == 4:
        last = value.shape[1] == value.shape[2] != value.shape[3]
        return value.mean((1, 2) if last else (2, 3))
    return value.mean(1) if value.ndim == 3 else value.flatten(1)


def student_layers(terms: Sequence[LossTerm]) -> tuple[Tap, ...]:
    """Where the terms listen in the student, in their order."""
    return tuple(Tap(mine) for term in terms for mine, _ in term.layer_names)


def teacher_layers(terms: Sequence[LossTerm]) -> tuple[Tap, ...]:
    """Where the terms listen in the teacher, in their order."""
    return tuple(Tap(theirs, importance=term.needs_importance) for term in terms for _, theirs in term.layer_names)


@torch.no_grad()
def locate(
    network: nn.Module, layers: Sequence[Tap], num_classes: int, image: Tensor, *, name: str
) -> tuple[tuple[Tap, ...], tuple[int, ...]]:
    """Find layers in a network and measure what they give.

    Args:
        network: On the device of the image.
        layers: Where to listen.
        num_classes: Which the classifier tells apart.
        image: Shape (1, channels, height, width).
        name: What the network is called in an error.

    Returns:
        The taps, and the sizes of a row's parts: logits, then each tap's elements, and again for their importance.

    Raises:
        RecipeError: If a layer does not exist, is not used, or does not answer with one tensor.
    """
    taps, sizes = [], [num_classes]
    for tap in layers:
        if not tap.layer:
            tap = replace(tap, layer=find_classifier(network, num_classes, name=name), of_input=True)
        modules = dict(network.named_modules())
        if tap.layer not in modules:
            raise RecipeError(f"{name} has no layer '{tap.layer}'", hint=_near_layers(modules, tap.layer))
        try:
            row = Tapped(copy.deepcopy(network).eval(), [tap])(image)
        except (RuntimeError, AttributeError, TypeError) as error:
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise RecipeError(f"layer '{tap.layer}' of {name} cannot be tapped: {why}") from error
        count = (row.shape[1] - num_classes) // (2 if tap.importance else 1)
        taps.append(tap)
        sizes += [count, count] if tap.importance else [count]
    return tuple(taps), tuple(sizes)


def _near_layers(modules: dict[str, nn.Module], layer: str) -> str:
    # Hundreds of names help nobody: those beside where the wrong one would be.
    parent = layer
    while parent not in modules:
        parent = parent.rpartition(".")[0]
    beside = [f"{parent}.{child}".lstrip(".") for child, _ in modules[parent].named_children()]
    return f"{nearest(layer, beside)} (or a layer inside one)" if beside else f"{parent} has no layers inside"


def find_classifier(network: nn.Module, num_classes: int, *, name: str) -> str:
    """Name the last linear layer with one output a class.

    Raises:
        RecipeError: If there is none.
    """
    found = [
        layer
        for layer, module in network.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == num_classes
    ]
    if not found:
        raise RecipeError(
            f"{name} has no linear classifier of {num_classes} classes, whose input could be compared",
            hint="name layers of both networks in the term's layers, or use --loss cakd-logits",
        )
    return str(found[-1])
