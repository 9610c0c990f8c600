"""What a student learns from: pure functions of logits, usable without the rest of cakd.

Each function returns a :class:`LossOutput`; each options class beside it is the method's place in a recipe.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_args

from pydantic import Field

from cakd_cli.losses.base import LossOutput, LossTerm
from cakd_cli.losses.correlation_aware import CAKDTerm, cakd
from cakd_cli.losses.decoupled import DKDTerm, dkd
from cakd_cli.losses.decoupling import Decoupling, decouple
from cakd_cli.losses.knowledge_distillation import KDTerm, kd
from cakd_cli.losses.supervised import CrossEntropyTerm, cross_entropy

LossOptions = Annotated[CrossEntropyTerm | KDTerm | DKDTerm | CAKDTerm, Field(discriminator="type")]

# The union is the registry.
TERMS: tuple[type[LossTerm], ...] = get_args(get_args(LossOptions)[0])


def objectives() -> dict[str, Sequence[Mapping[str, Any]]]:
    """Whole training objective of each method, as published: what ``--loss NAME`` stands for."""
    return {term.model_fields["type"].default: term.objective for term in TERMS}


__all__ = [
    "TERMS",
    "CAKDTerm",
    "CrossEntropyTerm",
    "DKDTerm",
    "Decoupling",
    "KDTerm",
    "LossOptions",
    "LossOutput",
    "LossTerm",
    "cakd",
    "cross_entropy",
    "decouple",
    "dkd",
    "kd",
    "objectives",
]
