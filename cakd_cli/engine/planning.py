"""What a run would do, without doing it."""

from typing import Any

from torch import nn

from cakd_cli.engine.training import Prepared
from cakd_cli.evaluation import cost


def plan(prepared: Prepared) -> dict[str, Any]:
    """Say what a run would do, without doing it."""
    recipe, data, machine = prepared.recipe, prepared.data, prepared.hardware
    image_shape = (data.channels, *data.image_size)
    steps = len(data.train) // recipe.engine.batch_size
    student = {"name": recipe.model.label, **_size(prepared.student, image_shape)}
    # Weights, gradients and the optimizer's one or two moments, all in float32.
    moments = 2 if recipe.optimizer.type == "adamw" else 1
    fixed = 4 * student["parameters"] * (2 + moments)
    kept = cost.saved_bytes_per_image(prepared.student, image_shape) * recipe.engine.batch_size
    kept = kept // recipe.engine.gradient_accumulation // (2 if machine.precision == "bf16" else 1)
    result = {
        "data": {
            "name": data.name,
            "classes": data.num_classes,
            "image": list(image_shape),
            "train": len(data.train),
            "validation": len(data.validation) if data.validation else 0,
            "test": len(data.test),
        },
        "student": student,
        "teacher": None,
        "loss": [term.model_dump(mode="json") for term in recipe.loss],
        "epochs": recipe.engine.epochs,
        "steps_per_epoch": steps,
        "steps": steps * recipe.engine.epochs,
        "training_memory_bytes": fixed + kept,
        "device": str(machine.device),
        "precision": machine.precision,
        "teacher_memory": recipe.engine.teacher_memory,
        "chosen": prepared.reasons,
    }
    if prepared.teacher is not None:
        result["teacher"] = {"name": prepared.teacher.name, **_size(prepared.teacher.model, image_shape)}
    return result


def _size(model: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    return {"parameters": cost.num_parameters(model), "flops_per_image": cost.flops(model, image_shape)}
