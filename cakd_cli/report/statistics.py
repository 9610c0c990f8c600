"""Whether one method is better than another: pairs of runs with one seed, and what chance would do.

Plain numbers in, plain numbers out: seeds are few. The tests hold them to SciPy and statsmodels.
"""

import itertools
import math
import random
from collections.abc import Sequence
from statistics import NormalDist, fmean

# Up to here all 2^n signs, or all n^n resamples, are tried; beyond it so many that are drawn.
_MOST_SIGNS = 1 << 16
_MOST_RESAMPLES = 50_000
LEVEL = 0.05
# The bootstrap of few values promises more than it keeps. Of normal draws so many 95% intervals held the true mean:
# 79% of 400 at four values, 85% of 150 at six.
LEAST_FOR_INTERVAL = 6


def bca_interval(values: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float]:
    """Find a confidence interval of the mean: bias-corrected and accelerated bootstrap (Efron, 1987).

    Args:
        values: One a seed. With fewer than two, or all alike, the interval is their mean.
        confidence: In (0, 1).

    Returns:
        Its lower and upper end. All resamples are taken where there are at most 50,000 (six values), else 50,000 that
        are drawn, always the same ones.
    """
    if len(set(values)) < 2:
        return fmean(values), fmean(values)
    return bca_of_resamples(values, _resampled_means(values), confidence=confidence)


def bca_of_resamples(
    values: Sequence[float], resamples: Sequence[float], *, confidence: float = 0.95
) -> tuple[float, float]:
    """Find the interval of :func:`bca_interval` from the means of given resamples."""
    normal, mean = NormalDist(), fmean(values)
    below = sum(resample < mean for resample in resamples)
    upto = sum(resample <= mean for resample in resamples)
    bias = normal.inv_cdf((below + upto) / (2 * len(resamples)))
    # The influence of each value, from leaving it out.
    left_out = [(sum(values) - value) / (len(values) - 1) for value in values]
    influence = [fmean(left_out) - one for one in left_out]
    squares = sum(one**2 for one in influence)
    acceleration = sum(one**3 for one in influence) / (6 * squares**1.5)
    ordered, ends = sorted(resamples), []
    for tail in ((1 - confidence) / 2, (1 + confidence) / 2):
        shifted = bias + normal.inv_cdf(tail)
        ends.append(_quantile(ordered, normal.cdf(bias + shifted / (1 - acceleration * shifted))))
    return ends[0], ends[1]


def _resampled_means(values: Sequence[float]) -> list[float]:
    count = len(values)
    if count**count <= _MOST_RESAMPLES:
        return [fmean(resample) for resample in itertools.product(values, repeat=count)]
    draw = random.Random(0)
    return [fmean(draw.choices(values, k=count)) for _ in range(_MOST_RESAMPLES)]


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def sign_flip(differences: Sequence[float]) -> float:
    """Test whether paired differences are centred at 0, by flipping their signs: two-sided p.

    Exact up to 16 pairs; beyond that of 65,536 draws, the given signs among them.
    """
    count = len(differences)
    # Sums that differ by rounding alone are equal.
    bar = abs(sum(differences)) * (1 - 1e-12)
    if 2**count <= _MOST_SIGNS:
        signs = itertools.product((1, -1), repeat=count)
        return sum(abs(_signed(sign, differences)) >= bar for sign in signs) / float(2**count)
    draw = random.Random(0)
    drawn = (draw.choices((1, -1), k=count) for _ in range(_MOST_SIGNS - 1))
    return (1 + sum(abs(_signed(sign, differences)) >= bar for sign in drawn)) / _MOST_SIGNS


def _signed(signs: Sequence[int], differences: Sequence[float]) -> float:
    return sum(sign * difference for sign, difference in zip(signs, differences, strict=True))


def least_p(pairs: int) -> float:
    """The smallest p that :func:`sign_flip` can give for so many pairs."""
    return min(1.0, 2 / 2**pairs) if pairs else 1.0


def pairs_needed(comparisons: int) -> int:
    """The fewest pairs with which one of so many comparisons can be significant after Holm's correction."""
    return next(pairs for pairs in itertools.count(1) if comparisons * least_p(pairs) <= LEVEL)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values of several comparisons (Holm, 1979), in their order."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def mcnemar(only_first: int, only_second: int) -> float:
    """Test whether two networks are right on equally many images: exact two-sided p (McNemar, 1947).

    Args:
        only_first: Images that the first alone gets right.
        only_second: Images that the second alone gets right.
    """
    total, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(total, k) for k in range(fewer + 1))
    return min(1.0, _ratio_to_power(2 * tail, total))


def _ratio_to_power(numerator: int, power: int) -> float:
    """Divide by a power of two that no float may hold."""
    shift = max(0, numerator.bit_length() - 64)
    return math.ldexp(numerator >> shift, shift - power)


def verdict(differences: Sequence[float], p: float, *, comparisons: int) -> str:
    """Say what paired differences show: better, worse, or inconclusive and why.

    Args:
        differences: One a seed that both have; above 0 is better.
        p: After correction.
        comparisons: How many were made.
    """
    if p <= LEVEL:
        return "better" if fmean(differences) > 0 else "worse"
    needed = pairs_needed(comparisons)
    if len(differences) < needed:
        return f"inconclusive: {needed} seeds in common are needed"
    return "inconclusive"
