"""What each loss costs beside a step of ResNet32x4 -> ResNet8x4 at batch 64 and 100 classes.

    python recipes/evidence/loss_cost.py

A step is the teacher's forward, the student's forward and backward, in bf16 where the machine has it. The cost of a
loss is its forward and backward, to the logits or to the classifier's input. Medians of 50; everything is measured in
turns.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch

from cakd_cli import losses
from cakd_cli.losses import Lesson, Look, Shapes, Weights
from cakd_cli.machine.hardware import choose_hardware
from cakd_cli.recipe.resolve import resolve

BATCH, CLASSES, ROUNDS = 64, 100, 50
# Of both networks' last layers: the input of the classifier, and the map of the second stage.
SHAPES = {"vector": (256,), "importance": (256,), "map": (128, 16, 16)}


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

    def layers(looks: tuple[Look, ...]) -> dict[Look, torch.Tensor]:
        return {look: torch.randn(BATCH, *SHAPES[look.form], device=machine.device) for look in looks}

    def cost(term: losses.Term) -> Callable[[], None]:
        ours = logits[0].clone().requires_grad_()
        mine, theirs = layers(term.needs.student_layers), layers(term.needs.teacher_layers)
        shapes = ({look: SHAPES[look.form] for look in side} for side in (mine, theirs))
        module = term.module(Shapes(*shapes, torch.randn(CLASSES, *SHAPES["vector"])))
        if module is not None:
            module.to(machine.device)
        lesson = Lesson(ours, logits[1], target, {look: x.requires_grad_() for look, x in mine.items()}, theirs)
        return lambda: term(lesson, module).total.backward()

    ways: dict[str, Callable[[], None]] = {"step": step}
    for term in losses.TERMS:
        of_run = term().over(1)  # type: ignore[call-arg]
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
    sys.stdout.write(f"step: {1000 * medians['step']:.1f} ms\n\n| loss | ms | share of a step |\n|---|---|---|\n")
    for name, value in list(medians.items())[1:]:
        sys.stdout.write(f"| {name} | {1000 * value:.2f} | {value / medians['step']:.2%} |\n")


if __name__ == "__main__":
    main()
