"""The theorem that every method of the KL family stands on.

Split the classes of a sample into groups g. With b_g the probability mass of a group and p^_g the distribution
inside it

    KL(p || q) = KL(b || b') + sum_g b_g KL(p^_g || p^'_g)

(CAKD, arXiv 2410.14741; for two groups DKD, arXiv 2203.08679 eq. 7, and GDKD, arXiv 2512.04625.)

Shape suffixes: S student and teacher, B batch, C classes, K groups, J the groups together and then each of them,
N every class of every group and then the groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cakd_cli.losses.base import LossOutput
from cakd_cli.losses.logits import check_pair, soften

KLType = Literal["forward", "reverse", "both"]


@dataclass(frozen=True)
class Decoupling:
    """KL(teacher || student) of each sample, in parts, in nats, without the factor temperature squared.

    Attributes:
        parts_BJ: ``between_B``, and then ``within_BK``.
        teacher_mass_BK: Teacher's probability of each group; no gradient; 0 for an empty group.
    """

    parts_BJ: Tensor
    teacher_mass_BK: Tensor

    @property
    def between_B(self) -> Tensor:  # noqa: N802
        """KL of the group masses."""
        return self.parts_BJ[:, 0]

    @property
    def within_BK(self) -> Tensor:  # noqa: N802
        """KL inside each group, in the direction asked for; 0 for a group that is empty or holds one class."""
        return self.parts_BJ[:, 1:]

    @property
    def kl_B(self) -> Tensor:  # noqa: N802
        """KL(teacher || student) of each sample, by the theorem; needs the forward KL inside the groups."""
        return self.between_B + (self.teacher_mass_BK * self.within_BK).sum(1)


def two_groups(first_BC: Tensor) -> Tensor:
    """Number the classes of a boolean mask 0 and all others 1, as :func:`decouple` takes them."""
    # A bool is a byte of 0 or 1: no copy is needed.
    return (~first_BC).view(torch.uint8)


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
    finite logits, for groups of one class, and for empty groups. Gradients can be taken once, not of themselves.

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
    outside_BKC = group_BC.unsqueeze(1) != group_K.view(1, -1, 1)
    logits_SBC = soften(torch.stack([student_BC, teacher_BC.detach()]), temperature)
    return Decoupling(*_Divergences.apply(logits_SBC, outside_BKC, kl_type))


class _Divergences(torch.autograd.Function):
    """The parts, with their gradients in closed form.

    The tensors are small, and a GPU takes longer to launch a kernel than to run it: autograd's own gradient would
    launch three times as many. With p of the teacher, q of the student, b the mass of a group and ^ inside it, the
    gradients by a student logit of a group are

        of KL(b || b')      (b' - b) q^
        of KL(p^ || q^)     q^ - p^
        of KL(q^ || p^)     q^ (log q^ - log p^ - KL(q^ || p^))
    """

    @staticmethod
    def forward(ctx: Any, logits_SBC: Tensor, outside_BKC: Tensor, kl_type: KLType) -> tuple[Tensor, Tensor]:
        lowest = torch.finfo(logits_SBC.dtype).min
        masked_SBKC = logits_SBC.unsqueeze(2).masked_fill(outside_BKC, lowest)
        # Both networks are uniform inside an empty group, and give it the lowest log mass, which is a mass of 0.
        inside_SBKC = masked_SBKC.log_softmax(3)
        # What a softmax subtracts is the log of the sum of exponentials, here of a group.
        mass_SBK = (masked_SBKC.amax(3) - inside_SBKC.amax(3)).log_softmax(2)
        log_SBN = torch.cat([inside_SBKC.flatten(2), mass_SBK], 2)
        probability_SBN = log_SBN.exp()
        ctx.kl_type, ctx.shape = kl_type, outside_BKC.shape
        gap_BN = log_SBN[1] - log_SBN[0]
        inside_BKC, between_BK = _classes_and_groups(probability_SBN[1] * gap_BN, ctx.shape)
        if kl_type != "forward":
            reverse_BKC = _classes_and_groups(probability_SBN[0] * -gap_BN, ctx.shape)[0]
            inside_BKC = reverse_BKC if kl_type == "reverse" else (inside_BKC + reverse_BKC) / 2
        parts_BJ = torch.cat([between_BK.sum(1, keepdim=True), inside_BKC.sum(2)], 1)
        teacher_mass_BK = _classes_and_groups(probability_SBN[1], ctx.shape)[1]
        ctx.save_for_backward(probability_SBN, gap_BN)
        ctx.mark_non_differentiable(teacher_mass_BK)
        ctx.set_materialize_grads(False)
        return parts_BJ, teacher_mass_BK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BJ: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:
        if gradient_BJ is None:
            return None, None, None
        (student_BN, teacher_BN), gap_BN = ctx.saved_tensors
        student_BKC = _classes_and_groups(student_BN, ctx.shape)[0]
        inside_BKC, mass_BK = _classes_and_groups(student_BN - teacher_BN, ctx.shape)
        if ctx.kl_type != "forward":
            behind_BKC = -_classes_and_groups(gap_BN, ctx.shape)[0]
            mean_BK1 = (student_BKC * behind_BKC).sum(2, keepdim=True)
            reverse_BKC = student_BKC * (behind_BKC - mean_BK1)
            inside_BKC = reverse_BKC if ctx.kl_type == "reverse" else (inside_BKC + reverse_BKC) / 2
        between_BK1 = (gradient_BJ[:, :1] * mass_BK).unsqueeze(2)
        gradient_BKC = torch.addcmul(gradient_BJ[:, 1:, None] * inside_BKC, between_BK1, student_BKC)
        # The teacher is constant: what its half of the logits is told goes nowhere.
        return gradient_BKC.sum(1).expand(2, -1, -1), None, None


def _classes_and_groups(values_BN: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Take apart what stands side by side: of the classes of each group, in the shape given, and of the groups."""
    num_groups = shape[1]
    return values_BN[:, :-num_groups].unflatten(1, shape[1:]), values_BN[:, -num_groups:]


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
    parts_J = split.parts_BJ.mean(0) * scale
    between_mean, *plain_K = parts_J.unbind()
    parts = {between.name: between_mean}
    total = between_mean if between.weight == 1 else between.weight * between_mean
    massed_K = plain_K
    if any(part is not None and part.by_mass for part in inside):
        massed_K = list((scale * (split.teacher_mass_BK * split.within_BK).mean(0)).unbind())
    for part, plain, massed in zip(inside, plain_K, massed_K, strict=True):
        if part is not None:
            parts[part.name] = massed if part.shows_mass else plain
            total = torch.add(total, massed if part.by_mass else plain, alpha=part.weight)
    return LossOutput(total, parts)
