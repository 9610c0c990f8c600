"""The theorem that every method of the KL family stands on.

Split the classes of a sample into groups g. With b_g the probability mass of a group and p^_g the distribution
inside it

    KL(p || q) = KL(b || b') + sum_g b_g KL(p^_g || p^'_g)

(CAKD, arXiv 2410.14741; for two groups DKD, arXiv 2203.08679 eq. 7, and GDKD, arXiv 2512.04625.)

Shape suffixes: B batch, C classes, K groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from cakd_cli.losses.base import LossOutput
from cakd_cli.losses.logits import check_pair, soften

KLType = Literal["forward", "reverse", "both"]


@dataclass(frozen=True)
class Decoupling:
    """KL(teacher || student) of each sample, in parts, in nats, without the factor temperature squared.

    Attributes:
        between_B: KL of the group masses.
        within_BK: KL inside each group, in the direction asked for; 0 for a group that is empty or holds one class.
        teacher_mass_BK: Teacher's probability of each group; no gradient; 0 for an empty group.
    """

    between_B: Tensor
    within_BK: Tensor
    teacher_mass_BK: Tensor

    @property
    def kl_B(self) -> Tensor:  # noqa: N802
        """KL(teacher || student) of each sample, by the theorem; needs the forward KL inside the groups."""
        return self.between_B + (self.teacher_mass_BK * self.within_BK).sum(1)


def decouple(
    student_BC: Tensor,
    teacher_BC: Tensor,
    group_BC: Tensor,
    *,
    num_groups: int,
    temperature: float = 1.0,
    kl_type: KLType = "forward",
) -> Decoupling:
    """Split KL(teacher || student) into the KL of group masses and the KL inside each group.

    Everything is computed in log space and in float32 at least, so values and gradients are finite for any
    finite logits, for groups of one class, and for empty groups.

    Args:
        student_BC: Student logits, (batch, classes).
        teacher_BC: Teacher logits, same shape; treated as constant.
        group_BC: Group of each class in each sample, integers in [0, num_groups).
        num_groups: Number of groups, >= 1; some may be empty.
        temperature: Softening of both networks, > 0.
        kl_type: Inside the groups, ``forward`` is KL(teacher || student), ``reverse`` KL(student || teacher),
            ``both`` their mean. Between the groups it is always forward.

    Returns:
        The parts of each sample.

    Raises:
        ValueError: If shapes differ, ``group_BC`` is not an integer tensor, or a number is out of range.
    """
    check_pair(student_BC, teacher_BC, temperature)
    if group_BC.shape != student_BC.shape or group_BC.dtype.is_floating_point or group_BC.dtype == torch.bool:
        raise ValueError(
            f"groups must be integers of shape {tuple(student_BC.shape)}, "
            f"got {tuple(group_BC.shape)} of {group_BC.dtype}"
        )
    if num_groups < 1:
        raise ValueError(f"num_groups must be at least 1, got {num_groups}")
    if kl_type not in get_args(KLType):
        raise ValueError(f"kl_type must be one of {', '.join(get_args(KLType))}, got {kl_type!r}")

    group_K = torch.arange(num_groups, device=group_BC.device)
    member_BKC = group_BC.unsqueeze(1) == group_K.view(1, -1, 1)
    filled_BK = member_BKC.any(2)
    student_mass_BK, student_inside_BC = _log_split(soften(student_BC, temperature), member_BKC, filled_BK)
    teacher_mass_BK, teacher_inside_BC = _log_split(soften(teacher_BC.detach(), temperature), member_BKC, filled_BK)

    mass_BK = teacher_mass_BK.exp()
    # An empty group has log mass -inf in both networks, and -inf minus -inf is not a number.
    mass_gap_BK = torch.where(filled_BK, teacher_mass_BK - student_mass_BK, 0)
    gap_BC = teacher_inside_BC - student_inside_BC
    if kl_type == "forward":
        inside_BC = teacher_inside_BC.exp() * gap_BC
    elif kl_type == "reverse":
        inside_BC = student_inside_BC.exp() * -gap_BC
    else:
        inside_BC = (teacher_inside_BC.exp() - student_inside_BC.exp()) * gap_BC / 2
    return Decoupling(
        between_B=(mass_BK * mass_gap_BK).sum(1),
        within_BK=torch.where(member_BKC, inside_BC.unsqueeze(1), 0).sum(2),
        teacher_mass_BK=mass_BK,
    )


def _log_split(logits_BC: Tensor, member_BKC: Tensor, filled_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Log mass of each group, and log probability of each class inside its own group."""
    logits_B1C = logits_BC.unsqueeze(1)
    lowest = torch.finfo(logits_BC.dtype).min
    # The maximum cancels in both results, so it needs no gradient.
    top_BK1 = logits_B1C.detach().masked_fill(~member_BKC, lowest).amax(2, keepdim=True)
    shifted_BKC = torch.where(member_BKC, logits_B1C - top_BK1, -torch.inf)
    # The sum is 0 for an empty group only: elsewhere the maximum itself contributes 1.
    log_sum_BK = torch.where(filled_BK, shifted_BKC.exp().sum(2), 1).log()
    group_BK = torch.where(filled_BK, top_BK1.squeeze(2) + log_sum_BK, -torch.inf)
    inside_BC = torch.where(member_BKC, shifted_BKC - log_sum_BK.unsqueeze(2), 0).sum(1)
    return group_BK.log_softmax(1), inside_BC


class Part(NamedTuple):
    """How one part of a divergence counts.

    Attributes:
        name: As the method calls it.
        weight: Of the part.
        by_mass: Weigh each sample by the teacher's mass of the group as well, as the theorem does.
        shows_mass: Whether the reported part is then weighed by the mass too.
    """

    name: str
    weight: float = 1.0
    by_mass: bool = False
    shows_mass: bool = False


def weigh(split: Decoupling, temperature: float, between: Part, inside: Sequence[Part | None]) -> LossOutput:
    """Make a loss of the parts of a divergence: who is in which group is the split's, what each weighs is said here.

    Args:
        split: From :func:`decouple`, at this temperature.
        temperature: Its square multiplies every part.
        between: The divergence of the group masses.
        inside: The divergence inside each group, in their order; none leaves a group out.

    Returns:
        ``total``, and the parts by name: batch means, times temperature squared, before their weights, in nats.
    """
    scale = temperature**2
    parts = {between.name: scale * split.between_B.mean()}
    total = between.weight * parts[between.name]
    plain_K = scale * split.within_BK.mean(0)
    massed_K = plain_K
    if any(part is not None and part.by_mass for part in inside):
        massed_K = scale * (split.teacher_mass_BK * split.within_BK).mean(0)
    for part, plain, massed in zip(inside, plain_K, massed_K, strict=True):
        if part is not None:
            parts[part.name] = massed if part.shows_mass else plain
            total = total + part.weight * (massed if part.by_mass else plain)
    return LossOutput(total, parts)
