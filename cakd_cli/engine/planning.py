"""What a run would do, without doing it."""

from typing import Any

from torch import nn

from cakd_cli.engine.build import Inputs
from cakd_cli.engine.choices import decide
from cakd_cli.engine.task import Task
from cakd_cli.evaluation import cost
from cakd_cli.models import num_parameters
from cakd_cli.teachers import EnsembleTeacher


def plan(inputs: Inputs) -> dict[str, Any]:
    """Say what a run would do; nothing is measured, written or downloaded.

    Raises:
        RecipeError: If a term of the loss cannot be built.
    """
    choices = decide(inputs, measure=False)
    recipe, data, machine, teacher = choices.recipe, inputs.data, inputs.hardware, choices.inputs.teacher
    size = recipe.engine.batch_size // recipe.engine.gradient_accumulation
    Task(inputs.student, recipe.loss, data, machine, teacher, size).close()
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


def _training_bytes(inputs: Inputs, parameters: int) -> int:
    engine = inputs.recipe.engine
    # Weights, gradients and the optimizer's one or two moments, all in float32.
    moments = 2 if inputs.recipe.optimizer.type == "adamw" else 1
    kept = cost.saved_bytes_per_image(inputs.student, inputs.data.input.shape) * engine.batch_size
    half = 2 if inputs.hardware.is_half else 1
    return 4 * parameters * (2 + moments) + kept // engine.gradient_accumulation // half


def _size(model: nn.Module, shape: tuple[int, int, int]) -> dict[str, Any]:
    return {"parameters": num_parameters(model), "flops_per_image": cost.flops(model, shape)}
