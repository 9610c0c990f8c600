"""cakd train-teacher and cakd distill."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole

from cakd_cli.console import Console
from cakd_cli.engine import planning, run_directory, training
from cakd_cli.errors import InputError, RecipeError, UsageError
from cakd_cli.recipe import strict_yaml
from cakd_cli.recipe.resolve import names_recipe, resolve
from cakd_cli.recipe.schema import Recipe, RunTeacher, single_teachers
from cakd_cli.report import tables


def run(words: list[str], flags: Mapping[str, Any], *, dry_run: bool, console: Console, **how: Any) -> None:
    """Resolve the recipe and run it, or say what it would do; settings as of :func:`train`."""
    facts = train(words, flags, dry_run=dry_run, console=console, **how)
    console.result(facts, lambda stdout: tables.show_plan(stdout, facts) if dry_run else _show(stdout, facts))


def train(
    words: list[str],
    flags: Mapping[str, Any],
    *,
    distil: bool,
    out: str | None,
    resume: bool,
    overwrite: bool,
    dry_run: bool,
    console: Console,
) -> dict[str, Any]:
    """Do it, and return what run.json holds (or the plan) with the run's path.

    Raises:
        CakdError: If anything is missing, does not fit, diverges or is stopped.
    """
    if resume and overwrite:
        raise RecipeError("--resume and --overwrite exclude each other", hint="choose one")
    if out == "":
        raise UsageError("--out is empty")
    saved = Path(out) / "recipe.yaml" if out and resume else None
    if saved is not None and saved.is_file():
        run_directory.read_recipe(saved.parent)  # a damaged file is told apart from a wrong word
    elif saved is not None and not words and all(value is None for value in flags.values()):
        raise InputError(f"no run to resume in {out}", hint="give its settings, or another --out")
    recipe = resolve(
        words,
        flags,
        file=saved if saved is not None and saved.is_file() and not any(map(names_recipe, words)) else None,
        defaults={"loss": "cakd"} if distil else None,
        flag_names={"model": "--student"} if distil else None,
    )
    if not distil and recipe.needs_teacher:
        raise RecipeError(
            "train-teacher learns from labels alone, but the loss compares with a teacher", hint="cakd distill"
        )
    path = Path(out) if out else _default_out(recipe, flags.get("loss"), distil=distil)
    run_directory.check_free(path, resume=resume, overwrite=overwrite)
    _check_sources(recipe, path)
    prepared = training.prepare(recipe)
    console.detail(strict_yaml.dump(run_directory.type_first(prepared.recipe.model_dump(mode="json"))))
    if recipe.teacher is not None and not recipe.needs_teacher:
        console.note("the teacher is not asked: no term of the loss needs it")
    if dry_run:
        return planning.plan(prepared) | {"out": str(path)}
    facts = training.run(prepared, path, resume=resume, overwrite=overwrite, progress=console)
    return facts | {"out": str(path)}


def _check_sources(recipe: Recipe, out: Path) -> None:
    """Refuse a run that would replace what it reads."""
    sources = [
        recipe.model.weights,
        *(
            teacher.path if isinstance(teacher, RunTeacher) else teacher.weights
            for teacher in single_teachers(recipe.teacher)
        ),
    ]
    for source in sources:
        if source is not None and Path(source).resolve().is_relative_to(out.resolve()):
            raise RecipeError(f"{source} lies in {out}, where the run would be written", hint="give another --out")


def _default_out(recipe: Recipe, method: str | None, *, distil: bool) -> Path:
    asked = method or next((term.type for term in recipe.loss if term.needs_teacher), "alone")
    role = asked if distil else "teacher"
    name = "-".join([recipe.data.label, recipe.model.label, role, f"seed{recipe.seed}"])
    return Path("runs") / name.replace(":", "-").replace("/", "-")


def _show(stdout: RichConsole, facts: Mapping[str, Any]) -> None:
    figures = facts["metrics"]["test"]
    stdout.print(
        f"{facts['model']['name']}: test {_figures(figures)}, "
        f"{facts['model']['parameters']:,} parameters, in {facts['out']}",
        markup=False,
    )


def _figures(figures: Mapping[str, float]) -> str:
    if "map" in figures:
        return f"mAP {figures['map']:.2%}, top-1 {figures['top1']:.2%}"
    return f"top-1 {figures['top1']:.2%}, ECE {figures['ece']:.3f}"
