"""What is trained, and what a step computes: the student, the terms of its loss, and what the terms train themselves.

Shape suffixes: B batch, C classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cakd_cli.data import Batch, ImageDataSet
from cakd_cli.errors import RecipeError
from cakd_cli.evaluation import metrics
from cakd_cli.losses import Lesson, Look, LossOutput, Shapes, Term
from cakd_cli.losses.weights import part_name
from cakd_cli.machine import compiling
from cakd_cli.machine.hardware import Hardware
from cakd_cli.machine.sharding import whole
from cakd_cli.machine.stopwatch import Stopwatch
from cakd_cli.models.layers import LOGITS, SECOND_LOGITS, Answers, Located, Tap, Tapped, locate, preactivation
from cakd_cli.models.normalisation import Normalisation
from cakd_cli.teachers import Teacher


class Step(NamedTuple):
    """The loss of a batch.

    Attributes:
        total: The weighted sum, differentiable.
        parts: ``loss``, ``top1`` (of training images with labels, in [0, 1]) and the unweighted parts of each term, by
            name, without gradient.
        terms: Each term's share of the total, in the recipe's order.
        gradient_norms: How strongly each term acts on the logits: the Frobenius norm of its gradient there, weight
            included; -1 for a term that does not look at the logits. None unless it was asked for.
    """

    total: Tensor
    parts: dict[str, Tensor]
    terms: tuple[Tensor, ...]
    gradient_norms: Tensor | None = None


def taps(looks: Sequence[Look]) -> tuple[Tap, ...]:
    """Say where in a network terms look."""
    return tuple(Tap(look.layer, look.form) for look in looks)


def teacher_looks(terms: Sequence[Term]) -> list[Look]:
    """List the layers of the teacher that terms look at, in their order."""
    return [look for term in terms for look in term.needs.teacher_layers]


class Task(nn.Module):
    """The student and the terms' own modules; its forward pass is the loss of a batch.

    Attributes:
        student: The network that is saved.
        tapped: The student as it trains: it answers with the layers that terms look at as well.
        term_modules: What terms train themselves, by their number; trained with the student and no part of it.

    Args:
        student: On the device.
        terms: The recipe's loss.
        data: Whose normalisation the student uses.
        hardware: Precision and layout.
        teacher: Whose answers the terms compare with; its taps begin with :func:`teacher_looks`.
        batch_size: Samples of a batch, or of the part of one that this process sees at a time.

    Raises:
        RecipeError: If the student lacks a layer that a term names, or a term cannot connect two layers.
    """

    tapped: Tapped
    _forward: Callable[[Tensor], Answers]

    def __init__(
        self,
        student: nn.Module,
        terms: Sequence[Term],
        data: ImageDataSet,
        hardware: Hardware,
        teacher: Teacher | None = None,
        batch_size: int = 0,
    ) -> None:
        super().__init__()
        self.student = student
        self.hardware = hardware
        self.labelled = data.labelled
        self.normalisation = Normalisation(data.mean, data.std, hardware)
        self.watch = Stopwatch(hardware.device)
        looks = [look for term in terms for look in term.needs.student_layers]
        example = data.input.example(hardware.device)
        found = locate(student, taps(looks), data.num_classes, example, name="the student")
        tapped = Tapped(student, found.taps)
        # Beside the module tree, in which the student stands already.
        self.__dict__.update(tapped=tapped, _forward=tapped)
        self._student_names = _names(looks, found.taps)
        self._teacher_names = _names(teacher_looks(terms), teacher.taps if teacher is not None else ())
        self._part_names: dict[tuple[int, str], str] = {}  # by term and its own name for a part
        try:
            shapes = self._shapes(found, data, teacher)._replace(batch_size=batch_size)
            self.term_modules = _make_modules(terms, shapes).to(hardware.device)
        except BaseException:
            tapped.close()
            raise

    def _shapes(self, found: Located, data: ImageDataSet, teacher: Teacher | None) -> Shapes:
        """Say what the terms' own modules are built for."""
        student = {look: found.shapes[name] for look, name in self._student_names.items()}
        labels_N = data.train.labels_by_number()
        if teacher is None:
            return Shapes(student, {}, labels_N=labels_N, num_classes=data.num_classes)
        theirs = {look: teacher.shapes[name] for look, name in self._teacher_names.items()}
        weight, bias = classifier_of(teacher)
        norms = {look: _norm_before(teacher, look) for look in theirs if look.form == "preactivation"}
        return Shapes(student, theirs, weight, bias, labels_N, norms, data.num_classes)

    def compile_student(self, parts: int) -> None:
        """Compile the student's training pass on a batch cut into parts; validation keeps the network as it is."""
        faster = compiling.compiled_student(self.tapped, self.hardware.device, parts=parts)
        self.__dict__["_forward"] = faster

    def close(self) -> None:
        """Remove what was hooked into the student."""
        self.tapped.close()

    def forward(
        self, batch: Batch, answers: Answers | None, terms: Sequence[Term], epoch: int, *, norms: bool = False
    ) -> Step:
        """Compute the loss of a batch.

        Args:
            batch: uint8 images with labels.
            answers: The teacher's, in float32; none if no term needs them.
            terms: With the weights of the epoch.
            epoch: From 1.
            norms: Whether to measure the terms' gradients at the logits.
        """
        with self.watch("student"), self.hardware.autocast():
            student = self._forward(self.normalisation(batch.images))
            if batch.strong is not None:
                student = student | {SECOND_LOGITS: self._forward(self.normalisation(batch.strong))[LOGITS]}
        with self.watch("loss"):
            return self._loss(batch, student, answers, terms, epoch, norms=norms)

    def _loss(
        self,
        batch: Batch,
        student: Answers,
        answers: Answers | None,
        terms: Sequence[Term],
        epoch: int,
        *,
        norms: bool,
    ) -> Step:
        lesson = Lesson(
            student_BC=student[LOGITS],
            teacher_BC=None if answers is None else answers[LOGITS],
            target_B=batch.labels,
            student={look: student[name] for look, name in self._student_names.items()},
            teacher={} if answers is None else {look: answers[name] for look, name in self._teacher_names.items()},
            sample_B=batch.samples,
            epoch=epoch,
            student_strong_BC=student.get(SECOND_LOGITS),
            teacher_strong_BC=None if answers is None else answers.get(SECOND_LOGITS),
        )
        total = lesson.student_BC.new_zeros(())
        parts = {"loss": total}
        if self.labelled:
            parts["top1"] = metrics.hits(lesson.student_BC.detach(), batch.labels).float().mean()
        weighted = []
        for number, term in enumerate(terms):
            key = str(number)
            module = self.term_modules[key] if key in self.term_modules else None  # noqa: SIM401 - it has no get
            output = _of_both(term, lesson, batch, module)
            weighted.append(term.factor * output.total)
            total = total + weighted[-1]
            self._add_parts(parts, number, output)
        parts["loss"] = total.detach()
        # After all terms: a backward pass lets go of gathered shares (FSDP2).
        measured = [_norm_of_gradient(term, lesson.student_BC) for term in weighted if norms]
        return Step(total, parts, tuple(weighted), torch.stack(measured) if measured else None)

    def _add_parts(self, parts: dict[str, Tensor], number: int, output: LossOutput) -> None:
        for name, part in output.parts.items():
            # Two terms of one kind: the second's parts get its number.
            unique = name if name not in parts else f"{name}_{sum(n.startswith(name) for n in parts) + 1}"
            parts[unique] = part.detach()
            self._part_names[number, name] = unique

    def parts_by_term(self, means: Mapping[str, float]) -> dict[str, float]:
        """Name mean parts as adaptive weights know them."""
        return {part_name(*key): means[name] for key, name in self._part_names.items()}


def _of_both(term: Term, lesson: Lesson, batch: Batch, module: nn.Module | None) -> LossOutput:
    """Ask a term about its lesson; of mixed images by the labels of both, each by its share."""
    output: LossOutput = term(lesson, module)
    if batch.other_labels is None or batch.own_share is None or not term.needs_label:
        return output
    other: LossOutput = term(replace(lesson, target_B=batch.other_labels), module)
    share = batch.own_share[0]
    parts = {name: torch.lerp(other.parts[name], part, share) for name, part in output.parts.items()}
    return LossOutput(torch.lerp(other.total, output.total, share), parts)


def _make_modules(terms: Sequence[Term], shapes: Shapes) -> nn.ModuleDict:
    modules = nn.ModuleDict()
    for number, term in enumerate(terms):
        try:
            module = term.module(shapes)
        except ValueError as error:
            raise RecipeError(
                f"loss.{number}: {term.type} does not fit: {error}", hint="name other layers, or take another method"
            ) from error
        if module is not None:
            modules[str(number)] = module
    return modules


def classifier_of(teacher: Teacher) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of the teacher's classifier, if its input is looked at."""
    for tap in teacher.taps:
        linear = teacher.model.get_submodule(tap.layer)
        if tap.of_input and isinstance(linear, nn.Linear):
            weight_CD, bias_C = _copy(linear.weight.flatten(1)), None if linear.bias is None else _copy(linear.bias)
            if teacher.mapped is None:
                return weight_CD, bias_C
            # Of classes that stand for several there is no weight.
            rows = list(teacher.mapped.rows or ())
            return (weight_CD[rows], None if bias_C is None else bias_C[rows]) if rows else (None, None)
    return None, None


def _norm_before(teacher: Teacher, look: Look) -> tuple[Tensor, Tensor]:
    name = f"the teacher {teacher.name}"
    _, layer = preactivation(teacher.model, look.layer, name)
    norm = teacher.model.get_submodule(layer)
    return _copy(norm.get_parameter("weight")), _copy(norm.get_parameter("bias"))


def _copy(parameter: Tensor) -> Tensor:
    return whole(parameter.detach()).float().clone()


def _names(looks: Sequence[Look], found: Sequence[Tap]) -> dict[Look, str]:
    """Name the answer in which each layer comes; a network may answer more than is asked for here."""
    return {look: str(tap) for look, tap in zip(looks, found, strict=False)}


def _norm_of_gradient(total: Tensor, student_BC: Tensor) -> Tensor:
    """Norm of the gradient at the logits; -1 if the total does not depend on them."""
    gradient = None
    if total.requires_grad and student_BC.requires_grad:
        (gradient,) = torch.autograd.grad(total, student_BC, retain_graph=True, allow_unused=True)
    return total.new_full((), -1.0) if gradient is None else gradient.detach().norm()
