"""What a student learns from: pure functions of tensors, usable without the rest of cakd.

A loss returns a :class:`LossOutput`; the options class beside it is the method's place in a recipe. The functions whose
names are here are public, also those that no recipe runs.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_args

from pydantic import Field

from cakd_cli.losses.alpha_beta import ABDivergenceTerm, ab
from cakd_cli.losses.base import Lesson, LogitTerm, Look, LossOutput, Needs, Shapes, Term
from cakd_cli.losses.correlation_aware import CAKDTerm, cakd
from cakd_cli.losses.correlation_matching import CMKDTerm, cmkd, sample_difficulty
from cakd_cli.losses.cross_view import CRLDTerm, crld_step
from cakd_cli.losses.curriculum import CTKDTerm, ctkd
from cakd_cli.losses.decoupled import DKDTerm, dkd, dkd_mod
from cakd_cli.losses.decoupled_kl import GKLTerm, IKLTerm, gkl, ikl
from cakd_cli.losses.decoupling import Decoupling, decouple, two_groups
from cakd_cli.losses.features.activation_boundaries import ABTerm, activation_boundaries
from cakd_cli.losses.features.attention import ATTerm, at
from cakd_cli.losses.features.class_attention import CATKDTerm, cat_kd
from cakd_cli.losses.features.contrastive import CRDTerm, crd
from cakd_cli.losses.features.correlation_aware import CAKDFeaturesTerm
from cakd_cli.losses.features.correlation_congruence import CCTerm, cc
from cakd_cli.losses.features.cross_layer import SemCKDTerm, sem_ckd
from cakd_cli.losses.features.dense_relational import dist_dense
from cakd_cli.losses.features.factor_transfer import ft
from cakd_cli.losses.features.fitnet import FitNetTerm, fitnet
from cakd_cli.losses.features.many_to_one import norm, norm_imagenet, norm_step
from cakd_cli.losses.features.masked_generation import MGDTerm, mgd
from cakd_cli.losses.features.neuron_selectivity import NSTTerm, nst
from cakd_cli.losses.features.overhaul import OFDTerm, ofd
from cakd_cli.losses.features.relational import RKDTerm, rkd
from cakd_cli.losses.features.reused_classifier import SimKDTerm, sim_kd
from cakd_cli.losses.features.review import ReviewKDTerm, review_kd
from cakd_cli.losses.features.similarity import PKTTerm, SPTerm, pkt, sp
from cakd_cli.losses.features.singular_values import KDSVDTerm, kdsvd
from cakd_cli.losses.features.softmax_regression import SRRLTerm, srrl, srrl_pooled
from cakd_cli.losses.features.solution_flow import FSPTerm, fsp
from cakd_cli.losses.features.variational import VIDTerm, vid
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
from cakd_cli.losses.refined import RLDTerm, rld, rld_step
from cakd_cli.losses.relational import DISTTerm, dist
from cakd_cli.losses.scale_decoupled import (
    SDDDKDTerm,
    SDDKDTerm,
    SDDNKDTerm,
    sdd_dkd,
    sdd_kd,
    sdd_nkd,
    sdd_regions,
)
from cakd_cli.losses.sorted_logits import SortDKDTerm, SortKDTerm, sort_dkd, sort_kd
from cakd_cli.losses.standardisation import lskd_dkd, lskd_kd
from cakd_cli.losses.supervised import CrossEntropyTerm, cross_entropy
from cakd_cli.losses.swapped import SLDTerm, sld_step
from cakd_cli.losses.transformed import TTMTerm, WTTMTerm, ttm, wttm
from cakd_cli.losses.wasserstein import WKDTerm, wkd_l, wkd_l_step
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
    | RLDTerm
    | TTMTerm
    | WTTMTerm
    | IKLTerm
    | GKLTerm
    | WKDTerm
    | ABDivergenceTerm
    | SortKDTerm
    | SortDKDTerm
    | CRLDTerm
    | SLDTerm
    | SDDKDTerm
    | SDDDKDTerm
    | SDDNKDTerm
    | FitNetTerm
    | ATTerm
    | SPTerm
    | PKTTerm
    | NSTTerm
    | CCTerm
    | RKDTerm
    | VIDTerm
    | FSPTerm
    | ABTerm
    | KDSVDTerm
    | CRDTerm
    | OFDTerm
    | ReviewKDTerm
    | SemCKDTerm
    | SRRLTerm
    | MGDTerm
    | CATKDTerm
    | SimKDTerm,
    Field(discriminator="type"),
]

# The union is the registry.
TERMS: tuple[type[Term], ...] = get_args(get_args(LossOptions)[0])


def objectives() -> dict[str, Sequence[Mapping[str, Any]]]:
    """Whole training objectives by method, as published: what ``--loss NAME`` stands for."""
    return {name: entries for term in TERMS for name, entries in term.objectives.items()}


__all__ = [
    "TERMS",
    "ABDivergenceTerm",
    "ABTerm",
    "ATTerm",
    "CAKDFeaturesTerm",
    "CAKDTerm",
    "CATKDTerm",
    "CCTerm",
    "CMKDTerm",
    "CRDTerm",
    "CRLDTerm",
    "CTKDTerm",
    "CrossEntropyTerm",
    "DISTTerm",
    "DKDTerm",
    "Decoupling",
    "FSPTerm",
    "FitNetTerm",
    "GDKD3Term",
    "GDKDAutoKTerm",
    "GDKDAutoWTerm",
    "GDKDTerm",
    "GKLTerm",
    "IKLTerm",
    "JensenShannonTerm",
    "KDSVDTerm",
    "KDTerm",
    "Lesson",
    "LogitMSETerm",
    "LogitTerm",
    "Look",
    "LossOptions",
    "LossOutput",
    "MGDTerm",
    "MLKDTerm",
    "NKDTerm",
    "NSTTerm",
    "Needs",
    "OFDTerm",
    "PKTTerm",
    "RKDTerm",
    "RLDTerm",
    "ReverseKLTerm",
    "ReviewKDTerm",
    "SDDDKDTerm",
    "SDDKDTerm",
    "SDDNKDTerm",
    "SLDTerm",
    "SPTerm",
    "SRRLTerm",
    "SemCKDTerm",
    "Shapes",
    "SimKDTerm",
    "SortDKDTerm",
    "SortKDTerm",
    "TTMTerm",
    "Term",
    "VIDTerm",
    "WKDTerm",
    "WTTMTerm",
    "Weights",
    "ab",
    "activation_boundaries",
    "at",
    "cakd",
    "cat_kd",
    "cc",
    "cmkd",
    "crd",
    "crld_step",
    "cross_entropy",
    "ctkd",
    "decouple",
    "dist",
    "dist_dense",
    "dkd",
    "dkd_mod",
    "fitnet",
    "fsp",
    "ft",
    "gdkd",
    "gdkd3",
    "gdkd_auto_k",
    "gdkd_auto_w",
    "gkl",
    "hard_rank",
    "hard_spearman",
    "ikl",
    "jensen_shannon",
    "kd",
    "kdsvd",
    "logit_mse",
    "ls_gdkd",
    "lskd_dkd",
    "lskd_kd",
    "mgd",
    "mlkd_batch_correlation",
    "mlkd_class_correlation",
    "mlkd_instance_kd",
    "mlkd_single_view",
    "mlkd_step",
    "nkd",
    "norm",
    "norm_imagenet",
    "norm_step",
    "nst",
    "objectives",
    "ofd",
    "pearson",
    "pkt",
    "reverse_kl",
    "review_kd",
    "rkd",
    "rld",
    "rld_step",
    "sample_difficulty",
    "sdd_dkd",
    "sdd_kd",
    "sdd_nkd",
    "sdd_regions",
    "sem_ckd",
    "sim_kd",
    "sld_step",
    "soft_rank",
    "soft_spearman",
    "sort_dkd",
    "sort_kd",
    "sp",
    "srrl",
    "srrl_pooled",
    "standardise",
    "ttm",
    "two_groups",
    "vid",
    "wkd_l",
    "wkd_l_step",
    "wttm",
]
