"""cakd export."""

from pathlib import Path
from typing import Any

from cakd_cli.console import Console
from cakd_cli.engine import run_directory
from cakd_cli.errors import UsageError
from cakd_cli.evaluation.measure import check_fits
from cakd_cli.export.check import real_images
from cakd_cli.export.formats import FORMATS
from cakd_cli.export.write import export
from cakd_cli.models import saving


def run(run: str, *, format: str, out: str | None, overwrite: bool, console: Console) -> None:  # noqa: A002 - the flag's name
    """Write the file, check it, and say what was found."""
    report = export_run(run, format=format, out=out, overwrite=overwrite)
    console.result(report, lambda stdout: stdout.print(describe(report), markup=False))


def export_run(run: str, *, format: str, out: str | None = None, overwrite: bool = False) -> dict[str, Any]:  # noqa: A002 - the flag's name
    """Write the file and check it against the run's network on real images.

    Its place inside the run is the network's own, and is written again unasked.

    Raises:
        CakdError: If the run or an extra is missing, or the file answers differently; no file is left then.
    """
    if out == "":
        raise UsageError("--out is empty")
    path = Path(run).expanduser()
    saved = saving.read(path)
    row = FORMATS[format]
    target = Path(out).expanduser() if out else path / row.default
    if row.suffix and target.is_dir():
        target = target / row.default
    shown = saved.preprocessing
    data = run_directory.read_recipe(path).data.shown_as(shown.input_size[1:], shown.crop_pct).load()
    check_fits(saved, data, run)
    images = real_images(saved, data)
    report = export(saved, images, target.resolve(), format, overwrite=overwrite or target == path / row.default)
    return {"format": format, "out": str(target), **report}


def describe(report: dict[str, Any]) -> str:
    """Say in one line what was written and how it compares."""
    return (
        f"{report['out']}: {report['bytes'] / 1e6:.2f} MB; on {report['samples']} real images the largest difference "
        f"of a logit is {report['largest_difference']:.1e}, top-1 agreement {report['agreement']:.1%}"
    )
