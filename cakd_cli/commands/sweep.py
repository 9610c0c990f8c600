"""cakd sweep."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from cakd_cli.commands.compare import comparison_of
from cakd_cli.console import Console, duration
from cakd_cli.engine.run_directory import RunDirectory
from cakd_cli.errors import CakdError, CheckFailedError, ExitCode, InputError, StoppedError, UsageError
from cakd_cli.files import read_json, write_json
from cakd_cli.recipe.resolve import names_recipe
from cakd_cli.report import finished, writing
from cakd_cli.sweep import here, on_ray, slurm
from cakd_cli.sweep.here import Outcome
from cakd_cli.sweep.plan import MOST_RUNS, Unit, make_plan, split


@dataclass(frozen=True)
class Wish:
    """What a user asked for beside the recipe.

    Attributes:
        losses: Methods, with commas between them.
        seeds: How many, or which, with commas between them.
        out: The sweep's folder.
        jobs: Runs side by side; none = one a device.
        where: ``here``, ``ray`` or ``slurm``.
    """

    losses: str
    seeds: str
    out: str
    jobs: int | None = None
    where: str = "here"


def run(words: list[str], flags: Mapping[str, Any], wish: Wish, *, console: Console) -> None:
    """Train all that is not trained yet, and compare.

    Raises:
        CheckFailedError: If a run failed; the others have been carried out.
        StoppedError: If a signal asked for it.
    """
    if not wish.out:
        raise UsageError("--out is empty")
    units = make_plan(words, flags, losses=split(wish.losses), seeds=_seeds(wish.seeds))
    out = Path(wish.out).expanduser()
    if (out / "recipe.yaml").is_file():
        raise InputError(f"{out} is a run, not a sweep", hint="give another --out")
    out.mkdir(parents=True, exist_ok=True)
    records = _records(out)
    left = [unit for unit in units if not _is_done(unit, out, records.get(unit.name))]
    done = len(units) - len(left)
    console.note(f"{len(units)} runs in {out}{f', {done} of them finished before' if done else ''}")
    if wish.where == "slurm" and left:
        said = slurm.submit(left, out, jobs=wish.jobs)
        known = records | {unit.name: {"words": list(unit.words)} for unit in left}
        write_json(out / "sweep.json", {"runs": known})
        console.result({"out": str(out), **said}, lambda stdout: stdout.print(said["said"], markup=False))
        return
    board = _Board(units, left, out, console)
    start = on_ray.run_all if wish.where == "ray" else here.run_all
    jobs = wish.jobs or max(1, len(here.devices()))
    with board:
        stopped = start(left, out, jobs=jobs, started=board.begin, ended=board.end) if left else 0
    if stopped:
        raise StoppedError(
            "the sweep was stopped; what its runs had saved is kept", hint="the same command goes on with it"
        )
    varied = any(len(split(word.partition("=")[2])) > 1 for word in words if not names_recipe(word))
    _conclude(units, out, board.failed, varied=varied, console=console)


def _seeds(text: str) -> list[int]:
    """Read how many seeds, or which."""
    parts = split(text)
    if not all(part.isdecimal() and int(part) < 2**32 for part in parts) or parts == ["0"]:
        raise UsageError(f"--seeds {text}: not a number of seeds", hint="--seeds 6 is 0 to 5; --seeds 3,7 is these two")
    if len(parts) == 1 and int(parts[0]) > MOST_RUNS:
        raise UsageError(f"--seeds {text}: so many seeds", hint=f"one seed of this number is --seeds {text},0")
    return list(range(int(parts[0]))) if len(parts) == 1 else [int(part) for part in parts]


def _records(out: Path) -> dict[str, Any]:
    try:
        records = read_json(out / "sweep.json")["runs"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return records if isinstance(records, dict) else {}


def _is_done(unit: Unit, out: Path, record: Any) -> bool:
    """Whether this very run is finished; one with other settings is left to its own process, which refuses it."""
    return (
        isinstance(record, dict)
        and record.get("words") == list(unit.words)
        and finished.state_of(out / unit.name) == "completed"
    )


class _Board:
    """Tells how a sweep goes: a table that fills in, or a line a run where nobody watches."""

    def __init__(self, units: Sequence[Unit], left: Sequence[Unit], out: Path, console: Console) -> None:
        self._units, self._out, self._console = units, out, console
        self._left, self._done, self._running = len(left), 0, set[str]()
        self._began = time.monotonic()
        self._records = _records(out)
        self.failed: list[Outcome] = []
        self._figures: dict[str, dict[int, float]] = {}
        for unit in units:
            if unit not in left:
                self._note_figure(unit)
        watched = console.stderr.is_terminal and not console.quiet
        self._live = Live(get_renderable=self._table, console=console.stderr, transient=True) if watched else None

    def __enter__(self) -> "_Board":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def begin(self, unit: Unit) -> None:
        """Take note of a run that has begun."""
        self._running.add(unit.name)

    def end(self, outcome: Outcome) -> None:
        """Take note of a run that has ended, and say so."""
        unit = outcome.unit
        self._running.discard(unit.name)
        if outcome.code == ExitCode.STOPPED and not outcome.seconds:  # it never began
            return
        self._done += 1
        self._records[unit.name] = {
            "words": list(unit.words),
            "code": outcome.code,
            "seconds": round(outcome.seconds, 1),
            "said": outcome.said,
        }
        write_json(self._out / "sweep.json", {"runs": self._records})
        if outcome.code:
            self.failed.append(outcome)
            line = f"{unit.name}: exit {outcome.code}: {outcome.said}"
        else:
            self._note_figure(unit)
            line = f"{unit.name}: {self._figure(unit)}, {duration(outcome.seconds)}"
        text = f"{line}  ({self._done}/{self._left}, about {duration(self._seconds_left())} left)"
        if self._live is not None:
            self._live.console.print(text, style="dim", markup=False)
        else:
            self._console.note(text)

    def _seconds_left(self) -> float:
        return (time.monotonic() - self._began) / self._done * (self._left - self._done)

    def _note_figure(self, unit: Unit) -> None:
        figures = finished.figures_of(RunDirectory(self._out / unit.name).facts(), "test")
        self._figures.setdefault(unit.group, {})[unit.seed] = figures.get("map", figures.get("top1", math.nan))

    def _figure(self, unit: Unit) -> str:
        return f"test {self._figures[unit.group][unit.seed]:.2%}"

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for name in ("", "done", "test %", "now"):
            table.add_column(name, justify="right" if name in ("done", "test %") else "left")
        for group in dict.fromkeys(unit.group for unit in self._units):
            members = [unit for unit in self._units if unit.group == group]
            found = list(self._figures.get(group, {}).values())
            now = [f"seed {unit.seed}" for unit in members if unit.name in self._running]
            mean = f"{100 * fmean(found):.2f}" if found else ""
            table.add_row(Text(group), f"{len(found)}/{len(members)}", mean, ", ".join(now))
        return table


def _conclude(units: Sequence[Unit], out: Path, failed: Sequence[Outcome], *, varied: bool, console: Console) -> None:
    """Show the comparison of what is finished, then fail if anything is not."""
    done = [unit for unit in units if finished.state_of(out / unit.name) == "completed"]
    sets: dict[str, list[str]] = {}
    for unit in done:
        sets.setdefault(unit.name.rpartition("/")[0], []).append(str(out / unit.name))
    document: dict[str, Any] = {
        "out": str(out),
        "runs": len(units),
        "failed": [{"run": o.unit.name, "exit": o.code, "said": o.said} for o in failed],
    }
    if sets:
        try:
            found = {name: comparison_of(paths, different=varied) for name, paths in sets.items()}
            document["comparison"] = found.get("", {"sets": found})
        except CakdError as error:
            if not failed:
                raise
            console.warn(f"no comparison: {error.message}")
    if not (failed and console.json_mode):
        console.result(document, lambda stdout: writing.show_sweep(stdout, document))
    if failed:
        raise CheckFailedError(
            f"{len(failed)} of {len(units)} runs failed: {', '.join(o.unit.name for o in failed[:5])}",
            hint=f"what each said is in {out / 'logs'}; the same command tries them again",
            document=document,
        )
