"""What each term weighs in an epoch, and what the weights that adapt have seen so far."""

from collections.abc import Mapping, Sequence
from typing import Any

from cakd_cli.losses import LossTerm
from cakd_cli.losses.emphasis import Emphasis, lags


class Weights:
    """The terms of a recipe with numbers in the place of schedules.

    Args:
        terms: The recipe's loss.
    """

    def __init__(self, terms: Sequence[LossTerm]) -> None:
        self._terms = terms
        self._first: dict[str, float] = {}
        self._latest: dict[str, float] = {}
        self._settled: tuple[int, list[LossTerm]] = (0, [])

    def at(self, epoch: int) -> list[LossTerm]:
        """Settle every weight for an epoch counted from 1, the linear warm-up of a term among them."""
        if self._settled[0] != epoch:
            self._settled = epoch, [self._settle(number, term, epoch) for number, term in enumerate(self._terms)]
        return self._settled[1]

    def _settle(self, number: int, term: LossTerm, epoch: int) -> LossTerm:
        lag = self._lags(number, term)
        update = {
            name: value.at(epoch, lag.get(term.weighs.get(name, ""), 1.0)) for name, value in _emphases(term).items()
        }
        if term.warmup_epochs:
            update["weight"] = update.get("weight", term.weight) * self.warmup(number, epoch)
        return term.model_copy(update=update) if update else term

    def warmup(self, number: int, epoch: int) -> float:
        """Share of its weight that a term has reached; the literature's first epoch of 20 has 1/20."""
        epochs = self._terms[number].warmup_epochs
        assert epochs != "auto", "resolve() settles every auto"
        return min(epoch / epochs, 1.0) if epochs else 1.0

    def _lags(self, number: int, term: LossTerm) -> dict[str, float]:
        names = {part: part_name(number, part) for part in (*term.weighs.values(), *term.beside)}
        if not all(name in self._first and name in self._latest for name in names.values()):
            return {}
        return lags(*({part: seen[name] for part, name in names.items()} for seen in (self._first, self._latest)))

    def hear(self, parts: Mapping[str, float]) -> None:
        """Take the means of an epoch that has ended, by :func:`part_name`."""
        self._first = self._first or dict(parts)
        self._latest = dict(parts)
        self._settled = 0, []

    def varying(self, epoch: int) -> dict[str, float]:
        """Weights in an epoch, of those that a recipe lets change, as ``number.type.name``."""
        return {
            f"{number}.{term.type}.{name}": getattr(settled, name)
            for number, (term, settled) in enumerate(zip(self._terms, self.at(epoch), strict=True))
            for name in _emphases(term)
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"first": self._first, "latest": self._latest}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self._first, self._latest = dict(state["first"]), dict(state["latest"])
        self._settled = 0, []


def part_name(number: int, part: str) -> str:
    """Name a part of the numbered term among all terms' parts."""
    return f"{number}.{part}"


def _emphases(term: LossTerm) -> dict[str, Emphasis]:
    values = {name: getattr(term, name) for name in type(term).model_fields}
    return {name: value for name, value in values.items() if isinstance(value, Emphasis)}
