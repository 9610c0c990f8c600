"""Terms that need no label give the same whatever the labels are, -1 for none included; all others say so."""

import pytest
import torch

from cakd_cli import losses
from cakd_cli.losses import Lesson, Shapes
from tests.losses.test_methods import TERMS as BY_DEFAULT

TERMS = [
    *BY_DEFAULT,
    losses.KDSVDTerm(layers=[{"student": "a", "teacher": "b"}, {"student": "c", "teacher": "d"}]),
    losses.DKDTerm(strategy="top1"),
    losses.IKLTerm(class_prior=True),
    losses.GKLTerm(class_prior=False),
    losses.MLKDTerm(second_view=True),
]


def loss(term, target):
    """Compute a term on one and the same batch."""
    generator = torch.Generator().manual_seed(3)
    student, teacher, student_strong, teacher_strong = torch.randn(4, 8, 10, generator=generator).double()
    maps, vectors = ((6, 8, 8), (6, 8, 8)), ((6,), (7,))
    sizes = {"map": maps, "preactivation": maps, "vector": vectors, "importance": vectors}
    sizes["class maps"] = ((10, 8, 8), (10, 8, 8))
    mine, theirs = (
        {look: torch.randn(8, *sizes[look.form][i], generator=generator).double() for look in looks}
        for i, looks in enumerate(term.needs[1:3])
    )
    shapes = ({look: tuple(x.shape[1:]) for look, x in layers.items()} for layers in (mine, theirs))
    norms = {look: (torch.ones(6), torch.zeros(6)) for look in theirs if look.form == "preactivation"}
    weight, bias = torch.randn(10, 7, generator=generator), torch.randn(10, generator=generator)
    torch.manual_seed(3)
    module = term.module(Shapes(*shapes, weight, bias, target, norms, 10, 8))
    module = module.double() if module is not None else None
    numbers = torch.arange(8)
    lesson = Lesson(student, teacher, target, mine, theirs, numbers, 2, student_strong, teacher_strong)
    torch.manual_seed(4)
    return term(lesson, module).total


@pytest.mark.parametrize("term", [term for term in TERMS if not term.needs_label], ids=repr)
def test_a_term_without_labels_never_looks_at_them(term):
    expected = loss(term, torch.arange(8))

    assert expected.isfinite()
    for target in (torch.full((8,), -1), torch.tensor([3] * 8)):
        assert torch.equal(loss(term, target), expected)


# The prior is of the last epoch's images: in the first all classes are alike.
NEEDING = [term for term in TERMS if term.needs_label and not getattr(term, "class_prior", False)]


@pytest.mark.parametrize("term", NEEDING, ids=repr)
def test_a_term_that_needs_labels_depends_on_them(term):
    assert not torch.equal(loss(term, torch.arange(8)), loss(term, torch.tensor([1, 1, 2, 2, 3, 3, 4, 4])))


def test_both_kinds_are_there():
    needing = {term.type for term in TERMS if term.needs_label}

    assert needing == {
        *("cross-entropy", "dkd", "cakd", "cmkd", "nkd", "rld"),
        *("sort-kd", "sort-dkd", "sld", "wkd-l", "crd", "ikl", "sdd-kd", "sdd-dkd", "sdd-nkd"),
    }
