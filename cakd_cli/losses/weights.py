"""Weights that change over a run: schedules, and weights that follow the part that lags behind.

Epochs count from 1, so the first epoch has the start's value, and the last of ``epochs`` the end's.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field

from cakd_cli.options import Options

if TYPE_CHECKING:
    from cakd_cli.losses.base import Term

_NotNegative = Annotated[float, Field(ge=0)]


class ChangingWeight(Options):
    """A weight as a function of the epoch."""

    type: str

    def at(self, epoch: int, lag: float) -> float:
        """Weight in an epoch counted from 1.

        Args:
            epoch: From 1.
            lag: How far the part it weighs is behind the others; 1 = not at all.
        """
        raise NotImplementedError

    def over(self, epochs: int) -> Self:
        """Put numbers where the recipe leaves it to the length of the run."""
        return self


class _Ramp(ChangingWeight):
    start: _NotNegative = Field(description="weight in the first epoch")
    end: _NotNegative = Field(description="weight in the last epoch, and after it")
    epochs: float | None = Field(None, gt=0, description="epochs from start to end; by default the whole run")

    def over(self, epochs: int) -> Self:
        return self.model_copy(update={"epochs": float(epochs)}) if self.epochs is None else self

    def _progress(self, epoch: int) -> float:
        assert self.epochs is not None, "resolve() fills it in"
        return min((epoch - 1) / max(self.epochs - 1, 1), 1.0)


class LinearWeight(_Ramp):
    """From start to end in a straight line."""

    type: Literal["linear"] = "linear"

    def at(self, epoch: int, lag: float) -> float:
        """``start + (end - start) p`` with p the share of the epochs that have passed."""
        return self.start + (self.end - self.start) * self._progress(epoch)


class CosineWeight(_Ramp):
    """From start to end along half a cosine."""

    type: Literal["cosine"] = "cosine"

    def at(self, epoch: int, lag: float) -> float:
        """``start + (end - start) (1 - cos(pi p)) / 2`` with p the share of the epochs that have passed."""
        return self.start + (self.end - self.start) * (1 - math.cos(math.pi * self._progress(epoch))) / 2


class StepWeight(ChangingWeight):
    """Start for some epochs, then end."""

    type: Literal["step"] = "step"
    start: _NotNegative = Field(description="weight in the first epochs")
    end: _NotNegative = Field(description="weight after them")
    epochs: float = Field(gt=0, description="epochs with the first weight")

    def at(self, epoch: int, lag: float) -> float:
        """``start`` up to and with epoch ``epochs``, then ``end``."""
        return self.start if epoch <= self.epochs else self.end


class AdaptiveWeight(ChangingWeight):
    """Raised while its part lags behind the other parts of its term in the student, lowered while it leads."""

    type: Literal["adaptive"] = "adaptive"
    base: _NotNegative = Field(description="weight where no part lags, and in the first epoch")
    bound: float = Field(4.0, ge=1, le=1000, description="most by which the weight is multiplied or divided")

    def at(self, epoch: int, lag: float) -> float:
        """``base * clip(lag, 1 / bound, bound)``; for the lag see :func:`lags`."""
        return self.base * min(max(lag, 1 / self.bound), self.bound)


def lags(first: Mapping[str, float], latest: Mapping[str, float]) -> dict[str, float]:
    """How far each part is behind the others: its share that is left, by the mean share left of the others.

    A part's share that is left is its mean over the latest epoch by that over the first. Parts that were 0 have
    nothing to learn and are left out; a part alone has a lag of 1.
    """
    left = {name: latest[name] / value for name, value in first.items() if value > 0}
    found = {}
    for name, share in left.items():
        others = [value for other, value in left.items() if other != name]
        mean = sum(others) / len(others) if others else 0.0
        found[name] = share / mean if mean > 0 else 1.0
    return found


Weight = (
    _NotNegative | Annotated[LinearWeight | CosineWeight | StepWeight | AdaptiveWeight, Field(discriminator="type")]
)


class Weights:
    """The terms of a recipe with numbers in the place of weights that change, and what adaptive ones have seen.

    Args:
        terms: The recipe's loss.
    """

    def __init__(self, terms: Sequence["Term"]) -> None:
        self.terms = terms
        self._first: dict[str, float] = {}
        self._latest: dict[str, float] = {}
        self._of_epoch: tuple[int, list[Term]] = (0, [])

    def at(self, epoch: int) -> "list[Term]":
        """Compute every weight for an epoch counted from 1, the linear warm-up of a term among them."""
        if self._of_epoch[0] != epoch:
            self._of_epoch = epoch, [self._at(number, term, epoch) for number, term in enumerate(self.terms)]
        return self._of_epoch[1]

    def _at(self, number: int, term: "Term", epoch: int) -> "Term":
        lag = self._lags(number, term)
        update: dict[str, Any] = {
            name: weight.at(epoch, lag.get(term.weighs.get(name, ""), 1.0)) for name, weight in _changing(term).items()
        }
        if term.warmup_epochs:
            update["weight"] = update.get("weight", term.weight) * self.warmup(number, epoch)
        return term.model_copy(update=update) if update else term

    def warmup(self, number: int, epoch: int) -> float:
        """Share of its weight that a term has reached; the literature's first epoch of 20 has 1/20."""
        epochs = self.terms[number].warmup_epochs
        assert epochs != "auto", "resolve() fills in every auto"
        return min(epoch / epochs, 1.0) if epochs else 1.0

    def _lags(self, number: int, term: "Term") -> dict[str, float]:
        names = {part: part_name(number, part) for part in (*term.weighs.values(), *term.beside)}
        if not all(name in self._first and name in self._latest for name in names.values()):
            return {}
        return lags(*({part: seen[name] for part, name in names.items()} for seen in (self._first, self._latest)))

    def end_epoch(self, parts: Mapping[str, float]) -> None:
        """Take the means of an epoch that has ended, by :func:`part_name`."""
        self._first = self._first or dict(parts)
        self._latest = dict(parts)
        self._of_epoch = 0, []

    def changing(self, epoch: int) -> dict[str, float]:
        """Weights in an epoch, of those that a recipe lets change, as ``number.type.name``."""
        return {
            f"{number}.{term.type}.{name}": getattr(computed, name)
            for number, (term, computed) in enumerate(zip(self.terms, self.at(epoch), strict=True))
            for name in _changing(term)
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"first": self._first, "latest": self._latest}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self._first, self._latest = dict(state["first"]), dict(state["latest"])
        self._of_epoch = 0, []


def part_name(number: int, part: str) -> str:
    """Name a part of the numbered term among all terms' parts."""
    return f"{number}.{part}"


def _changing(term: "Term") -> dict[str, ChangingWeight]:
    values = {name: getattr(term, name) for name in type(term).model_fields}
    return {name: value for name, value in values.items() if isinstance(value, ChangingWeight)}
