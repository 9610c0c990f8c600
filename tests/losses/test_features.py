"""CAKD over features: masks, the connector, and the sum over layers."""

import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from cakd_cli.losses import CAKDFeaturesTerm, FitNetTerm, Lesson, Look, Shapes, cakd, fitnet, standardise
from cakd_cli.losses.features.correlation_aware import above_mean, activation, classifier_evidence
from cakd_cli.losses.features.fitnet import MapConnector
from tests.losses import reference

BATCH, CLASSES = 6, 4


def draw(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(BATCH, size, generator=generator).double() for size in sizes)


def lesson(term, mine, theirs):
    """What the term needs, from tensors in its order."""
    student, teacher = draw(CLASSES, CLASSES, seed=9)
    needs = term.needs
    layers = dict(zip(needs.student_layers, mine, strict=True)), dict(zip(needs.teacher_layers, theirs, strict=True))
    return Lesson(student, teacher, torch.zeros(BATCH, dtype=torch.long), *layers)


def module(term, mine, theirs, weight=None):
    """What the term trains, for layers of these sizes in its order."""
    sizes = [
        {look: (size,) for look, size in zip(looks, given, strict=False)}
        for looks, given in zip(term.needs[1:3], (mine, theirs), strict=True)
    ]
    return term.module(Shapes(*sizes, weight))


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
    connector = module(term, [8], [8])

    output = term(lesson(term, (mine,), (theirs, importance)), connector)

    assert not list(connector.parameters())
    prepare = standardise if standard else lambda x: x
    expected = cakd(prepare(mine), prepare(theirs), above_mean(importance), temperature=4, alpha=2, beta=3)
    assert_close(output.total, expected.total)
    assert_close(output.parts["feature_wcd"], expected.parts["wcd"])


def test_layers_are_summed_and_projected_where_widths_differ():
    pairs = [{"student": "a", "teacher": "b"}, {"student": "c", "teacher": "d"}]
    term = CAKDFeaturesTerm(beta=1, layers=pairs, mask="activation", standardise=False)
    connector = module(term, [8, 3], [8, 5]).double()
    (one, other, theirs, more) = draw(8, 3, 8, 5)

    output = term(lesson(term, (one, other), (theirs, more)), connector)

    assert [tuple(parameter.shape) for parameter in connector.parameters()] == [(5, 3), (5,)]
    projected = connector.projections[1](other)
    first = cakd(one, theirs, activation(theirs, 1.0), temperature=1, alpha=1, beta=1)
    second = cakd(projected, more, activation(more, 1.0), temperature=1, alpha=1, beta=1)
    assert_close(output.total, first.total + second.total)
    assert_close(output.parts["feature_bcd"], first.parts["bcd"] + second.parts["bcd"])


def test_gradients_reach_the_student_and_the_connector_and_not_the_teacher():
    mine, theirs, weight = draw(3, 8, 8)
    mine.requires_grad_()
    theirs.requires_grad_()
    term = CAKDFeaturesTerm()
    connector = module(term, [3], [8], weight[:CLASSES]).double()

    term(lesson(term, (mine,), (theirs,)), connector).total.backward()

    assert mine.grad.abs().sum() > 0
    assert all(parameter.grad.abs().sum() > 0 for parameter in connector.parameters())
    assert theirs.grad is None
    # The classifier's weight is the teacher's: neither trained nor saved.
    assert "weight_CD" not in connector.state_dict()


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("standard", [False, True])
def test_finite_at_the_edges(scale, standard):
    mine, theirs, weight = (scale * x.float() for x in draw(8, 8, 8))
    mine.requires_grad_()
    term = CAKDFeaturesTerm(standardise=standard)

    total = term(lesson(term, (mine,), (theirs,)), module(term, [8], [8], weight[:CLASSES])).total
    total.backward()

    assert total.isfinite()
    assert mine.grad.isfinite().all()


def test_the_mask_of_the_classifier_needs_its_input():
    with pytest.raises(ValidationError, match="classifier-evidence needs the classifier's input"):
        CAKDFeaturesTerm(layers=[{"student": "a", "teacher": "b"}])


# FitNet.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", reference.FEATURES.cases("FitNet"))
def test_fitnet_is_the_official_one(name, dtype):
    case, tensors = reference.FEATURES.case(name), reference.FEATURES.tensor
    student = tensors(case["inputs"]["student"]).to(dtype).requires_grad_()
    teacher = tensors(case["inputs"]["teacher"]).to(dtype)
    term = FitNetTerm(layers=[{"student": "a", "teacher": "b"}])
    shapes = Shapes({Look("a", "map"): tuple(student.shape[1:])}, {Look("b", "map"): tuple(teacher.shape[1:])})
    connectors = term.module(shapes).to(dtype)
    (connector,) = connectors.connectors
    connector.load_state_dict({key: tensors(tensor).to(dtype) for key, tensor in case["weights"].items()})
    nothing = torch.zeros(len(student), 2, dtype=dtype)

    given = Lesson(nothing, nothing, nothing, {Look("a", "map"): student}, {Look("b", "map"): teacher})
    loss = term(given, connectors)
    (gradient,) = torch.autograd.grad(loss.total, student)

    limit = 1e-9 if dtype == torch.float64 else 1e-5
    assert loss.total.item() == pytest.approx(case["total"], rel=limit)
    expected = tensors(case["grads"][case["inputs"]["student"]])
    assert (gradient.double() - expected).abs().max() <= limit * expected.abs().max()
    # In training mode batch norm keeps what it sees: the vectors have the statistics of one moment alone.
    seen = connector.conv(student).mean((0, 2, 3)).double()
    kept = 0.9 * tensors(case["weights"]["bn.running_mean"]) + 0.1 * seen
    assert_close(connector.bn.running_mean.double(), kept, rtol=1e-5, atol=1e-6)


def test_fitnet_by_its_definition():
    generator = torch.Generator().manual_seed(0)
    guided, hint = (torch.randn(3, 4, 5, 5, generator=generator).double().requires_grad_() for _ in "gh")

    total = fitnet(hint, guided).total
    total.backward()

    assert_close(total, ((guided - hint) ** 2).sum() / guided.numel())
    assert hint.grad is None
    with pytest.raises(ValueError, match="one shape"):
        fitnet(hint, guided[:, :3])


@pytest.mark.parametrize(
    ("mine", "theirs", "message"),
    [
        ((4, 4, 4), (4, 16, 16), "no convolution leads from a map of 4 to one of 16"),
        ((64,), (4, 8, 8), "needs square maps"),
        ((4, 8, 8), (4, 8, 6), "needs square maps"),
    ],
)
def test_maps_that_nothing_connects(mine, theirs, message):
    with pytest.raises(ValueError, match=message):
        MapConnector(mine, theirs)
