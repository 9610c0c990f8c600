"""A file of weights, named where a network is wanted."""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor

from cakd_cli import models
from cakd_cli.errors import InputError
from cakd_cli.models import ModelSpec, TorchvisionSpec, read_state


def weights_alone(path: Path, given: str) -> InputError:
    """Say which two words are missing: a file of weights does not say of which network they are.

    Args:
        path: Of the file.
        given: As the person wrote it.

    Raises:
        InputError: If it is no file of weights that can be read without running code.
    """
    if path.suffix not in (".pth", ".pt", ".bin", ".safetensors", ".ckpt"):
        return InputError(
            f"{given} is a file, and no network", hint="a trained network is named by the folder of its run"
        )
    state = read_state(path)
    if {*state} == {"logits"}:
        return InputError(f"{given} holds logits, and no network", hint=f"--teacher logits:{given}")
    return InputError(
        f"{given} holds weights, and does not say of which network",
        hint=f"name both: --teacher {_likely(path.stem, state)} teacher.weights={given}",
    )


def _likely(stem: str, state: Mapping[str, Tensor]) -> str:
    """Guess the network from the name of its file; of two with that name take the one whose weights are called so.

    NAME where the file does not tell.
    """
    own = {name: spec for name, spec in models.names().items() if spec.shorthand is None}
    known = [*TorchvisionSpec.known(), *own]
    word = re.sub(r"[^a-z0-9]+", "_", stem.lower())
    within = [name for name in known if re.search(rf"(^|_){re.escape(name)}(_|$)", word)]
    found = sorted(within, key=len)[-1:] or get_close_matches(word, known, n=1, cutoff=0.6)
    if not found:
        return "NAME"
    (name,) = found
    specs = [own[name](type=name)] if name in own else []
    specs += [TorchvisionSpec(name=name)] if name in TorchvisionSpec.known() else []
    return next((spec.label for spec in specs if {*_weights(spec)} == {*state}), specs[-1].label)


def _weights(spec: ModelSpec) -> Iterable[str]:
    """Name a network's weights, without making them."""
    with torch.device("meta"):
        return spec.build(in_channels=3, num_classes=10).state_dict()
