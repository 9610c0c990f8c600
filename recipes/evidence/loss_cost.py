"""What each loss costs beside a step of ResNet32x4 -> ResNet8x4 at batch 64 and 100 classes.

    python recipes/evidence/loss_cost.py

A step is the teacher's forward, the student's forward and backward, in bf16 where the machine has it. The cost of a
loss is its forward and backward, to the logits or to the layers that it compares, its connectors and memory banks with
it. Medians of 20; everything is measured in turns. The last column is what the term keeps beside the student.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from cakd_cli import losses
from cakd_cli.engine.task import taps
from cakd_cli.losses import Lesson, Look, Shapes, Weights
from cakd_cli.machine.hardware import choose_hardware
from cakd_cli.models.layers import locate, stages
from cakd_cli.recipe.resolve import resolve

BATCH, CLASSES, SAMPLES, ROUNDS = 64, 100, 50_000, 20


def main() -> None:
    """Print one row a term."""
    machine = choose_hardware()
    sizes = {"in_channels": 3, "num_classes": CLASSES}
    recipe = resolve(["bench/resnet32x4-resnet8x4"], {})
    assert recipe.teacher is not None
    student = machine.place(recipe.model.build(**sizes)).train()
    teacher = machine.place(recipe.teacher.build(**sizes)).eval()  # type: ignore[union-attr]
    images = torch.randn(BATCH, 3, 32, 32, device=machine.device)
    target = torch.randint(0, CLASSES, (BATCH,), device=machine.device)
    logits = torch.randn(2, BATCH, CLASSES, device=machine.device)

    def step() -> None:
        with machine.autocast():
            with torch.no_grad():
                teacher(images)
            answers = student(images)
        answers.float().square().mean().backward()

    kept: dict[str, int] = {}

    def shapes_of(network: nn.Module, looks: tuple[Look, ...]) -> dict[Look, tuple[int, ...]]:
        found = locate(network, taps(looks), CLASSES, images[:1], name="it")
        return {look: found.shapes[str(tap)] for look, tap in zip(looks, found.taps, strict=True)}

    def cost(term: losses.Term) -> Callable[[], None]:
        ours = logits[0].clone().requires_grad_()
        mine, theirs = shapes_of(student, term.needs.student_layers), shapes_of(teacher, term.needs.teacher_layers)
        norms = {look: (torch.rand(shape[0]), torch.randn(shape[0])) for look, shape in theirs.items()}
        labels = torch.arange(SAMPLES) % CLASSES
        module = term.module(
            Shapes(mine, theirs, torch.randn(CLASSES, 256), torch.randn(CLASSES), labels, norms, CLASSES, BATCH)
        )
        if module is not None:
            module.to(machine.device)
            kept[term.type] = sum(x.nbytes for x in (*module.parameters(), *module.buffers()))
        layers = (
            {look: torch.randn(BATCH, *shape, device=machine.device) for look, shape in side.items()}
            for side in (mine, theirs)
        )
        student_layers, teacher_layers = layers
        for layer in student_layers.values():
            layer.requires_grad_()
        numbers = torch.arange(BATCH, device=machine.device)
        strong = {"student_strong_BC": ours, "teacher_strong_BC": logits[1]}
        lesson = Lesson(ours, logits[1], target, student_layers, teacher_layers, numbers, **strong)
        return lambda: term(lesson, module).total.backward()

    ways: dict[str, Callable[[], None]] = {"step": step}
    for kind in losses.TERMS:
        of_run = kind().over(1).between(tuple(stages(student)), tuple(stages(teacher)))  # type: ignore[call-arg]
        ways[of_run.type] = cost(Weights([of_run]).at(1)[0])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS + 3):
        for name, run in ways.items():
            machine.wait()
            started = time.perf_counter()
            run()
            machine.wait()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values[3:]) for name, values in seconds.items()}
    sys.stdout.write(f"{machine.name}, {machine.precision}, torch {torch.__version__}, n {ROUNDS}\n")
    sys.stdout.write(
        f"step: {1000 * medians['step']:.1f} ms\n\n| loss | ms | share of a step | kept |\n|---|---|---|---|\n"
    )
    for name, value in list(medians.items())[1:]:
        size = f"{kept[name] / 1e6:.1f} MB" if kept.get(name) else ""
        sys.stdout.write(f"| {name} | {1000 * value:.2f} | {value / medians['step']:.2%} | {size} |\n")


if __name__ == "__main__":
    main()
