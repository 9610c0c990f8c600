"""What a step computes: the student, the teacher where one is needed, and the terms of the loss.

Shape suffixes: B batch, C classes.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from cakd_cli.data import Batch, ImageDataSet
from cakd_cli.engine.hardware import Hardware
from cakd_cli.engine.teacher import Teacher
from cakd_cli.evaluation.predict import Normalisation
from cakd_cli.losses import LossTerm


class Task:
    """The loss of one batch and its parts.

    Args:
        student: The network that learns.
        teacher: The frozen network; none if no term needs it.
        terms: The recipe's loss.
        data: Whose normalisation the student uses.
        hardware: Precision and layout.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | None,
        terms: Sequence[LossTerm],
        data: ImageDataSet,
        hardware: Hardware,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.terms = terms
        self.hardware = hardware
        self.normalisation = Normalisation(data.mean, data.std, hardware)
        self._shared_input = teacher is not None and (teacher.mean, teacher.std) == (data.mean, data.std)

    def loss(self, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch.

        Args:
            batch: Images as uint8 and labels.
            epoch: From 1, as the literature counts for warm-up: the first epoch of 20 has weight 1/20.

        Returns:
            The weighted sum, differentiable, and every part by name without gradient: ``loss``, ``top1`` (of training
            images, in [0, 1]) and the unweighted parts of each term.
        """
        student_input = self.normalisation(batch.images)
        teacher_BC = None
        if self.teacher is not None:
            same = self._shared_input
            teacher_BC = self.teacher.answer(
                student_input if same else self.teacher.normalisation(batch.images), self.hardware
            )
        with self.hardware.autocast():
            student_BC = self.student(student_input)
        student_BC = student_BC.float()
        total = student_BC.new_zeros(())
        parts = {"loss": total, "top1": (student_BC.detach().argmax(1) == batch.labels).float().mean()}
        for term in self.terms:
            output = term(student_BC, teacher_BC, batch.labels)
            total = total + weight_at(term, epoch) * output.total
            for name, part in output.parts.items():
                # Two terms of one kind: the second's parts get its number.
                unique = name if name not in parts else f"{name}_{sum(n.startswith(name) for n in parts) + 1}"
                parts[unique] = part.detach()
        parts["loss"] = total.detach()
        return total, parts


def weight_at(term: LossTerm, epoch: int) -> float:
    """Weight of a term in an epoch counted from 1: linear warm-up, then constant."""
    assert term.warmup_epochs != "auto", "resolve() settles every auto"
    return term.weight * min(epoch / term.warmup_epochs, 1.0) if term.warmup_epochs else term.weight
