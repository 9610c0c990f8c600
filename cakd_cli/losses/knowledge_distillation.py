"""KD: Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, arXiv 1503.02531; and other distances.

Shape suffixes: B batch, C classes.
"""

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor

from cakd_cli.losses.base import LogitTerm, LossOutput, Objectives, SoftenedTerm
from cakd_cli.losses.logits import check_pair, kl, soften


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
    total = temperature**2 * kl(student_BC, teacher_BC, temperature).mean()
    return LossOutput(total, {"kd": total})


def reverse_kl(student_BC: Tensor, teacher_BC: Tensor, *, temperature: float) -> LossOutput:
    """Temperature squared times the batch mean of KL(student || teacher), in nats: it seeks the teacher's modes.

    Args and errors as of :func:`kd`; ``total`` with the part ``reverse_kl``.
    """
    student_log_BC, teacher_log_BC = _log_probabilities(student_BC, teacher_BC, temperature)
    return _scaled("reverse_kl", student_log_BC.exp() * (student_log_BC - teacher_log_BC), temperature)


def jensen_shannon(student_BC: Tensor, teacher_BC: Tensor, *, temperature: float) -> LossOutput:
    """Temperature squared times the batch mean of the Jensen-Shannon divergence, in [0, log 2] nats before scaling.

    With m the mean of both distributions, (KL(teacher || m) + KL(student || m)) / 2.

    Args and errors as of :func:`kd`; ``total`` with the part ``jensen_shannon``.
    """
    student_log_BC, teacher_log_BC = _log_probabilities(student_BC, teacher_BC, temperature)
    mean_log_BC = student_log_BC.logaddexp(teacher_log_BC) - math.log(2)
    both_BC = sum(log_BC.exp() * (log_BC - mean_log_BC) for log_BC in (student_log_BC, teacher_log_BC))
    assert isinstance(both_BC, Tensor)
    return _scaled("jensen_shannon", both_BC / 2, temperature)


def logit_mse(student_BC: Tensor, teacher_BC: Tensor) -> LossOutput:
    """Mean over batch and classes of the squared difference of logits (Kim et al., arXiv 2105.08919).

    Args and errors as of :func:`kd`; ``total`` with the part ``logit_mse``.
    """
    check_pair(student_BC, teacher_BC, 1.0)
    total = (soften(student_BC, 1.0) - soften(teacher_BC.detach(), 1.0)).square().mean()
    return LossOutput(total, {"logit_mse": total})


def _log_probabilities(student_BC: Tensor, teacher_BC: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    check_pair(student_BC, teacher_BC, temperature)
    return soften(student_BC, temperature).log_softmax(1), soften(teacher_BC.detach(), temperature).log_softmax(1)


def _scaled(name: str, divergence_BC: Tensor, temperature: float) -> LossOutput:
    total = temperature**2 * divergence_BC.sum(1).mean()
    return LossOutput(total, {name: total})


class KDTerm(SoftenedTerm):
    """KL of softened class probabilities."""

    paper = "Hinton, Vinyals, Dean 2015, arXiv 1503.02531"
    formula = "T^2 mean KL(p_teacher || p_student)"
    # CIFAR-100 settings of mdistiller's configs: 0.1 CE + 0.9 KD, temperature 4.
    objectives: ClassVar[Objectives] = {
        "kd": ({"type": "cross-entropy", "weight": 0.1}, {"type": "kd", "weight": 0.9}),
        "ls-kd": (
            {"type": "cross-entropy", "weight": 0.1},
            {"type": "kd", "weight": 9.0, "temperature": 2.0, "standardise": True},
        ),
    }
    summaries: ClassVar[Mapping[str, str]] = {"ls-kd": "KD of z-scored logits (LSKD, arXiv 2403.01427)."}
    function = staticmethod(kd)

    type: Literal["kd"] = "kd"


class ReverseKLTerm(SoftenedTerm):
    """KL the other way round: the student seeks the teacher's modes."""

    formula = "T^2 mean KL(p_student || p_teacher)"
    objectives: ClassVar[Objectives] = {
        "reverse-kl": ({"type": "cross-entropy", "weight": 0.1}, {"type": "reverse-kl", "weight": 0.9})
    }
    function = staticmethod(reverse_kl)

    type: Literal["reverse-kl"] = "reverse-kl"


class JensenShannonTerm(SoftenedTerm):
    """Mean of the KLs of both networks to their mixture; bounded."""

    formula = "T^2 mean (KL(p_teacher || m) + KL(p_student || m)) / 2,  m = (p_teacher + p_student) / 2"
    objectives: ClassVar[Objectives] = {
        "jensen-shannon": ({"type": "cross-entropy", "weight": 0.1}, {"type": "jensen-shannon", "weight": 0.9})
    }
    function = staticmethod(jensen_shannon)

    type: Literal["jensen-shannon"] = "jensen-shannon"


class LogitMSETerm(LogitTerm):
    """Squared difference of the logits themselves."""

    paper = "Kim et al. 2021, arXiv 2105.08919"
    formula = "mean (z_student - z_teacher)^2"
    objectives: ClassVar[Objectives] = {
        "logit-mse": ({"type": "cross-entropy", "weight": 0.1}, {"type": "logit-mse", "weight": 0.9})
    }
    function = staticmethod(logit_mse)

    type: Literal["logit-mse"] = "logit-mse"
