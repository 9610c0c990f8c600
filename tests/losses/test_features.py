"""CAKD over features: masks, the connector, and the sum over layers."""

import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from cakd_cli.losses import CAKDFeaturesTerm, Lesson, cakd, standardise
from cakd_cli.losses.features import above_mean, activation, classifier_evidence

BATCH, CLASSES = 6, 4


def draw(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(BATCH, size, generator=generator).double() for size in sizes)


def lesson(mine, theirs, importance=()):
    student, teacher = draw(CLASSES, CLASSES, seed=9)
    return Lesson(student, teacher, torch.zeros(BATCH, dtype=torch.long), mine, theirs, importance)


def test_evidence_is_the_value_times_the_weight_of_the_predicted_class():
    features, logits, weight = draw(8, CLASSES, 8)
    weight = weight[:CLASSES]

    strong = classifier_evidence(features, logits, weight)

    for i in range(BATCH):
        evidence = [(features[i, k] * weight[logits[i].argmax(), k]).item() for k in range(8)]
        assert strong[i].tolist() == [value > sum(evidence) / 8 for value in evidence]


def test_a_wrong_prediction_gives_another_mask_whatever_the_label_is():
    features, logits, weight = draw(8, CLASSES, 8)
    other = logits.roll(1, dims=1)

    assert not torch.equal(
        classifier_evidence(features, logits, weight[:CLASSES]), classifier_evidence(features, other, weight[:CLASSES])
    )


def test_activation_takes_what_is_above_an_even_share():
    (features,) = draw(8)

    strong = activation(features, 2.0)

    assert torch.equal(strong, (features / 2).softmax(1) > 1 / 8)


def test_nothing_is_strong_where_all_are_equal():
    for count in range(2, 64):
        assert not above_mean(torch.full((2, count), 0.1)).any(), count


@pytest.mark.parametrize("standard", [False, True])
def test_one_layer_is_cakd_of_its_elements(standard):
    mine, theirs, importance = draw(8, 8, 8)
    term = CAKDFeaturesTerm(
        layers=[{"student": "a", "teacher": "b"}],
        mask="grad-cam",
        alpha=2,
        beta=3,
        temperature=4,
        standardise=standard,
    )
    learner = term.learner([8], [8], None)

    output = term.learn(lesson((mine,), (theirs,), (importance,)), learner)

    assert not list(learner.parameters())
    prepare = standardise if standard else lambda x: x
    expected = cakd(prepare(mine), prepare(theirs), above_mean(importance), temperature=4, alpha=2, beta=3)
    assert_close(output.total, expected.total)
    assert_close(output.parts["feature_wcd"], expected.parts["wcd"])


def test_layers_are_summed_and_projected_where_widths_differ():
    term = CAKDFeaturesTerm(beta=1, layers=[{"student": "a", "teacher": "b"}] * 2, mask="activation", standardise=False)
    learner = term.learner([8, 3], [8, 5], None).double()
    (one, other, theirs, more) = draw(8, 3, 8, 5)

    output = term.learn(lesson((one, other), (theirs, more)), learner)

    assert [tuple(parameter.shape) for parameter in learner.parameters()] == [(5, 3), (5,)]
    projected = learner.projections[1](other)
    first = cakd(one, theirs, activation(theirs, 1.0), temperature=1, alpha=1, beta=1)
    second = cakd(projected, more, activation(more, 1.0), temperature=1, alpha=1, beta=1)
    assert_close(output.total, first.total + second.total)
    assert_close(output.parts["feature_bcd"], first.parts["bcd"] + second.parts["bcd"])


def test_gradients_reach_the_student_and_the_connector_and_not_the_teacher():
    mine, theirs, weight = draw(3, 8, 8)
    mine.requires_grad_()
    theirs.requires_grad_()
    term = CAKDFeaturesTerm()
    learner = term.learner([3], [8], weight[:CLASSES]).double()

    term.learn(lesson((mine,), (theirs,)), learner).total.backward()

    assert mine.grad.abs().sum() > 0
    assert all(parameter.grad.abs().sum() > 0 for parameter in learner.parameters())
    assert theirs.grad is None
    # The classifier's weight is the teacher's: neither trained nor saved.
    assert "weight_CD" not in learner.state_dict()


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("standard", [False, True])
def test_finite_at_the_edges(scale, standard):
    mine, theirs, weight = (scale * x.float() for x in draw(8, 8, 8))
    mine.requires_grad_()
    term = CAKDFeaturesTerm(standardise=standard)

    total = term.learn(lesson((mine,), (theirs,)), term.learner([8], [8], weight[:CLASSES])).total
    total.backward()

    assert total.isfinite()
    assert mine.grad.isfinite().all()


def test_the_mask_of_the_classifier_needs_its_input():
    with pytest.raises(ValidationError, match="classifier-evidence needs the classifier's input"):
        CAKDFeaturesTerm(layers=[{"student": "a", "teacher": "b"}])
