"""Weights that change over a run."""

import pytest
from pydantic import ValidationError

from cakd_cli.losses import CAKDTerm, CrossEntropyTerm, DKDTerm, KDTerm, Weights
from cakd_cli.losses.weights import AdaptiveWeight, CosineWeight, LinearWeight, StepWeight, lags


def values(weight, epochs, lag=1.0):
    return [weight.over(5).at(epoch, lag) for epoch in epochs]


def test_linear():
    assert values(LinearWeight(start=1, end=3), (1, 2, 3, 5, 9)) == pytest.approx([1, 1.5, 2, 3, 3])
    assert values(LinearWeight(start=3, end=1, epochs=3), (1, 2, 3, 4)) == pytest.approx([3, 2, 1, 1])
    # A ramp of one epoch has only a start, and what follows it.
    assert values(LinearWeight(start=3, end=1, epochs=1), (1, 2)) == pytest.approx([3, 1])


def test_cosine():
    assert values(CosineWeight(start=0, end=2), (1, 2, 3, 5, 6)) == pytest.approx([0, 1 - 0.5**0.5, 1, 2, 2])


def test_step():
    assert values(StepWeight(start=1, end=4, epochs=2), (1, 2, 3)) == [1, 1, 4]


def test_adaptive_is_bounded():
    weight = AdaptiveWeight(base=2, bound=3)

    assert [weight.at(7, lag) for lag in (0.01, 0.5, 1, 2, 100)] == pytest.approx([2 / 3, 1, 2, 4, 6])


def test_a_part_lags_if_more_of_it_is_left_than_of_the_others():
    found = lags({"a": 4.0, "b": 1.0, "c": 10.0, "gone": 0.0}, {"a": 2.0, "b": 0.25, "c": 2.5, "gone": 0.0})

    # Shares left: 0.5, 0.25, 0.25.
    assert found == pytest.approx({"a": 2.0, "b": 0.25 / 0.375, "c": 0.25 / 0.375})


def test_nothing_to_compare_with_is_no_lag():
    assert lags({"a": 4.0}, {"a": 1.0}) == {"a": 1.0}
    assert lags({"a": 4.0, "b": 1.0}, {"a": 1.0, "b": 0.0}) == {"a": 1.0, "b": 0.0}


def test_the_weights_of_a_run():
    terms = [
        CrossEntropyTerm(weight=LinearWeight(start=1, end=0)).over(11),
        DKDTerm(beta=AdaptiveWeight(base=8), warmup_epochs=2.0),
    ]
    weights = Weights(terms)

    assert [weights.at(epoch)[0].weight for epoch in (1, 6, 11)] == pytest.approx([1, 0.5, 0])
    assert [weights.at(epoch)[1].weight for epoch in (1, 2, 3)] == [0.5, 1, 1]
    assert weights.at(1)[1].beta == 8
    weights.end_epoch({"0.cross_entropy": 2.0, "1.tckd": 1.0, "1.nckd": 1.0})
    weights.end_epoch({"0.cross_entropy": 2.0, "1.tckd": 0.25, "1.nckd": 0.5})
    assert weights.at(3)[1].beta == pytest.approx(16)
    assert weights.at(3)[1].alpha == 1
    assert weights.changing(3) == pytest.approx({"0.cross-entropy.weight": 0.8, "1.dkd.beta": 16})

    other = Weights(terms)
    other.restore(weights.state())
    assert other.at(3) == weights.at(3)


def test_constant_terms_are_left_alone():
    term = KDTerm()
    weights = Weights([term])

    assert weights.at(5)[0] is term
    assert weights.changing(5) == {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: KDTerm(weight={"type": "adaptive", "base": 1}),
            "weight\n  cannot be adaptive: .* none of its weights can",
        ),
        (lambda: CAKDTerm(weight={"type": "adaptive", "base": 1}), "alpha, beta can"),
        (lambda: CAKDTerm(beta={"type": "linear", "start": -1, "end": 1}), "greater than or equal to 0"),
        (lambda: CAKDTerm(beta={"type": "linear", "start": 1}), "Field required"),
        (lambda: CAKDTerm(beta={"type": "sine", "start": 1}), "does not match any of the expected tags"),
        (lambda: CAKDTerm(beta={"type": "adaptive", "base": 1, "bound": 0.5}), "greater than or equal to 1"),
        (lambda: CAKDTerm(beta=-1), "greater than or equal to 0"),
    ],
)
def test_wrong_weights(make, message):
    with pytest.raises(ValidationError, match=message):
        make()


def test_a_weight_adapts_to_parts_that_have_no_weight_too():
    """With S = {label} there is nothing inside the strong classes: only bcd is beside wcd."""
    weights = Weights([CAKDTerm(beta={"type": "adaptive", "base": 8})])
    weights.end_epoch({"0.bcd": 1.0, "0.scd": 0.0, "0.wcd": 1.0})
    weights.end_epoch({"0.bcd": 0.25, "0.scd": 0.0, "0.wcd": 0.5})

    assert weights.at(3)[0].beta == pytest.approx(16)
