"""CRLD: Zhang et al., Cross-View Consistency Regularisation for Knowledge Distillation, arXiv 2412.16493.

Shape suffixes: B batch, C classes.
"""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from cakd_cli.losses.base import Lesson, LossOutput, Needs, Objectives, SoftenedTerm
from cakd_cli.losses.logits import check_pair, kl, soften
from cakd_cli.losses.supervised import cross_entropy
from cakd_cli.losses.weights import Weight


def crld_step(
    student_BC: Tensor,
    teacher_BC: Tensor,
    target_B: Tensor,
    student_strong_BC: Tensor,
    teacher_strong_BC: Tensor,
    *,
    temperature: float,
    ce_weight: float = 1.0,
    wv_weight: float = 2.0,
    cv_weight: float = 0.5,
    tau_w: float = 0.9,
    tau_s: float = 0.2,
) -> LossOutput:
    """Whole objective on two views: the student of each learns from the teacher of both, where the teacher is sure.

    With K(a, b) = T^2 KL(teacher of view b || student of view a) of each sample,
    ``wv_weight * mean m_w (K(w, w) + K(s, s)) + cv_weight * mean m_s (K(s, w) + K(w, s))``. The masks tell where the
    teacher's largest probability at temperature 1 reaches ``tau_w`` on the weak view and ``tau_s`` on the strong one.
    Samples that are left out count in the means, as 0.

    Args:
        student_BC: Student logits of the weak view, (batch, classes), any float type; computed in float32 at least.
        teacher_BC: Teacher logits of the weak view; treated as constant.
        target_B: Class indices.
        student_strong_BC: Student logits of the strong view.
        teacher_strong_BC: Teacher logits of the strong view; treated as constant.
        temperature: Softening, > 0; the paper uses 4 on CIFAR-100.
        ce_weight: Weight of the sum of both views' cross-entropies.
        wv_weight: Weight within the views.
        cv_weight: Weight across them.
        tau_w: Least probability on the weak view, in [0, 1].
        tau_s: Least probability on the strong view, in [0, 1].

    Returns:
        ``total`` with the parts ``loss_ce``, ``loss_kd`` and the two that it is the sum of, ``loss_kd_wv`` and
        ``loss_kd_cv``: all weighted, batch means, in nats.

    Raises:
        ValueError: If shapes do not fit or the temperature is not positive.
    """
    weak, strong = (student_BC, teacher_BC), (student_strong_BC, teacher_strong_BC)
    within, across = _of_both_views(weak, strong, temperature, (tau_w, tau_s))
    within, across = wv_weight * within, cv_weight * across
    loss_ce = ce_weight * (cross_entropy(student_BC, target_B).total + cross_entropy(student_strong_BC, target_B).total)
    loss_kd = within + across
    parts = {"loss_ce": loss_ce, "loss_kd": loss_kd, "loss_kd_wv": within, "loss_kd_cv": across}
    return LossOutput(loss_ce + loss_kd, parts)


def _of_both_views(
    weak: tuple[Tensor, Tensor], strong: tuple[Tensor, Tensor], temperature: float, taus: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Distil within the views and across them, unweighted; of each view the student's logits and the teacher's."""
    (student_BC, teacher_BC), (student_strong_BC, teacher_strong_BC) = weak, strong
    for logits_BC in (teacher_BC, student_strong_BC, teacher_strong_BC):
        check_pair(student_BC, logits_BC, temperature)
    weak_B, strong_B = _sure(teacher_BC, taus[0]), _sure(teacher_strong_BC, taus[1])
    within_B = kl(student_BC, teacher_BC, temperature) + kl(student_strong_BC, teacher_strong_BC, temperature)
    across_B = kl(student_strong_BC, teacher_BC, temperature) + kl(student_BC, teacher_strong_BC, temperature)
    return temperature**2 * (weak_B * within_B).mean(), temperature**2 * (strong_B * across_B).mean()


def _sure(teacher_BC: Tensor, least: float) -> Tensor:
    """Where the teacher's largest probability reaches a bound: bool, (batch,)."""
    return soften(teacher_BC.detach(), 1.0).softmax(1).amax(1) >= least


class CRLDTerm(SoftenedTerm):
    """The teacher of each view for the student of both, where the teacher is sure."""

    paper = "Zhang et al. 2024, arXiv 2412.16493"
    formula = "wv mean m_w T^2 (K(w, w) + K(s, s)) + cv mean m_s T^2 (K(s, w) + K(w, s)),  m = [max p_teacher >= tau]"
    objectives: ClassVar[Objectives] = {"crld": ({"type": "cross-entropy", "second_view": True}, {"type": "crld"})}

    type: Literal["crld"] = "crld"
    wv_weight: Weight = Field(2.0, description="weight within the views")
    cv_weight: Weight = Field(0.5, description="weight across them")
    tau_w: float = Field(0.9, ge=0, le=1, description="least of the teacher's largest probability, weak view")
    tau_s: float = Field(0.2, ge=0, le=1, description="least of the teacher's largest probability, strong view")

    @property
    def needs(self) -> Needs:
        """Both views."""
        return Needs(second_view=True)

    def __call__(self, lesson: Lesson, module: nn.Module | None = None) -> LossOutput:
        settings = self.settings()
        within, across = _of_both_views(*self._views(lesson), self.temperature, (self.tau_w, self.tau_s))
        wv, cv = settings["wv_weight"] * within, settings["cv_weight"] * across
        return LossOutput(wv + cv, {"wv": wv, "cv": cv})
