"""A whole run, from what it reads to a finished folder; train-teacher and distill differ only in the recipe."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cakd_cli.data import ImageDataSet
from cakd_cli.engine import record, run_directory, state
from cakd_cli.engine.build import Inputs, Job, make_job, make_source
from cakd_cli.engine.checkpoints import Checkpoint
from cakd_cli.engine.choices import Choices, as_begun, decide
from cakd_cli.engine.loop import Trainer
from cakd_cli.engine.progress import Progress
from cakd_cli.engine.run_directory import RunDirectory
from cakd_cli.engine.stopping import StopRequest
from cakd_cli.engine.tracking import tracked
from cakd_cli.errors import CakdError, DeviceFullError, InputError, RecipeError, first_line
from cakd_cli.evaluation import metrics
from cakd_cli.evaluation.teacher_check import IMAGES, Part, check_teacher
from cakd_cli.machine.memory import is_out_of_memory
from cakd_cli.machine.sharding import load_whole
from cakd_cli.machine.stopwatch import Stopwatch
from cakd_cli.models import saving
from cakd_cli.models.normalisation import Normalisation
from cakd_cli.models.preprocessing import Preprocessing
from cakd_cli.recipe.schema import Recipe
from cakd_cli.teachers import StoredLogits, memory

# What of run.json goes with the network.
_OF_THE_MODEL = ("data", "loss", "seed", "protocol", "metrics", "best_on_test", "teacher")


@dataclass(frozen=True)
class Start:
    """How a run is started.

    Attributes:
        out: Its folder.
        resume: Go on with the run that is there, if there is one.
        overwrite: Replace it.
        grace: Seconds between a signal and the end of the process; none = as long as a step and a checkpoint take.
    """

    out: Path
    resume: bool = False
    overwrite: bool = False
    grace: float | None = None


def run(inputs: Inputs, start: Start, progress: Progress) -> dict[str, Any]:
    """Train, or go on training, and leave a finished folder.

    Args:
        inputs: What the run reads; of a run that goes on, with the choices of its beginning.
        start: Where, and what to do with a run that is there.
        progress: Is told how it goes.

    Returns:
        What run.json holds.

    Raises:
        CakdError: If the run cannot begin, diverges or is stopped.
    """
    fresh = {}
    if inputs.recipe.engine.out_of_memory == "accumulate" and inputs.ranks.count == 1:
        fresh = {name: tensor.detach().cpu().clone() for name, tensor in inputs.student.state_dict().items()}
    while True:
        try:
            return _attempt(inputs, start, progress)
        except DeviceFullError as error:
            if not fresh or error.parts is None:
                raise
            parts = error.parts
        # Outside: what the failed attempt held is free by now. A step has failed, so the run is in its folder.
        size = inputs.recipe.engine.batch_size // parts
        progress.warn(f"the device's memory is full: the batch is cut into {parts} parts of {size} from here on")
        inputs.student.load_state_dict(fresh)
        inputs.student.zero_grad(set_to_none=True)
        inputs.hardware.give_back_memory()
        torch.manual_seed(inputs.recipe.seed)
        recipe = as_begun(inputs.recipe, run_directory.read_recipe(start.out))
        engine = recipe.engine.model_copy(update={"gradient_accumulation": parts})
        inputs = replace(inputs, recipe=recipe.model_copy(update={"engine": engine}))
        start = replace(start, resume=True, overwrite=False)


def _attempt(inputs: Inputs, start: Start, progress: Progress) -> dict[str, Any]:
    ranks = inputs.ranks
    opened = ranks.by_first(lambda: RunDirectory.open(start.out, resume=start.resume, overwrite=start.overwrite))
    directory = opened or RunDirectory(start.out)
    try:
        begun = ranks.told(ranks.by_first(lambda: _begun(directory, inputs, start, progress)))
        assert begun is not None
        if begun.finished:
            progress.note(f"{start.out} is already finished")
            return begun.facts
        inputs.hardware.keep_freed_memory()
        with torch_errors(inputs.recipe):
            choices = decide_together(inputs)
        facts = record.facts_of(choices)
        if begun.checkpoint is not None:
            facts = record.gone_on(begun.facts, facts)
        with torch_errors(choices.recipe):
            job = _build(choices, facts, progress)
        with contextlib.closing(job):
            ranks.by_first(lambda: _enter(directory, job.recipe, overwrite=start.overwrite))
            stop = StopRequest(start.grace, directory.checkpoints.exist)
            kind = job.recipe.engine.tracking if ranks.first else "off"
            tracking = tracked(kind, job.recipe, start.out, progress.warn)
            with stop.listening(), torch_errors(job.recipe), tracking as tracker:
                return _train(Trainer(job, directory, progress, stop, tracker), begun.checkpoint, facts)
    finally:
        directory.close()


@dataclass(frozen=True)
class _Begun:
    """What of an earlier start of the run is there."""

    facts: dict[str, Any]
    finished: bool
    checkpoint: Checkpoint | None


def _begun(directory: RunDirectory, inputs: Inputs, start: Start, progress: Progress) -> _Begun:
    """Read what is there; settings, data and teacher must be those of the beginning."""
    if start.overwrite:
        return _Begun({}, finished=False, checkpoint=None)
    out = start.out
    before = directory.facts()
    whole = "metrics" in before and all((out / name).is_file() for name in ("config.json", "model.safetensors"))
    if (out / "recipe.yaml").is_file():
        now = decide(inputs, measure=False).recipe  # a refusal need not wait for measurements
        run_directory.check_same_recipe(run_directory.read_recipe(out), now, out)
    if before.get("ended") == "completed" and whole:
        return _Begun(before, finished=True, checkpoint=None)
    checkpoint = directory.checkpoints.latest()
    for trace in directory.traces():
        progress.note(trace)
    for problem in directory.checkpoints.damaged:
        progress.warn(f"{problem}; the one before it is used")
    if checkpoint is not None:
        record.check_same_inputs(before, inputs, out, progress)
    return _Begun(before, finished=False, checkpoint=checkpoint)


def decide_together(inputs: Inputs) -> Choices:
    """Let one process measure and choose, and the others follow."""
    ranks = inputs.ranks
    if ranks.count == 1:
        return decide(inputs)
    chosen = ranks.by_first(lambda: decide(inputs))
    recipe = ranks.told(None if chosen is None else chosen.recipe.model_dump_json())
    if chosen is None:
        assert recipe is not None
        chosen = decide(replace(inputs, recipe=Recipe.model_validate_json(recipe)), measure=False)
    return chosen


def _enter(directory: RunDirectory, recipe: Recipe, *, overwrite: bool) -> None:
    if overwrite:
        directory.clear()  # not sooner: what cannot begin replaces nothing
    directory.write_recipe(recipe)


def _build(choices: Choices, facts: dict[str, Any], progress: Progress) -> Job:
    """Say what was chosen, check the teacher and build the run; a teacher that cannot teach ends it here."""
    inputs, recipe = choices.inputs, choices.recipe
    for line in choices.lines():
        progress.note(line)
    for line in choices.warnings:
        progress.warn(line)
    checked = inputs.ranks.told(inputs.ranks.by_first(lambda: _check_teacher(choices, facts["data"], progress)))
    source = make_source(inputs, recipe, progress.note, table=choices.table)
    if checked and source is not None and source.memory is not None and source.memory.folder and inputs.ranks.first:
        memory.write_check(source.memory.identity, _measured_on(choices, facts["data"]), checked)
    try:
        return make_job(inputs, recipe, source)
    except BaseException:
        if source is not None:
            source.close()
        raise


def _check_teacher(choices: Choices, data_facts: dict[str, Any], progress: Progress) -> dict[str, float]:
    """Measure the teacher, unless another run has on the same data; empty without one."""
    inputs, engine = choices.inputs, choices.recipe.engine
    teacher, data = inputs.teacher, inputs.data
    if teacher is None:
        return {}
    literature = choices.recipe.protocol == "literature"
    on: Part = "validation" if data.validation else "test" if literature else "train"
    if isinstance(teacher.model, StoredLogits):
        on = "train"  # it knows no others, and of those held out it cannot tell where they are a part of their own
    if on == "train" and (not data.labelled or (data.multi_label and isinstance(teacher.model, StoredLogits))):
        return {}  # nothing but the test images has labels, and they are for the end
    checked = None
    if engine.teacher_memory == "disk":
        stored = engine.teacher_memory_precision
        shared = memory.identify(teacher, data, inputs.hardware, form=engine.teacher_form, stored=stored)
        checked = memory.read_check(shared, _measured_on(choices, data_facts)) if shared is not None else None
    if checked is None:
        size = engine.evaluation_batch_size
        checked = check_teacher(teacher, data, data_facts, inputs.hardware, batch_size=size, on=on)
    progress.note(f"teacher {teacher.name}: top-1 {checked['top1']:.1%} of {checked['samples']} {IMAGES[on]} images")
    return checked


def _measured_on(choices: Choices, data_facts: dict[str, Any]) -> dict[str, Any]:
    """Say on what a teacher was measured: the literature has no images but those of the test."""
    protocol = choices.recipe.protocol
    return data_facts | ({"protocol": protocol} if protocol == "literature" else {})


def _train(trainer: Trainer, checkpoint: Checkpoint | None, facts: dict[str, Any]) -> dict[str, Any]:
    job, directory, progress = trainer.job, trainer.run, trainer.progress
    try:
        with torch_errors(job.recipe):
            trainer.ranks.by_first(lambda: directory.write_facts(facts | {"ended": "running"}))
            if checkpoint is not None:
                state.restore(trainer, checkpoint)
                progress.note(f"resumed after epoch {trainer.epoch}, step {trainer.step}")
            trainer.ranks.by_first(lambda: directory.keep_metrics(trainer.epoch))
            progress.start(
                epochs=job.recipe.engine.epochs,
                steps_per_epoch=trainer.steps_per_epoch,
                done=trainer.epoch * trainer.steps_per_epoch + trainer.step,
                title=job.recipe.model.label,
            )
            try:
                trainer.fit()
            finally:
                progress.end()
            facts = _finish(trainer, facts)
            trainer.tracker.end(facts["metrics"])
            return facts
    except BaseException as error:
        # The first error is the one to report, also where the disk is too full to note it.
        if trainer.ranks.first:
            with contextlib.suppress(OSError):
                directory.write_facts(facts | {"ended": _why_ended(error), "finished_at": run_directory.now()})
        raise


def _finish(trainer: Trainer, facts: dict[str, Any]) -> dict[str, Any]:
    """Measure the chosen network in float32, look at the test set for the first and only time, and write the folder."""
    job = trainer.job
    recipe, data, student = job.recipe, job.data, job.task.student
    machine = job.hardware.full_precision()
    load_whole(student, trainer.best_state)
    normalisation = Normalisation(data.mean, data.std, machine)
    figures = {}
    for name, split in (("validation", data.validation), ("test", data.test)):
        if split is not None:
            size = recipe.engine.evaluation_batch_size
            figures[name] = metrics.quality(
                *trainer.ranks.predict(student, split, normalisation, machine, batch_size=size)
            )
    last = {"epoch": recipe.engine.epochs}
    literature = recipe.protocol == "literature"
    facts |= {
        "ended": "completed",
        "finished_at": run_directory.now(),
        "best": last if literature else trainer.best or last,
        **({"best_on_test": trainer.best} if literature else {}),
        "metrics": figures,
    }
    trainer.ranks.by_first(lambda: _write(trainer, facts))
    return facts


def _write(trainer: Trainer, facts: dict[str, Any]) -> None:
    """Write the finished folder; ``facts`` gets what is only known now."""
    job, directory = trainer.job, trainer.run
    recipe, data, student = job.recipe, job.data, job.task.student
    if recipe.engine.parallel == "fsdp":
        student = recipe.model.network(in_channels=data.input.shape[0], num_classes=data.num_classes)
        student.load_state_dict(trainer.best_state)
    facts["images_per_second"] = [line["images_per_second"] for line in directory.metrics()]
    saved = saving.SavedModel(
        model=student.cpu().eval(),
        spec=recipe.model,
        class_names=data.class_names,
        preprocessing=preprocessing_of(data),
        facts={key: facts[key] for key in _OF_THE_MODEL if facts.get(key) is not None},
    )
    saving.write(directory.path, saved)
    facts["weights_hash"] = saving.weights_hash(saved.model.state_dict())
    directory.write_facts(facts)
    directory.checkpoints.drop()


def preprocessing_of(data: ImageDataSet) -> Preprocessing:
    """Say how pictures of this data become a network's input."""
    return Preprocessing(data.input.shape, data.mean, data.std, data.crop_pct, data.resized)


def fill_memory(inputs: Inputs, progress: Progress) -> tuple[str, int]:
    """Ask the teacher about every view that the run would meet, and train nothing.

    Args:
        inputs: Of a run with a teacher.
        progress: Is told of every epoch.

    Returns:
        The memory's key, and the images that the teacher was shown.

    Raises:
        RecipeError: If the recipe keeps no memory on disk.
        InputError: If the disk is full.
    """
    planned = decide(inputs, measure=False)
    where = planned.recipe.engine.teacher_memory
    if where != "disk":
        why = planned.reasons.get("engine.teacher_memory", "as the recipe says")
        raise RecipeError(f"this recipe keeps no memory on disk: engine.teacher_memory is {where} ({why})")
    with torch_errors(inputs.recipe):
        choices = decide(inputs, student=False)
        with contextlib.closing(_build(choices, record.facts_of(choices), progress)) as job:
            return _fill(job, progress)


def _fill(job: Job, progress: Progress) -> tuple[str, int]:
    source, recipe, device = job.source, job.recipe, job.hardware.device
    assert source is not None
    assert source.memory is not None
    asked = 0
    for epoch in range(recipe.engine.epochs):
        batches = job.data.train.train_batches(
            batch_size=recipe.engine.batch_size,
            seed=recipe.seed,
            epoch=epoch,
            start=0,
            device=device,
            share=job.ranks.share(recipe),
        )
        # There is no end of second views, and nothing would remember what the teacher says of them.
        first_views = (batch._replace(strong=None) for batch in batches)
        for _ in source.beside(first_views, Stopwatch(device)):
            pass
        counts = source.take_counts()
        asked += counts["asked"]
        if source.memory.stopped:
            raise InputError(f"answers are not kept: {source.memory.stopped}", hint="make room, then fill again")
        progress.note(
            f"epoch {epoch + 1}/{recipe.engine.epochs}: {counts['asked']:,} asked about, {counts['remembered']:,} known"
        )
    return source.memory.identity.key, asked


def _why_ended(error: BaseException) -> str:
    if isinstance(error, CakdError):
        return error.code
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"


@contextlib.contextmanager
def torch_errors(recipe: Recipe) -> Iterator[None]:
    """Turn torch's errors that a recipe can be changed to avoid into cakd's."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        raise DeviceFullError(
            f"the device's memory is full: {first_line(error)}",
            hint="fewer images at a time: engine.evaluation_batch_size, or a smaller network",
        ) from error
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise RecipeError(
            f"batch norm has nothing to average over: images this small need more than "
            f"{recipe.engine.batch_size // recipe.engine.gradient_accumulation} at a time",
            hint="give a larger --batch-size, or a smaller engine.gradient_accumulation",
        ) from error
