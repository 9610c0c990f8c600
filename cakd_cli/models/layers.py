"""What the inside of a network gives: its layers, by name, beside its logits.

A tapped network answers with named tensors: ``logits`` and one for each tap. So a teacher's features are remembered as
its logits are, and a compiler sees a function from images to tensors.

Shape suffixes: B batch, C classes, D elements of a layer.
"""

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cakd_cli.errors import RecipeError, first_line, nearest

# What every network answers; and a teacher that is asked about a second view of each image.
LOGITS = "logits"
SECOND_LOGITS = "logits of the second view"

Answers = dict[str, Tensor]


@dataclass(frozen=True)
class Tap:
    """A layer, and the form in which it is wanted.

    Attributes:
        layer: Name of a module or of a stage; empty for the classifier that :func:`locate` finds, whose input is meant:
            as a vector, or the map that it is the average of.
        form: ``vector`` (batch, elements): a map (channels, height, width) is averaged over its positions, tokens
            (tokens, channels) over the tokens, in float32. ``map``: as the layer gives it. ``importance`` (batch,
            elements): how much each element speaks for the predicted class: gradient times activation, where positive,
            averaged as the vector is. Grad-CAM (arXiv 1610.02391) averages the gradient first; taken place by place, as
            HiResCAM (arXiv 2011.08891) does, it tells where an element matters. ``preactivation``: a stage's map before
            its last activation; :func:`locate` makes a map of it. ``class maps`` (batch, classes, height, width): the
            classifier at every position of the map that it sees the average of, without its bias (CAM, arXiv
            1512.04150).
        of_input: Whether the module's input is meant, not its output.
        classifier: Of class maps, the module that makes them; :func:`locate` finds it.
    """

    layer: str = ""
    form: Literal["vector", "map", "importance", "preactivation", "class maps"] = "vector"
    of_input: bool = False
    classifier: str = ""

    def __str__(self) -> str:
        """Name of the answer, as a person says it."""
        suffix = {"importance": " by grad-cam", "vector": ""}.get(self.form, f" as {self.form}")
        return ("input of " if self.of_input else "") + self.layer + suffix

    @property
    def place(self) -> "_Place":
        """Where in the network the values come from."""
        return _Place(self.layer, self.of_input, self.classifier)


class _Place(NamedTuple):
    """The output or the input of a layer; or what a classifier makes of the output."""

    layer: str
    of_input: bool = False
    classifier: str = ""


class Tapped(nn.Module):
    """A network that answers with named tensors.

    Args:
        network: Any module from images to logits.
        taps: Which layers it answers with beside the logits.

    Raises:
        AttributeError: If a layer does not exist.
    """

    def __init__(self, network: nn.Module, taps: Sequence[Tap] = ()) -> None:
        super().__init__()
        self.network = network
        self.taps = tuple(dict.fromkeys(taps))
        self._places = tuple(dict.fromkeys(tap.place for tap in self.taps))
        self._captured: dict[_Place, Tensor] = {}
        self._capturing = False
        self._handles: list[RemovableHandle] = []
        self._add_hooks()

    def _add_hooks(self) -> None:
        for place in self._places:
            module = self.network.get_submodule(place.layer)
            if place.of_input:
                self._handles.append(module.register_forward_pre_hook(self._input_hook(place)))
            else:
                self._handles.append(module.register_forward_hook(self._output_hook(place)))
            if place.classifier:
                classifier = self.network.get_submodule(place.classifier)
                self._handles.append(classifier.register_forward_hook(self._classifier_hook(place)))

    def close(self) -> None:
        """Remove the hooks; the network itself is as it was."""
        while self._handles:
            self._handles.pop().remove()

    # Functions, not methods: who copies the network beneath must not copy this one with it.

    def _input_hook(self, place: _Place) -> Callable[..., tuple[Any, ...]]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (self._capture(place, inputs[0]), *inputs[1:])

        return hook

    def _output_hook(self, place: _Place) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            return self._capture(place, output)

        return hook

    def _classifier_hook(self, place: _Place) -> Callable[..., None]:
        def hook(linear: nn.Linear, inputs: tuple[Any, ...], output: Tensor) -> None:
            if not self._capturing:
                return
            values = self._captured[place]
            if values.shape[1] != linear.in_features:
                raise RuntimeError(f"it has {values.shape[1]} channels, and the classifier takes {linear.in_features}")
            maps = linear.forward(values.movedim(1, -1))
            self._captured[place] = (maps if linear.bias is None else maps - linear.bias).movedim(-1, 1)

        return hook

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tapped":
        # A copied hook would still tell the original.
        self.close()
        try:
            return Tapped(copy.deepcopy(self.network, memo), self.taps)
        finally:
            self._add_hooks()

    def _capture(self, place: _Place, value: Tensor) -> Tensor:
        if not self._capturing:
            return value
        if Tap(place.layer, "importance", place.of_input) in self.taps and not value.requires_grad:
            value = value.detach().requires_grad_()
        self._captured[place] = value
        # What follows may work in place.
        return value.clone()

    def forward(self, images: Tensor) -> Answers:
        """Map normalised images to the logits (batch, classes) and each tap's tensor, by name, in float32."""
        if any(tap.form == "importance" for tap in self.taps):
            return self._with_importance(images)
        logits_BC, captured = self._run(images)
        return {LOGITS: logits_BC.float(), **{str(tap): _formed(captured[tap.place], tap) for tap in self.taps}}

    def _run(self, images: Tensor) -> tuple[Tensor, dict[_Place, Tensor]]:
        self._captured = {}
        self._capturing = True
        try:
            logits_BC = self.network(images)
        finally:
            self._capturing = False
        captured, self._captured = self._captured, {}
        if len(captured) < len(self._places):
            raise RuntimeError("a tapped layer was not used")
        return logits_BC, captured

    def _with_importance(self, images: Tensor) -> Answers:
        with torch.enable_grad():
            logits_BC, captured = self._run(images)
            wanted = [tap.place for tap in self.taps if tap.form == "importance"]
            # Samples do not know of each other, so the sum's gradient is that of each one's own largest logit.
            largest = logits_BC.float().amax(1).sum()
            gradients = dict(
                zip(wanted, torch.autograd.grad(largest, [captured[place] for place in wanted]), strict=True)
            )
        answers = {LOGITS: logits_BC.detach().float()}
        for tap in self.taps:
            value = captured[tap.place].detach().float()
            if tap.form == "importance":
                answers[str(tap)] = pooled((gradients[tap.place].float() * value).relu())
            else:
                answers[str(tap)] = _formed(value, tap)
        return answers


def _formed(value: Tensor, tap: Tap) -> Tensor:
    return value.float() if tap.form in ("map", "class maps") else pooled(value.float())


def pooled(value: Tensor) -> Tensor:
    """Average a layer's values over positions or tokens, to (batch, elements).

    Of a map with channels last, as Swin's, two equal sizes in the middle give the positions away; any other is taken
    for one with channels first.
    """
    if value.ndim == 4:
        last = value.shape[1] == value.shape[2] != value.shape[3]
        return value.mean((1, 2) if last else (2, 3))
    return value.mean(1) if value.ndim == 3 else value.flatten(1)


@dataclass(frozen=True)
class Located:
    """Layers that were found in a network.

    Attributes:
        taps: With the names of modules, in the order asked for.
        shapes: Of every answer without the batch, by name, the logits first.
    """

    taps: tuple[Tap, ...]
    shapes: Mapping[str, tuple[int, ...]]


@torch.no_grad()
def locate(network: nn.Module, taps: Sequence[Tap], num_classes: int, example: Tensor, *, name: str) -> Located:
    """Find layers in a network and measure what they give.

    Args:
        network: On the device of the example.
        taps: Which layers.
        num_classes: Which the classifier tells apart.
        example: An input of one sample.
        name: What the network is called in an error.

    Raises:
        RecipeError: If a layer does not exist, is not used, or does not give one tensor of the wanted form.
    """
    found: list[Tap] = []
    shapes: dict[str, tuple[int, ...]] = {LOGITS: (num_classes,)}
    for tap in taps:
        tap = _with_module(network, tap, num_classes, name)
        try:
            with contextlib.closing(Tapped(copy.deepcopy(network).eval(), [tap])) as probe:
                shape = tuple(probe(example)[str(tap)].shape[1:])
        except (RuntimeError, AttributeError, TypeError) as error:
            raise RecipeError(f"layer '{tap.layer}' of {name} cannot be tapped: {first_line(error)}") from error
        if tap.form in ("map", "class maps") and len(shape) != 3:
            size = " x ".join(map(str, shape))
            raise RecipeError(
                f"layer '{tap.layer}' of {name} gives {size} numbers an image, not a map",
                hint="name a layer before the pooling, as its last stage",
            )
        found.append(tap)
        shapes[str(tap)] = shape
    return Located(tuple(found), shapes)


def _with_module(network: nn.Module, tap: Tap, num_classes: int, name: str) -> Tap:
    if tap.form == "class maps":
        tap = replace(tap, classifier=find_classifier(network, num_classes, name=name))
    if not tap.layer and tap.form in ("map", "class maps"):
        tap = replace(tap, layer=averaged_map(network, name))
    if not tap.layer:
        return replace(tap, layer=find_classifier(network, num_classes, name=name), of_input=True)
    modules = dict(network.named_modules())
    if tap.form == "preactivation":
        layer, _ = preactivation(network, tap.layer, name)
        return Tap(layer, "map", of_input=isinstance(modules[layer], nn.ReLU))
    layer = stages(network).get(tap.layer, tap.layer)
    if layer not in modules:
        raise RecipeError(f"{name} has no layer '{tap.layer}'", hint=_near_layers(network, modules, tap.layer))
    return replace(tap, layer=layer)


def stages(network: nn.Module) -> dict[str, str]:
    """Modules that end the stages of a network, by ``stage1``, ``stage2``, ...; empty where it does not tell.

    cakd's own networks name them in ``stages``; torchvision's ResNets and their like by ``layer1`` to ``layer4``.
    """
    names = getattr(network, "stages", None)
    if not isinstance(names, tuple):
        children = dict(network.named_children())
        names = tuple(name for name in ("layer1", "layer2", "layer3", "layer4") if name in children)
    return {f"stage{number}": str(layer) for number, layer in enumerate(names, 1)}


def averaged_map(network: nn.Module, name: str) -> str:
    """Name the module whose output is averaged into the input of the classifier.

    cakd's own networks that go on after their last stage name it in ``averaged``; elsewhere it is the last stage.

    Raises:
        RecipeError: If the network does not tell.
    """
    last = getattr(network, "averaged", None) or next(reversed(stages(network).values()), None)
    if last is None:
        raise RecipeError(
            f"{name} does not tell which map its classifier sees the average of",
            hint="cakd's own networks and ResNets do; cat-kd and sdd-* take its name: "
            "layer={student: layer4, teacher: layer4}",
        )
    return str(last)


def preactivation(network: nn.Module, stage: str, name: str) -> tuple[str, str]:
    """Find what a stage gives before its last activation.

    cakd's own networks name it in ``preactivations``; in torchvision's ResNets it is what the last block's ReLU is
    given.

    Args:
        network: Any.
        stage: Its name, or that of the stage's module.
        name: What the network is called in an error.

    Returns:
        A module, whose input is meant if it is a ReLU and else its output; and the batch norm before the activation.

    Raises:
        RecipeError: If the network does not tell.
    """
    found = stages(network)
    layer = found.get(stage, stage)
    known = getattr(network, "preactivations", None)
    if layer in found.values() and isinstance(known, tuple):
        return cast(tuple[str, str], known[list(found.values()).index(layer)])
    blocks = list(dict(network.named_modules()).get(layer, nn.Sequential()).named_children())
    last = blocks[-1][1] if blocks else None
    norms = [child for child, module in last.named_children() if isinstance(module, nn.BatchNorm2d)] if last else []
    if not norms or not isinstance(getattr(last, "relu", None), nn.ReLU):
        raise RecipeError(
            f"{name} does not tell what '{stage}' is before its last activation",
            hint="stages of a ResNet, a wide ResNet, a VGG, a MobileNet and ShuffleNetV1 do",
        )
    block = f"{layer}.{blocks[-1][0]}"
    return f"{block}.relu", f"{block}.{norms[-1]}"


def _near_layers(network: nn.Module, modules: Mapping[str, nn.Module], layer: str) -> str:
    # Hundreds of names help nobody: those beside where the wrong one would be.
    parent = layer
    while parent not in modules:
        parent = parent.rpartition(".")[0]
    beside = [f"{parent}.{child}".lstrip(".") for child, _ in modules[parent].named_children()]
    beside += [] if parent else list(stages(network))
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
