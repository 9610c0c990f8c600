"""What run.json records of a run, and whether a run that goes on is still the same."""

import contextlib
import importlib.metadata
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from cakd_cli import __version__
from cakd_cli.engine import run_directory
from cakd_cli.engine.build import Inputs
from cakd_cli.engine.choices import Choices
from cakd_cli.engine.progress import Progress
from cakd_cli.errors import InputError
from cakd_cli.losses.weights import ChangingWeight
from cakd_cli.models import num_parameters
from cakd_cli.recipe.schema import Recipe
from cakd_cli.teachers import Teacher, single_teachers

# What is recorded of each time that the run was started.
_BEGINNING = ("command", "versions", "hardware", "started_at")


def facts_of(choices: Choices) -> dict[str, Any]:
    """Say how the run begins."""
    inputs, recipe = choices.inputs, choices.recipe
    data, teacher = inputs.data, inputs.teacher
    return {
        "command": ["cakd", *sys.argv[1:]],
        "versions": versions(),
        "hardware": {
            "device": str(inputs.hardware.device),
            "name": inputs.hardware.name,
            "precision": inputs.hardware.precision,
            "threads": torch.get_num_threads(),
            **inputs.ranks.describe(),
        },
        "started_at": run_directory.now(),
        "seed": recipe.seed,
        "protocol": recipe.protocol,
        "data": {
            "name": data.name,
            "fingerprints": dict(data.fingerprints),
            "image": list(data.input.shape),
            "validation_fraction": recipe.data.validation_fraction,
            "split_seed": recipe.data.split_seed,
            "train": len(data.train),
            "validation": len(data.validation) if data.validation else 0,
            "test": len(data.test),
            **({"left_out": list(data.left_out)} if data.left_out else {}),
        },
        "model": {"name": recipe.model.label, "parameters": num_parameters(inputs.student)},
        "loss": " + ".join(f"{_weight(term.weight)} {term.type}" for term in recipe.loss),
        "teacher": teacher and _about(teacher, recipe),
        "chosen": choices.reasons,
        "warnings": list(choices.warnings),
    }


def _about(teacher: Teacher, recipe: Recipe) -> dict[str, Any]:
    assert recipe.teacher is not None
    origins = dict.fromkeys(member.origin for member in single_teachers(recipe.teacher))
    trained_on = _part(dict(teacher.facts), "data").get("name")
    origin = f"trained on {trained_on}" if trained_on else " and ".join(origins)
    classes = {"classes": dict(teacher.classes)} if teacher.classes else {}
    return {"name": teacher.name, "weights_hash": teacher.weights_hash, "origin": origin, **classes}


def gone_on(before: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Leave on record how the run began, and add that it went on."""
    began = {key: before[key] for key in (*_BEGINNING, "chosen", "warnings") if key in before}
    again = {key: facts[key] for key in _BEGINNING}
    resumed = before.get("resumed")
    return facts | began | {"resumed": [*(resumed if isinstance(resumed, list) else []), again]}


def check_same_inputs(before: dict[str, Any], inputs: Inputs, out: Path, progress: Progress) -> None:
    """Refuse to continue a run on other training images or under another teacher; other test images are said.

    Raises:
        InputError: If what it learns from is not what the run began with.
    """
    began, now = _part(before, "data").get("fingerprints"), inputs.data.fingerprints
    began = began if isinstance(began, dict) else {}
    changed = {part for part in now if part in began and began[part] != now[part]}
    what = [f"{part} images" for part in ("train", "val") if part in changed]
    old = _part(before, "teacher").get("weights_hash")
    if inputs.teacher is not None and old is not None and old != inputs.teacher.weights_hash:
        what.append("teacher")
    elif inputs.teacher is not None and _part(_part(before, "teacher"), "classes") != inputs.teacher.classes:
        what.append("teacher's classes")
    if what:
        raise InputError(
            f"{out} cannot be resumed: not the same as when it began: its {' and its '.join(what)}",
            hint="put them back, or start another run with another --out",
        )
    threads, machine = _part(before, "hardware").get("threads"), inputs.hardware
    if machine.device.type == "cpu" and threads not in (None, torch.get_num_threads()):
        progress.note(
            f"the run began with {threads} threads and goes on with {torch.get_num_threads()}: the last digits may "
            f"differ; OMP_NUM_THREADS={threads} keeps them"
        )
    if "test" in changed:
        progress.warn(f"the test images of {inputs.data.name} changed after the run began; it is measured on these")


def _part(facts: dict[str, Any], key: str) -> dict[str, Any]:
    """Read a part of run.json, which somebody may have edited."""
    part = facts.get(key)
    return part if isinstance(part, dict) else {}


def _weight(weight: Any) -> str:
    return f"{weight.type} weight of" if isinstance(weight, ChangingWeight) else f"{weight:g}"


def versions() -> dict[str, str]:
    """Versions of everything that may change a result."""
    packages = ("torch", "torchvision", "safetensors", "torchmetrics", "timm", "onnx", "onnxruntime")
    found = {"cakd": __version__, "python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
