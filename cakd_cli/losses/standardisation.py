"""LSKD: Sun et al., Logit Standardization in Knowledge Distillation, arXiv 2403.01427, CVPR 2024.

In a recipe it is the setting ``standardise`` of any term on logits; here are the two compositions that the paper
reports.

Shape suffixes: B batch, C classes.
"""

from torch import Tensor

from cakd_cli.losses.base import LossOutput
from cakd_cli.losses.decoupled import dkd
from cakd_cli.losses.knowledge_distillation import kd
from cakd_cli.losses.logits import check_pair, standardise


def lskd_kd(student_BC: Tensor, teacher_BC: Tensor, *, temperature: float) -> LossOutput:
    """KD of z-scored logits; unchanged by a * z + b of either network for a > 0. The paper's temperature is 2."""
    check_pair(student_BC, teacher_BC, temperature)
    return kd(standardise(student_BC), standardise(teacher_BC), temperature=temperature)


def lskd_dkd(
    student_BC: Tensor, teacher_BC: Tensor, target_B: Tensor, *, temperature: float, alpha: float, beta: float
) -> LossOutput:
    """DKD of z-scored logits; the paper multiplies alpha and beta by 9."""
    check_pair(student_BC, teacher_BC, temperature)
    return dkd(
        standardise(student_BC), standardise(teacher_BC), target_B, temperature=temperature, alpha=alpha, beta=beta
    )
