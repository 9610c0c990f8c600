"""Finished runs: found below a folder, read, and measured once beside their teacher."""

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cakd_cli.engine.run_directory import RunDirectory, read_recipe
from cakd_cli.errors import CakdError, InputError
from cakd_cli.evaluation.measure import Kept, measure
from cakd_cli.files import read_json, write_json
from cakd_cli.models.saving import read_config
from cakd_cli.recipe.schema import Recipe

# Of what is kept in evaluation.json; another number is measured again.
_FORMAT = 1
_FILE = "evaluation.json"
# On what an epoch's line has figures: held-out images, or those of the test under the literature's protocol.
MEASURED = ("validation", "test")


@dataclass(frozen=True)
class FinishedRun:
    """One run that ended, as its folder says.

    Attributes:
        path: Its folder.
        group: Its name without the seed: runs of one group differ in the seed alone.
        seed: Of its weights and order.
        recipe: That it followed.
        facts: run.json.
    """

    path: Path
    group: str
    seed: int
    recipe: Recipe
    facts: dict[str, Any]

    @functools.cached_property
    def curve(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, one an epoch, as far as they are whole."""
        lines = []
        for line in RunDirectory(self.path).metrics():
            parts = {part: figures_of(line, part) for part in ("train", *MEASURED) if part in line}
            if not parts.get("train") or len(parts["train"]) != len(line["train"]):
                break
            others = {key: value for key, value in line.items() if key not in MEASURED}
            lines.append(others | {part: figures for part, figures in parts.items() if figures})
        return lines

    @property
    def is_alone(self) -> bool:
        """Whether it learnt from labels alone."""
        return not self.recipe.needs_teacher


def folders_of_runs(paths: Sequence[str]) -> Iterator[Path]:
    """Find the run directories that are meant: each itself, or those in it.

    Raises:
        InputError: If there is none.
    """
    for given in paths:
        path = Path(given).expanduser()
        found = [path] if (path / "recipe.yaml").is_file() else []
        if not found and path.is_dir():
            found = sorted(file.parent for file in path.glob("*/recipe.yaml"))
        if not found:
            raise InputError(f"{path} is no run, and holds none", hint="name the folder of a run or of a sweep")
        yield from found


def state_of(path: Path) -> str:
    """Say how a run stands: completed, or why it is not."""
    ended = RunDirectory(path).facts().get("ended", "not begun")
    whole = all((path / name).is_file() for name in ("model.safetensors", "config.json"))
    return str(ended) if ended != "completed" or whole else "incomplete"


def figures_of(facts: Mapping[str, Any], part: str) -> dict[str, float]:
    """Pick a part's figures of what somebody may have edited: numbers by name, whatever else is there."""
    holder = facts.get("metrics", facts)
    found = holder.get(part) if isinstance(holder, dict) else None
    return (
        {key: value for key, value in found.items() if type(value) in (int, float)} if isinstance(found, dict) else {}
    )


def _mapping(facts: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = facts.get(key)
    return value if isinstance(value, dict) else {}


def read(path: Path) -> FinishedRun:
    """Read a finished run.

    Raises:
        InputError: If it is not finished, or a file is damaged.
    """
    read_config(path)
    facts, recipe = RunDirectory(path).facts(), read_recipe(path)
    facts |= {key: _mapping(facts, key) for key in ("data", "model", "teacher", "versions", "hardware", "chosen")}
    facts["data"]["fingerprints"] = _mapping(facts["data"], "fingerprints")
    facts["metrics"] = {part: figures_of(facts, part) for part in ("test", "validation")}
    facts["best_on_test"] = figures_of({"best_on_test": facts.get("best_on_test")}, "best_on_test")
    names = (facts["data"].get("name"), facts["model"].get("name"))
    if "top1" not in facts["metrics"]["test"] or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path / 'run.json'}: damaged, or of a run that is not finished")
    name = re.sub(r"[-_]?seed\d+$", "", path.resolve().name)
    return FinishedRun(path, name or "run", recipe.seed, recipe, facts)


class Evaluations:
    """What ``cakd eval`` says of runs beside their teacher; kept in each run's folder, so that it is measured once."""

    def __init__(self) -> None:
        self._kept = Kept()
        self._timed: set[str] = set()
        self._known: dict[Path, dict[str, Any]] = {}

    def of(self, run: FinishedRun) -> dict[str, Any]:
        """Measure a run on its test images, or read what was measured before.

        Raises:
            CakdError: If its data or its teacher is gone.
        """
        if run.path not in self._known:
            self._known[run.path] = self._read(run) or self._measure(run)
        return self._known[run.path]

    def _measure(self, run: FinishedRun) -> dict[str, Any]:
        teacher = run.recipe.comparable_teacher is not None
        recipe = run.recipe.model_copy(
            update={"engine": run.recipe.engine.model_copy(update={"device": "auto", "precision": "fp32"})}
        )
        # Networks of one kind are equally fast.
        latency = run.facts["model"]["name"] not in self._timed
        self._timed.add(run.facts["model"]["name"])
        try:
            report = measure(
                run.path, recipe, split="test", with_teacher=teacher, with_latency=latency, kept=self._kept
            )
        except InputError as error:
            # A path in a recipe counts from where the training was started.
            hint = error.hint or "paths in its recipe count from the folder in which it was trained: go there"
            raise InputError(f"{run.path}: {error.message}", hint=hint) from error
        report = {"format": _FORMAT, "weights_hash": run.facts.get("weights_hash"), **report}
        with contextlib.suppress(OSError):  # somebody else's folder, or a full disk: measured again next time
            write_json(run.path / _FILE, report)
        return report

    def _read(self, run: FinishedRun) -> dict[str, Any] | None:
        try:
            known = read_json(run.path / _FILE)
            same = known["weights_hash"] == run.facts["weights_hash"] and known["format"] == _FORMAT
            return known if same and _is_whole(known) else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


def _is_whole(known: dict[str, Any]) -> bool:
    """Whether an evaluation that somebody may have edited has all that is used of it; may raise what that raises."""
    int(known["right"], 16)
    parts = [known["quality"]["top1"], *known["quality"].values(), known["samples"], len(known["per_class"])]
    parts += [known["cost"][key] for key in ("parameters", "flops_per_image")]
    parts += [timing["median_ms"] for timing in known["cost"].get("latency", ())]
    if "teacher" in known:
        teacher = known["teacher"]
        parts += [*teacher["quality"].values(), *teacher["fidelity"].values()]
        parts += [teacher["cost"][key] for key in ("parameters", "flops_per_image")]
        str.partition(teacher["name"], " ")
    return isinstance(known["data"], str) and all(type(part) in (int, float) for part in parts)


def differing(runs: Sequence[FinishedRun]) -> dict[str, list[str]]:
    """List what makes runs no fair comparison: what differs though it is not the method, with its values."""
    asked: dict[str, Callable[[FinishedRun], Any]] = {
        "data": lambda run: run.facts["data"]["name"],
        "test images": lambda run: _fingerprint(run, "test"),
        "training images": lambda run: _fingerprint(run, "train"),
        "protocol": lambda run: run.recipe.protocol,
        "held-out share": lambda run: run.recipe.data.validation_fraction,
        "split": lambda run: run.recipe.data.split_seed,
        "student": lambda run: run.facts["model"]["name"],
        "teacher": lambda run: run.facts["teacher"].get("weights_hash"),
        "epochs": lambda run: run.recipe.engine.epochs,
        "batch size": lambda run: run.recipe.engine.batch_size,
        "optimizer": lambda run: json.dumps(run.recipe.optimizer.model_dump(mode="json")),
        "schedule": lambda run: json.dumps(run.recipe.schedule.model_dump(mode="json")),
    }
    found = {}
    for what, value in asked.items():
        # A student alone asks no teacher.
        values = {str(value(run)) for run in runs if not (what == "teacher" and run.is_alone)}
        if len(values) > 1:
            found[what] = sorted(values)
    return found


def _fingerprint(run: FinishedRun, part: str) -> str:
    return str(run.facts["data"].get("fingerprints", {}).get(part))


def summary(path: Path) -> dict[str, Any]:
    """Say in a line what a folder's run is and how far it has come; never fails."""
    directory = RunDirectory(path)
    row: dict[str, Any] = {"run": str(path), "state": state_of(path)}
    facts, curve = directory.facts(), directory.metrics()
    row["epochs"] = curve[-1]["epoch"] if curve else 0
    try:
        recipe = read_recipe(path)
        row |= {"of": recipe.engine.epochs, "model": recipe.model.label, "data": recipe.data.label, "seed": recipe.seed}
        terms = [term.type for term in recipe.loss]
        row["loss"] = " + ".join([name for name in terms if name != "cross-entropy"] or terms)
    except CakdError as error:
        row["error"] = error.message
    for split in MEASURED:
        row[split] = figures_of(facts, split).get("top1")
    if row["validation"] is None:
        held_out = [figures_of(line, "validation") for line in curve]
        row["validation"] = max((figures["top1"] for figures in held_out if "top1" in figures), default=None)
    return row
