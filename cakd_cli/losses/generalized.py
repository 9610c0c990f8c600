"""GDKD: Generalized Decoupled Knowledge Distillation, arXiv 2512.04625, and the variants of its repository.

The classes are split by the teacher's own logits, whatever the label is: the k largest (u1) and the rest (u2).

Shape suffixes: B batch, C classes, K groups.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cakd_cli.losses import grouping
from cakd_cli.losses.base import Lesson, LossOutput, Objectives, SoftenedTerm
from cakd_cli.losses.decoupling import Decoupling, KLType, Part, decouple, two_groups, weigh
from cakd_cli.losses.logits import STANDARDISING_EPSILON, check_pair, soften, standardise
from cakd_cli.losses.weights import Weight

Strategy = Literal["best", "worst"]


def gdkd(
    student_BC: Tensor,
    teacher_BC: Tensor,
    *,
    k: int,
    temperature: float,
    w0: float,
    w1: float,
    w2: float,
    kl_type: KLType = "forward",
    strategy: Strategy = "best",
) -> LossOutput:
    """``w0 * high + w1 * low_top + w2 * low_other``: top against rest, inside the top, inside the rest.

    Equal to DKD(alpha=w0, beta=w2) for k = 1 where the teacher is right, and to CAKD(S = top-k, alpha=w1, beta=w2) for
    w0 = 1. With k >= classes the rest is empty: ``high`` and ``low_other`` are 0, where the official code gives NaN.

    Args:
        student_BC: Student logits, (batch, classes), any float type; computed in float32 at least.
        teacher_BC: Teacher logits, same shape; treated as constant.
        k: Classes at the top, >= 1; 5 in the paper.
        temperature: Softening, > 0.
        w0: Weight of ``high``.
        w1: Weight of ``low_top``.
        w2: Weight of ``low_other``.
        kl_type: Of ``low_top`` and ``low_other``: forward KL(teacher || student), reverse, or the mean of both.
        strategy: ``best`` takes the k largest logits, ``worst`` the k smallest.

    Returns:
        ``total`` with the parts ``high``, ``low_top``, ``low_other``: unweighted, batch means, times temperature
        squared, in nats.

    Raises:
        ValueError: If shapes do not fit or a setting is out of range.
    """
    split = _split(student_BC, teacher_BC, _top(teacher_BC, k, strategy), temperature, kl_type)
    return weigh(split, temperature, *_parts(w0, w1, w2))


def gdkd3(
    student_BC: Tensor, teacher_BC: Tensor, *, k: int, temperature: float, w0: float, w1: float, w2: float
) -> LossOutput:
    """GDKD with three groups: the top class, the 2nd to k-th, the rest; ``high`` is over their three masses.

    ``low_top`` is inside the middle group. k = 1 leaves it, and k >= classes the rest, empty: their parts are 0, where
    the official code gives NaN. Arguments, parts and errors otherwise as of :func:`gdkd`.
    """
    check_pair(student_BC, teacher_BC, temperature)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    order_BK = teacher_BC.topk(min(k, teacher_BC.shape[1]), dim=1).indices
    place_BK = torch.ones_like(order_BK).index_fill_(1, order_BK.new_zeros(1), 0)
    group_BC = torch.full(teacher_BC.shape, 2, device=teacher_BC.device).scatter_(1, order_BK, place_BK)
    split = decouple(student_BC, teacher_BC, group_BC, num_groups=3, temperature=temperature)
    high, inside = _parts(w0, w1, w2)
    return weigh(split, temperature, high, (None, *inside))


def gdkd_auto_w(
    student_BC: Tensor,
    teacher_BC: Tensor,
    *,
    mode: Literal["v1", "v2", "v3"],
    k: int,
    temperature: float,
    m1: float = 1.0,
    m2: float = 1.0,
    w1: float = 1.0,
    w2: float = 1.0,
) -> LossOutput:
    """GDKD whose inner parts are weighed by the teacher's mass of their group in each sample.

    ``v1``: high + m1 * low_top + m2 * low_other, both parts with the mass; exactly KD at m1 = m2 = 1.
    ``v2``: as v1, but ``low_top`` without the mass, with weight w1.
    ``v3``: as v1, but ``low_other`` without the mass, with weight w2.

    Args:
        student_BC: As of :func:`gdkd`.
        teacher_BC: Likewise.
        mode: See above.
        k: As of :func:`gdkd`.
        temperature: Likewise.
        m1: Weight of ``low_top`` where it has the mass.
        m2: Weight of ``low_other`` where it has the mass.
        w1: Weight of ``low_top`` where it has not.
        w2: Weight of ``low_other`` where it has not.

    Returns:
        ``total`` with the parts ``high``, ``low_top``, ``low_other`` (batch means with the mass where the mode says so,
        times temperature squared, nats) and the mean masses ``b_top_mean`` and ``b_other_mean``.

    Raises:
        ValueError: If shapes do not fit or a setting is out of range.
    """
    if mode not in ("v1", "v2", "v3"):
        raise ValueError(f"mode must be v1, v2 or v3, got {mode!r}")
    split = _split(student_BC, teacher_BC, _top(teacher_BC, k, "best"), temperature, "forward")
    inside = (
        Part("low_top", w1) if mode == "v2" else Part("low_top", m1, by_mass=True, shows_mass=True),
        Part("low_other", w2) if mode == "v3" else Part("low_other", m2, by_mass=True, shows_mass=True),
    )
    output = weigh(split, temperature, Part("high"), inside)
    masses = split.teacher_mass_BK.mean(0)
    return LossOutput(output.total, output.parts | {"b_top_mean": masses[0], "b_other_mean": masses[1]})


def gdkd_auto_k(
    student_BC: Tensor,
    teacher_BC: Tensor,
    *,
    temperature: float,
    w0: float,
    w1: float,
    w2: float,
    topk_cap: int = 100,
    ratio_threshold: float = 2.0,
    kl_type: KLType = "forward",
) -> LossOutput:
    """GDKD with a k of each sample's own: how many classes stand out in the teacher's answer (grouping.auto_k).

    Arguments, parts and errors otherwise as of :func:`gdkd`.
    """
    check_pair(student_BC, teacher_BC, temperature)
    k_B = grouping.auto_k(teacher_BC, ratio_threshold=ratio_threshold, topk_cap=topk_cap, temperature=temperature)
    split = _split(student_BC, teacher_BC, grouping.ranked_below(teacher_BC, k_B), temperature, kl_type)
    return weigh(split, temperature, *_parts(w0, w1, w2))


def ls_gdkd(
    student_BC: Tensor,
    teacher_BC: Tensor,
    *,
    norm_mode: Literal["global", "both", "other"] = "global",
    k: int,
    temperature: float,
    w0: float,
    w1: float,
    w2: float,
    kl_type: KLType = "forward",
    strategy: Strategy = "best",
) -> LossOutput:
    """GDKD on standardised logits (LS_GDKD of the GDKD repository).

    ``global``: all logits are z-scored first. ``both``: ``high`` is of the raw logits, and the logits of each group are
    z-scored by themselves for its inner part, with the biased deviation. ``other``: so is the rest alone.

    Returns:
        ``total`` with the parts of :func:`gdkd` and the batch means of what was subtracted and divided by:
        ``mean_`` and ``std_`` of ``student`` and ``teacher``, for the inner modes with ``_top`` and ``_other``.

    Raises:
        ValueError: If shapes do not fit or a setting is out of range.
    """
    if norm_mode not in ("global", "both", "other"):
        raise ValueError(f"norm_mode must be global, both or other, got {norm_mode!r}")
    top_BC = _top(teacher_BC, k, strategy)
    check_pair(student_BC, teacher_BC, temperature)
    raw = logits = {"student": student_BC, "teacher": teacher_BC.detach()}
    facts: dict[str, Tensor] = {}
    if norm_mode == "global":
        for name, logits_BC in raw.items():
            precise_BC = soften(logits_BC, 1.0)
            facts |= {f"mean_{name}": precise_BC.mean(1).mean(), f"std_{name}": precise_BC.std(1).mean()}
        logits = {name: standardise(logits_BC) for name, logits_BC in raw.items()}
    else:
        logits = dict(raw)
        groups = {"top": top_BC, "other": ~top_BC}
        for group in ("top", "other") if norm_mode == "both" else ("other",):
            for name in logits:
                logits[name], mean_B, std_B = _standardise_inside(logits[name], groups[group])
                facts |= {f"mean_{name}_{group}": mean_B.mean(), f"std_{name}_{group}": std_B.mean()}
    split = _split(logits["student"], logits["teacher"], top_BC, temperature, kl_type)
    if norm_mode != "global":
        between_B1 = _split(raw["student"], raw["teacher"], top_BC, temperature, kl_type).parts_BJ[:, :1]
        split = replace(split, parts_BJ=torch.cat([between_B1, split.within_BK], 1))
    output = weigh(split, temperature, *_parts(w0, w1, w2))
    return LossOutput(output.total, output.parts | facts)


def _split(student_BC: Tensor, teacher_BC: Tensor, top_BC: Tensor, temperature: float, kl_type: KLType) -> Decoupling:
    return decouple(student_BC, teacher_BC, two_groups(top_BC), num_groups=2, temperature=temperature, kl_type=kl_type)


def _standardise_inside(logits_BC: Tensor, member_BC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Z-score the members of a group by themselves and leave the others; mean and biased deviation of each sample."""
    logits_BC = soften(logits_BC, 1.0)
    count_B1 = member_BC.sum(1, keepdim=True).clamp(min=1)
    mean_B1 = torch.where(member_BC, logits_BC, 0).sum(1, keepdim=True) / count_B1
    centred_BC = torch.where(member_BC, logits_BC - mean_B1, 0)
    variance_B1 = centred_BC.square().sum(1, keepdim=True) / count_B1
    # The root has no gradient at 0, where all members are equal.
    std_B1 = torch.where(variance_B1 > 0, variance_B1, 1).sqrt() * (variance_B1 > 0)
    scored_BC = torch.where(member_BC, centred_BC / (std_B1 + STANDARDISING_EPSILON), logits_BC)
    return scored_BC, mean_B1.squeeze(1), std_B1.squeeze(1)


def _top(teacher_BC: Tensor, k: int, strategy: Strategy) -> Tensor:
    if strategy not in ("best", "worst"):
        raise ValueError(f"strategy must be best or worst, got {strategy!r}")
    return grouping.top_k(teacher_BC if strategy == "best" else -teacher_BC, k)


def _parts(w0: float, w1: float, w2: float) -> tuple[Part, tuple[Part, Part]]:
    return Part("high", w0), (Part("low_top", w1), Part("low_other", w2))


class _GeneralizedTerm(SoftenedTerm):
    paper = "arXiv 2512.04625 (IEEE TNNLS 2026)"
    weighs: ClassVar[Mapping[str, str]] = {"w0": "high", "w1": "low_top", "w2": "low_other"}

    w0: Weight = Field(1.0, description="weight of high, top against rest")
    w1: Weight = Field(1.0, description="weight of low_top, inside the top")
    w2: Weight = Field(8.0, description="weight of low_other, inside the rest")


class GDKDTerm(_GeneralizedTerm):
    """The teacher's top k logits and the rest, weighted freely."""

    formula = "w0 T^2 mean KL(b) + w1 T^2 mean KL(top k) + w2 T^2 mean KL(rest),  b = masses of top k and rest"
    # Defaults of the official cfg.py; 20 of 240 epochs of warm-up.
    objectives: ClassVar[Objectives] = {
        "gdkd": ({"type": "cross-entropy"}, {"type": "gdkd", "warmup_epochs": "auto"}),
        "ls-gdkd": (
            {"type": "cross-entropy"},
            {"type": "gdkd", "warmup_epochs": "auto", "standardise": True},
        ),
    }

    summaries: ClassVar[Mapping[str, str]] = {"ls-gdkd": "GDKD of z-scored logits (LS_GDKD of its repository)."}
    function = staticmethod(gdkd)

    type: Literal["gdkd"] = "gdkd"
    k: int = Field(5, ge=1, description="classes at the top")
    kl_type: KLType = Field("forward", description="direction of the KL inside the groups")
    strategy: Strategy = Field("best", description="the k largest logits, or the k smallest")
    standardise: bool | Literal["both", "other"] = Field(  # type: ignore[assignment]
        False, description="z-score all logits first; or those of both groups, or of the rest, for their inner part"
    )

    def __call__(self, lesson: Lesson, module: nn.Module | None = None) -> LossOutput:
        if not self.standardise:
            return super().__call__(lesson, module)
        assert lesson.teacher_BC is not None
        mode = "global" if self.standardise is True else self.standardise
        output = ls_gdkd(lesson.student_BC, lesson.teacher_BC, norm_mode=mode, **self.settings())
        # What was subtracted and divided by is no part of the loss.
        return LossOutput(output.total, {name: output.parts[name] for name in self.weighs.values()})


class GDKD3Term(_GeneralizedTerm):
    """GDKD of three groups: the top class, the 2nd to k-th, the rest."""

    formula = "w0 T^2 mean KL(b) + w1 T^2 mean KL(2nd to k-th) + w2 T^2 mean KL(rest),  b = three masses"
    objectives: ClassVar[Objectives] = {
        "gdkd3": ({"type": "cross-entropy"}, {"type": "gdkd3", "warmup_epochs": "auto"})
    }
    function = staticmethod(gdkd3)

    type: Literal["gdkd3"] = "gdkd3"
    k: int = Field(4, ge=1, description="classes in the first two groups")


class GDKDAutoKTerm(_GeneralizedTerm):
    """GDKD whose k is how many classes stand out in each sample."""

    formula = "as gdkd; k = number of classes from the first p_j >= ratio_threshold mean(p_1..p_j), p ascending"
    objectives: ClassVar[Objectives] = {
        "gdkd-auto-k": ({"type": "cross-entropy"}, {"type": "gdkd-auto-k", "warmup_epochs": "auto"})
    }
    function = staticmethod(gdkd_auto_k)

    type: Literal["gdkd-auto-k"] = "gdkd-auto-k"
    # Of its repository's configuration, which are not GDKD's.
    w1: Weight = Field(4.0, description="weight of low_top, inside the top")
    topk_cap: int = Field(100, ge=1, description="most classes at the top")
    ratio_threshold: float = Field(2.0, gt=0, description="by how much a class must exceed the mean of those below it")
    kl_type: KLType = Field("forward", description="direction of the KL inside the groups")


class GDKDAutoWTerm(SoftenedTerm):
    """GDKD whose inner parts weigh by the teacher's mass of each."""

    paper = "arXiv 2512.04625 (IEEE TNNLS 2026), its repository's GDKDAutoW"
    formula = "T^2 mean (KL(b) + m1 b_top KL(top k) + m2 b_rest KL(rest));  v2: w1 for m1 b_top;  v3: w2 for m2 b_rest"
    # m1 and m2 are those of ResNet32x4 -> ResNet8x4.
    objectives: ClassVar[Objectives] = {
        "gdkd-auto-w": ({"type": "cross-entropy"}, {"type": "gdkd-auto-w", "warmup_epochs": "auto"}),
        "gdkd-auto-w-v3": ({"type": "cross-entropy"}, {"type": "gdkd-auto-w", "mode": "v3", "warmup_epochs": "auto"}),
    }
    summaries: ClassVar[Mapping[str, str]] = {
        "gdkd-auto-w-v3": "GDKD whose part inside the top weighs by the teacher's mass of it."
    }
    function = staticmethod(gdkd_auto_w)

    type: Literal["gdkd-auto-w"] = "gdkd-auto-w"
    mode: Literal["v1", "v2", "v3"] = Field("v1", description="which parts have the mass: both, the rest's, the top's")
    k: int = Field(5, ge=1, description="classes at the top")
    m1: Weight = Field(6.0, description="weight of low_top where it has the mass")
    m2: Weight = Field(14.0, description="weight of low_other where it has the mass")
    w1: Weight = Field(1.0, description="weight of low_top in v2")
    w2: Weight = Field(8.0, description="weight of low_other in v3")
