"""Who answers: networks and ensembles, the form in which they compute, and the memory of what they have said."""

from typing import Annotated

from pydantic import Field

from cakd_cli.data import ImageDataSet
from cakd_cli.machine.hardware import Hardware
from cakd_cli.models import ModelOptions, ModelSpec
from cakd_cli.teachers.ensemble import EnsembleTeacher, load_ensemble
from cakd_cli.teachers.network import RunTeacher, Teacher, load_network

TeacherOptions = Annotated[RunTeacher | ModelOptions | EnsembleTeacher, Field(discriminator="type")]


def single_teachers(teacher: RunTeacher | ModelSpec | EnsembleTeacher | None) -> list[RunTeacher | ModelSpec]:
    """List the teachers of a recipe one by one."""
    if teacher is None:
        return []
    return list(teacher.members) if isinstance(teacher, EnsembleTeacher) else [teacher]


def load_teacher(
    spec: RunTeacher | ModelSpec | EnsembleTeacher, data: ImageDataSet, hardware: Hardware, *, fetch: bool = True
) -> Teacher:
    """Read a teacher and check that its classes are the data's.

    Args:
        spec: The recipe's.
        data: What it will be asked about.
        hardware: Where.
        fetch: Whether published weights may be downloaded.

    Raises:
        InputError: If its files are missing or damaged.
        RecipeError: If its classes or channels are not the data's.
    """
    if isinstance(spec, EnsembleTeacher):
        return load_ensemble(spec, data, hardware, fetch=fetch)
    return load_network(spec, data, hardware, fetch=fetch)


__all__ = [
    "EnsembleTeacher",
    "RunTeacher",
    "Teacher",
    "TeacherOptions",
    "load_teacher",
    "single_teachers",
]
