"""What a run would do, without doing it."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from cakd_cli.engine import advice
from cakd_cli.engine.build import Inputs
from cakd_cli.engine.choices import Choices, decide
from cakd_cli.engine.rehearsal import rehearse
from cakd_cli.engine.task import Task
from cakd_cli.evaluation import cost
from cakd_cli.files import read_json
from cakd_cli.models import ExternalSpec, num_parameters
from cakd_cli.teachers import EnsembleTeacher, StoredLogits, Teacher


def plan(inputs: Inputs) -> dict[str, Any]:
    """Say what a run would do, and how long it would take where all is here; nothing is written or downloaded.

    Raises:
        RecipeError: If a term of the loss cannot be built, or the batch is too small for a batch norm.
        DeviceFullError: If the device has no room for a step.
    """
    choices = decide(inputs, measure=False)
    recipe, data, machine, teacher = choices.recipe, inputs.data, inputs.hardware, choices.inputs.teacher
    shape = data.input.shape
    student = {"name": recipe.model.label, "starts_from": recipe.model.origin, **_size(inputs.student, shape)}
    result = {
        "data": {
            "name": data.name,
            "classes": data.num_classes,
            "image": list(shape),
            "train": len(data.train),
            "validation": len(data.validation) if data.validation else 0,
            "test": len(data.test),
        },
        "student": student,
        "teacher": None,
        "loss": [term.model_dump(mode="json") for term in recipe.loss],
        "epochs": recipe.engine.epochs,
        "steps_per_epoch": inputs.steps_per_epoch,
        "steps": inputs.steps_per_epoch * recipe.engine.epochs,
        "seconds": _seconds(choices),
        "training_memory_bytes": _training_bytes(inputs, student["parameters"]),
        "device": str(machine.device),
        "precision": machine.precision,
        "teacher_memory": recipe.engine.teacher_memory,
        "chosen": choices.reasons,
        "to_fetch": list(inputs.to_fetch),
        "warnings": list(choices.warnings),
    }
    if teacher is not None:
        assert recipe.teacher is not None
        origin = "several" if isinstance(recipe.teacher, EnsembleTeacher) else recipe.teacher.origin
        result["teacher"] = {"name": teacher.name, "starts_from": origin, **_size(teacher.model, shape)}
    return result


def _seconds(choices: Choices) -> dict[str, Any] | None:
    """Measure how long it takes; none where stand-ins would be measured, or one process of several."""
    inputs, recipe = choices.inputs, choices.recipe
    if not inputs.to_fetch and inputs.ranks.count == 1:
        return rehearse(choices).as_dict()
    size = recipe.engine.batch_size // recipe.engine.gradient_accumulation // inputs.ranks.count
    Task(inputs.student, recipe.loss, inputs.data, inputs.hardware, inputs.teacher, size).close()
    return None


def worth_knowing(inputs: Inputs, out: Path) -> list[str]:
    """Say what a user should know before the run begins; empty where all is well.

    Args:
        inputs: What the run reads.
        out: Its folder; runs beside it may have trained the student alone.
    """
    recipe, teacher = inputs.recipe, inputs.teacher
    lines = [] if teacher is None else advice.before_distilling(_case(inputs, teacher, out))
    if isinstance(recipe.model, ExternalSpec) and recipe.model.could_be_pretrained():
        lines.append(f"{recipe.model.label} starts from fresh weights; model.pretrained=true takes published ones")
    return lines


def _case(inputs: Inputs, teacher: Teacher, out: Path) -> advice.Case:
    return advice.Case(
        classes=inputs.data.num_classes,
        training_images=len(inputs.data.train),
        student_parameters=num_parameters(inputs.student),
        teacher_parameters=num_parameters(teacher.model),
        terms=frozenset(term.type for term in inputs.recipe.loss if term.needs.teacher),
        teacher_top1=_held_out_top1(teacher.facts, inputs),
        alone_top1=_alone(inputs, teacher, out),
    )


def _held_out_top1(facts: Mapping[str, Any], inputs: Inputs) -> float | None:
    """What a run has recorded on held-out images; none if its data was another."""
    try:
        same = facts["data"]["fingerprints"] == dict(inputs.data.fingerprints)
        return float(facts["metrics"]["validation"]["top1"]) if same else None
    except (KeyError, TypeError, ValueError):
        return None


def _alone(inputs: Inputs, teacher: Teacher, out: Path) -> float | None:
    """Find what the student reached without a teacher, in the mean of other runs beside this one than the teacher's."""
    found = []
    for path in sorted(out.parent.glob("*/run.json")):
        try:
            facts = read_json(path)
            alone = facts["teacher"] is None and facts["model"]["name"] == inputs.recipe.model.label
            alone = alone and facts["weights_hash"] != teacher.weights_hash
            figure = _held_out_top1(facts, inputs) if alone else None
        except (OSError, ValueError, KeyError, TypeError):
            continue  # somebody else's file, or a damaged one
        found += [] if figure is None else [figure]
    return statistics.fmean(found) if found else None


def _training_bytes(inputs: Inputs, parameters: int) -> int:
    engine = inputs.recipe.engine
    # Weights, gradients and the optimizer's one or two moments, all in float32.
    moments = 2 if inputs.recipe.optimizer.type == "adamw" else 1
    kept = cost.saved_bytes_per_image(inputs.student, inputs.data.input.shape) * engine.batch_size
    half = 2 if inputs.hardware.is_half else 1
    return 4 * parameters * (2 + moments) + kept // engine.gradient_accumulation // half


def _size(model: nn.Module, shape: tuple[int, int, int]) -> dict[str, Any]:
    if isinstance(model, StoredLogits):
        return {"parameters": 0, "flops_per_image": 0}
    return {"parameters": num_parameters(model), "flops_per_image": cost.flops(model, shape)}
