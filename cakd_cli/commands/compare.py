"""cakd compare, and cakd runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console as RichConsole
from rich.table import Table
from rich.text import Text

from cakd_cli.console import Console
from cakd_cli.errors import InputError
from cakd_cli.report import finished, writing
from cakd_cli.report.comparison import compare


def run(paths: list[str], *, against: str | None, different: bool, form: str, console: Console) -> None:
    """Compare finished runs, and show it in the form that was asked for."""
    sets = sets_in(paths)
    if sets:
        document = {
            "sets": {name: comparison_of([path], against=against, different=different) for name, path in sets.items()}
        }
    else:
        document = comparison_of(paths, against=against, different=different)
    if form == "terminal":
        console.result(document, lambda stdout: writing.show(stdout, document))
    else:
        text = writing.markdown(document) if form == "markdown" else writing.latex(document)
        console.result(document, lambda stdout: stdout.out(text, end="", highlight=False))


def sets_in(paths: Sequence[str]) -> dict[str, str]:
    """Find folders that each hold the runs of one recipe, as a sweep of several leaves them; none in any other."""
    roots = [Path(path).expanduser() for path in paths]
    if len(roots) != 1 or (roots[0] / "recipe.yaml").is_file() or any(roots[0].glob("*/recipe.yaml")):
        return {}
    return {folder.name: str(folder) for folder in sorted({run.parents[1] for run in roots[0].glob("*/*/recipe.yaml")})}


def comparison_of(paths: Sequence[str], *, against: str | None = None, different: bool = False) -> dict[str, Any]:
    """Read, measure and compare the runs in these folders.

    Raises:
        CakdError: If there is none, or they are no fair comparison.
    """
    return compare(runs_in(paths), finished.Evaluations(), against=against, different=different)


def runs_in(paths: Sequence[str]) -> list[finished.FinishedRun]:
    """Read the finished runs that are meant; in a folder of runs those that are not finished are left out.

    Raises:
        InputError: If there is none, or a run that was named itself is not finished.
    """
    named = {Path(path).expanduser() for path in paths}
    folders = list(dict.fromkeys(finished.folders_of_runs(paths)))
    found = [finished.read(path) for path in folders if path in named or finished.state_of(path) == "completed"]
    # A sweep's folder may hold the teacher that its runs learnt from.
    students = [run for run in found if not any(_teaches(run, other) for other in found if other is not run)]
    if not students:
        raise InputError(f"no run in {', '.join(paths)} is finished")
    return students


def _teaches(run: finished.FinishedRun, other: finished.FinishedRun) -> bool:
    teacher = other.facts.get("teacher") or {}
    return teacher.get("weights_hash") is not None and teacher["weights_hash"] == run.facts.get("weights_hash")


def list_runs(folder: str, *, console: Console) -> None:
    """List the runs below a folder with their figures, best first."""
    root = Path(folder).expanduser()
    paths = sorted(file.parent for depth in ("", "*/", "*/*/") for file in root.glob(f"{depth}recipe.yaml"))
    rows = [finished.summary(path) for path in paths]
    rows.sort(key=lambda row: -(row["test"] or row["validation"] or 0))
    if not rows and not root.is_dir():
        raise InputError(f"no such folder: {root}")
    console.result({"runs": rows}, lambda stdout: _show(stdout, rows, root))


def _show(stdout: RichConsole, rows: Sequence[dict[str, Any]], root: Path) -> None:
    if not rows:
        stdout.print(f"no run in {root}", markup=False)
        return
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("run", "student", "loss", "epochs", "held-out", "test"):
        table.add_column(name, justify="left" if name in ("run", "student", "loss") else "right", overflow="fold")
    for row in rows:
        figures = [f"{row[split]:.2%}" if row[split] is not None else "" for split in ("validation", "test")]
        state = "" if row["state"] == "completed" else f" ({row['state']})"
        name = str(Path(row["run"]).relative_to(root)) + state
        table.add_row(
            Text(name), row.get("model", "?"), row.get("loss", "?"), f"{row['epochs']}/{row.get('of', '?')}", *figures
        )
    stdout.print(table)
