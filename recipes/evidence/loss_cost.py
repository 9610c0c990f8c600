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
from cakd_cli.engine import hardware
from cakd_cli.engine.emphasis import Weights
from cakd_cli.recipe.resolve import resolve
from cakd_cli.recipe.schema import EngineOptions

BATCH, CLASSES, ROUNDS = 64, 100, 50
# Of both networks' classifiers.
WIDTH = 256


def main() -> None:
    """Print one row a term."""
    machine = hardware.choose(EngineOptions())
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

    def cost(term: losses.LossTerm) -> Callable[[], None]:
        ours = logits[0].clone().requires_grad_()
        sizes = [WIDTH] * len(term.layer_names)
        mine, theirs = torch.randn(2, BATCH, WIDTH, device=machine.device)
        learner = term.learner(sizes, sizes, torch.randn(CLASSES, WIDTH))
        if learner is not None:
            learner.to(machine.device)
        lesson = losses.Lesson(ours, logits[1], target, (mine.requires_grad_(),), (theirs,))
        return lambda: term.learn(lesson, learner).total.backward()

    ways: dict[str, Callable[[], None]] = {"step": step}
    for term in losses.TERMS:
        settled = term().settled(1)  # type: ignore[call-arg]
        ways[settled.type] = cost(Weights([settled]).at(1)[0])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS + 3):
        for name, run in ways.items():
            machine.wait()
            started = time.perf_counter()
            run()
            machine.wait()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values[3:]) for name, values in seconds.items()}
    sys.stdout.write(
        f"{hardware.describe(machine.device)}, {machine.precision}, torch {torch.__version__}, n {ROUNDS}\n"
    )
    sys.stdout.write(f"step: {1000 * medians['step']:.1f} ms\n\n| loss | ms | share of a step |\n|---|---|---|\n")
    for name, value in list(medians.items())[1:]:
        sys.stdout.write(f"| {name} | {1000 * value:.2f} | {value / medians['step']:.2%} |\n")


if __name__ == "__main__":
    main()
