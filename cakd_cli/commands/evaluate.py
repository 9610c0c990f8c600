"""cakd eval."""

from pathlib import Path
from typing import Any

from cakd_cli import data
from cakd_cli.console import Console
from cakd_cli.data import DataSpec
from cakd_cli.engine import run_directory
from cakd_cli.errors import CheckFailedError, InputError
from cakd_cli.evaluation.measure import measure
from cakd_cli.evaluation.probe import linear_probe
from cakd_cli.machine.hardware import choose_hardware
from cakd_cli.models import saving
from cakd_cli.recipe.resolve import resolve
from cakd_cli.recipe.schema import Recipe
from cakd_cli.report import tables
from cakd_cli.teachers import LogitsTeacher


def run(
    run: str, flags: dict[str, Any], *, split: str, min_top1: float | None, probe: str | None, console: Console
) -> None:
    """Measure, show, and fail where the bar is not reached."""
    path = Path(run).expanduser()
    saving.read_config(path)  # first of all: whether there is a network
    recipe = recipe_of(path, flags)
    other = _probe_data(probe, flags) if probe else None
    asked = bool(flags.get("teacher"))
    if asked and isinstance(recipe.teacher, LogitsTeacher):
        console.warn(f"{recipe.teacher.label} says nothing of {split} images: agreement with the teacher is left out")
    report = measure(path, recipe, split=split, with_teacher=asked and recipe.comparable_teacher is not None)
    if other is not None:
        machine = choose_hardware(recipe.engine.device, "fp32", channels_last=recipe.engine.channels_last)
        report["probe"] = linear_probe(path, other, machine, batch_size=recipe.engine.evaluation_batch_size)
    del report["right"]  # for comparisons of networks
    if report["as_recorded"] is False:
        console.warn(f"the {split} images of {report['data']} are not those that {run} was made with")
    failed = min_top1 is not None and report["quality"]["top1"] < min_top1
    if not (failed and console.json_mode):
        console.result(report, lambda stdout: tables.show_evaluation(stdout, report))
    if failed:
        raise CheckFailedError(
            f"top-1 is {report['quality']['top1']:.4f}, below --min-top1 {min_top1:g}", document=report
        )


def _probe_data(words: str, flags: dict[str, Any]) -> DataSpec:
    given: dict[str, Any] = {"data": words, "model": "resnet8"}
    kind = data.names().get(words.partition(":")[0])
    if kind is not None and "root" in kind.model_fields:
        given["data.root"] = flags.get("data.root")
    return resolve([], given, flag_names={"data": "--probe"}).data.without_auto()[0]


def recipe_of(path: Path, flags: dict[str, Any]) -> Recipe:
    """Make the recipe of a measurement: that of the run, or of the flags alone for an exported folder.

    Raises:
        CakdError: If neither says on which data.
    """
    # Answers are compared, whatever the run learnt from: so any teacher will do.
    flags = {**flags, "loss": "cross-entropy"}
    recipe_file = path / "recipe.yaml"
    if recipe_file.is_file():
        run_directory.read_recipe(path)  # a damaged file is told apart from a wrong flag
    elif flags.get("data") is None:
        raise InputError(f"{path} does not say on which data to measure", hint="give --data")
    else:
        flags = {**flags, "model": "resnet8"}  # never built: the folder's own network is measured
    return resolve(
        ["engine.device=auto", "engine.precision=fp32"],
        flags,
        file=recipe_file if recipe_file.is_file() else None,
        flag_names={"engine.evaluation_batch_size": "--batch-size"},
    )
