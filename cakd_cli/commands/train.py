"""cakd train-teacher and cakd distill."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole

from cakd_cli.console import Console
from cakd_cli.engine import planning, run_directory
from cakd_cli.engine.build import read_inputs
from cakd_cli.engine.choices import as_begun
from cakd_cli.engine.distributed import ALONE, Ranks, opened
from cakd_cli.engine.progress import Silent
from cakd_cli.engine.run import Start
from cakd_cli.engine.run import run as run_engine
from cakd_cli.errors import InputError, RecipeError, UsageError
from cakd_cli.recipe import strict_yaml
from cakd_cli.recipe.resolve import names_recipe, resolve
from cakd_cli.recipe.schema import Recipe
from cakd_cli.report import tables
from cakd_cli.teachers import single_teachers


@dataclass(frozen=True)
class Wish:
    """What a user asked for beside the recipe.

    Attributes:
        distil: Learn from a teacher.
        out: Run directory; none = a name made of the settings.
        resume: Go on with the run that is there.
        overwrite: Replace it.
        grace: Seconds between a signal and the end of the process.
        dry_run: Say what would be done, and do nothing.
    """

    distil: bool
    out: str | None = None
    resume: bool = False
    overwrite: bool = False
    grace: float | None = None
    dry_run: bool = False


def run(words: list[str], flags: Mapping[str, Any], wish: Wish, *, console: Console) -> None:
    """Resolve the recipe and run it, or say what it would do."""
    with opened() as ranks:
        facts = train(words, flags, wish, console=console, ranks=ranks)
    if ranks.first:
        console.result(facts, lambda stdout: tables.show_plan(stdout, facts) if wish.dry_run else _show(stdout, facts))


def train(
    words: list[str], flags: Mapping[str, Any], wish: Wish, *, console: Console, ranks: Ranks = ALONE
) -> dict[str, Any]:
    """Do it, and return what run.json holds (or the plan) with the run's path.

    Raises:
        CakdError: If anything is missing, does not fit, diverges or is stopped.
    """
    if ranks.restarted:
        wish = replace(wish, resume=True, overwrite=False)
    if wish.resume and wish.overwrite:
        raise RecipeError("--resume and --overwrite exclude each other", hint="choose one")
    if wish.out == "":
        raise UsageError("--out is empty")
    recipe = _recipe(words, flags, wish, console.note if ranks.first else None)
    method = flags.get("loss") or next(
        (w.removeprefix("loss=") for w in words if re.fullmatch("loss=[a-z0-9-]+", w)), None
    )
    path = Path(wish.out).expanduser() if wish.out else _default_out(recipe, method, distil=wish.distil)
    ranks.by_first(lambda: run_directory.check_free(path, resume=wish.resume, overwrite=wish.overwrite))
    _check_sources(recipe, path)
    if wish.resume and (path / "recipe.yaml").is_file():
        recipe = as_begun(recipe, run_directory.read_recipe(path))
    inputs = read_inputs(recipe, fetch=not wish.dry_run, ranks=ranks)
    console.detail(strict_yaml.dump(run_directory.type_first(inputs.recipe.model_dump(mode="json"))))
    for line in inputs.teacher.notes if inputs.teacher is not None and ranks.first else ():
        console.note(line)
    if recipe.teacher is not None and not recipe.needs_teacher:
        console.note("the teacher is not asked: no term of the loss needs it")
    worth_knowing = planning.worth_knowing(inputs, path)
    if wish.dry_run:
        command = "distill" if wish.distil else "train-teacher"
        return planning.plan(inputs) | {"command": command, "out": str(path), "worth_knowing": worth_knowing}
    for line in worth_knowing if ranks.first else ():
        console.note(line)
    start = Start(path, resume=wish.resume, overwrite=wish.overwrite, grace=wish.grace)
    facts = run_engine(inputs, start, console if ranks.first else Silent())
    return facts | {"out": str(path)}


def _recipe(words: list[str], flags: Mapping[str, Any], wish: Wish, note: Callable[[str], None] | None) -> Recipe:
    """Make the recipe of what was typed, or of the run that goes on."""
    saved = Path(wish.out).expanduser() / "recipe.yaml" if wish.out and wish.resume else None
    if saved is not None and saved.is_file():
        run_directory.read_recipe(saved.parent)  # a damaged file is told apart from a wrong word
    elif saved is not None and not words and all(value is None for value in flags.values()):
        raise InputError(f"no run to resume in {wish.out}", hint="give its settings, or another --out")
    recipe = resolve(
        words,
        flags,
        file=saved if saved is not None and saved.is_file() and not any(map(names_recipe, words)) else None,
        defaults={"loss": "cakd"} if wish.distil else None,
        flag_names={"model": "--student"} if wish.distil else None,
        note=note,
    )
    if not wish.distil and recipe.needs_teacher:
        raise RecipeError(
            "train-teacher learns from labels alone, but the loss compares with a teacher", hint="cakd distill"
        )
    return recipe


def _check_sources(recipe: Recipe, out: Path) -> None:
    """Refuse a run that would replace what it reads."""
    teachers = single_teachers(recipe.teacher)
    paths = (getattr(teacher, "path", None) or getattr(teacher, "weights", None) for teacher in teachers)
    for source in (recipe.model.weights, *paths):
        if source is not None and Path(source).expanduser().resolve().is_relative_to(out.resolve()):
            raise RecipeError(f"{source} lies in {out}, where the run would be written", hint="give another --out")


def _default_out(recipe: Recipe, method: str | None, *, distil: bool) -> Path:
    asked = method or next((term.type for term in recipe.loss if term.needs.teacher), "alone")
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
