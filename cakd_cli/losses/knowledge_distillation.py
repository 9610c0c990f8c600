"""KD: Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, arXiv 1503.02531.

Shape suffixes: B batch, C classes.
"""

from typing import Literal

from torch import Tensor

from cakd_cli.losses.base import LossOutput, TeacherTerm, check_pair, soften


def kd(student_BC: Tensor, teacher_BC: Tensor, *, temperature: float) -> LossOutput:
    """Temperature squared times the batch mean of KL(teacher || student), summed over classes, in nats.

    Args:
        student_BC: Student logits, (batch, classes), any float type; computed in float32 at least.
        teacher_BC: Teacher logits, same shape; treated as constant.
        temperature: Softening, > 0, typically 1 to 8. The square keeps the size of gradients.

    Returns:
        ``total`` with the part ``kd``.

    Raises:
        ValueError: If the shapes differ or the temperature is not positive.
    """
    check_pair(student_BC, teacher_BC, temperature)
    student_log_BC = soften(student_BC, temperature).log_softmax(1)
    teacher_log_BC = soften(teacher_BC.detach(), temperature).log_softmax(1)
    kl_B = (teacher_log_BC.exp() * (teacher_log_BC - student_log_BC)).sum(1)
    total = temperature**2 * kl_B.mean()
    return LossOutput(total, {"kd": total})


class KDTerm(TeacherTerm):
    """KL of softened class probabilities (arXiv 1503.02531)."""

    # CIFAR-100 settings of mdistiller's configs: 0.1 CE + 0.9 KD, temperature 4.
    objective = ({"type": "cross-entropy", "weight": 0.1}, {"type": "kd", "weight": 0.9})

    type: Literal["kd"] = "kd"

    def compare(self, student_BC: Tensor, teacher_BC: Tensor, target_B: Tensor) -> LossOutput:
        """Compute the unweighted term for one batch."""
        return kd(student_BC, teacher_BC, temperature=self.temperature)
