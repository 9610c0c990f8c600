"""cakd export."""

from pathlib import Path
from typing import Any

from cakd_cli import export
from cakd_cli.commands.evaluate import check_fits
from cakd_cli.console import Console
from cakd_cli.engine import run_directory, saved_model
from cakd_cli.errors import UsageError
from cakd_cli.export.check import real_images


def run(run: str, *, format: str, out: str | None, console: Console) -> None:  # noqa: A002 - the flag's name
    """Write the file, check it, and say what was found."""
    report = export_run(run, format=format, out=out)
    console.result(report, lambda stdout: stdout.print(describe(report), markup=False))


def export_run(run: str, *, format: str, out: str | None) -> dict[str, Any]:  # noqa: A002 - the flag's name
    """Write the file and check it against the run's network on real images.

    Raises:
        CakdError: If the run or an extra is missing, or the file answers differently; no file is left then.
    """
    path = Path(run).expanduser()
    saved = saved_model.read(path)
    target = Path(out).expanduser() if out else path / run_directory.EXPORT_NAMES[format]
    if out == "":
        raise UsageError("--out is empty")
    if format != "safetensors" and target.is_dir():
        target = target / run_directory.EXPORT_NAMES[format]
    if format == "safetensors":
        export.check_folder(target)
        saved_model.write(target, saved)
        return {"format": format, "out": str(target), "bytes": (target / "model.safetensors").stat().st_size}
    data = run_directory.read_recipe(path).data.load()
    check_fits(saved, data, run)
    return {"format": format, "out": str(target)} | export.to_file(saved, real_images(saved, data), target, format)


def describe(report: dict[str, Any]) -> str:
    """Say in one line what was written and how it compares."""
    text = f"{report['out']}: {report['bytes'] / 1e6:.2f} MB"
    if "largest_difference" in report:
        text += (
            f"; on {report['samples']} real images the largest difference of a logit is "
            f"{report['largest_difference']:.1e}, top-1 agreement {report['agreement']:.1%}"
        )
    return text
