"""A folder that holds one trained network: what a run leaves, what a teacher is read from, what export copies.

``model.safetensors`` + ``config.json`` + ``README.md``, in the layout that the Hugging Face hub and timm read.
cakd's own facts stand under ``"cakd"`` in config.json.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from cakd_cli import __version__
from cakd_cli.errors import InputError
from cakd_cli.evaluation.cost import num_parameters
from cakd_cli.files import write_json, write_tensors, write_text
from cakd_cli.models import ModelOptions, ModelSpec, TimmSpec, load_state, read_state

_SPEC: TypeAdapter[ModelSpec] = TypeAdapter(ModelOptions)


@dataclass(frozen=True)
class SavedModel:
    """A network and what must be known to use it.

    Attributes:
        model: On the CPU, in eval mode.
        spec: Its place in a recipe.
        class_names: One name a class, in the order of the logits.
        channels: Of an image.
        image_size: Height and width in pixels.
        mean: Of each channel, for pixels in [0, 1].
        std: Likewise.
        facts: Data fingerprint, metrics and the like.
        crop_pct: Share of the shorter side that it is shown.
    """

    model: nn.Module
    spec: ModelSpec
    class_names: tuple[str, ...]
    channels: int
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    facts: Mapping[str, Any]
    crop_pct: float = 1.0


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
    described, card = config(saved), model_card(saved)
    write_tensors(folder / "model.safetensors", saved.model.state_dict())
    write_json(folder / "config.json", described)
    write_text(folder / "README.md", card)


def config(saved: SavedModel) -> dict[str, Any]:
    """Describe a network in the form of timm's config.json."""
    classifier = [name for name, module in saved.model.named_modules() if isinstance(module, nn.Linear)]
    heads = [module for module in saved.model.modules() if isinstance(module, nn.Linear)]
    architecture = saved.spec.name if isinstance(saved.spec, TimmSpec) else f"cakd_{saved.spec.label.replace(':', '_')}"
    return {
        "architecture": architecture,
        "num_classes": len(saved.class_names),
        "num_features": heads[-1].in_features if heads else None,
        "label_names": list(saved.class_names),
        "model_args": {"in_chans": saved.channels} if isinstance(saved.spec, TimmSpec) else {},
        "pretrained_cfg": {
            "input_size": [saved.channels, *saved.image_size],
            "mean": list(saved.mean),
            "std": list(saved.std),
            "interpolation": "bilinear",
            "crop_pct": saved.crop_pct,
            "classifier": classifier[-1] if classifier else None,
        },
        "cakd": {
            "version": __version__,
            "model": saved.spec.model_copy(update={"weights": None}).model_dump(mode="json"),
            "weights_hash": weights_hash(saved.model.state_dict()),
            **saved.facts,
        },
    }


def model_card(saved: SavedModel) -> str:
    """Describe a network for people, with front matter that the Hub reads."""
    facts = saved.facts
    test = facts.get("metrics", {}).get("test", {})
    front: dict[str, Any] = {
        "library_name": "timm" if isinstance(saved.spec, TimmSpec) else "cakd",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "cakd"] + (["knowledge-distillation"] if "teacher" in facts else []),
    }
    if "top1" in test:
        name, value = ("mean_average_precision", test["map"]) if "map" in test else ("accuracy", test["top1"])
        front["model-index"] = [
            {
                "name": saved.spec.label,
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"name": facts["data"]["name"], "type": facts["data"]["name"]},
                        "metrics": [{"type": name, "value": round(value, 4)}],
                    }
                ],
            }
        ]
    channels, (height, width) = saved.channels, saved.image_size
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {saved.spec.label}",
        "",
        f"An image classifier of {num_parameters(saved.model):,} parameters for {len(saved.class_names)} classes, "
        f"trained by cakd {__version__}" + (f" on {facts['data']['name']}." if "data" in facts else "."),
        "",
        f"- input: {channels} x {height} x {width}, pixels in [0, 1], minus mean {list(saved.mean)}, "
        f"divided by {list(saved.std)}",
        "- output: one logit a class"
        + ("; an image may have several labels, so each class is decided by itself" if "map" in test else ""),
        f"- loss: {facts.get('loss', 'unknown')}",
    ]
    if "teacher" in facts:
        lines.append(f"- teacher: {facts['teacher']['name']}")
    for split, metrics in facts.get("metrics", {}).items():
        values = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float))
        lines.append(f"- {split}: {values}")
    lines += ["", "Measure it with `cakd eval FOLDER --data DATA`.", ""]
    return "\n".join(lines)


def _check_config(
    channels: int,
    height: int,
    width: int,
    names: tuple[str, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    facts: Mapping[str, Any],
) -> None:
    if not (1 <= channels <= 1024 and min(height, width) >= 1 and max(height, width) <= 65536):
        raise ValueError(f"input_size {[channels, height, width]} is not that of an image")
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"mean and std must have {channels} numbers")
    if not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise ValueError("mean must be finite and std positive")
    if len(names) < 2:
        raise ValueError("a classifier needs two classes at least")
    metrics = facts.get("metrics", {})
    values = [value for split in metrics.values() for value in split.values()]
    if not all(isinstance(value, int | float) for value in values):
        raise ValueError("metrics must be numbers")
    if not isinstance(facts.get("data", {}).get("name", ""), str):
        raise ValueError("data must have a name")
    if not isinstance(facts.get("teacher", {}).get("name", ""), str):
        raise ValueError("teacher must have a name")


def read(folder: Path) -> SavedModel:
    """Read a folder that :func:`write` made.

    Raises:
        InputError: If a file is missing, damaged, or does not fit the others.
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
        content = json.loads(path.read_text(encoding="utf-8"))
        facts = dict(content["cakd"])
        spec = _SPEC.validate_python(facts.pop("model"))
        pretrained = content["pretrained_cfg"]
        channels, height, width = map(int, pretrained["input_size"])
        names = tuple(map(str, content["label_names"]))
        mean, std = tuple(map(float, pretrained["mean"])), tuple(map(float, pretrained["std"]))
        crop_pct = float(pretrained["crop_pct"])
        _check_config(channels, height, width, names, mean, std, facts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        what = str(error).splitlines()[0]
        if isinstance(error, KeyError):
            what = f"lacks {error}"
        if isinstance(error, ValidationError):
            what = error.errors()[0]["msg"]
        raise InputError(f"{path}: not a config.json of cakd: {what}") from error
    state = read_state(folder / "model.safetensors")
    model = spec.build(in_channels=channels, num_classes=len(names))
    load_state(model, state, source=str(folder / "model.safetensors"))
    recorded = facts.get("weights_hash")
    if recorded is not None and recorded != weights_hash(state):
        raise InputError(
            f"{folder}: model.safetensors is not the file that config.json describes",
            hint="copy both files of one run again",
        )
    return SavedModel(model.eval(), spec, names, channels, (height, width), mean, std, facts, crop_pct)
