"""cakd export."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.table import Table
from rich.text import Text

from cakd_cli.console import Console
from cakd_cli.engine import run_directory
from cakd_cli.errors import RecipeError, UsageError
from cakd_cli.evaluation.measure import check_fits
from cakd_cli.export import check
from cakd_cli.export.formats import FORMATS
from cakd_cli.export.write import export
from cakd_cli.models import saving

# Beyond this a user should know that they pay for 8 bits with accuracy.
_LARGE_DROP = 0.01


def run(
    run: str | None,
    *,
    format: str,  # noqa: A002 - the flag's name
    out: str | None,
    overwrite: bool,
    max_drop: float | None,
    console: Console,
) -> None:
    """Write the file, check it, and say what was found.

    Raises:
        UsageError: If RUN is not given.
    """
    if run is None:
        raise UsageError("missing argument RUN: which network to export", hint=f"cakd export RUN --format {format}")
    report = export_run(run, format=format, out=out, overwrite=overwrite, max_drop=max_drop)
    if max_drop is None and report.get("drop", 0) > _LARGE_DROP:
        console.warn(f"{check.fall(report)}; --max-drop {_LARGE_DROP:g} makes that an error")
    console.result(report, lambda stdout: stdout.print(describe(report), markup=False))


def export_run(
    run: str,
    *,
    format: str,  # noqa: A002 - the flag's name
    out: str | None = None,
    overwrite: bool = False,
    max_drop: float | None = None,
) -> dict[str, Any]:
    """Write the file and check it against the run's network on real images.

    Its place inside the run is the network's own, and is written again unasked.

    Raises:
        CakdError: If the run or an extra is missing, or the file answers differently; no file is left then.
    """
    if out == "":
        raise UsageError("--out is empty")
    row = FORMATS[format]
    if max_drop is not None and row.original is None:
        raise UsageError(
            f"--max-drop is for quantised files; {format} must answer as the network does", hint="leave out --max-drop"
        )
    path = Path(run).expanduser()
    saved = saving.read(path)
    target = Path(out).expanduser() if out else path / row.default
    if row.suffix and target.is_dir():
        target = target / row.default
    shown = saved.preprocessing
    data = run_directory.read_recipe(path).data.shown_as(shown.input_size[1:], shown.crop_pct).load()
    check_fits(saved, data, run)
    replace = overwrite or target == path / row.default
    report = export(saved, data, target.resolve(), format, overwrite=replace, max_drop=max_drop)
    return {"format": format, "out": str(target), **report}


def describe(report: Mapping[str, Any]) -> str:
    """Say in one line what was written and how it compares."""
    if "drop" not in report:
        answer = "probability" if FORMATS[report["format"]].pixels else "logit"
        return (
            f"{report['out']}: {report['bytes'] / 1e6:.2f} MB; on {report['samples']} real images the largest "
            f"difference of a {answer} is {report['largest_difference']:.1e}, top-1 agreement {report['agreement']:.1%}"
        )
    before, after = report["before"], report["after"]
    threads = f"{report['threads']} thread{'s' * (report['threads'] > 1)}"
    return (
        f"{report['out']}: {after['bytes'] / 1e6:.2f} MB instead of {before['bytes'] / 1e6:.2f}; {check.fall(report)}, "
        f"top-1 agreement {report['agreement']:.1%}; an image takes {after['latency_ms']:.2f} ms instead of "
        f"{before['latency_ms']:.2f} ({threads}, median of {report['rounds']} rounds); calibrated on "
        f"{report['calibration_images']} training images"
    )


def list_formats(*, anything_else: bool, console: Console) -> None:
    """Show the kinds of file that can be written, and what each needs.

    Raises:
        UsageError: If anything else is wanted, which this would not do.
    """
    if anything_else:
        raise UsageError("--format list writes nothing", hint="cakd export --format list")
    rows = [
        {
            "format": name,
            "file": row.default if row.suffix else f"{row.default}/",
            "runs_on": row.runs_on,
            "extra": row.extra or None,
            "installed": _is_installed(row.module),
        }
        for name, row in FORMATS.items()
    ]
    console.result(rows, lambda stdout: _show(stdout, rows))


def _is_installed(module: str) -> bool:
    try:
        importlib.import_module(module).require()
    except RecipeError:
        return False
    return True


def _show(stdout: RichConsole, rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("format", "file", "runs on", "needs"):
        table.add_column(heading)
    for row in rows:
        extra = f"{row['extra']} ({'installed' if row['installed'] else 'missing'})" if row["extra"] else "nothing more"
        # Not markup: cakd[export] has brackets.
        table.add_row(*map(Text, (row["format"], row["file"], row["runs_on"], extra)))
    stdout.print(table)
