"""What a step computes: the student and the terms of its loss.

Shape suffixes: B batch, C classes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cakd_cli.data import ImageDataSet
from cakd_cli.engine import compiling
from cakd_cli.engine.emphasis import Weights, part_name
from cakd_cli.engine.hardware import Hardware
from cakd_cli.engine.stopwatch import Stopwatch
from cakd_cli.engine.taps import Tapped, locate, student_layers
from cakd_cli.engine.teacher import Teacher
from cakd_cli.evaluation import metrics
from cakd_cli.evaluation.predict import Normalisation
from cakd_cli.losses import Lesson, LossTerm
from cakd_cli.losses.emphasis import Emphasis

# A term that pulls less than this share of another is worth a warning.
_FAINT = 0.01


class _Share(NamedTuple):
    """Which parts of both networks' rows, behind the logits, are a term's."""

    mine: slice
    theirs: slice
    importance: slice


def _shares(terms: Sequence[LossTerm]) -> list[_Share]:
    shares, mine, theirs = [], 0, 0
    for term in terms:
        # An importance stands behind each layer that has one.
        count, step = len(term.layer_names), 2 if term.needs_importance else 1
        end = theirs + step * count
        importance = slice(theirs + 1, end, step) if term.needs_importance else slice(0)
        shares.append(_Share(slice(mine, mine + count), slice(theirs, end, step), importance))
        mine, theirs = mine + count, end
    return shares


class Task:
    """The loss of one batch and its parts.

    Args:
        student: The network that learns.
        terms: The recipe's loss.
        data: Whose normalisation the student uses.
        hardware: Precision and layout.
        teacher: Whose answers the terms compare with; none if they need none.

    Attributes:
        network: The student as it trains: with the layers tapped that the terms look at.
        weights: What each term weighs in an epoch.
        pulls: How strongly each term pulled at the logits in the first batch of the latest epoch: the Frobenius norm of
            the gradient, weight included; -1 for a term that does not look at the logits.
        pulls_epoch: That epoch.
        learners: What terms learn themselves, by their number; trained with the student and no part of it.

    Raises:
        RecipeError: If the student lacks a layer that a term names.
    """

    def __init__(
        self,
        student: nn.Module,
        terms: Sequence[LossTerm],
        data: ImageDataSet,
        hardware: Hardware,
        teacher: Teacher | None = None,
    ) -> None:
        self.student = student
        self.terms = terms
        self.hardware = hardware
        self.normalisation = Normalisation(data.mean, data.std, hardware)
        self.watch = Stopwatch(hardware.device)
        image = torch.zeros(1, data.channels, *data.image_size, device=hardware.device)
        taps, self._student_sizes = locate(student, student_layers(terms), data.num_classes, image, name="the student")
        self._teacher_sizes = teacher.sizes if teacher is not None and teacher.sizes else (data.num_classes,)
        self._shares = _shares(terms)
        self.network = Tapped(student, taps) if taps else student
        self._forward: Callable[[Tensor], Tensor] = self.network
        self.weights = Weights(terms)
        self._names: dict[tuple[int, str], str] = {}  # of parts, by term and its own name for them
        self.pulls_epoch = 0
        self.pulls = torch.zeros(len(terms), device=hardware.device)
        self.learners = self._make_learners(teacher).to(hardware.device)

    def _make_learners(self, teacher: Teacher | None) -> nn.ModuleDict:
        learners = nn.ModuleDict()
        for number, (term, share) in enumerate(zip(self.terms, self._shares, strict=True)):
            taps = teacher.taps[share.mine] if teacher is not None else ()
            weight = None
            if teacher is not None and any(tap.of_input for tap in taps):
                weight = teacher.model.get_submodule(taps[0].layer).get_parameter("weight").detach().float().clone()
            learner = term.learner(self._student_sizes[1:][share.mine], self._teacher_sizes[1:][share.theirs], weight)
            if learner is not None:
                learners[str(number)] = learner
        return learners

    def compile(self, parts: int) -> None:
        """Compile the student's training pass on a batch cut into parts; validation keeps the network as it is."""
        self._forward = compiling.compiled_student(self.network, self.hardware.device, parts=parts)

    def loss(
        self, images: Tensor, labels_B: Tensor, teacher: Tensor | None, epoch: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch.

        Args:
            images: uint8, (batch, channels, height, width).
            labels_B: Class indices, or bool (batch, classes).
            teacher: The teacher's answers in float32, its logits and what its taps give; none if no term needs them.
            epoch: From 1, as the literature counts for warm-up: the first epoch of 20 has weight 1/20.

        Returns:
            The weighted sum, differentiable, and every part by name without gradient: ``loss``, ``top1`` (of training
            images, in [0, 1]) and the unweighted parts of each term.
        """
        with self.watch("student"), self.hardware.autocast():
            student = self._forward(self.normalisation(images)).float()
        with self.watch("loss"):
            return self._weigh(student, labels_B, teacher, epoch)

    def _lessons(self, student: Tensor, labels_B: Tensor, teacher: Tensor | None) -> list[Lesson]:
        """Cut the answers of both networks into what each term looks at."""
        student_BC, *mine = student.split(list(self._student_sizes), 1)
        teacher_BC: Tensor | None = None
        theirs: list[Tensor] = []
        if teacher is not None:
            teacher_BC, *theirs = teacher.split(list(self._teacher_sizes), 1)
        return [
            Lesson(
                student_BC,
                teacher_BC,
                labels_B,
                student_features=tuple(mine[share.mine]),
                teacher_features=tuple(theirs[share.theirs]),
                importance=tuple(theirs[share.importance]),
            )
            for share in self._shares
        ]

    def _weigh(
        self, student: Tensor, labels_B: Tensor, teacher: Tensor | None, epoch: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        lessons = self._lessons(student, labels_B, teacher)
        student_BC = lessons[0].student_BC
        total = student_BC.new_zeros(())
        parts = {"loss": total, "top1": metrics.hits(student_BC.detach(), labels_B).float().mean()}
        pulls = []
        for number, (term, lesson) in enumerate(zip(self.weights.at(epoch), lessons, strict=True)):
            key = str(number)
            learner = self.learners[key] if key in self.learners else None  # noqa: SIM401 - it has no get
            output = term.learn(lesson, learner)
            weighted = term.weight * output.total
            if self.pulls_epoch != epoch and student_BC.requires_grad:
                pulls.append(_norm_of_gradient(weighted, student_BC))
            total = total + weighted
            for name, part in output.parts.items():
                # Two terms of one kind: the second's parts get its number.
                unique = name if name not in parts else f"{name}_{sum(n.startswith(name) for n in parts) + 1}"
                parts[unique] = part.detach()
                self._names[number, name] = unique
        if pulls:
            self.pulls_epoch, self.pulls = epoch, torch.stack(pulls)
        parts["loss"] = total.detach()
        return total, parts

    def end_epoch(self, means: Mapping[str, float]) -> None:
        """Tell the weights that adapt what the parts were on average over an epoch."""
        self.weights.hear({part_name(*key): means[name] for key, name in self._names.items()})

    def balance(self, pulls: Sequence[float]) -> dict[str, float]:
        """Name the values of ``pulls``; terms that do not look at the logits are left out."""
        named = zip(self.terms, pulls, strict=True)
        return {f"{number}.{term.type}": pull for number, (term, pull) in enumerate(named) if pull >= 0}

    def imbalance(self, pulls: Sequence[float]) -> list[str]:
        """Say which terms of the first epoch hardly count beside another, also once their warm-up is over.

        Terms whose weight changes by a schedule are left out: the first epoch says little of them.
        """
        full = self.balance(
            [
                -1.0 if isinstance(term.weight, Emphasis) else pull / self.weights.warmup(number, 1)
                for number, (term, pull) in enumerate(zip(self.terms, pulls, strict=True))
            ]
        )
        strongest = max(full, key=full.__getitem__, default="")
        return [
            f"warning: the loss term {name} pulls at the logits with {pull:.1e}, {strongest} with "
            f"{full[strongest]:.1e}: it hardly counts"
            for name, pull in full.items()
            if pull < _FAINT * full[strongest]
        ]


def _norm_of_gradient(total: Tensor, student_BC: Tensor) -> Tensor:
    """Norm of the gradient at the logits; -1 if the total does not depend on them."""
    gradient = None
    if total.requires_grad:
        (gradient,) = torch.autograd.grad(total, student_BC, retain_graph=True, allow_unused=True)
    return total.new_full((), -1.0) if gradient is None else gradient.detach().norm()
