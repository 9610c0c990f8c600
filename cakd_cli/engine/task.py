"""What a step computes: the student and the terms of its loss.

Shape suffixes: B batch, C classes.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from cakd_cli.data import ImageDataSet
from cakd_cli.engine import compiling
from cakd_cli.engine.hardware import Hardware
from cakd_cli.engine.stopwatch import Stopwatch
from cakd_cli.evaluation.predict import Normalisation
from cakd_cli.losses import LossTerm


class Task:
    """The loss of one batch and its parts.

    Args:
        student: The network that learns.
        terms: The recipe's loss.
        data: Whose normalisation the student uses.
        hardware: Precision and layout.
    """

    def __init__(self, student: nn.Module, terms: Sequence[LossTerm], data: ImageDataSet, hardware: Hardware) -> None:
        self.student = student
        self.terms = terms
        self.hardware = hardware
        self.normalisation = Normalisation(data.mean, data.std, hardware)
        self.watch = Stopwatch(hardware.device)
        self._forward: Callable[[Tensor], Tensor] = student

    def compile(self, parts: int) -> None:
        """Compile the student's training pass on a batch cut into parts; validation keeps the network as it is."""
        self._forward = compiling.compiled(self.student, self.hardware.device, parts=parts)

    def loss(
        self, images: Tensor, labels_B: Tensor, teacher_BC: Tensor | None, epoch: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch.

        Args:
            images: uint8, (batch, channels, height, width).
            labels_B: Class indices.
            teacher_BC: The teacher's logits in float32; none if no term needs them.
            epoch: From 1, as the literature counts for warm-up: the first epoch of 20 has weight 1/20.

        Returns:
            The weighted sum, differentiable, and every part by name without gradient: ``loss``, ``top1`` (of training
            images, in [0, 1]) and the unweighted parts of each term.
        """
        with self.watch("student"), self.hardware.autocast():
            student_BC = self._forward(self.normalisation(images)).float()
        with self.watch("loss"):
            return self._weigh(student_BC, labels_B, teacher_BC, epoch)

    def _weigh(
        self, student_BC: Tensor, labels_B: Tensor, teacher_BC: Tensor | None, epoch: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        total = student_BC.new_zeros(())
        parts = {"loss": total, "top1": (student_BC.detach().argmax(1) == labels_B).float().mean()}
        for term in self.terms:
            output = term(student_BC, teacher_BC, labels_B)
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
