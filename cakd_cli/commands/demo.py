"""cakd demo: the whole story on data that ships with cakd."""

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole

from cakd_cli.commands import export
from cakd_cli.commands.evaluate import recipe_of
from cakd_cli.commands.train import Wish, train
from cakd_cli.console import Console
from cakd_cli.errors import RecipeError, UsageError
from cakd_cli.evaluation.measure import measure
from cakd_cli.report import tables

METHODS = ("cross-entropy", "kd", "dkd", "cakd")
# One run says little: on 360 test images the accuracy of equal runs differs by a percent.
SEEDS = (0, 1, 2)
TEACHER, STUDENT = "digits/teacher", "digits/student"


def run(*, out: str, overwrite: bool, console: Console) -> None:
    """Train a teacher, distil it into small students, compare them, and export one."""
    if not out:
        raise UsageError("--out is empty")
    started = time.monotonic()
    folder = Path(out).expanduser()
    inner = Console(json_mode=console.json_mode, quiet=console.quiet or not console.verbose, bar=not console.quiet)

    def do(words: list[str], flags: Mapping[str, Any], *, distil: bool, name: str) -> str:
        path = str(folder / name)
        train(words, flags, Wish(distil, path, resume=not overwrite, overwrite=overwrite), console=inner)
        return path

    console.note(f"a teacher on 1,295 handwritten digits: cakd train-teacher {TEACHER}")
    teacher = do([TEACHER], {}, distil=False, name="teacher")
    reports: dict[str, list[dict[str, Any]]] = {}
    for method in METHODS:
        console.note(f"{len(SEEDS)} students: cakd distill {STUDENT} --teacher {teacher} --loss {method}")
        for seed in SEEDS:
            flags = {"teacher": (teacher,), "loss": method, "seed": seed}
            path = do([STUDENT], flags, distil=True, name=f"{method}-seed{seed}")
            recipe = recipe_of(Path(path), {"teacher": (teacher,)})
            report = measure(Path(path), recipe, split="test", with_teacher=True, with_latency=False)
            reports.setdefault(method, []).append(report)
    student = str(folder / "cakd-seed0")
    exported = _export(student, console)

    rows = [_teacher_row(reports["cakd"][0]), *(_row(method, reports[method]) for method in METHODS)]
    document = {"rows": rows, "export": exported, "seconds": round(time.monotonic() - started, 1)}
    console.result(document, lambda stdout: _show(stdout, document, teacher, student))


def _export(student: str, console: Console) -> dict[str, Any]:
    try:
        return export.export_run(student, format="onnx", out=None)
    except RecipeError as error:
        console.note(f"{error.message} ({error.hint}); writing .pt2 instead")
        return export.export_run(student, format="pt2", out=None)


def _teacher_row(report: Mapping[str, Any]) -> dict[str, Any]:
    teacher = report["teacher"]
    figures = {key: [teacher["quality"][key], None] for key in ("top1", "ece")}
    return {"name": "teacher", "n": 1, "parameters": teacher["cost"]["parameters"], **figures}


def _row(method: str, reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    sources = [report["quality"] | report["teacher"]["fidelity"] for report in reports]
    figures = {
        key: [statistics.mean(s[key] for s in sources), statistics.stdev(s[key] for s in sources)]
        for key in ("top1", "agreement", "ece", "bcd", "scd", "wcd")
    }
    name = "student alone" if method == "cross-entropy" else f"student, {method}"
    return {"name": name, "n": len(reports), "parameters": reports[0]["cost"]["parameters"], **figures}


def _show(stdout: RichConsole, document: Mapping[str, Any], teacher: str, student: str) -> None:
    title = f"360 test digits, mean ± standard deviation of {len(SEEDS)} seeds"
    stdout.print(tables.comparison(document["rows"], title))
    stdout.print(
        "agree: share of the teacher's answers repeated. BCD, SCD, WCD: what is not learnt yet of the teacher,\n"
        "in nats at temperature 4: its top five classes against the rest, inside the top, inside the rest.\n\n"
        f"{export.describe(dict(document['export']))}\n\n"
        f"All of it took {document['seconds']:.0f} s. Next:\n"
        f"  cakd eval {student} --teacher {teacher}\n"
        f"  cakd distill {STUDENT} --teacher {teacher} --loss cakd loss.1.beta=4 --out runs/mine\n"
        "  cakd recipes show folder/student      # your own images",
        markup=False,
    )
