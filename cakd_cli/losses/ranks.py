"""Ranks of logits: differentiable ones, and the correlation of ranks (Spearman).

Shape suffixes: B batch, C classes, R rows at a time.
"""

import torch
from torch import Tensor

from cakd_cli.losses.base import LossOutput
from cakd_cli.losses.logits import check_pair, pearson, soften, standardise

# Elements of the largest intermediate tensor, 64 MB in float32, up to 4,096 classes; a row alone may need more.
_MOST_ELEMENTS = 2**24


def soft_rank(values_BC: Tensor, *, epsilon: float) -> Tensor:
    """Differentiable ranks of each row, the smallest value first (Blondel et al., arXiv 2002.08871, l2).

    The Euclidean projection of values / epsilon on the permutahedron of (1..classes). How soft depends on the spread of
    values / epsilon beside the number of classes. Where it is small, everything is one block and the result is
    values / epsilon shifted: its Pearson correlation is that of the values, no rank at all. Where it is large,
    every block has one member: hard ranks, whose gradient is 0. For z-scored logits 3 / classes lies between.

    Args:
        values_BC: (batch, classes); computed in float32 at least.
        epsilon: > 0; small is hard.

    Returns:
        Ranks in [1, classes], summing to classes (classes + 1) / 2 in each row; equal values have equal ranks.

    Raises:
        ValueError: If the shape does not fit or ``epsilon`` is not positive.
    """
    if values_BC.ndim != 2:
        raise ValueError(f"values must be of shape (batch, classes), got {tuple(values_BC.shape)}")
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, got {epsilon}")
    descending_BC, order_BC = soften(values_BC, epsilon).sort(dim=1, descending=True)
    num_classes = values_BC.shape[1]
    place_C = torch.arange(num_classes, 0, -1, device=values_BC.device, dtype=descending_BC.dtype)
    block_BC = _blocks(descending_BC.detach() - place_C)
    # Inside a block: its mean rank, and by how much a value differs from the block's mean value.
    sorted_ranks_BC = _block_means(place_C.expand_as(descending_BC), block_BC)
    deviation_BC = descending_BC - _block_means(descending_BC, block_BC)
    return torch.zeros_like(descending_BC).scatter(1, order_BC, sorted_ranks_BC + deviation_BC)


def _blocks(values_BC: Tensor) -> Tensor:
    """Number the blocks of the decreasing isotonic regression of each row, from 0.

    The first block ends where the mean from its start is largest, and so on from its end. All ends are found at once,
    for every start, and followed from the first by doubling: no loop waits for a result.
    """
    batch, num_classes = values_BC.shape
    rows = max(1, _MOST_ELEMENTS // num_classes**2)
    # Small numbers have small rounding errors: any line through the values has the same blocks.
    centred_BC = values_BC - values_BC.mean(1, keepdim=True)
    after_BC = torch.cat([_block_ends(part_RC) + 1 for part_RC in centred_BC.split(rows)])
    # One more place, the end, which is its own successor.
    end_B1 = after_BC.new_full((batch, 1), num_classes)
    after_BC = torch.cat([after_BC, end_B1], dim=1)
    start_BC = torch.zeros_like(after_BC)
    start_BC[:, 0] = 1
    for _ in range(num_classes.bit_length()):
        # From 2^n starts to 2^(n + 1).
        start_BC = start_BC.scatter_reduce(1, after_BC, start_BC, "amax")
        after_BC = after_BC.gather(1, after_BC)
    block_BC = start_BC[:, :-1].cumsum(1) - 1
    # Neighbours that are equal but for rounding are one block: the gradient of ties would depend on it.
    means_BC = _block_means(centred_BC, block_BC)
    rounding_B1 = 16 * torch.finfo(means_BC.dtype).eps * values_BC.abs().amax(1, keepdim=True)
    return (means_BC.diff(dim=1, prepend=means_BC[:, :1]).abs() > rounding_B1).cumsum(1)


def _block_ends(values_RC: Tensor) -> Tensor:
    """Last member of the block that would begin at each place."""
    num_classes = values_RC.shape[1]
    sums_RC = values_RC.cumsum(1)
    before_RC = sums_RC - values_RC
    place_C = torch.arange(num_classes, device=values_RC.device, dtype=values_RC.dtype)
    length_CC = place_C - place_C.unsqueeze(1) + 1
    nowhere_CC = torch.where(length_CC < 1, -torch.inf, 0).to(values_RC.dtype)
    # One pass over the largest tensor does both, the division and the mask.
    sum_RCC = sums_RC.unsqueeze(1) - before_RC.unsqueeze(2)
    return torch.addcmul(nowhere_CC, sum_RCC, length_CC.clamp(min=1).reciprocal()).argmax(2)


def _block_means(values_BC: Tensor, block_BC: Tensor) -> Tensor:
    sums_BC = torch.zeros_like(values_BC).scatter_add(1, block_BC, values_BC)
    counts_BC = torch.zeros_like(values_BC).scatter_add_(1, block_BC, torch.ones_like(values_BC))
    return (sums_BC / counts_BC.clamp(min=1)).gather(1, block_BC)


def hard_rank(values_BC: Tensor) -> Tensor:
    """Ranks of each row from 1, the smallest value first; equal values share the mean of their ranks."""
    values_BC = values_BC.contiguous()
    ascending_BC = values_BC.sort(dim=1).values
    below_BC = torch.searchsorted(ascending_BC, values_BC)
    up_to_BC = torch.searchsorted(ascending_BC, values_BC, right=True)
    return (below_BC + up_to_BC + 1).to(values_BC.dtype) / 2


def soft_spearman(
    student_BC: Tensor, teacher_BC: Tensor, *, epsilon: float | None = None, zscore: bool = True
) -> LossOutput:
    """One minus the mean correlation of soft ranks, in [0, 2].

    Args:
        student_BC: Student logits, (batch, classes).
        teacher_BC: Teacher logits, same shape; treated as constant.
        epsilon: Of :func:`soft_rank`; 3 / classes by default.
        zscore: Standardise both logits first, so that ``epsilon`` means the same for every sample.

    Returns:
        ``total`` with the part ``one_minus_rho``.

    Raises:
        ValueError: If shapes do not fit or ``epsilon`` is not positive.
    """
    total = (1 - soft_rank_correlation(student_BC, teacher_BC, epsilon=epsilon, zscore=zscore)).mean()
    return LossOutput(total, {"one_minus_rho": total})


def soft_rank_correlation(
    student_BC: Tensor, teacher_BC: Tensor, *, epsilon: float | None, zscore: bool = True
) -> Tensor:
    """Correlation of the soft ranks of each sample, (batch,); arguments as of :func:`soft_spearman`."""
    check_pair(student_BC, teacher_BC, 1.0)
    epsilon = 3 / student_BC.shape[1] if epsilon is None else epsilon
    # Both at once: their rows do not know of each other.
    both_BC = torch.cat([soften(student_BC, 1.0), soften(teacher_BC.detach(), 1.0)])
    student_ranks_BC, teacher_ranks_BC = soft_rank(standardise(both_BC) if zscore else both_BC, epsilon=epsilon).chunk(
        2
    )
    return pearson(student_ranks_BC, teacher_ranks_BC)


def hard_spearman(student_BC: Tensor, teacher_BC: Tensor) -> Tensor:
    """Spearman correlation of each sample's logits, (batch,), in [-1, 1]; it has no gradient.

    Raises:
        ValueError: If shapes do not fit.
    """
    check_pair(student_BC, teacher_BC, 1.0)
    return pearson(hard_rank(soften(student_BC.detach(), 1.0)), hard_rank(soften(teacher_BC.detach(), 1.0)))
