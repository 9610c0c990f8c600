"""NORM: Liu et al., NORM: Knowledge Distillation via N-to-One Representation Matching, arXiv 2305.13803.

No term of a recipe: :class:`ManyToOne` stands in the student between its last map and its pooling, where it is trained,
evaluated and saved with it. Both its layers are linear without an activation between them, so that they can be merged.

Shape suffixes: B batch, C classes, D channels of the teacher, N copies of them, H and W height and width; E = N * D.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from cakd_cli.losses.base import LossOutput
from cakd_cli.losses.features.maps import check_maps, precise
from cakd_cli.losses.knowledge_distillation import kd
from cakd_cli.losses.logits import soften
from cakd_cli.losses.supervised import cross_entropy

# Of beta1: epochs from 1 up to which it holds, for CIFAR-100 and for ImageNet.
_CIFAR = ((10, 0.1), (20, 0.5), (180, 1.0), (210, 0.5), (240, 0.1))
_IMAGENET = ((5, 0.1), (15, 0.5), (60, 0.9), (80, 0.5), (100, 0.1))


def norm(expanded_BEHW: Tensor, teacher_BDHW: Tensor, *, N: int, beta: float = 1.0, beta1: float = 1.0) -> LossOutput:
    """``beta1 * beta * norm``: N groups of the student's channels, each compared with the whole map of the teacher.

    Args:
        expanded_BEHW: The student's map in N times the teacher's channels, see :class:`ManyToOne`.
        teacher_BDHW: The teacher's last map, treated as constant; where it is larger by a whole number, the largest of
            every square is taken.
        N: Groups, >= 1; 8 in the official scripts.
        beta: Weight; 1 in the official scripts.
        beta1: Weight of the epoch, see :func:`norm_beta1`.

    Returns:
        ``total`` with the part ``norm``: the sum over the groups of the mean squared differences, unweighted.

    Raises:
        ValueError: If shapes do not fit or N is not positive.
    """
    check_maps(expanded_BEHW, teacher_BDHW)
    distance = _distance(expanded_BEHW, _largest(teacher_BDHW, expanded_BEHW), N)
    return LossOutput(beta1 * beta * distance, {"norm": distance})


def norm_imagenet(
    expanded: Sequence[Tensor], teachers: Sequence[Tensor], *, N: int, beta: float = 1.0, beta1: float = 1.0
) -> LossOutput:
    """The sum over several maps, as the official code has it for ImageNet: the student's map is the larger one.

    Args:
        expanded: Maps of the student in N times the teacher's channels, reduced as of :func:`norm` the teacher's.
        teachers: The teacher's; treated as constant.
        N: As of :func:`norm`; so are the other settings, the part and the errors.
        beta: Likewise.
        beta1: Likewise.
    """
    if not len(expanded) == len(teachers) > 0:
        raise ValueError(f"needs as many maps of both networks, got {len(expanded)} and {len(teachers)}")
    check_maps(*expanded, *teachers)
    pairs = zip(expanded, teachers, strict=True)
    distance = torch.stack([_distance(_largest(mine, theirs), theirs, N) for mine, theirs in pairs]).sum()
    return LossOutput(beta1 * beta * distance, {"norm": distance})


def norm_step(
    student_BC: Tensor,
    teacher_BC: Tensor,
    target_B: Tensor,
    expanded_BEHW: Tensor,
    teacher_BDHW: Tensor,
    *,
    N: int,
    beta: float = 1.0,
    beta1: float = 1.0,
    gamma: float = 0.5,
    alpha: float = 0.0,
    ceta: float = 2.5,
    kd_T: float = 4.0,
) -> LossOutput:
    """Whole objective: ``gamma * ce + alpha * kd + beta1 * beta * norm``.

    Both networks' logits are brought to mean 0 and deviation ``ceta`` over the classes first; so they are at test time.

    Args:
        student_BC: Student logits, (batch, classes), of :class:`ManyToOne`'s first result.
        teacher_BC: Teacher logits, same shape; treated as constant.
        target_B: Class indices.
        expanded_BEHW: As of :func:`norm`.
        teacher_BDHW: Likewise.
        N: Likewise.
        beta: Likewise.
        beta1: Likewise.
        gamma: Weight of cross-entropy; 0.0625 to 0.5 in the official scripts.
        alpha: Weight of KD; 0 in the official scripts.
        ceta: Deviation of the logits.
        kd_T: Temperature of KD.

    Returns:
        ``total`` with the parts ``norm``, ``ce`` and ``kd`` (times temperature squared), unweighted; the latter in
        nats.

    Raises:
        ValueError: If shapes do not fit or a setting is out of range.
    """
    matched = norm(expanded_BEHW, teacher_BDHW, N=N, beta=beta, beta1=beta1)
    student_BC, teacher_BC = ceta * _even(student_BC), ceta * _even(teacher_BC.detach())
    ce = cross_entropy(student_BC, target_B).total
    distilled = kd(student_BC, teacher_BC, temperature=kd_T).total
    return LossOutput(gamma * ce + alpha * distilled + matched.total, {**matched.parts, "ce": ce, "kd": distilled})


def norm_beta1(epoch: int, *, imagenet: bool = False) -> float:
    """Weight of an epoch, from 1, in 240 epochs of CIFAR-100 or 100 of ImageNet; the official code counts from 0.

    Raises:
        ValueError: If there is no such epoch.
    """
    spans = _IMAGENET if imagenet else _CIFAR
    if not 1 <= epoch <= spans[-1][0]:
        raise ValueError(f"epoch must be from 1 to {spans[-1][0]}, got {epoch}")
    return next(weight for last, weight in spans if epoch <= last)


def _even(logits_BC: Tensor) -> Tensor:
    """Layer norm without weights: biased variance, epsilon 1e-7."""
    logits_BC = soften(logits_BC, 1.0)
    # Squares of large logits would overflow: the size cancels.
    size_B1 = logits_BC.detach().abs().amax(1, keepdim=True).clamp(min=1)
    small_BC = logits_BC / size_B1
    variance_B1 = small_BC.var(1, correction=0, keepdim=True) + 1e-7 / size_B1 / size_B1
    return (small_BC - small_BC.mean(1, keepdim=True)) * variance_B1.rsqrt()


def _largest(map_BDHW: Tensor, other_BDHW: Tensor) -> Tensor:
    """Take the largest of every square of a map that is larger than the other by a whole number."""
    (height, width), size = map_BDHW.shape[2:], other_BDHW.shape[2:]
    ratio = height // size[0]
    if (ratio * size[0], ratio * size[1]) != (height, width):
        raise ValueError(f"a map of {height} x {width} is no whole multiple of one of {size[0]} x {size[1]}")
    return map_BDHW if ratio == 1 else functional.max_pool2d(map_BDHW, ratio)


def _distance(expanded_BEHW: Tensor, teacher_BDHW: Tensor, copies: int) -> Tensor:
    channels = teacher_BDHW.shape[1]
    if copies < 1 or expanded_BEHW.shape[1] != copies * channels:
        raise ValueError(f"needs N x {channels} channels, got {expanded_BEHW.shape[1]} and N = {copies}")
    groups_BNDHW: Tensor = precise(expanded_BEHW).unflatten(1, (copies, channels))
    difference_BNDHW = groups_BNDHW - precise(teacher_BDHW).detach().unsqueeze(1)
    return copies * difference_BNDHW.square().mean()


class ManyToOne(nn.Module):
    """Expands the student's last map to N times the teacher's channels, and adds what it brings back to the map.

    Each way a 1x1 convolution and batch norm, without activation. With N = 1 the official code leaves it out.

    Args:
        student_channels: Of the student's last map.
        teacher_channels: Of the teacher's.
        copies: N.

    Raises:
        ValueError: If ``copies`` < 1.
    """

    def __init__(self, student_channels: int, teacher_channels: int, copies: int = 8) -> None:
        super().__init__()
        if copies < 1:
            raise ValueError(f"copies must be at least 1, got {copies}")
        wide = copies * teacher_channels
        self.expand = nn.Sequential(nn.Conv2d(student_channels, wide, 1, bias=False), nn.BatchNorm2d(wide))
        self.reduce = nn.Sequential(nn.Conv2d(wide, student_channels, 1, bias=False), nn.BatchNorm2d(student_channels))

    def forward(self, map_BDHW: Tensor) -> tuple[Tensor, Tensor]:
        """Give the map that the student goes on with, and the expanded one."""
        expanded_BEHW = self.expand(map_BDHW)
        return map_BDHW + self.reduce(expanded_BEHW), expanded_BEHW
