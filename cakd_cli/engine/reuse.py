"""A student that takes over its teacher's classifier (SimKD), and so becomes another network before it is trained."""

import torch
from torch import nn

from cakd_cli.data import ImageDataSet
from cakd_cli.engine.task import classifier_of, teacher_looks
from cakd_cli.errors import RecipeError
from cakd_cli.losses import SimKDTerm
from cakd_cli.models import ModelSpec
from cakd_cli.models.ends import ReusedClassifier
from cakd_cli.models.layers import Tap, find_classifier, locate
from cakd_cli.recipe.schema import Recipe
from cakd_cli.teachers import Teacher


def own_model(recipe: Recipe) -> ModelSpec:
    """The student as it is before it takes over a classifier; a run that goes on knows what comes of that."""
    taken = any(isinstance(term, SimKDTerm) for term in recipe.loss)
    return recipe.model.model_copy(update={"end": None}) if taken else recipe.model


@torch.no_grad()
def reuse_classifier(recipe: Recipe, student: nn.Module, teacher: Teacher, data: ImageDataSet) -> ModelSpec:
    """Put the teacher's classifier at the end of the student, where a term of the loss asks for it.

    Args:
        recipe: With the student's :func:`own_model`.
        student: On the CPU; changed in place.
        teacher: With the layers that the loss looks at.
        data: Whose classes both tell apart.

    Returns:
        The student's place in the recipe, with its end.

    Raises:
        RecipeError: If either network lacks what the method needs.
    """
    term = next((term for term in recipe.loss if isinstance(term, SimKDTerm)), None)
    if term is None:
        return recipe.model
    number = recipe.loss.index(term)
    where = f"loss.{number}: {term.type}"
    weight_CD, bias_C = classifier_of(teacher)
    if weight_CD is None:
        raise RecipeError(
            f"{where} needs a teacher with a linear classifier, one weight for each class of {data.name}",
            hint="take a teacher of these classes, or another method",
        )
    if recipe.engine.quantize != "off":
        raise RecipeError(
            f"{where} adds convolutions to the student, which engine.quantize={recipe.engine.quantize} does not round",
            hint="leave out engine.quantize; cakd export --format onnx-int8 needs no training",
        )
    spec = recipe.model.model_copy(update={"end": _end(term, student, teacher, recipe, data)})
    try:
        spec.ended(student, data.num_classes)
    except ValueError as error:
        raise RecipeError(f"{where} does not fit: {error}", hint=f"set loss.{number}.reduction=1") from error
    linear = student.get_submodule(find_classifier(student, data.num_classes, name="the student"))
    linear.get_parameter("weight").copy_(weight_CD)
    linear.get_parameter("bias").copy_(torch.zeros(data.num_classes) if bias_C is None else bias_C)
    return spec


def _end(term: SimKDTerm, student: nn.Module, teacher: Teacher, recipe: Recipe, data: ImageDataSet) -> ReusedClassifier:
    names = dict(zip(teacher_looks(recipe.loss), map(str, teacher.taps), strict=False))
    theirs = teacher.shapes[names[term.needs.teacher_layers[0]]]
    found = locate(student, [Tap("", "map")], data.num_classes, data.input.example(), name="the student")
    mine = found.shapes[str(found.taps[0])]
    # As in the loss, the height decides which map is the larger one.
    size = (theirs[1], theirs[2]) if theirs[1] < mine[1] else None
    return ReusedClassifier(channels=theirs[0], size=size, reduction=term.reduction)
