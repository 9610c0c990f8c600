"""A network as a run begins with it: fresh, from a file, or from its library's published weights."""

from pathlib import Path

import torch
from torch import Tensor, nn

from cakd_cli.errors import RecipeError, first_line, place_in_own_code
from cakd_cli.models.base import ModelSpec
from cakd_cli.models.external import ExternalSpec, load_but_head
from cakd_cli.models.weights import load_state, read_state


def initial_network(spec: ModelSpec, example: Tensor, num_classes: int, *, fetch: bool = True) -> nn.Module:
    """Make a network for images like the example.

    Args:
        spec: The recipe's.
        example: (1, channels, height, width).
        num_classes: Logits that it answers with.
        fetch: Whether published weights may be downloaded; otherwise the network is fresh, and of the same sizes.

    Raises:
        InputError: If its weights are missing or do not fit.
        RecipeError: If there is no such network, or it cannot take such images.
    """
    return spec.ended(_own_network(spec, example.shape[1], num_classes, fetch=fetch), num_classes)


def _own_network(spec: ModelSpec, in_channels: int, num_classes: int, *, fetch: bool) -> nn.Module:
    sizes = {"in_channels": in_channels, "num_classes": num_classes}
    pretrained = isinstance(spec, ExternalSpec) and spec.pretrained
    if isinstance(spec, ExternalSpec) and pretrained and spec.weights is None:
        return spec.published(**sizes) if fetch else spec.build(**sizes)
    model = spec.build(**sizes)
    if spec.weights is not None:
        path = Path(spec.weights).expanduser()
        # Published weights from a file, and those of a run, may have another head; other weights must fit.
        load = load_but_head if pretrained or path.is_dir() else load_state
        load(model, read_state(path / "model.safetensors" if path.is_dir() else path), source=spec.weights)
    return model


def check_takes(model: nn.Module, example: Tensor, num_classes: int, name: str) -> None:
    """Show a network, on the CPU, one image.

    Raises:
        RecipeError: If it cannot take it, or does not answer with a logit a class.
    """
    if count_logits(model, example, name) != num_classes:
        raise RecipeError(f"{name} does not answer with one logit for each of {num_classes} classes")


def count_logits(model: nn.Module, example: Tensor, name: str) -> int:
    """Show a network, on the CPU, one image, and count its logits.

    Raises:
        RecipeError: If it cannot take it, or does not answer with logits.
    """
    try:
        # Not in inference mode: what a network computes once and keeps must serve training too.
        with torch.no_grad():
            answer = model.eval()(example)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # Other people's networks refuse with whatever they like.
        size = " x ".join(map(str, example.shape[1:]))
        where = place_in_own_code(error)
        raise RecipeError(
            f"{name} cannot take images of {size}: {f'{where}: ' if where else ''}{first_line(error)}",
            hint="another network; or, for a folder's images, another size: data.image_size=224",
        ) from error
    if not isinstance(answer, Tensor) or answer.ndim != 2 or len(answer) != 1:
        raise RecipeError(f"{name} does not answer with logits, one for each class")
    return answer.shape[1]
