"""cakd data."""

from typing import Any

from cakd_cli.console import Console
from cakd_cli.data import checking
from cakd_cli.errors import InputError
from cakd_cli.recipe.resolve import resolve
from cakd_cli.report import tables


def check(data: str, words: list[str], *, root: str | None, console: Console) -> None:
    """Look at all images before anything is trained, and say what is wrong with them.

    Raises:
        CakdError: If the data is missing, or has what would stop a training.
    """
    # The network is never built: settings of the data alone are looked at.
    given: dict[str, Any] = {"data": data, "data.root": root, "model": "resnet8"}
    recipe = resolve(words, given, flag_names={"data": "DATA"})
    report = checking.check(recipe.data, batch_size=recipe.engine.batch_size, note=console.note)
    if report["ready"] or not console.json_mode:
        console.result(report, lambda stdout: tables.show_check(stdout, report))
    if not report["ready"]:
        says = "; ".join(found["says"] for found in report["must_mend"])
        raise InputError(
            f"{report['data']} is not ready: {says}",
            hint=_MEND[report["must_mend"][-1]["kind"]],
            document=report,
        )


# What to do, by kind of what must be mended.
_MEND = {
    "unreadable": "replace or remove the files, or leave them out: data.bad_images=skip",
    "emptied": "each class needs images that can be read, in every part",
    "names": "rename the folders",
}
