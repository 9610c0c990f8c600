"""A folder that holds one trained network: what a run leaves, what a teacher is read from, what export copies.

``model.safetensors`` + ``config.json`` + ``README.md``, in the layout that the Hugging Face hub and timm read.
cakd's own facts stand under ``"cakd"`` in config.json.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from cakd_cli import __version__
from cakd_cli.errors import InputError, first_line
from cakd_cli.files import read_json, write_json, write_tensors, write_text
from cakd_cli.models import ModelOptions, ModelSpec, TimmSpec, card
from cakd_cli.models.preprocessing import Preprocessing
from cakd_cli.models.weights import load_state, read_state

# What :func:`write` leaves.
FILES = ("model.safetensors", "config.json", "README.md")

_SPEC: TypeAdapter[ModelSpec] = TypeAdapter(ModelOptions)


@dataclass(frozen=True)
class SavedModel:
    """A network and what must be known to use it.

    Attributes:
        model: On the CPU, in eval mode.
        spec: Its place in a recipe.
        class_names: One name a class, in the order of the logits.
        preprocessing: From a picture to its input.
        facts: Data fingerprint, metrics and the like.
    """

    model: nn.Module
    spec: ModelSpec
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    facts: Mapping[str, Any]

    @property
    def of_timm(self) -> TimmSpec | None:
        """The network as timm makes it; none if timm cannot read it."""
        return self.spec if isinstance(self.spec, TimmSpec) and self.spec.end is None else None

    @property
    def several_labels(self) -> bool:
        """Whether an image may have several labels, so that each class is decided by itself."""
        return "map" in self.facts.get("metrics", {}).get("test", {})

    def describe(self, *, pixels: bool = False) -> dict[str, Any]:
        """What whoever runs an exported file must know: its version, class names, preprocessing and probabilities.

        Args:
            pixels: Of a file that takes uint8 pixels, channels last, and answers with probabilities.
        """
        return {
            "producer": f"cakd {__version__}",
            "class_names": list(self.class_names),
            "preprocessing": self.preprocessing.document(pixels=pixels),
            "probabilities": "sigmoid" if self.several_labels else "softmax",
        }


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """Hash the names, types, shapes and bytes of tensors; equal only for equal weights."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # A view as bytes, because numpy has no bf16.
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def write(folder: Path, saved: SavedModel) -> None:
    """Write the folder's three files, each whole or not at all."""
    described = config(saved)
    write_tensors(folder / "model.safetensors", saved.model.state_dict())
    write_json(folder / "config.json", described)
    write_text(folder / "README.md", card.model_card(saved))


def config(saved: SavedModel) -> dict[str, Any]:
    """Describe a network in the form of timm's config.json."""
    classifier = [name for name, module in saved.model.named_modules() if isinstance(module, nn.Linear)]
    heads = [module for module in saved.model.modules() if isinstance(module, nn.Linear)]
    shown = saved.preprocessing
    timm = saved.of_timm
    architecture = timm.name if timm else f"cakd_{saved.spec.label.replace(':', '_')}"
    return {
        "architecture": architecture,
        "num_classes": len(saved.class_names),
        "num_features": heads[-1].in_features if heads else None,
        "label_names": list(saved.class_names),
        "model_args": {"in_chans": shown.input_size[0]} if timm else {},
        "pretrained_cfg": {
            "input_size": list(shown.input_size),
            "mean": list(shown.mean),
            "std": list(shown.std),
            "interpolation": shown.interpolation,
            "crop_pct": shown.crop_pct,
            "classifier": classifier[-1] if classifier else None,
        },
        "cakd": {
            "version": __version__,
            "model": saved.spec.model_copy(update={"weights": None}).model_dump(mode="json"),
            "weights_hash": weights_hash(saved.model.state_dict()),
            "preprocessing": shown.document(),
            **saved.facts,
        },
    }


def _check(described: Preprocessing, names: tuple[str, ...], facts: Mapping[str, Any]) -> None:
    channels, height, width = described.input_size
    if not (1 <= channels <= 1024 and min(height, width) >= 1 and max(height, width) <= 4096):
        raise ValueError(f"input_size {[channels, height, width]} is not that of an image")
    if len(described.mean) != channels or len(described.std) != channels:
        raise ValueError(f"mean and std must have {channels} numbers")
    if not all(map(math.isfinite, (*described.mean, *described.std))) or min(described.std) <= 0:
        raise ValueError("mean must be finite and std positive")
    if not 0 < described.crop_pct <= 1:
        raise ValueError(f"crop_pct must be in (0, 1], got {described.crop_pct}")
    if len(names) < 2:
        raise ValueError("a classifier needs two classes at least")
    metrics = facts.get("metrics", {})
    values = [value for split in metrics.values() for value in split.values()]
    if not all(isinstance(value, int | float) for value in values):
        raise ValueError("metrics must be numbers")
    for key in ("data", "teacher"):
        if not isinstance(facts.get(key, {}).get("name", ""), str):
            raise ValueError(f"{key} must have a name")
    if not isinstance(facts.get("data", {}).get("fingerprints", {}), dict):
        raise ValueError("fingerprints of data must have names")


def read(folder: Path) -> SavedModel:
    """Read a folder that :func:`write` made.

    Raises:
        InputError: If a file is missing, damaged, or does not fit the others.
    """
    spec, names, shown, facts = read_config(folder)
    state = read_state(folder / "model.safetensors")
    model = spec.network(in_channels=shown.input_size[0], num_classes=len(names))
    load_state(model, state, source=str(folder / "model.safetensors"))
    recorded = facts.get("weights_hash")
    if recorded is not None and recorded != weights_hash(state):
        raise InputError(
            f"{folder}: model.safetensors is not the file that config.json describes",
            hint="copy both files of one run again",
        )
    return SavedModel(model.eval(), spec, names, shown, facts)


def read_config(folder: Path) -> tuple[ModelSpec, tuple[str, ...], Preprocessing, dict[str, Any]]:
    """Read what a folder says of its network: its options, class names, preprocessing and facts.

    Raises:
        InputError: If a file is missing or damaged.
    """
    if not folder.exists():
        raise InputError(f"no such run directory: {folder}", hint="a trained network is named by the folder of its run")
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            unfinished = (folder / "recipe.yaml").is_file()
            raise InputError(
                f"{folder} has no {name}" + (": its run is not finished" if unfinished else ""),
                hint="finish it: the same command with --resume" if unfinished else None,
            )
    path = folder / "config.json"
    try:
        content = read_json(path)
        facts = dict(content["cakd"])
        spec = _SPEC.validate_python(facts.pop("model"))
        facts.pop("preprocessing", None)  # the same as pretrained_cfg, for whoever is not timm
        names = tuple(map(str, content["label_names"]))
        shown = Preprocessing.of_timm(content["pretrained_cfg"], resized="resize" in content["cakd"]["preprocessing"])
        _check(shown, names, facts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        what = first_line(error)
        if isinstance(error, KeyError):
            what = f"lacks {error}"
        if isinstance(error, ValidationError):
            what = error.errors()[0]["msg"]
        raise InputError(f"{path}: not a config.json of cakd: {what}") from error
    return spec, names, shown, facts
