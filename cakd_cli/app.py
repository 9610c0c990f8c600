"""Every command that a user can type."""

from enum import StrEnum
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cakd_cli import __version__
from cakd_cli.export import formats

EPILOG = (
    "Exit codes: 0 done, 1 a bug in cakd, 2 a wrong word, 3 a wrong recipe, 4 missing or damaged input, "
    "5 training diverged, 6 a check failed, 7 hardware, "
    "75 stopped and saved (run again with --resume), 130 interrupted, 141 nobody reads the output."
)


class _Commands(TyperGroup):
    """Says what is wrong with a word without the name of the exception that found it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")
            raise


app = typer.Typer(
    cls=_Commands,
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
data_app = typer.Typer(no_args_is_help=True, help="Look at data before anything is trained.")
app.add_typer(data_app, name="data")


ExportFormat = StrEnum("ExportFormat", {name: name for name in (*formats.FORMATS, "list")})  # type: ignore[misc]


class SplitName(StrEnum):
    """Which images to measure on."""

    test = "test"
    val = "val"
    train = "train"


class Baseline(StrEnum):
    """What to measure against."""

    plain = "plain"


class Where(StrEnum):
    """Where a sweep runs."""

    here = "here"
    ray = "ray"
    slurm = "slurm"


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
Teacher = Annotated[
    list[str] | None,
    typer.Option(
        help="Run directory, torchvision:NAME, timm:NAME, hf-hub:ID, FILE.onnx, logits:FILE, probe:timm:NAME, "
        "clip:FOLDER, ...; again for several."
    ),
]
ClassMap = Annotated[
    str | None, typer.Option(metavar="FILE", help="Which of the teacher's classes are the data's; by name by default.")
]
Student = Annotated[str | None, typer.Option(help="resnet8, torchvision:NAME, ... (cakd list models)")]
Keys = Annotated[list[str] | None, typer.Argument(metavar="[KEY]...", help="As listed; all by default.")]
Out = Annotated[str | None, typer.Option(help="Run directory; by default runs/ and a name made of the settings.")]
Epochs = Annotated[int | None, typer.Option(help="Passes over the training images.")]
Seed = Annotated[int | None, typer.Option(help="Of weights, order and augmentation.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...")]
BatchSize = Annotated[int | None, typer.Option(help="Images a step.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out; start it if there is none.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")]
Grace = Annotated[
    float | None, typer.Option(min=1, metavar="SECONDS", help="Leave so long after a signal, checkpoint or not.")
]
Trust = Annotated[
    bool, typer.Option("--trust", help="Execute the Python file that a run's python:FILE.py:FUNCTION names.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would run, and stop.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Results and errors only.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Say more.")]
FinishedRun = Annotated[str, typer.Argument(metavar="RUN", help="Directory of a finished run.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="Directory of a finished run, or an exported folder.")]


def _begin(trust: bool) -> None:
    """Forget what an earlier command of this process was allowed to execute."""
    from cakd_cli.models import own_code

    own_code.begin(trust=trust)


def _teachers(given: list[str] | None) -> tuple[str, ...] | None:
    """What a flag that may be given again holds; none if it was not given."""
    return tuple(given) if given else None


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
    """Show the whole story on data that ships with cakd, in one to three minutes."""
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
    grace: Grace = None,
    trust: Trust = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train a network on labels alone."""
    from cakd_cli.commands import train
    from cakd_cli.console import Console

    _begin(trust)
    flags = {
        "data": data,
        "data.root": data_root,
        "model": model,
        "engine.epochs": epochs,
        "seed": seed,
        "engine.device": device,
        "engine.batch_size": batch_size,
    }
    wish = train.Wish(distil=False, out=out, resume=resume, overwrite=overwrite, grace=grace, dry_run=dry_run)
    train.run(words or [], flags, wish, console=Console(json_mode=json, quiet=quiet, verbose=verbose))


@app.command()
def distill(
    words: Words = None,
    data: Data = None,
    data_root: DataRoot = None,
    teacher: Teacher = None,
    class_map: ClassMap = None,
    student: Student = None,
    loss: Annotated[str | None, typer.Option(help="cakd, dkd, kd, cross-entropy, ... (cakd list losses)")] = None,
    out: Out = None,
    epochs: Epochs = None,
    seed: Seed = None,
    device: Device = None,
    batch_size: BatchSize = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    grace: Grace = None,
    trust: Trust = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train a small network on what a large one says."""
    from cakd_cli.commands import train
    from cakd_cli.console import Console

    _begin(trust)
    flags = {
        "data": data,
        "data.root": data_root,
        "teacher": _teachers(teacher),
        "class_map": class_map,
        "model": student,
        "loss": loss,
        "engine.epochs": epochs,
        "seed": seed,
        "engine.device": device,
        "engine.batch_size": batch_size,
    }
    wish = train.Wish(distil=True, out=out, resume=resume, overwrite=overwrite, grace=grace, dry_run=dry_run)
    train.run(words or [], flags, wish, console=Console(json_mode=json, quiet=quiet, verbose=verbose))


@app.command("eval")
def evaluate(
    run: Run,
    data: Data = None,
    data_root: DataRoot = None,
    split: Annotated[SplitName, typer.Option(help="Which images.")] = SplitName.test,
    teacher: Teacher = None,
    class_map: ClassMap = None,
    min_top1: Annotated[
        float | None, typer.Option(min=0, max=1, help="Fail with exit code 6 below this share, in [0, 1].")
    ] = None,
    probe: Annotated[
        str | None, typer.Option(metavar="DATA", help="Also train a linear classifier on its features, for this data.")
    ] = None,
    device: Device = None,
    batch_size: BatchSize = None,
    trust: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure a trained network, and how well it learnt from its teacher."""
    from cakd_cli.commands import evaluate as command
    from cakd_cli.console import Console

    _begin(trust)
    flags = {
        "data": data,
        "data.root": data_root,
        "teacher": _teachers(teacher),
        "class_map": class_map,
        "engine.device": device,
        "engine.evaluation_batch_size": batch_size,
    }
    console = Console(json_mode=json, quiet=quiet, verbose=verbose)
    command.run(run, flags, split=split.value, min_top1=min_top1, probe=probe, console=console)


@app.command()
def predict(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A finished run, an exported folder, or an .onnx file of cakd.")
    ],
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Pictures, or folders of pictures.")],
    top: Annotated[int | None, typer.Option(min=1, help="Classes a picture; 5 by default.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what pictures show, and how sure a trained network is of it."""
    from cakd_cli.commands import predict as command
    from cakd_cli.console import Console

    command.run(run, images, top=top, console=Console(json_mode=json, quiet=quiet))


@app.command()
def export(
    format: Annotated[ExportFormat, typer.Option(help="Kind of file; list shows what each is and needs.")],  # noqa: A002 - the flag's name
    run: Annotated[str | None, typer.Argument(metavar="RUN", help="Directory of a finished run.")] = None,
    out: Annotated[str | None, typer.Option(help="File or folder to write; by default inside RUN.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")] = False,
    trust: Trust = False,
    max_drop: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Fail with exit code 6 if 8 bits lose more accuracy than this, in [0, 1]."),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a trained network as a file that runs elsewhere, checked against the original."""
    from cakd_cli.commands import export as command
    from cakd_cli.console import Console

    _begin(trust)
    console = Console(json_mode=json, quiet=quiet, verbose=verbose)
    if format.value == "list":
        command.list_formats(anything_else=bool(run or out or overwrite or max_drop is not None), console=console)
        return
    command.run(run, format=format.value, out=out, overwrite=overwrite, max_drop=max_drop, console=console)


@app.command()
def sweep(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE]... [KEY=A,B]...", help="Recipes, then settings; KEY=A,B tries both."),
    ] = None,
    data: Data = None,
    data_root: DataRoot = None,
    teacher: Teacher = None,
    class_map: ClassMap = None,
    student: Student = None,
    loss: Annotated[str, typer.Option(help="Methods beside the student alone: kd,dkd,cakd.")] = "cakd",
    seeds: Annotated[str, typer.Option(help="How many (6 is 0 to 5), or which: 3,7.")] = "6",
    out: Annotated[str, typer.Option(help="Folder of the sweep, with a run directory for each run.")] = "runs/sweep",
    epochs: Epochs = None,
    device: Device = None,
    batch_size: BatchSize = None,
    jobs: Annotated[int | None, typer.Option(min=1, max=256, help="Runs side by side; one a GPU by default.")] = None,
    on: Annotated[Where, typer.Option(help="This machine, a Ray cluster, or an array of SLURM jobs.")] = Where.here,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train every method with every seed, and compare; the same command goes on where it was."""
    from cakd_cli.commands import sweep as command
    from cakd_cli.console import Console

    flags = {
        "--data": data,
        "--data-root": data_root,
        "--teacher": teacher,
        "--class-map": class_map,
        "--student": student,
        "--epochs": epochs,
        "--device": device,
        "--batch-size": batch_size,
    }
    wish = command.Wish(losses=loss, seeds=seeds, out=out, jobs=jobs, where=on.value)
    command.run(words or [], flags, wish, console=Console(json_mode=json, quiet=quiet, verbose=verbose))


Runs = Annotated[list[str], typer.Argument(metavar="RUN|SWEEP...", help="Folders of runs, or of sweeps.")]
Different = Annotated[bool, typer.Option("--different", help="Compare although more than the method differs.")]
Against = Annotated[str | None, typer.Option(help="The method to compare with; the student alone by default.")]


@app.command()
def compare(
    runs: Runs,
    against: Against = None,
    different: Different = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a table of Markdown.")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="Print a table of LaTeX (booktabs).")] = False,
    trust: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Say which method is better, by how much, and whether that is more than chance."""
    from cakd_cli.commands import compare as command
    from cakd_cli.console import Console

    _begin(trust)
    form = "latex" if latex else "markdown" if markdown else "terminal"
    console = Console(json_mode=json, quiet=quiet, verbose=verbose)
    command.run(runs, against=against, different=different, form=form, console=console)


@app.command()
def report(
    runs: Runs,
    out: Annotated[str, typer.Option(help="File to write.")] = "report.html",
    against: Against = None,
    different: Different = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file at --out.")] = False,
    trust: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write one page about runs: was distilling worth it, what is left to learn, what goes wrong."""
    from cakd_cli.commands import report as command
    from cakd_cli.console import Console

    _begin(trust)
    console = Console(json_mode=json, quiet=quiet, verbose=verbose)
    command.run(runs, out=out, against=against, different=different, overwrite=overwrite, console=console)


@app.command("runs")
def runs_(
    folder: Annotated[str, typer.Argument(metavar="[DIR]", help="Where to look.")] = "runs",
    json: Json = False,
) -> None:
    """List runs with their figures, best first."""
    from cakd_cli.commands import compare as command
    from cakd_cli.console import Console

    command.list_runs(folder, console=Console(json_mode=json))


@app.command()
def bench(
    words: Words = None,
    data: Data = None,
    data_root: DataRoot = None,
    teacher: Teacher = None,
    class_map: ClassMap = None,
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
        "teacher": _teachers(teacher),
        "class_map": class_map,
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
    class_map: ClassMap = None,
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
        "teacher": _teachers(teacher),
        "class_map": class_map,
        "model": student,
        "engine.epochs": epochs,
        "seed": seed,
        "engine.device": device,
    }
    memory.fill(words or [], flags, console=Console(json_mode=json, quiet=quiet, verbose=verbose))


@data_app.command("check")
def data_check(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="folder:PATH, digits, tensors:FILE, ... (cakd list data)")
    ],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that a training will have.")
    ] = None,
    data_root: DataRoot = None,
    json: Json = False,
) -> None:
    """Say what cannot be read, what is there twice, which classes are small, and which settings suit the images."""
    from cakd_cli.commands import data as command
    from cakd_cli.console import Console

    command.check(data, words or [], root=data_root, console=Console(json_mode=json))
