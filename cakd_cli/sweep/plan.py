"""Which runs a sweep has: every loss, every combination of settings, every seed, and the student alone."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cakd_cli.errors import RecipeError, UsageError
from cakd_cli.recipe.resolve import names_recipe, resolve

# The student without a teacher, which every sweep has.
ALONE = "cross-entropy"
# More are a mistake in a list, or a project for somebody's cluster.
MOST_RUNS = 10_000


@dataclass(frozen=True)
class Unit:
    """One run.

    Attributes:
        name: Its folder in the sweep's; in that of its recipe, where the sweep has several.
        group: Its method and settings without the seed, likewise.
        seed: Of the student.
        words: Of ``cakd distill``, without where it is written.
    """

    name: str
    group: str
    seed: int
    words: tuple[str, ...]

    def command(self, out: Path) -> list[str]:
        """Give all words behind ``cakd``; the same ones start the run, go on with it, or say that it is finished."""
        return ["distill", *self.words, "--out", str(out / self.name), "--resume", "-q"]


def make_plan(
    words: Sequence[str], flags: Mapping[str, Any], *, losses: Sequence[str], seeds: Sequence[int]
) -> list[Unit]:
    """List all runs, those of one seed together, so that an early look at a sweep compares like with like.

    Args:
        words: Recipes and settings; ``KEY=A,B`` stands for two settings.
        flags: Words by flag, as a user types them; a list is given again and again.
        losses: Methods beside the student alone.
        seeds: Of each.

    Raises:
        UsageError: If a list holds the same twice, or there are too many runs.
        RecipeError: If a combination is no recipe; nothing has been started.
    """
    recipes = [word for word in words if names_recipe(word)]
    titles = [Path(recipe).stem for recipe in recipes]
    for what, values in (("--loss", losses), ("--seeds", seeds), ("the list of recipes", titles)):
        if len(set(values)) < len(values):
            raise UsageError(f"{what} names one twice: {','.join(map(str, values))}")
    if len(recipes) > 1:
        others = [word for word in words if word not in recipes]
        plans = [make_plan([recipe, *others], flags, losses=losses, seeds=seeds) for recipe in recipes]
        return [
            replace(unit, name=f"{title}/{unit.name}", group=f"{title}/{unit.group}")
            for title, plan in zip(titles, plans, strict=True)
            for unit in plan
        ]
    fixed, axes = _axes(words)
    given = [part for flag, value in flags.items() for part in _given(flag, value)]
    groups: dict[str, tuple[str, ...]] = {}
    for loss in dict.fromkeys([ALONE, *losses]):
        # What a teacher's terms are set to says nothing of a student without one.
        varied = [axis for axis in axes if loss != ALONE or not axis[0].startswith(("loss.", "teacher"))]
        kept = [word for word in fixed if loss != ALONE or not word.startswith("loss.")]
        for settings in itertools.product(*([f"{key}={value}" for value in values] for key, values in varied)):
            name = re.sub(r"[^\w.=+-]+", "_", "-".join([loss, *settings]))
            if name in groups:
                raise UsageError(f"two settings would share the folder {name}", hint="make two sweeps of them")
            groups[name] = (*kept, *settings, *given, "--loss", loss)
    if len(groups) * len(seeds) > MOST_RUNS:
        raise UsageError(f"{len(groups) * len(seeds):,} runs are more than {MOST_RUNS:,}")
    for name, of_group in groups.items():
        _check(name, of_group)
    return [
        Unit(f"{name}-seed{seed}", name, seed, (*of_group, "--seed", str(seed)))
        for seed in seeds
        for name, of_group in groups.items()
    ]


def _given(flag: str, value: Any) -> list[str]:
    if value is None:
        return []
    return [part for one in (value if isinstance(value, list) else [value]) for part in (flag, str(one))]


def _axes(words: Sequence[str]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Tell settings from lists of settings."""
    fixed, axes = [], []
    for word in words:
        key, _, text = word.partition("=")
        values = [text] if names_recipe(word) else split(text)
        if len(values) == 1:
            fixed.append(word)
        elif key in ("loss", "seed"):
            raise UsageError(f"{word}: a sweep has its own lists of these", hint="--loss kd,dkd and --seeds 3,7")
        elif len(set(values)) < len(values) or "" in values:
            raise UsageError(f"{word}: names a setting twice, or an empty one")
        else:
            axes.append((key, values))
    return fixed, axes


def split(text: str) -> list[str]:
    """Cut a text at its commas, but not inside brackets or quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote or letter in "'\"":
            quote = "" if letter == quote else quote or letter
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


# As cakd distill knows them.
KEYS = {
    "--data": "data",
    "--data-root": "data.root",
    "--teacher": "teacher",
    "--class-map": "class_map",
    "--student": "model",
    "--loss": "loss",
    "--epochs": "engine.epochs",
    "--batch-size": "engine.batch_size",
    "--device": "engine.device",
}


def _check(name: str, words: tuple[str, ...]) -> None:
    """Resolve one recipe of a group, to learn of all that is wrong before anything is started."""
    plain, flags, rest = [], dict[str, list[Any]](), iter(words)
    for word in rest:
        if word in KEYS:
            flags.setdefault(KEYS[word], []).append(next(rest))
        else:
            plain.append(word)
    values: dict[str, Any] = {key: tuple(found) if key == "teacher" else found[0] for key, found in flags.items()}
    values |= {key: int(values[key]) for key in ("engine.epochs", "engine.batch_size") if key in values}
    try:
        resolve(plain, values, defaults={"loss": "cakd"}, flag_names={"model": "--student"})
    except RecipeError as error:
        raise RecipeError(f"{name}: {error.message}", hint=error.hint) from error
