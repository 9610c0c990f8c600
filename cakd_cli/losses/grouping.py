"""Who is strong and who is weak: rules that pick a set of classes for each sample.

Each returns ``strong_BC``, a boolean mask of shape (batch, classes). Ties at the edge of a set are broken by
``torch.topk`` or ``torch.sort`` and so are arbitrary, as in every published implementation.

Shape suffixes: B batch, C classes.
"""

from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from cakd_cli.losses.logits import check_target, soften
from cakd_cli.options import Options


def label(teacher_BC: Tensor, target_B: Tensor) -> Tensor:
    """Strong is the labelled class alone (DKD; CAKD over logits), or all of them where a sample has several.

    Args:
        teacher_BC: Teacher logits.
        target_B: Class indices, or for several labels a sample bool (batch, classes): the paper of CAKD leaves these
            open, and with more than one strong class its SCD does not vanish.

    Raises:
        ValueError: If the labels are neither.
    """
    if target_B.ndim == 2 and target_B.dtype == torch.bool and target_B.shape == teacher_BC.shape:
        return target_B
    check_target(teacher_BC, target_B)
    classes_C = torch.arange(teacher_BC.shape[1], device=teacher_BC.device)
    return classes_C == target_B.unsqueeze(1)


def top_k(teacher_BC: Tensor, k: int) -> Tensor:
    """Strong are the k classes with the teacher's largest logits (GDKD); all of them if k >= classes.

    Raises:
        ValueError: If k < 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    chosen_BK = teacher_BC.topk(min(k, teacher_BC.shape[1]), dim=1).indices
    return torch.zeros_like(teacher_BC, dtype=torch.bool).scatter_(1, chosen_BK, True)


def auto_k(
    teacher_BC: Tensor, *, ratio_threshold: float = 2.0, topk_cap: int = 100, temperature: float = 1.0
) -> Tensor:
    """Count the classes that stand out in each sample (GDKDAutok of the GDKD repository): int64, (batch,).

    With the teacher's softened probabilities in ascending order, ratio_j = p_j / mean(p_1..p_j). The classes from the
    first ratio that reaches the threshold upwards stand out, at most ``topk_cap`` of them, and one where none
    does. The official code holds for 100 classes only; this is its rule for any number.

    Raises:
        ValueError: If ``topk_cap`` < 1.
    """
    if topk_cap < 1:
        raise ValueError(f"topk_cap must be at least 1, got {topk_cap}")
    num_classes = teacher_BC.shape[1]
    ascending_BC = soften(teacher_BC, temperature).softmax(1).sort(dim=1).values
    count_C = torch.arange(1, num_classes + 1, device=teacher_BC.device)
    # Probabilities that have underflowed to 0 stand out from nothing.
    above_BC = (ascending_BC * count_C >= ratio_threshold * ascending_BC.cumsum(1)) & (ascending_BC > 0)
    # argmax finds the first of several equal values.
    k_B = num_classes - above_BC.int().argmax(1)
    return torch.where(above_BC.any(1), k_B.clamp(max=topk_cap), 1)


def ranked_below(teacher_BC: Tensor, k_B: Tensor) -> Tensor:
    """Strong are the classes with the teacher's k largest logits, with a k of each sample's own."""
    order_BC = teacher_BC.argsort(dim=1, descending=True)
    classes_C = torch.arange(teacher_BC.shape[1], device=teacher_BC.device)
    return torch.zeros_like(teacher_BC, dtype=torch.bool).scatter_(1, order_BC, classes_C < k_B.unsqueeze(1))


def top_mass(teacher_BC: Tensor, mass: float, *, temperature: float = 1.0) -> Tensor:
    """Strong is the smallest set of classes whose teacher probability, softened, is at least ``mass``.

    Raises:
        ValueError: If ``mass`` is not in (0, 1].
    """
    if not 0 < mass <= 1:
        raise ValueError(f"mass must be in (0, 1], got {mass}")
    sorted_BC, order_BC = soften(teacher_BC, temperature).softmax(1).sort(dim=1, descending=True)
    mass_before_BC = sorted_BC.cumsum(1) - sorted_BC
    return torch.zeros_like(teacher_BC, dtype=torch.bool).scatter_(1, order_BC, mass_before_BC < mass)


def threshold(teacher_BC: Tensor, probability: float, *, temperature: float = 1.0) -> Tensor:
    """Strong are the classes to which the teacher, softened, gives at least ``probability``; possibly none.

    Raises:
        ValueError: If ``probability`` is not in (0, 1).
    """
    if not 0 < probability < 1:
        raise ValueError(f"probability must be in (0, 1), got {probability}")
    return soften(teacher_BC, temperature).softmax(1) >= probability


class _Grouping(Options):
    def strong(self, teacher_BC: Tensor, target_B: Tensor, temperature: float) -> Tensor:
        """Mask of the strong classes."""
        raise NotImplementedError


class LabelGrouping(_Grouping):
    """The labelled class is strong, or all labelled classes of a sample."""

    type: Literal["label"] = "label"

    def strong(self, teacher_BC: Tensor, target_B: Tensor, temperature: float) -> Tensor:
        return label(teacher_BC, target_B)


class TopKGrouping(_Grouping):
    """The teacher's k largest logits are strong."""

    type: Literal["top-k"] = "top-k"
    k: int = Field(5, ge=1, description="number of strong classes")

    def strong(self, teacher_BC: Tensor, target_B: Tensor, temperature: float) -> Tensor:
        return top_k(teacher_BC, self.k)


class TopMassGrouping(_Grouping):
    """The smallest set that holds a share of the teacher's softened probability is strong."""

    type: Literal["top-mass"] = "top-mass"
    mass: float = Field(0.9, gt=0, le=1, description="share of the teacher's probability")

    def strong(self, teacher_BC: Tensor, target_B: Tensor, temperature: float) -> Tensor:
        return top_mass(teacher_BC, self.mass, temperature=temperature)


class ThresholdGrouping(_Grouping):
    """Classes above a softened teacher probability are strong."""

    type: Literal["threshold"] = "threshold"
    probability: float = Field(0.05, gt=0, lt=1, description="least softened teacher probability of a strong class")

    def strong(self, teacher_BC: Tensor, target_B: Tensor, temperature: float) -> Tensor:
        return threshold(teacher_BC, self.probability, temperature=temperature)


Grouping = Annotated[
    LabelGrouping | TopKGrouping | TopMassGrouping | ThresholdGrouping,
    Field(discriminator="type"),
    # "label" is short for {type: label}.
    BeforeValidator(lambda given: {"type": given} if isinstance(given, str) else given),
]
