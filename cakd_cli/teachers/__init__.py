"""Who answers: networks, ensembles and files of logits, the form in which networks compute, and the memory of it."""

from typing import Annotated

from pydantic import Field

from cakd_cli.data import ImageDataSet
from cakd_cli.machine.hardware import Hardware
from cakd_cli.models import ModelOptions, ModelSpec
from cakd_cli.teachers.classes import ClassMap
from cakd_cli.teachers.ensemble import EnsembleTeacher, load_ensemble
from cakd_cli.teachers.hub import HubTeacher
from cakd_cli.teachers.logits_file import LogitsTeacher, StoredLogits, load_logits
from cakd_cli.teachers.network import RunTeacher, Teacher, TeacherSpec, load_network
from cakd_cli.teachers.onnx_file import OnnxTeacher
from cakd_cli.teachers.probe import ProbeTeacher
from cakd_cli.teachers.zero_shot import ZeroShotTeacher

TeacherOptions = Annotated[
    RunTeacher
    | HubTeacher
    | OnnxTeacher
    | LogitsTeacher
    | ProbeTeacher
    | ZeroShotTeacher
    | ModelOptions
    | EnsembleTeacher,
    Field(discriminator="type"),
]


def single_teachers(teacher: TeacherSpec | ModelSpec | EnsembleTeacher | None) -> list[TeacherSpec | ModelSpec]:
    """List the teachers of a recipe one by one."""
    if teacher is None:
        return []
    return list(teacher.members) if isinstance(teacher, EnsembleTeacher) else [teacher]


def load_teacher(
    spec: TeacherSpec | ModelSpec | EnsembleTeacher,
    data: ImageDataSet,
    hardware: Hardware,
    *,
    fetch: bool = True,
    class_map: ClassMap | None = None,
) -> Teacher:
    """Read a teacher and fit it to the data's images and classes.

    Args:
        spec: The recipe's.
        data: What it will be asked about.
        hardware: Where.
        fetch: Whether published weights may be downloaded.
        class_map: Which of its classes are the data's, where names do not say so.

    Raises:
        InputError: If its files are missing or damaged.
        RecipeError: If its channels are not the data's, or a class of the data is none of its.
    """
    if isinstance(spec, EnsembleTeacher):
        return load_ensemble(spec, data, hardware, fetch=fetch, class_map=class_map)
    if isinstance(spec, LogitsTeacher):
        return load_logits(spec, data, hardware, class_map=class_map)
    return load_network(spec, data, hardware, fetch=fetch, class_map=class_map)


__all__ = [
    "ClassMap",
    "EnsembleTeacher",
    "HubTeacher",
    "LogitsTeacher",
    "OnnxTeacher",
    "ProbeTeacher",
    "RunTeacher",
    "StoredLogits",
    "Teacher",
    "TeacherOptions",
    "TeacherSpec",
    "ZeroShotTeacher",
    "load_teacher",
    "single_teachers",
]
