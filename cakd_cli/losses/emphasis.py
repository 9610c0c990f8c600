"""Weights that change over a run: schedules, and weights that follow the part that lags behind.

Epochs count from 1, so the first epoch has the start's value, and the last of ``epochs`` the end's.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

_NotNegative = Annotated[float, Field(ge=0)]


class Emphasis(BaseModel):
    """A weight as a function of the epoch."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    type: str

    def at(self, epoch: int, lag: float) -> float:
        """Weight in an epoch counted from 1.

        Args:
            epoch: From 1.
            lag: How far the part it weighs is behind the others; 1 = not at all.
        """
        raise NotImplementedError

    def settled(self, epochs: int) -> Self:
        """Put numbers where the recipe leaves it to the length of the run."""
        return self


class _Ramp(Emphasis):
    start: _NotNegative = Field(description="weight in the first epoch")
    end: _NotNegative = Field(description="weight in the last epoch, and after it")
    epochs: float | None = Field(None, gt=0, description="epochs from start to end; by default the whole run")

    def settled(self, epochs: int) -> Self:
        """Put the run's epochs where none are given."""
        return self.model_copy(update={"epochs": float(epochs)}) if self.epochs is None else self

    def _progress(self, epoch: int) -> float:
        assert self.epochs is not None, "resolve() settles it"
        return min((epoch - 1) / max(self.epochs - 1, 1), 1.0)


class LinearEmphasis(_Ramp):
    """From start to end in a straight line."""

    type: Literal["linear"] = "linear"

    def at(self, epoch: int, lag: float) -> float:
        """``start + (end - start) p`` with p the share of the epochs that have passed."""
        return self.start + (self.end - self.start) * self._progress(epoch)


class CosineEmphasis(_Ramp):
    """From start to end along half a cosine."""

    type: Literal["cosine"] = "cosine"

    def at(self, epoch: int, lag: float) -> float:
        """``start + (end - start) (1 - cos(pi p)) / 2`` with p the share of the epochs that have passed."""
        return self.start + (self.end - self.start) * (1 - math.cos(math.pi * self._progress(epoch))) / 2


class StepEmphasis(Emphasis):
    """Start for some epochs, then end."""

    type: Literal["step"] = "step"
    start: _NotNegative = Field(description="weight in the first epochs")
    end: _NotNegative = Field(description="weight after them")
    epochs: float = Field(gt=0, description="epochs with the first weight")

    def at(self, epoch: int, lag: float) -> float:
        """``start`` up to and with epoch ``epochs``, then ``end``."""
        return self.start if epoch <= self.epochs else self.end


class AdaptiveEmphasis(Emphasis):
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


if TYPE_CHECKING:
    # What a term computes with: whoever calls it has settled the weight for the epoch.
    Weight = float
else:
    Weight = (
        _NotNegative
        | Annotated[
            LinearEmphasis | CosineEmphasis | StepEmphasis | AdaptiveEmphasis,
            Field(discriminator="type"),
        ]
    )
