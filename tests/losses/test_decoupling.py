"""The theorem, its numerics, and the losses that stand on it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cakd_cli.losses import cakd, cross_entropy, decouple, dkd, grouping, kd


@st.composite
def problems(draw):
    batch, classes = draw(st.integers(1, 4)), draw(st.integers(2, 12))
    num_groups = draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([0.1, 1.0, 5.0, 20.0]))
    student, teacher = (scale * torch.randn(batch, classes, generator=generator, dtype=torch.float64) for _ in "st")
    groups = torch.randint(0, num_groups, (batch, classes), generator=generator)
    return student, teacher, groups, num_groups, draw(st.sampled_from([0.5, 1.0, 4.0]))


@settings(deadline=None, max_examples=200)
@given(problems())
def test_parts_sum_to_kl_for_any_partition(problem):
    student, teacher, groups, num_groups, temperature = problem
    parts = decouple(student, teacher, groups, num_groups=num_groups, temperature=temperature)

    whole = kd(student, teacher, temperature=temperature).total.item() / temperature**2

    assert parts.kl_B.mean().item() == pytest.approx(whole, rel=1e-12, abs=1e-12)
    assert (parts.between_B > -1e-12).all()
    assert (parts.within_BK > -1e-12).all()


def naive(student, teacher, groups, num_groups, temperature):
    """The definition, one sample and one class at a time."""
    between, within, masses = [], [], []
    for s_row, t_row, g_row in zip(student.tolist(), teacher.tolist(), groups.tolist(), strict=True):
        p, q = ([math.exp(z / temperature) for z in row] for row in (t_row, s_row))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        b, c = ([sum(x for x, g in zip(r, g_row, strict=True) if g == k) for k in range(num_groups)] for r in (p, q))
        between.append(sum(x * math.log(x / y) for x, y in zip(b, c, strict=True) if x))
        within.append(
            [
                sum(x / b[k] * math.log((x / b[k]) / (y / c[k])) for x, y, g in zip(p, q, g_row, strict=True) if g == k)
                for k in range(num_groups)
            ]
        )
        masses.append(b)
    return torch.tensor(between).double(), torch.tensor(within).double(), torch.tensor(masses).double()


@settings(deadline=None, max_examples=50)
@given(problems())
def test_each_part_is_its_definition(problem):
    student, teacher, groups, num_groups, temperature = problem
    student, teacher = student.clamp(-20, 20), teacher.clamp(-20, 20)
    parts = decouple(student, teacher, groups, num_groups=num_groups, temperature=temperature)
    between, within, masses = naive(student, teacher, groups, num_groups, temperature)

    torch.testing.assert_close(parts.between_B, between, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(parts.within_BK, within, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(parts.teacher_mass_BK, masses, rtol=1e-6, atol=1e-6)


def test_gradients_agree_with_finite_differences():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 7, generator=generator, dtype=torch.float64) for _ in "st")
    target = torch.tensor([0, 3, 6])
    strong = torch.rand(3, 7, generator=generator) < 0.4
    student.requires_grad_()

    assert torch.autograd.gradcheck(lambda s: kd(s, teacher, temperature=3).total, student)
    assert torch.autograd.gradcheck(lambda s: dkd(s, teacher, target, temperature=3, alpha=1, beta=8).total, student)
    for scaled in (False, True):
        assert torch.autograd.gradcheck(
            lambda s, scaled=scaled: (
                cakd(s, teacher, strong, temperature=3, alpha=2, beta=5, scale_by_mass=scaled).total
            ),
            student,
        )


@pytest.mark.parametrize("kl_type", ["forward", "reverse", "both"])
def test_gradients_of_every_part_agree_with_finite_differences(kl_type):
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(3, 7, generator=generator, dtype=torch.float64) for _ in "st")
    # The last group is empty, and group 3 holds one class of the first sample.
    groups = torch.randint(0, 3, (3, 7), generator=generator)
    groups[0, 2] = 3
    student.requires_grad_()

    assert torch.autograd.gradcheck(
        lambda s: decouple(s, teacher, groups, num_groups=5, temperature=2, kl_type=kl_type).parts_BJ, student
    )


def test_cakd_with_the_label_is_dkd():
    student, teacher, target = torch.randn(5, 9).double(), torch.randn(5, 9).double(), torch.arange(5)

    ours = cakd(student, teacher, grouping.label(teacher, target), temperature=4, alpha=3, beta=8).total
    theirs = dkd(student, teacher, target, temperature=4, alpha=1, beta=8).total

    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_cakd_scaled_by_mass_is_kd():
    student, teacher = torch.randn(5, 9).double(), torch.randn(5, 9).double()
    strong = torch.rand(5, 9) < 0.5

    ours = cakd(student, teacher, strong, temperature=4, alpha=1, beta=1, scale_by_mass=True).total

    torch.testing.assert_close(ours, kd(student, teacher, temperature=4).total, rtol=1e-12, atol=0)


def losses(student, teacher, target):
    """Every loss and every grouping on one input."""
    settings = {"temperature": 4.0, "alpha": 1.0, "beta": 8.0}
    strong = {
        "label": grouping.label(teacher, target),
        "top-k": grouping.top_k(teacher, 2),
        "top-mass": grouping.top_mass(teacher, 0.9),
        "threshold": grouping.threshold(teacher, 0.3),
        "none": torch.zeros_like(teacher, dtype=torch.bool),
        "all": torch.ones_like(teacher, dtype=torch.bool),
    }
    yield "cross-entropy", cross_entropy(student, target, label_smoothing=0.1)
    yield "kd", kd(student, teacher, temperature=4.0)
    yield "dkd", dkd(student, teacher, target, **settings)
    for name, chosen in strong.items():
        yield f"cakd {name}", cakd(student, teacher, chosen, **settings)
        yield f"cakd {name} scaled", cakd(student, teacher, chosen, **settings, scale_by_mass=True)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize("classes", [2, 3, 1000])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4, 3e38])
def test_finite_for_any_finite_logits(scale, classes, autocast):
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if autocast else torch.float32
    limit = torch.finfo(dtype).max
    draw = (scale * torch.randn(2, 4, classes, generator=generator)).clamp(-limit, limit).to(dtype)
    # One row on the edge itself, in both directions.
    draw[:, 0, 0], draw[:, 0, 1] = torch.tensor([scale, -scale]), torch.tensor([-scale, scale])
    student, teacher = draw[0].requires_grad_(), draw[1]
    target = torch.tensor([0, 1, 0, 1])

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for name, loss in losses(student, teacher, target):
            assert loss.total.dtype == torch.float32, name
            (gradient,) = torch.autograd.grad(loss.total, student)
            assert loss.total.isfinite(), name
            assert gradient.isfinite().all(), name


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_logit_that_is_not_finite_cannot_pass_unseen(value):
    student, teacher, target = torch.zeros(2, 3), torch.randn(2, 3), torch.tensor([0, 1])
    student[0, 0] = value
    student.requires_grad_()
    for name, loss in losses(student, teacher, target):
        (gradient,) = torch.autograd.grad(loss.total, student)
        assert not (loss.total.isfinite() and gradient.isfinite().all()), name


def test_batch_of_one_and_bf16_inputs_are_computed_in_float32():
    student, teacher = torch.randn(1, 5).bfloat16(), torch.randn(1, 5).bfloat16()

    low = kd(student, teacher, temperature=2).total
    high = kd(student.float(), teacher.float(), temperature=2).total

    assert low.item() == high.item()


def test_two_classes_leave_nothing_inside_the_rest():
    loss = dkd(torch.randn(4, 2), torch.randn(4, 2), torch.tensor([0, 1, 0, 1]), temperature=4, alpha=1, beta=8)

    assert loss.parts["nckd"].item() == 0
    assert loss.parts["tckd"].item() > 0


def test_shift_invariance_and_zero_at_the_teacher():
    student, teacher, target = torch.randn(4, 9).double(), torch.randn(4, 9).double(), torch.arange(4)
    for (name, loss), (_, shifted), (_, same) in zip(
        losses(student, teacher, target),
        losses(student + 3, teacher - 2, target),
        losses(teacher, teacher, target),
        strict=True,
    ):
        assert loss.total.item() == pytest.approx(shifted.total.item(), rel=1e-10, abs=1e-12), name
        if name != "cross-entropy":
            assert abs(same.total.item()) < 1e-12, name


def test_the_teacher_gets_no_gradient():
    teacher = torch.randn(2, 5, requires_grad=True)
    student = torch.randn(2, 5, requires_grad=True)

    loss = cakd(student, teacher, grouping.top_k(teacher, 2), temperature=2, alpha=1, beta=1, scale_by_mass=True)
    loss.total.backward()

    assert teacher.grad is None


@pytest.mark.parametrize(
    "call",
    [
        lambda s, t: kd(s, t[:, :4], temperature=1),
        lambda s, t: kd(s, t, temperature=0),
        lambda s, t: kd(s[0], t[0], temperature=1),
        lambda s, t: dkd(s, t, torch.tensor([0]), temperature=1, alpha=1, beta=1),
        lambda s, t: dkd(s, t, torch.tensor([0.0, 1.0]), temperature=1, alpha=1, beta=1),
        lambda s, t: cakd(s, t, torch.ones(2, 5), temperature=1, alpha=1, beta=1),
        lambda s, t: decouple(s, t, torch.zeros(2, 4, dtype=torch.long), num_groups=2),
        lambda s, t: decouple(s, t, torch.zeros(2, 5, dtype=torch.bool), num_groups=2),
        lambda s, t: decouple(s, t, torch.zeros(2, 5, dtype=torch.long), num_groups=0),
        lambda s, t: cross_entropy(s, torch.tensor([0, 1]), label_smoothing=1.0),
        lambda s, t: grouping.top_k(t, 0),
        lambda s, t: grouping.top_mass(t, 0),
        lambda s, t: grouping.threshold(t, 1),
    ],
)
def test_what_would_broadcast_or_mean_nothing_is_refused(call):
    with pytest.raises(ValueError, match=r"must be|must have"):
        call(torch.randn(2, 5), torch.randn(2, 5))
