"""Every command that a user can type."""

import atexit
import contextlib
import errno
import os
import signal
import sys
from enum import StrEnum
from typing import Annotated, NoReturn

import typer

from cakd_cli import __version__
from cakd_cli.errors import CakdError, ExitCode, InputError, InterruptedRunError, UsageError

EPILOG = (
    "Exit codes: 0 done, 1 a bug in cakd, 2 a wrong word, 3 a wrong recipe, 4 missing or damaged input, "
    "5 training diverged, 6 a check failed, 7 hardware, "
    "75 stopped and saved (run again with --resume), 130 interrupted, 141 nobody reads the output."
)

app = typer.Typer(
    name="cakd",
    help="Distil a large image classifier into a small one.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(no_args_is_help=True, help="List, show and copy the recipes that ship with cakd.")
app.add_typer(recipes_app, name="recipes")
memory_app = typer.Typer(no_args_is_help=True, help="See, check and remove what teachers have answered before.")
app.add_typer(memory_app, name="teacher-memory")


class ExportFormat(StrEnum):
    """How a student leaves."""

    onnx = "onnx"
    pt2 = "pt2"
    safetensors = "safetensors"


class SplitName(StrEnum):
    """Which images to measure on."""

    test = "test"
    val = "val"
    train = "train"


class Baseline(StrEnum):
    """What to measure against."""

    plain = "plain"


class Catalogue(StrEnum):
    """What can be listed."""

    models = "models"
    losses = "losses"
    data = "data"


Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[RECIPE] [KEY=VALUE]...", help="A recipe (name or path), then any of its keys."),
]
Data = Annotated[str | None, typer.Option(help="digits, cifar100, folder:PATH, tensors:FILE, ... (cakd list data)")]
DataRoot = Annotated[str | None, typer.Option(help="Folder of data that is downloaded.")]
Teacher = Annotated[str | None, typer.Option(help="Run directory, torchvision:NAME, timm:NAME, or a list: '[A, B]'.")]
Student = Annotated[str | None, typer.Option(help="resnet8, torchvision:NAME, ... (cakd list models)")]
Keys = Annotated[list[str] | None, typer.Argument(metavar="[KEY]...", help="As listed; all by default.")]
Out = Annotated[str | None, typer.Option(help="Run directory; by default runs/ and a name made of the settings.")]
Epochs = Annotated[int | None, typer.Option(help="Passes over the training images.")]
Seed = Annotated[int | None, typer.Option(help="Of weights, order and augmentation.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...")]
BatchSize = Annotated[int | None, typer.Option(help="Images a step.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out; start it if there is none.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would run, and stop.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Results and errors only.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Say more.")]
FinishedRun = Annotated[str, typer.Argument(metavar="RUN", help="Directory of a finished run.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="Directory of a finished run, or an exported folder.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cakd {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Distil a large image classifier into a small one."""


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="Folder for the demo's runs.")] = "runs/demo",
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show the whole story on data that ships with cakd, in about a minute."""
    from cakd_cli.commands import demo as command
    from cakd_cli.console import Console

    command.run(out=out, overwrite=overwrite, console=Console(json_mode=json, quiet=quiet, verbose=verbose))


@app.command("train-teacher")
def train_teacher(
    words: Words = None,
    data: Data = None,
    data_root: DataRoot = None,
    model: Annotated[str | None, typer.Option(help="resnet56, torchvision:resnet18, ... (cakd list models)")] = None,
    out: Out = None,
    epochs: Epochs = None,
    seed: Seed = None,
    device: Device = None,
    batch_size: BatchSize = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train a network on labels alone."""
    from cakd_cli.commands import train
    from cakd_cli.console import Console

    flags = {
        "data": data,
        "data.root": data_root,
        "model": model,
        "engine.epochs": epochs,
        "seed": seed,
        "engine.device": device,
        "engine.batch_size": batch_size,
    }
    train.run(
        words or [],
        flags,
        distil=False,
        out=out,
        resume=resume,
        overwrite=overwrite,
        dry_run=dry_run,
        console=Console(json_mode=json, quiet=quiet, verbose=verbose),
    )


@app.command()
def distill(
    words: Words = None,
    data: Data = None,
    data_root: DataRoot = None,
    teacher: Teacher = None,
    student: Student = None,
    loss: Annotated[str | None, typer.Option(help="cakd, dkd, kd, cross-entropy, ... (cakd list losses)")] = None,
    out: Out = None,
    epochs: Epochs = None,
    seed: Seed = None,
    device: Device = None,
    batch_size: BatchSize = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train a small network on what a large one says."""
    from cakd_cli.commands import train
    from cakd_cli.console import Console

    flags = {
        "data": data,
        "data.root": data_root,
        "teacher": teacher,
        "model": student,
        "loss": loss,
        "engine.epochs": epochs,
        "seed": seed,
        "engine.device": device,
        "engine.batch_size": batch_size,
    }
    train.run(
        words or [],
        flags,
        distil=True,
        out=out,
        resume=resume,
        overwrite=overwrite,
        dry_run=dry_run,
        console=Console(json_mode=json, quiet=quiet, verbose=verbose),
    )


@app.command("eval")
def evaluate(
    run: Run,
    data: Data = None,
    data_root: DataRoot = None,
    split: Annotated[SplitName, typer.Option(help="Which images.")] = SplitName.test,
    teacher: Annotated[str | None, typer.Option(help="Compare with this teacher as well.")] = None,
    min_top1: Annotated[
        float | None, typer.Option(min=0, max=1, help="Fail with exit code 6 below this share, in [0, 1].")
    ] = None,
    device: Device = None,
    batch_size: BatchSize = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure a trained network, and how well it learnt from its teacher."""
    from cakd_cli.commands import evaluate as command
    from cakd_cli.console import Console

    command.run(
        run,
        data=data,
        data_root=data_root,
        split=split.value,
        teacher=teacher,
        min_top1=min_top1,
        device=device,
        batch_size=batch_size,
        console=Console(json_mode=json, quiet=quiet, verbose=verbose),
    )


@app.command()
def export(
    run: FinishedRun,
    format: Annotated[ExportFormat, typer.Option(help="Kind of file.")],  # noqa: A002 - the flag's name
    out: Annotated[str | None, typer.Option(help="File or folder to write; by default inside RUN.")] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a trained network as a file that runs elsewhere, checked against the original."""
    from cakd_cli.commands import export as command
    from cakd_cli.console import Console

    command.run(run, format=format.value, out=out, console=Console(json_mode=json, quiet=quiet, verbose=verbose))


@app.command()
def bench(
    words: Words = None,
    data: Data = None,
    data_root: DataRoot = None,
    teacher: Teacher = None,
    student: Student = None,
    against: Annotated[
        Baseline | None, typer.Option(help="plain: the loop that people copy from paper repositories.")
    ] = None,
    device: Device = None,
    batch_size: BatchSize = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure how fast a recipe's step is here, and where its time goes."""
    from cakd_cli.commands import bench as command
    from cakd_cli.console import Console

    flags = {
        "data": data,
        "data.root": data_root,
        "teacher": teacher,
        "model": student,
        "engine.device": device,
        "engine.batch_size": batch_size,
    }
    console = Console(json_mode=json, quiet=quiet, verbose=verbose)
    command.run(words or [], flags, against=against.value if against else None, console=console)


@app.command("list")
def list_(
    what: Annotated[Catalogue, typer.Argument(help="What to list.")],
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A loss, to see all about it.")] = None,
    json: Json = False,
) -> None:
    """List the models, losses or data that a recipe can name, or all about one loss."""
    from cakd_cli.commands import catalogue
    from cakd_cli.console import Console

    catalogue.run(what.value, name, console=Console(json_mode=json))


@app.command()
def env(json: Json = False) -> None:
    """Describe this machine, for a bug report."""
    from cakd_cli.commands import env as command
    from cakd_cli.console import Console

    command.run(console=Console(json_mode=json))


@recipes_app.command("list")
def recipes_list(json: Json = False) -> None:
    """List the recipes and what each is for."""
    from cakd_cli.commands import recipes
    from cakd_cli.console import Console

    recipes.list_all(console=Console(json_mode=json))


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument(metavar="NAME", help="As listed.")]) -> None:
    """Print a recipe."""
    from cakd_cli.commands import recipes

    recipes.show(name)


@recipes_app.command("copy")
def recipes_copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As listed.")],
    path: Annotated[str | None, typer.Argument(metavar="[PATH]", help="Where to; here by default.")] = None,
) -> None:
    """Copy a recipe, to change it."""
    from cakd_cli.commands import recipes

    recipes.copy(name, path)


@memory_app.command("list")
def memory_list(json: Json = False) -> None:
    """List whose answers are kept, to what, and how many."""
    from cakd_cli.commands import memory
    from cakd_cli.console import Console

    memory.list_all(console=Console(json_mode=json))


@memory_app.command("verify")
def memory_verify(keys: Keys = None, json: Json = False) -> None:
    """Compare every answer with its checksum."""
    from cakd_cli.commands import memory
    from cakd_cli.console import Console

    memory.verify(keys or [], console=Console(json_mode=json))


@memory_app.command("prune")
def memory_prune(
    keys: Annotated[list[str] | None, typer.Argument(metavar="[KEY]...", help="As listed.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Remove every memory.")] = False,
    json: Json = False,
) -> None:
    """Remove memories that are damaged or no longer wanted."""
    from cakd_cli.commands import memory
    from cakd_cli.console import Console

    memory.prune(keys or [], all_of_them=all_, console=Console(json_mode=json))


@memory_app.command("fill")
def memory_fill(
    words: Words = None,
    data: Data = None,
    data_root: DataRoot = None,
    teacher: Teacher = None,
    student: Student = None,
    epochs: Epochs = None,
    seed: Seed = None,
    device: Device = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Ask a teacher now about every view that a run of the recipe will meet."""
    from cakd_cli.commands import memory
    from cakd_cli.console import Console

    flags = {
        "data": data,
        "data.root": data_root,
        "teacher": teacher,
        "model": student,
        "engine.epochs": epochs,
        "seed": seed,
        "engine.device": device,
    }
    memory.fill(words or [], flags, console=Console(json_mode=json, quiet=quiet, verbose=verbose))


def main() -> NoReturn:
    """Run the command line; every failure becomes one message and its exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - until the process ends
    json_mode = "--json" in sys.argv
    try:
        code = _run(json_mode)
        sys.stdout.flush()
    except BrokenPipeError:
        code = int(ExitCode.BROKEN_PIPE)
    except OSError as error:
        # The result itself cannot be written: say so where that is still possible.
        code = _report(_translate(error), json_mode=False)
    finally:
        _forget_unwritten_output()
    # All is said and done: an impatient Ctrl-C must not interrupt what libraries do at the end.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


def _run(json_mode: bool) -> int:
    try:
        _refuse_two_teachers(sys.argv[1:])
        app()
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):
            raise stop.__context__ from None
        code = stop.code if isinstance(stop.code, int) else int(ExitCode.INTERNAL)
        if code == ExitCode.INTERRUPTED:
            return _report(InterruptedRunError("interrupted"), json_mode)
        if json_mode and code == ExitCode.USAGE:
            typer.echo('{"error": {"code": "usage", "message": "see stderr", "hint": "cakd --help"}}')
        return code
    except CakdError as error:
        return _report(error, json_mode)
    except KeyboardInterrupt:
        return _report(InterruptedRunError("interrupted"), json_mode)
    except BrokenPipeError:
        raise
    except Exception as error:
        if os.environ.get("CAKD_DEBUG"):
            raise
        return _report(_translate(error), json_mode)
    return int(ExitCode.OK)


def _refuse_two_teachers(words: list[str]) -> None:
    # Of any option the last counts, as everywhere; but who gives two teachers wants both.
    if sum(word == "--teacher" or word.startswith("--teacher=") for word in words) > 1:
        raise UsageError("--teacher is given twice", hint="several teachers are a list: --teacher '[A, B]'")


def _forget_unwritten_output() -> None:
    """Keep Python from trying, and complaining, once more at its end."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report(error: CakdError, json_mode: bool) -> int:
    from cakd_cli.console import show_error

    if os.environ.get("CAKD_DEBUG"):
        raise error
    show_error(error, json_mode=json_mode)
    return int(error.exit_code)


def _translate(error: Exception) -> CakdError:
    if isinstance(error, OSError):
        place = f": {error.filename}" if error.filename else ""
        hint = "make room, then run the same command again; a training run with --resume"
        return InputError(f"{error.strerror or error}{place}", hint=hint if error.errno == errno.ENOSPC else None)
    if isinstance(error, UnicodeError):
        return InputError(f"a name or path is not text in this terminal's encoding: {error}")
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        return InputError("a path begins with ~ and a name that is no user's")
    return CakdError(
        f"a bug in cakd: {type(error).__name__}: {error}", hint="run again with CAKD_DEBUG=1 and report the traceback"
    )


if __name__ == "__main__":
    main()
