"""How many kernels a loss launches: on a GPU each costs more than the work that it does on a small batch."""

from collections import Counter

import pytest
import torch
from pydantic import TypeAdapter
from torch.utils._python_dispatch import TorchDispatchMode

from cakd_cli import losses
from cakd_cli.losses import Lesson, LossOptions, Shapes

BATCH, CLASSES, ELEMENTS = 8, 10, 16
# Operators that only look at memory in another way, or take some without writing to it.
VIEWS = {
    "alias",
    "as_strided",
    "detach",
    "diagonal",
    "empty",
    "empty_like",
    "empty_strided",
    "expand",
    "new_empty",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
}


class Launches(TorchDispatchMode):
    """Counts the operators that reach a device, those of the gradient among them."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def launches(objective, number):
    """Operators of a term of a training objective, forward and backward."""
    term = TypeAdapter(LossOptions).validate_python(dict(losses.objectives()[objective][number])).over(240)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    needs = term.needs
    student = {look: draw(BATCH, ELEMENTS).requires_grad_() for look in needs.student_layers}
    teacher = {look: draw(BATCH, ELEMENTS) for look in needs.teacher_layers}
    module = term.module(
        Shapes(dict.fromkeys(student, (ELEMENTS,)), dict.fromkeys(teacher, (ELEMENTS,)), draw(CLASSES, ELEMENTS))
    )
    logits = draw(BATCH, CLASSES).requires_grad_(), draw(BATCH, CLASSES)
    lesson = Lesson(*logits, torch.arange(BATCH) % CLASSES, student, teacher)
    with Launches() as counted:
        term(lesson, module).total.backward()
    return counted.seen


@pytest.mark.parametrize(
    ("objective", "number", "most"),
    [
        ("cross-entropy", 0, 10),
        ("kd", 1, 25),
        ("dkd", 1, 39),
        ("gdkd", 1, 39),
        ("cakd", 1, 39),
        ("cakd", 2, 89),
        ("dist", 1, 90),
    ],
)
def test_a_loss_stays_within_its_budget_of_launches(objective, number, most):
    seen = launches(objective, number)

    assert seen.total() <= most, seen


def test_the_counter_counts_what_runs_and_not_what_only_looks():
    values = torch.ones(2, 3, requires_grad=True)
    with Launches() as counted:
        (values.unsqueeze(0) * 2).sum().backward()

    assert counted.seen == {"mul": 2, "sum": 1, "ones_like": 1}
