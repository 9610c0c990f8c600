"""CMKD: Correlation Matching Knowledge Distillation, arXiv 2410.06561.

The abstract gives the parts: a Pearson and a Spearman correlation, weighed for each sample by its difficulty, with
z-scores before and differentiable ranks. The measure of difficulty and its direction, the temperature, epsilon and the
factor of the whole are not public: here they are settings, and their defaults are inferred.

Shape suffixes: B batch, C classes.
"""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from cakd_cli.losses.base import LogitTerm, LossOutput, Objectives
from cakd_cli.losses.logits import check_pair, check_target, pearson, soften, standardise
from cakd_cli.losses.ranks import soft_rank_correlation

Difficulty = Literal["entropy-rank", "entropy", "label", "confidence"]
Direction = Literal["ranks-for-hard", "ranks-for-easy", "even"]


def cmkd(
    student_BC: Tensor,
    teacher_BC: Tensor,
    target_B: Tensor,
    *,
    temperature: float = 2.0,
    epsilon: float | None = None,
    difficulty: Difficulty = "entropy-rank",
    direction: Direction = "ranks-for-hard",
) -> LossOutput:
    """``T^2 mean[(1 - w) (1 - pearson) + w (1 - spearman)]`` with w the difficulty of each sample.

    ``pearson`` correlates softmax(z-scored logits / T), ``spearman`` the soft ranks of the z-scored logits. A z-score
    changes no correlation by itself: it acts through the softmax and through epsilon. With w = 0 the loss is the inter
    term of DIST on z-scored logits.

    Inferred, because the text at hand does not say: T^2 and T = 2 on z-scored logits (as LSKD), epsilon, the measure of
    difficulty, and that ranks matter more for hard samples, whose tails are flat and whose values say less.

    Args:
        student_BC: Student logits, (batch, classes), any float type; computed in float32 at least.
        teacher_BC: Teacher logits, same shape; treated as constant.
        target_B: Class indices, used by the difficulty ``label``.
        temperature: Softening of the z-scored logits before Pearson, > 0.
        epsilon: Softness of ranks; 3 / classes by default. At about 10 / classes and above ranks are values again, and
            Spearman is Pearson.
        difficulty: See :func:`sample_difficulty`.
        direction: ``ranks-for-hard`` takes w as it is, ``ranks-for-easy`` 1 - w, ``even`` 0.5.

    Returns:
        ``total`` with the parts ``pearson`` and ``spearman`` (one minus the mean correlation, in [0, 2], unweighted)
        and ``difficulty``, the mean of w before its direction.

    Raises:
        ValueError: If shapes do not fit or a setting is out of range.
    """
    check_pair(student_BC, teacher_BC, temperature)
    if direction not in ("ranks-for-hard", "ranks-for-easy", "even"):
        raise ValueError(f"direction must be ranks-for-hard, ranks-for-easy or even, got {direction!r}")
    difficulty_B = sample_difficulty(teacher_BC, target_B, measure=difficulty)
    ranks_B = {"ranks-for-hard": difficulty_B, "ranks-for-easy": 1 - difficulty_B}.get(direction)
    if ranks_B is None:
        ranks_B = torch.full_like(difficulty_B, 0.5)
    student_BC, teacher_BC = standardise(student_BC), standardise(teacher_BC.detach())
    pearson_B = 1 - pearson((student_BC / temperature).softmax(1), (teacher_BC / temperature).softmax(1))
    spearman_B = 1 - soft_rank_correlation(student_BC, teacher_BC, epsilon=epsilon, zscore=False)
    total = temperature**2 * ((1 - ranks_B) * pearson_B + ranks_B * spearman_B).mean()
    return LossOutput(
        total, {"pearson": pearson_B.mean(), "spearman": spearman_B.mean(), "difficulty": difficulty_B.mean()}
    )


def sample_difficulty(teacher_BC: Tensor, target_B: Tensor, *, measure: Difficulty) -> Tensor:
    """How hard each sample is to the teacher, in [0, 1], (batch,), without gradient.

    ``entropy``: entropy of the teacher's probabilities at temperature 1 by log classes. ``entropy-rank``: its rank in
    the batch, from 0 for the smallest to 1 for the largest, 0.5 for a sample alone: of a confident teacher all
    entropies are near 0, and by themselves would leave ranks without weight. ``label``: 1 - p_label, high for a sample
    that the teacher gets wrong, however sure it is. ``confidence``: 1 - max p.

    Raises:
        ValueError: If the measure is unknown, or ``label`` is asked for and labels do not fit.
    """
    log_BC = soften(teacher_BC.detach(), 1.0).log_softmax(1)
    if measure in ("entropy", "entropy-rank"):
        entropy_B = -(log_BC.exp() * log_BC).sum(1)
        if measure == "entropy-rank":
            return _share_below(entropy_B)
        return (entropy_B / math.log(max(log_BC.shape[1], 2))).clamp(0, 1)
    if measure == "label":
        check_target(teacher_BC, target_B)
        return 1 - log_BC.gather(1, target_B.unsqueeze(1)).squeeze(1).exp()
    if measure == "confidence":
        return 1 - log_BC.amax(1).exp()
    raise ValueError(f"measure must be entropy-rank, entropy, label or confidence, got {measure!r}")


def _share_below(value_B: Tensor) -> Tensor:
    """Rank each value among all, in [0, 1]; equal values have one rank."""
    if len(value_B) == 1:
        return torch.full_like(value_B, 0.5)
    sign_BB = (value_B.unsqueeze(1) - value_B).sign()
    return (1 + sign_BB.sum(1) / (len(value_B) - 1)) / 2


class CMKDTerm(LogitTerm):
    """Pearson correlation for easy samples, Spearman for hard ones."""

    paper = "arXiv 2410.06561; measure and direction of the difficulty, T and epsilon are inferred"
    formula = "T^2 mean [(1 - w) (1 - rho(softmax(u_s / T), softmax(u_t / T))) + w (1 - rho(rank u_s, rank u_t))]"
    objectives: ClassVar[Objectives] = {"cmkd": ({"type": "cross-entropy"}, {"type": "cmkd", "weight": 2.0})}
    function = staticmethod(cmkd)
    of_labels = True

    type: Literal["cmkd"] = "cmkd"
    temperature: float = Field(2.0, gt=0, le=1000, description="softening of z-scored logits before Pearson")
    epsilon: float | None = Field(
        None, gt=0, description="softness of ranks of z-scored logits; by default 3 by the number of classes"
    )
    difficulty: Difficulty = Field(
        "entropy-rank",
        description="rank of the teacher's entropy in the batch, that entropy, 1 - p_label, or 1 - largest p",
    )
    direction: Direction = Field("ranks-for-hard", description="which samples weigh ranks more; even is the control")

    @property
    def takes_several_labels(self) -> bool:
        """Whether the difficulty does without the label."""
        return self.difficulty != "label"
