"""What a student learns from: pure functions of tensors, usable without the rest of cakd.

A loss returns a :class:`LossOutput`; the options class beside it is the method's place in a recipe. The functions whose
names are here are public, also those that no recipe runs.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_args

from pydantic import Field

from cakd_cli.losses.base import Lesson, LogitTerm, Look, LossOutput, Needs, Shapes, Term
from cakd_cli.losses.correlation_aware import CAKDTerm, cakd
from cakd_cli.losses.correlation_matching import CMKDTerm, cmkd, sample_difficulty
from cakd_cli.losses.curriculum import CTKDTerm, ctkd
from cakd_cli.losses.decoupled import DKDTerm, dkd, dkd_mod
from cakd_cli.losses.decoupling import Decoupling, decouple
from cakd_cli.losses.features.correlation_aware import CAKDFeaturesTerm
from cakd_cli.losses.features.fitnet import FitNetTerm, fitnet
from cakd_cli.losses.generalized import (
    GDKD3Term,
    GDKDAutoKTerm,
    GDKDAutoWTerm,
    GDKDTerm,
    gdkd,
    gdkd3,
    gdkd_auto_k,
    gdkd_auto_w,
    ls_gdkd,
)
from cakd_cli.losses.knowledge_distillation import (
    JensenShannonTerm,
    KDTerm,
    LogitMSETerm,
    ReverseKLTerm,
    jensen_shannon,
    kd,
    logit_mse,
    reverse_kl,
)
from cakd_cli.losses.logits import pearson, standardise
from cakd_cli.losses.multi_level import (
    MLKDTerm,
    mlkd_batch_correlation,
    mlkd_class_correlation,
    mlkd_instance_kd,
    mlkd_single_view,
    mlkd_step,
)
from cakd_cli.losses.normalized import NKDTerm, nkd
from cakd_cli.losses.ranks import hard_rank, hard_spearman, soft_rank, soft_spearman
from cakd_cli.losses.relational import DISTTerm, dist
from cakd_cli.losses.standardisation import lskd_dkd, lskd_kd
from cakd_cli.losses.supervised import CrossEntropyTerm, cross_entropy
from cakd_cli.losses.weights import Weights

LossOptions = Annotated[
    CrossEntropyTerm
    | KDTerm
    | ReverseKLTerm
    | JensenShannonTerm
    | LogitMSETerm
    | DKDTerm
    | CAKDTerm
    | CAKDFeaturesTerm
    | GDKDTerm
    | GDKD3Term
    | GDKDAutoKTerm
    | GDKDAutoWTerm
    | CMKDTerm
    | DISTTerm
    | NKDTerm
    | CTKDTerm
    | MLKDTerm
    | FitNetTerm,
    Field(discriminator="type"),
]

# The union is the registry.
TERMS: tuple[type[Term], ...] = get_args(get_args(LossOptions)[0])


def objectives() -> dict[str, Sequence[Mapping[str, Any]]]:
    """Whole training objectives by method, as published: what ``--loss NAME`` stands for."""
    return {name: entries for term in TERMS for name, entries in term.objectives.items()}


__all__ = [
    "TERMS",
    "CAKDFeaturesTerm",
    "CAKDTerm",
    "CMKDTerm",
    "CTKDTerm",
    "CrossEntropyTerm",
    "DISTTerm",
    "DKDTerm",
    "Decoupling",
    "FitNetTerm",
    "GDKD3Term",
    "GDKDAutoKTerm",
    "GDKDAutoWTerm",
    "GDKDTerm",
    "JensenShannonTerm",
    "KDTerm",
    "Lesson",
    "LogitMSETerm",
    "LogitTerm",
    "Look",
    "LossOptions",
    "LossOutput",
    "MLKDTerm",
    "NKDTerm",
    "Needs",
    "ReverseKLTerm",
    "Shapes",
    "Term",
    "Weights",
    "cakd",
    "cmkd",
    "cross_entropy",
    "ctkd",
    "decouple",
    "dist",
    "dkd",
    "dkd_mod",
    "fitnet",
    "gdkd",
    "gdkd3",
    "gdkd_auto_k",
    "gdkd_auto_w",
    "hard_rank",
    "hard_spearman",
    "jensen_shannon",
    "kd",
    "logit_mse",
    "ls_gdkd",
    "lskd_dkd",
    "lskd_kd",
    "mlkd_batch_correlation",
    "mlkd_class_correlation",
    "mlkd_instance_kd",
    "mlkd_single_view",
    "mlkd_step",
    "nkd",
    "objectives",
    "pearson",
    "reverse_kl",
    "sample_difficulty",
    "soft_rank",
    "soft_spearman",
    "standardise",
]
