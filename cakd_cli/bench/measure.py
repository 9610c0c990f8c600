"""Runs the engine's own epochs, and the plain loop, in turns; compares them round by round."""

import contextlib
import copy
import functools
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cakd_cli.bench.plain import PlainLoop
from cakd_cli.data import Batch, ImageDataSet
from cakd_cli.engine.build import Inputs, Job, make_job, make_source, read_inputs
from cakd_cli.engine.choices import Choices, decide, fits_device
from cakd_cli.engine.loop import Trainer
from cakd_cli.engine.progress import Progress, Silent
from cakd_cli.engine.record import versions
from cakd_cli.engine.run_directory import RunDirectory
from cakd_cli.engine.stopping import StopRequest
from cakd_cli.errors import RecipeError
from cakd_cli.evaluation import cost
from cakd_cli.machine import memory
from cakd_cli.machine.hardware import HALVES, Hardware
from cakd_cli.models.layers import Answers
from cakd_cli.recipe.schema import EngineOptions, Recipe
from cakd_cli.teachers import Teacher
from cakd_cli.teachers.answers import AnswerSource
from cakd_cli.teachers.memory import identify

ROUNDS = 7
# Each way runs for about so long in each round.
_SECONDS = 3.0
_MOST_STEPS = 500
# What decides the time of a step.
_CHOSEN = ("device", "precision", "channels_last", "compile", "teacher_form", "gradient_accumulation")
# Steps of the process that shows the peak memory of one way.
_MEMORY_STEPS = 2


@dataclass(frozen=True)
class _Way:
    """One way to run a step."""

    run: Callable[[int], float]  # steps -> seconds
    shares: Callable[[], dict[str, float]]  # of the latest run


def measure(recipe: Recipe, progress: Progress, *, plain: bool) -> dict[str, Any]:
    """Measure the recipe's step.

    Args:
        recipe: With a teacher; what it would save or evaluate plays no part.
        progress: Hears what is being done.
        plain: Whether to run the plain loop between.

    Returns:
        Rates in images/s with their spread, ratios to the plain loop, shares of the time, FLOPs and peak memory.

    Raises:
        CakdError: If the recipe cannot be run.
    """
    if not recipe.needs_teacher:
        raise RecipeError("cakd bench measures distillation, and no term of the loss needs a teacher")
    if recipe.comparable_teacher is None:
        raise RecipeError("cakd bench measures a teacher that is asked, and a file of logits is not")
    if plain and any(term.looks_inside for term in recipe.loss):
        raise RecipeError("the plain loop compares logits alone, and the loss has features", hint="loss=cakd-logits")
    if plain and recipe.needs_second_view:
        raise RecipeError(
            "the plain loop has one view of each image, and the loss looks at two", hint="loss=cakd-logits"
        )
    if plain and recipe.delta:
        raise RecipeError("the plain loop has one momentum for all terms", hint="optimizer.delta=0")
    # Without a memory and with one: both are measured whatever the recipe says, in RAM and of this loss alone.
    off = recipe.engine.model_copy(update={"teacher_memory": "off"})
    inputs = read_inputs(recipe.model_copy(update={"engine": off}))
    inputs.hardware.keep_freed_memory()
    choices = decide(inputs)
    for line in choices.lines():
        progress.note(line)
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(_scratch())
        ways = {"plain": _plain(inputs)} if plain else {}
        for name in ("live", "memory_warm"):
            if name == "memory_warm" and inputs.data.train.views is None:
                progress.note("memory_warm: not measured, every epoch draws new views; data.views=8 would record some")
                continue
            job = stack.enter_context(contextlib.closing(_job(choices, warm=name == "memory_warm")))
            ways[name] = _engine(job, directory, progress)
        seconds, steps, shares = _rounds(ways, recipe.engine.batch_size, len(inputs.data.train), progress)
    progress.note("peak memory: a process for each way")
    peaks = {name: _peak_in_its_own_process(choices.recipe, name) for name in ways}
    about = {
        "device": f"{inputs.hardware.device}: {inputs.hardware.name}",
        "versions": versions(),
        "student": recipe.model.label,
        "teacher": _teacher(inputs).name,
        "batch_size": recipe.engine.batch_size,
        "image": list(inputs.data.input.shape),
        "engine": {key: getattr(choices.recipe.engine, key) for key in _CHOSEN},
    }
    rates = {
        name: [steps[name] * recipe.engine.batch_size / value for value in values] for name, values in seconds.items()
    }
    return about | {"rounds": ROUNDS, "steps": steps} | _figures(inputs, rates, shares) | {"peak_memory_bytes": peaks}


def _figures(inputs: Inputs, rates: dict[str, list[float]], shares: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Summarise the rounds: rates, ratios to the plain loop where it ran, and shares of what the machine can do."""
    ratios = {
        name: [ours / base for ours, base in zip(rates[name], rates["plain"], strict=True)]
        for name in rates
        if "plain" in rates and name != "plain"
    }
    flops, peak_flops = _flops(inputs), _matrix_product(inputs.hardware)
    return {
        "images_per_second": {name: _spread(values) for name, values in rates.items()},
        "ratio": {name: statistics.median(values) for name, values in ratios.items()},
        "ratio_spread": {name: _spread(values) for name, values in ratios.items()},
        "time": shares,
        "flops_per_image": flops,
        "peak_flops_per_second": peak_flops,
        "share_of_peak": {
            name: statistics.median(rates[name]) * flops[name] / peak_flops for name in shares if name in flops
        },
    }


@contextlib.contextmanager
def _scratch() -> Iterator[RunDirectory]:
    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory.open(Path(folder) / "run", resume=False, overwrite=False)
        try:
            yield directory
        finally:
            directory.close()


def _teacher(inputs: Inputs) -> Teacher:
    assert inputs.teacher is not None, "a recipe without one is refused"
    return inputs.teacher


def _job(choices: Choices, *, warm: bool, made_up: bool = False) -> Job:
    """Build one way: with a memory in RAM or without one; with the teacher, or zeros instead of what it would say.

    Both ways train the same student.
    """
    inputs, recipe = choices.inputs, choices.recipe
    # Nothing is saved, however long it takes.
    recipe = recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"checkpoint_seconds": 1e9})})
    table = warm and _has_room_for_a_table(inputs, recipe.engine)
    where = "ram" if warm else "off"
    source = make_source(inputs, recipe, Silent().note, memory=where, table=table and not made_up)
    assert source is not None
    if made_up:
        zeros, device = _Zeros(_teacher(inputs)), inputs.hardware.device
        source = AnswerSource(zeros, source.memory, device, Silent().note, table=table)
    return make_job(inputs, recipe, source)


def _has_room_for_a_table(inputs: Inputs, engine: EngineOptions) -> bool:
    """Whether a run would hold what it remembers on the device: the choices here are those of one without a memory."""
    form, stored = engine.teacher_form, engine.teacher_memory_precision
    identity = identify(_teacher(inputs), inputs.data, inputs.hardware, form=form, stored=stored)
    return identity is not None and fits_device(identity, inputs.hardware)[0]


class _Zeros:
    """Answers with zeros of a teacher's shapes."""

    def __init__(self, teacher: Teacher) -> None:
        self._shapes = teacher.shapes

    def answer(self, batch: Batch) -> Answers:
        device, size = batch.images.device, len(batch.images)
        return {name: torch.zeros(size, *shape, device=device) for name, shape in self._shapes.items()}

    def close(self) -> None:
        pass


def _engine(job: Job, directory: RunDirectory, progress: Progress) -> _Way:
    data, batch_size = job.data, job.recipe.engine.batch_size
    trainer = Trainer(job, directory, progress, StopRequest())
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    some_images = functools.cache(lambda steps: data.train.subset(order[: steps * batch_size]))
    latest: dict[str, float] = {}

    def run(steps: int) -> float:
        trainer.data = replace(data, train=some_images(steps))
        trainer.steps_per_epoch = trainer.optimizer.steps_per_epoch = steps
        trainer.epoch, trainer.step, trainer.sums = 0, 0, None
        trainer.hardware.keep_freed_memory()
        trainer.hardware.wait()
        started = time.perf_counter()
        latest.update(trainer.train_epoch()["time"])
        return time.perf_counter() - started

    return _Way(run, lambda: dict(latest))


def _plain(inputs: Inputs) -> _Way:
    device = inputs.hardware.device
    networks = copy.deepcopy(inputs.student), copy.deepcopy(_teacher(inputs).model)
    for model in networks:
        model.to(device, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    loop = PlainLoop(inputs.recipe, inputs.data, *networks, device)
    largest = inputs.recipe.engine.batch_size * max(_largest_output(model, inputs.data) for model in networks)

    def run(steps: int) -> float:
        # What the engine has set for the whole process is as it is for everybody else while this loop runs.
        memory.free_as_usual(largest)
        if device.type != "cuda":
            return loop.run(steps)
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
            return loop.run(steps)

    return _Way(run, dict)


def _largest_output(model: nn.Module, data: ImageDataSet) -> int:
    """Bytes of the largest float32 tensor that a layer makes of one image."""
    sizes = [0]
    hooks = [
        layer.register_forward_hook(lambda layer, given, made: sizes.append(4 * made.numel()))
        for layer in model.modules()
        if not list(layer.children())
    ]
    with torch.inference_mode():
        model.eval()(data.input.example(next(model.parameters()).device))
    for hook in hooks:
        hook.remove()
    return max(sizes)


def _rounds(
    ways: dict[str, _Way], batch_size: int, images: int, progress: Progress
) -> tuple[dict[str, list[float]], dict[str, int], dict[str, dict[str, float]]]:
    """Run the ways in turns: seconds of each round, steps in a round, and median shares of the time."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    shares: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    most = min(_MOST_STEPS, images // batch_size)
    steps = {}
    for name, way in ways.items():
        way.run(min(2, most))  # the first calls of kernels, workers that start
        trial = min(4, most)
        a_step = way.run(trial) / trial
        steps[name] = max(1, min(most, round(_SECONDS / a_step)))
        way.run(steps[name])  # with a memory: asks about the views of the rounds
    for number in range(ROUNDS):
        rates = []
        for name, way in ways.items():
            seconds[name].append(way.run(steps[name]))
            shares[name].append(way.shares())
            rates.append(f"{name} {steps[name] * batch_size / seconds[name][-1]:,.0f}")
        progress.note(f"round {number + 1}/{ROUNDS}: {', '.join(rates)} images/s")
    medians = {
        name: {part: statistics.median(line.get(part, 0.0) for line in lines) for part in lines[0]}
        for name, lines in shares.items()
        if lines[0]
    }
    return seconds, steps, medians


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _flops(inputs: Inputs) -> dict[str, int]:
    shape = inputs.data.input.shape
    student, teacher = cost.flops(inputs.student, shape), cost.flops(_teacher(inputs).model, shape)
    # The backward pass computes two products for each one of the forward pass.
    return {"student": student, "teacher": teacher, "live": 3 * student + teacher, "memory_warm": 3 * student}


def _matrix_product(hardware: Hardware) -> float:
    """Measure what the machine can do at best: FLOP/s of a square matrix product in the run's precision."""
    size = 2048 if hardware.device.type == "cpu" else 8192
    dtype = HALVES.get(hardware.precision, torch.float32)
    left, right = (torch.randn(size, size, device=hardware.device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        hardware.wait()
        started = time.perf_counter()
        left @ right
        hardware.wait()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _peak_in_its_own_process(recipe: Recipe, way: str) -> dict[str, int]:
    """Bytes, of the main process without its data workers; empty if the process does not come to its end."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_peak, recipe, way, torch.get_num_threads()).result()
        except BrokenProcessPool:
            return {}


def _peak(recipe: Recipe, name: str, threads: int) -> dict[str, int]:
    """Run a few steps of one way in a process that does nothing else; a warm memory asks nobody."""
    torch.set_num_threads(threads)
    inputs = read_inputs(recipe)
    steps = min(_MEMORY_STEPS, inputs.steps_per_epoch)
    if name == "plain":
        _plain(inputs).run(steps)
    else:
        # Nothing is automatic any more, so nothing is measured; the teacher of a warm memory says nothing.
        choices = Choices(inputs, recipe, {}, ())
        warm = name == "memory_warm"
        with _scratch() as directory, contextlib.closing(_job(choices, warm=warm, made_up=warm)) as job:
            _engine(job, directory, Silent()).run(steps)
    peaks = {"resident": _peak_resident_bytes()}
    if inputs.hardware.device.type == "cuda":
        peaks["device"] = torch.cuda.max_memory_allocated(inputs.hardware.device)
    return peaks


def _peak_resident_bytes() -> int:
    status = Path("/proc/self/status")
    if status.is_file():
        # Not ru_maxrss, which Linux hands down from the parent.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
