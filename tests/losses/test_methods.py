"""What must hold of every method, whatever its numbers: identities, invariances, and what happens at the edges."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from cakd_cli import losses
from cakd_cli.losses import Lesson, LogitTerm, Look, Shapes, grouping

W = {"w0": 1.0, "w1": 2.0, "w2": 8.0}
# Every method on (student, teacher, labels), with settings of the literature.
METHODS = {
    "kd": lambda s, t, y: losses.kd(s, t, temperature=4),
    "reverse-kl": lambda s, t, y: losses.reverse_kl(s, t, temperature=4),
    "jensen-shannon": lambda s, t, y: losses.jensen_shannon(s, t, temperature=4),
    "logit-mse": lambda s, t, y: losses.logit_mse(s, t),
    "dkd": lambda s, t, y: losses.dkd(s, t, y, temperature=4, alpha=1, beta=8),
    "dkd top1": lambda s, t, y: losses.dkd_mod(s, t, y, temperature=4, alpha=1, beta=8, strategy="top1"),
    "dkd both": lambda s, t, y: losses.dkd_mod(s, t, y, temperature=4, alpha=1, beta=8, kl_type="both"),
    "cakd": lambda s, t, y: losses.cakd(s, t, grouping.label(t, y), temperature=4, alpha=1, beta=8),
    "gdkd": lambda s, t, y: losses.gdkd(s, t, k=5, temperature=4, **W),
    "gdkd reverse": lambda s, t, y: losses.gdkd(s, t, k=5, temperature=4, kl_type="reverse", **W),
    "gdkd worst": lambda s, t, y: losses.gdkd(s, t, k=5, temperature=4, strategy="worst", **W),
    "gdkd3": lambda s, t, y: losses.gdkd3(s, t, k=4, temperature=4, **W),
    "gdkd3 k1": lambda s, t, y: losses.gdkd3(s, t, k=1, temperature=4, **W),
    "gdkd auto k": lambda s, t, y: losses.gdkd_auto_k(s, t, temperature=4, **W),
    **{
        f"gdkd auto w {mode}": lambda s, t, y, mode=mode: losses.gdkd_auto_w(s, t, mode=mode, k=5, temperature=4)
        for mode in ("v1", "v2", "v3")
    },
    **{
        f"ls gdkd {mode}": lambda s, t, y, mode=mode: losses.ls_gdkd(s, t, norm_mode=mode, k=5, temperature=2, **W)
        for mode in ("global", "both", "other")
    },
    "lskd kd": lambda s, t, y: losses.lskd_kd(s, t, temperature=2),
    "lskd dkd": lambda s, t, y: losses.lskd_dkd(s, t, y, temperature=2, alpha=9, beta=72),
    "dist": lambda s, t, y: losses.dist(s, t, temperature=4, beta=2, gamma=2),
    **{
        f"cmkd {measure} {direction}": lambda s, t, y, measure=measure, direction=direction: losses.cmkd(
            s, t, y, difficulty=measure, direction=direction
        )
        for measure, direction in (
            *(("entropy-rank", "ranks-for-hard"), ("entropy", "ranks-for-hard")),
            *(("label", "ranks-for-easy"), ("confidence", "even")),
        )
    },
    "soft spearman": lambda s, t, y: losses.soft_spearman(s, t),
    "nkd": lambda s, t, y: losses.nkd(s, t, y, temperature=1, gamma=1.5),
    "ctkd": lambda s, t, y: losses.ctkd(s, t, y, theta=1.0),
    "mlkd": lambda s, t, y: losses.mlkd_single_view(
        s, t, y, temperatures=(2, 4), ce_weight=0.1, kd_weight=0.9, enable_mask=True
    ),
    "mlkd quirks": lambda s, t, y: losses.mlkd_single_view(
        s, t, y, temperatures=(2, 4), ce_weight=0.1, kd_weight=0.9, enable_mask=True, reference_quirks=True
    ),
    "mlkd two views": lambda s, t, y: losses.mlkd_step(s, t, y, s, t, temperature=4, ce_weight=0.1, kd_weight=0.9),
}
# They contain a cross-entropy with the labels, which is not least where both networks agree; these parts are.
BESIDE_LABELS = {
    "nkd": ("non_target",),
    "ctkd": ("kd",),
    "mlkd": ("kd", "cc", "bc"),
    "mlkd quirks": ("kd", "cc", "bc"),
    "mlkd two views": ("loss_kd", "loss_cc", "loss_bc"),
}
# The sizes of logits cancel.
STANDARDISED = {name for name in METHODS if name.startswith(("ls", "cmkd", "soft"))} - {"ls gdkd both", "ls gdkd other"}
EACH = pytest.mark.parametrize("name", METHODS)


def draw(batch=8, classes=20, scale=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(batch, classes, generator=generator).double() for _ in "st")
    return student, teacher, torch.randint(0, classes, (batch,), generator=generator)


@EACH
def test_adding_a_number_to_all_logits_of_a_network_changes_nothing(name):
    if name == "logit-mse":
        pytest.skip("it is about the logits themselves")
    student, teacher, target = draw()

    shifted = METHODS[name](student + 3, teacher - 2, target).total

    assert_close(shifted, METHODS[name](student, teacher, target).total, rtol=1e-8, atol=1e-10)


@EACH
def test_nothing_is_left_to_learn_where_the_student_is_the_teacher(name):
    _, teacher, target = draw()
    student = teacher.clone().requires_grad_()

    loss = METHODS[name](student, teacher, target)
    left = sum(loss.parts[part] for part in BESIDE_LABELS[name]) if name in BESIDE_LABELS else loss.total
    (gradient,) = torch.autograd.grad(left, student)

    # Correlations have 1e-8 in their denominator, as published: felt where probabilities are small.
    assert gradient.abs().max() < 1e-4
    # What is left of NKD's part is the teacher's own entropy.
    assert name == "nkd" or abs(left.item()) < 1e-3


@pytest.mark.parametrize("name", sorted(STANDARDISED))
def test_standardised_losses_do_not_see_the_size_of_logits(name):
    student, teacher, target = draw()

    scaled = METHODS[name](5 * student - 1, teacher, target).total

    assert_close(scaled, METHODS[name](student, teacher, target).total, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("term", [term for term in losses.TERMS if issubclass(term, LogitTerm)])
def test_the_switch_makes_any_term_blind_to_size(term):
    student, teacher, target = draw()
    switched = term(standardise=True, **({"reversal": 1.0} if term is losses.CTKDTerm else {})).over(240)
    module = switched.module(Shapes({}, {}, torch.randn(20, 6).double(), num_classes=20))

    plain, scaled = (
        switched(Lesson(mine, theirs, target, student_strong_BC=mine, teacher_strong_BC=theirs), module).total
        for mine, theirs in ((student, teacher), (5 * student - 1, 0.5 * teacher + 2))
    )

    # A teacher's entropy, and what stands out in it, depend on the size: they are of z-scored logits too.
    assert_close(scaled, plain, rtol=1e-5, atol=1e-8)


@EACH
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize(("batch", "classes"), [(1, 2), (4, 2), (4, 3), (1, 1000), (4, 1000)])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_finite(name, scale, batch, classes, autocast):
    dtype = torch.bfloat16 if autocast else torch.float32
    student, teacher, target = draw(batch, classes, scale)
    student, teacher = student.to(dtype), teacher.to(dtype)
    student[0, 0], student[0, 1], teacher[0, 0], teacher[0, 1] = scale, -scale, -scale, scale
    student.requires_grad_()

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = METHODS[name](student, teacher, target)
    (gradient,) = torch.autograd.grad(loss.total, student)

    assert loss.total.dtype == torch.float32
    assert loss.total.isfinite()
    assert gradient.isfinite().all()
    assert all(part.isfinite() for part in loss.parts.values())


@EACH
def test_the_teacher_is_a_constant(name):
    student, teacher, target = draw()
    teacher.requires_grad_()

    METHODS[name](student.requires_grad_(), teacher, target).total.backward()

    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@EACH
def test_a_batch_in_which_most_classes_are_missing(name):
    student, teacher, _ = draw()
    target = torch.zeros(8, dtype=torch.long)

    assert METHODS[name](student, teacher, target).total.isfinite()


@EACH
def test_other_classes_than_the_teachers_are_refused(name):
    student, teacher, target = draw()

    with pytest.raises(ValueError, match=r"one shape \(batch, classes\), got \(8, 20\) and \(8, 19\)"):
        METHODS[name](student, teacher[:, :19], target.clamp(max=18))


class Waits(TorchDispatchMode):
    """Operations for which the host waits until an accelerator has computed what they are about."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "aten.equal", "repeat_interleave")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        by_mask = "aten.index" in str(operation) and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for argument in arguments
            if isinstance(argument, list | tuple)
            for index in argument
        )
        if by_mask or any(name in str(operation) for name in self.NAMES):
            self.seen.append(str(operation))
        return operation(*arguments, **(keywords or {}))


PAIR = [{"student": "a", "teacher": "b"}]
STAGES = ("stage1", "stage2")
# Singular values have no place to be computed where nobody waits.
TERMS = [
    term().over(240).between(STAGES, STAGES) for term in losses.TERMS if term not in (losses.CTKDTerm, losses.KDSVDTerm)
] + [
    losses.CTKDTerm(reversal=1.0),
    losses.CAKDFeaturesTerm(mask="activation", layers=PAIR),
    losses.CAKDFeaturesTerm(mask="grad-cam", layers=PAIR, standardise=False),
    *(losses.CAKDTerm(grouping=name) for name in ("top-k", "top-mass", "threshold")),
    *(losses.CMKDTerm(difficulty=measure) for measure in ("entropy-rank", "entropy", "label", "confidence")),
    losses.MLKDTerm(reference_quirks=True),
    losses.GDKDTerm(standardise="both"),
]


@pytest.mark.parametrize("several_labels", [False, True])
@pytest.mark.parametrize("term", TERMS, ids=lambda term: term.type)
def test_no_term_waits_for_the_device(term, several_labels):
    if several_labels and not term.takes_several_labels:
        pytest.skip("it takes one label")
    student, teacher, target = draw(batch=8, classes=10)
    if several_labels:
        target = torch.nn.functional.one_hot(target, 10).bool() | (teacher > 3)
    maps, vectors = ((6, 8, 8), (6, 8, 8)), ((6,), (7,))
    sizes = {"map": maps, "preactivation": maps, "vector": vectors, "importance": vectors}
    sizes["class maps"] = ((10, 8, 8), (10, 8, 8))
    mine, theirs = (
        {look: torch.randn(8, *sizes[look.form][i]).double() for look in looks}
        for i, looks in enumerate(term.needs[1:3])
    )
    shapes = ({look: tuple(x.shape[1:]) for look, x in layers.items()} for layers in (mine, theirs))
    norms = {look: (torch.rand(6), torch.randn(6)) for look in theirs if look.form == "preactivation"}
    numbers = torch.arange(8)
    module = term.module(Shapes(*shapes, torch.randn(10, 7), torch.randn(10), numbers % 3, norms, 10, 8))
    module = module.double() if module is not None else None
    for layer in mine.values():
        layer.requires_grad_()
    student.requires_grad_()
    lesson = Lesson(
        student, teacher, target, mine, theirs, numbers, student_strong_BC=student, teacher_strong_BC=teacher
    )

    with Waits() as waits:
        term(lesson, module).total.backward()

    assert not waits.seen


def test_what_waits_would_be_seen():
    x = torch.arange(4.0)
    for wait in (lambda: x[x > 1], lambda: x.sum().item(), lambda: bool(x[0]), lambda: torch.nonzero(x)):
        with Waits() as waits:
            wait()
        assert waits.seen


@pytest.mark.parametrize(
    "name", [name for name in METHODS if name not in ("soft spearman", "cmkd confidence even", "ctkd")]
)
def test_gradients_agree_with_finite_differences(name):
    student, teacher, target = draw(batch=3, classes=7)

    assert torch.autograd.gradcheck(lambda s: METHODS[name](s, teacher, target).total, student.requires_grad_())


# The identities of the family.


def test_gdkd_with_one_class_is_dkd_where_the_teacher_is_right():
    student, teacher, _ = draw()
    ours = losses.gdkd(student, teacher, k=1, temperature=4, w0=3, w1=2, w2=8)

    theirs = losses.dkd(student, teacher, teacher.argmax(1), temperature=4, alpha=3, beta=8)

    assert_close(ours.total, theirs.total, rtol=1e-12, atol=0)


def test_a_teacher_that_is_wrong_separates_dkd_from_gdkd():
    student, teacher, _ = draw()
    wrong = teacher.argmin(1)

    by_label = losses.dkd(student, teacher, wrong, temperature=4, alpha=1, beta=8).total
    by_teacher = losses.dkd_mod(student, teacher, wrong, temperature=4, alpha=1, beta=8, strategy="top1").total

    # DKD holds on to the label; GDKD and DKDMod's top1 follow the teacher.
    assert (by_label - by_teacher).abs() > 0.1
    assert_close(by_teacher, losses.gdkd(student, teacher, k=1, temperature=4, w0=1, w1=0, w2=8).total)


@pytest.mark.parametrize("k", [1, 2, 5, 19, 20, 21])
def test_cakd_with_the_teachers_top_k_is_gdkd(k):
    student, teacher, _ = draw()

    ours = losses.cakd(student, teacher, grouping.top_k(teacher, k), temperature=4, alpha=2, beta=8)

    theirs = losses.gdkd(student, teacher, k=k, temperature=4, w0=1, w1=2, w2=8)
    assert_close(ours.total, theirs.total, rtol=1e-12, atol=0)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_gdkd_weighed_by_mass_is_kd(k):
    student, teacher, _ = draw()

    ours = losses.gdkd_auto_w(student, teacher, mode="v1", k=k, temperature=4, m1=1, m2=1)

    assert_close(ours.total, losses.kd(student, teacher, temperature=4).total, rtol=1e-12, atol=0)
    # Both masses are the teacher's, and all of it.
    assert_close(ours.parts["b_top_mean"] + ours.parts["b_other_mean"], torch.tensor(1.0).double())


def test_three_groups_by_the_theorem_are_kd():
    student, teacher, _ = draw()
    order = teacher.argsort(1, descending=True)
    group = torch.full_like(order, 2).scatter_(1, order[:, 1:4], 1).scatter_(1, order[:, :1], 0)
    split = losses.decouple(student, teacher, group, num_groups=3, temperature=4)

    loss = losses.gdkd3(student, teacher, k=4, temperature=4, w0=1, w1=1, w2=1)

    assert_close(loss.parts["high"], 16 * split.between_B.mean())
    assert_close(loss.parts["low_top"], 16 * split.within_BK[:, 1].mean())
    assert_close(loss.parts["low_other"], 16 * split.within_BK[:, 2].mean())
    assert_close(16 * split.kl_B.mean(), losses.kd(student, teacher, temperature=4).total)


def test_empty_groups_leave_nothing_where_the_official_code_gives_nan():
    student, teacher, _ = draw()

    everything = losses.gdkd(student, teacher, k=20, temperature=4, w0=1, w1=2, w2=8)
    no_middle = losses.gdkd3(student, teacher, k=1, temperature=4, w0=1, w1=2, w2=8)

    assert everything.parts["high"] == 0
    assert everything.parts["low_other"] == 0
    assert_close(everything.parts["low_top"], losses.kd(student, teacher, temperature=4).total)
    assert no_middle.parts["low_top"] == 0


def test_ties_at_the_edge_of_the_top_pick_exactly_k():
    teacher = torch.zeros(2, 10).double()

    assert grouping.top_k(teacher, 3).sum(1).tolist() == [3, 3]
    assert grouping.ranked_below(teacher, torch.tensor([3, 1])).sum(1).tolist() == [3, 1]
    # Nothing stands out: one class, as in the official code.
    assert grouping.auto_k(teacher).tolist() == [1, 1]


def test_probabilities_that_have_underflowed_do_not_stand_out():
    teacher = torch.zeros(1, 100)
    teacher[0, 0] = 200.0

    assert grouping.auto_k(teacher).tolist() == [1]


def test_reverse_kl_is_the_kl_the_other_way_round():
    student, teacher, _ = draw()
    p, q = ((x / 4).log_softmax(1) for x in (teacher, student))

    expected = 16 * torch.nn.functional.kl_div(p, q, reduction="batchmean", log_target=True)

    assert_close(losses.reverse_kl(student, teacher, temperature=4).total, expected)


def test_jensen_shannon_is_symmetric_and_bounded():
    student, teacher, _ = draw(scale=200.0)

    one_way = losses.jensen_shannon(student, teacher, temperature=1).total
    other_way = losses.jensen_shannon(teacher, student, temperature=1).total

    assert_close(one_way, other_way)
    assert 0 < one_way <= torch.log(torch.tensor(2.0)) + 1e-9


def test_both_directions_are_the_mean_of_each():
    student, teacher, _ = draw()
    parts = [
        losses.gdkd(student, teacher, k=5, temperature=4, kl_type=kl_type, **W).parts["low_other"]
        for kl_type in ("forward", "reverse", "both")
    ]

    assert_close((parts[0] + parts[1]) / 2, parts[2])


# Ranks.


def pool_adjacent_violators(values):
    """The textbook's decreasing isotonic regression, one value at a time."""
    blocks = []
    for value in values:
        blocks.append([value, 1])
        while len(blocks) > 1 and blocks[-1][0] >= blocks[-2][0]:
            (b, n), (a, m) = blocks.pop(), blocks.pop()
            blocks.append([(a * m + b * n) / (m + n), m + n])
    return list(itertools.chain.from_iterable([value] * count for value, count in blocks))


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.floats(-5, 5).map(lambda x: round(x, 2)), min_size=1, max_size=30),
    st.sampled_from([0.01, 0.1, 0.3, 1.0, 10.0]),
)
def test_soft_rank_is_the_projection_that_the_textbook_gives(values, epsilon):
    order = sorted(range(len(values)), key=lambda i: -values[i])
    scaled = [values[i] / epsilon for i in order]
    places = range(len(values), 0, -1)
    dual = pool_adjacent_violators([s - w for s, w in zip(scaled, places, strict=True)])
    expected = torch.empty(len(values), dtype=torch.float64)
    expected[order] = torch.tensor([s - v for s, v in zip(scaled, dual, strict=True)], dtype=torch.float64)

    ranks = losses.soft_rank(torch.tensor([values], dtype=torch.float64), epsilon=epsilon)

    assert_close(ranks[0], expected, rtol=0, atol=1e-8)


def test_large_sets_are_ranked_in_parts(monkeypatch):
    values = torch.randn(7, 50).double()
    whole = losses.soft_rank(values, epsilon=0.05)

    monkeypatch.setattr("cakd_cli.losses.ranks._MOST_ELEMENTS", 2 * 50**2)

    assert_close(losses.soft_rank(values, epsilon=0.05), whole, rtol=0, atol=0)


def test_soft_ranks_that_are_too_soft_are_no_ranks():
    student, teacher, _ = draw(classes=100)

    soft = losses.soft_spearman(student, teacher, epsilon=1.0).total

    # The trap: with the usual default of 1, Spearman is Pearson.
    assert_close(soft, 1 - losses.pearson(student, teacher).mean(), rtol=0, atol=1e-9)


def test_soft_ranks_that_are_hard_are_spearman_and_teach_nothing():
    student, teacher, _ = draw(classes=100)
    student.requires_grad_()

    loss = losses.soft_spearman(student, teacher, epsilon=1e-7)
    (gradient,) = torch.autograd.grad(loss.total, student)

    assert_close(loss.total, 1 - losses.hard_spearman(student, teacher).mean(), rtol=0, atol=1e-9)
    assert gradient.abs().max() == 0


def test_the_default_epsilon_lies_between():
    student, teacher, _ = draw(classes=100)
    student.requires_grad_()

    loss = losses.soft_spearman(student, teacher)
    (gradient,) = torch.autograd.grad(loss.total, student)

    assert (loss.total - (1 - losses.pearson(student, teacher).mean())).abs() > 1e-3
    assert gradient.abs().max() > 0


def test_ranks_do_not_see_a_bent_scale():
    student, teacher, _ = draw()

    assert_close(losses.hard_spearman(student.exp(), teacher**3), losses.hard_spearman(student, teacher))


def test_equal_values_share_their_rank():
    values = torch.tensor([[3.0, 1.0, 3.0, 2.0]])

    assert losses.hard_rank(values).tolist() == [[3.5, 1.0, 3.5, 2.0]]
    assert losses.soft_rank(values, epsilon=0.01)[0].tolist() == pytest.approx([3.5, 1.0, 3.5, 2.0])


# CMKD.


@pytest.mark.parametrize("measure", ["entropy", "label", "confidence"])
def test_difficulty_is_a_share_and_grows_with_doubt(measure):
    target = torch.tensor([0, 0, 0])
    teacher = torch.tensor([[9.0, 0, 0, 0], [1.0, 0, 0, 0], [0.0, 0, 0, 0]])

    sure, less, none = losses.sample_difficulty(teacher, target, measure=measure).tolist()

    assert 0 <= sure < less < none <= 1


def test_only_the_labels_probability_finds_a_sample_hard_that_the_teacher_gets_wrong():
    teacher, wrong = torch.tensor([[9.0, 0, 0, 0]]), torch.tensor([1])

    found = {name: losses.sample_difficulty(teacher, wrong, measure=name).item() for name in ("entropy", "label")}

    assert found["label"] > 0.99
    assert found["entropy"] < 0.01


def test_cmkd_of_easy_samples_is_the_inter_term_of_dist():
    student, teacher, target = draw(scale=1.0)
    standard = losses.standardise(student), losses.standardise(teacher)
    settings = {"temperature": 2, "difficulty": "entropy", "direction": "ranks-for-easy"}
    easy = losses.cmkd(student, teacher * 0, target, **settings)

    # A teacher that gives every class the same is hard: with ranks for easy samples alone, only Pearson is left.
    assert easy.parts["difficulty"].item() == pytest.approx(1)
    loss = losses.cmkd(student, teacher, target, temperature=2)
    assert_close(
        4 * loss.parts["pearson"], losses.dist(*standard, temperature=2, beta=1, gamma=0).total, rtol=1e-9, atol=0
    )


def test_difficulty_by_rank_spreads_over_any_batch():
    _, teacher, target = draw(batch=5)
    sure = 40 * teacher  # the entropies of a confident teacher hardly differ from 0

    ranks = losses.sample_difficulty(sure, target, measure="entropy-rank")

    entropies = losses.sample_difficulty(sure, target, measure="entropy")
    assert sorted(ranks.tolist()) == [0, 0.25, 0.5, 0.75, 1]
    assert torch.equal(ranks.argsort(), entropies.argsort())
    assert losses.sample_difficulty(teacher[:1], target[:1], measure="entropy-rank").tolist() == [0.5]
    alike = teacher[:1].expand(4, -1)
    assert losses.sample_difficulty(alike, target[:4], measure="entropy-rank").tolist() == [0.5] * 4


def test_cmkd_weighs_each_sample_by_its_difficulty():
    student, teacher, target = draw(batch=1)
    loss = losses.cmkd(student, teacher, target, temperature=2)
    reverse = losses.cmkd(student, teacher, target, temperature=2, direction="ranks-for-easy")
    even = losses.cmkd(student, teacher, target, temperature=2, direction="even")
    w, p, s = (loss.parts[name] for name in ("difficulty", "pearson", "spearman"))

    assert_close(loss.total, 4 * ((1 - w) * p + w * s))
    assert_close(reverse.total, 4 * (w * p + (1 - w) * s))
    assert_close(even.total, 2 * (p + s))


# MLKD.


def test_mlkd_without_quirks_learns_from_the_masked_samples_alone():
    student, teacher, target = draw()
    confidence = teacher.softmax(1).amax(1)
    chosen = confidence <= confidence.quantile(0.5)

    loss = losses.mlkd_single_view(
        student, teacher, target, temperatures=[4], ce_weight=0, kd_weight=1, enable_mask=True
    )

    expected = losses.kd(student[chosen], teacher[chosen], temperature=4).total
    assert_close(loss.parts["kd"], expected)
    gram = losses.mlkd_batch_correlation(student[chosen], teacher[chosen], temperature=4).total
    assert_close(loss.parts["bc"], gram)


def test_mlkd_without_quirks_reads_the_strong_view_at_every_temperature():
    student, teacher, target = draw()
    strong_student, strong_teacher, _ = draw(seed=1)
    weights = {"temperature": 4, "ce_weight": 0, "kd_weight": 1}

    loss = losses.mlkd_step(student, teacher, target, strong_student, strong_teacher, **weights)
    weak_only = losses.mlkd_step(student, teacher, target, strong_teacher, strong_teacher, **weights)

    strong = sum(losses.kd(strong_student, strong_teacher, temperature=t).total for t in (4, 3, 5, 2, 6))
    assert_close(loss.parts["loss_kd"] - weak_only.parts["loss_kd"], strong)


def test_the_learnt_temperature_stays_in_its_range():
    student, teacher, target = draw()
    ends = [losses.ctkd(student, teacher, target, theta=theta).parts["temperature"].item() for theta in (-50.0, 50.0)]

    assert ends == pytest.approx([1, 21])


@pytest.mark.parametrize(
    "call",
    [
        lambda s, t, y: losses.gdkd(s, t, k=0, temperature=4, **W),
        lambda s, t, y: losses.gdkd(s, t, k=1, temperature=4, strategy="first", **W),
        lambda s, t, y: losses.gdkd(s, t, k=1, temperature=4, kl_type="sideways", **W),
        lambda s, t, y: losses.gdkd3(s, t, k=0, temperature=4, **W),
        lambda s, t, y: losses.gdkd_auto_w(s, t, mode="v4", k=1, temperature=4),
        lambda s, t, y: losses.gdkd_auto_k(s, t, temperature=4, topk_cap=0, **W),
        lambda s, t, y: losses.ls_gdkd(s, t, norm_mode="none", k=1, temperature=4, **W),
        lambda s, t, y: losses.dkd_mod(s, t, y, temperature=4, alpha=1, beta=1, strategy="top2"),
        lambda s, t, y: losses.cmkd(s, t, y, direction="up"),
        lambda s, t, y: losses.cmkd(s, t, y, difficulty="size"),
        lambda s, t, y: losses.cmkd(s, t, y.float(), difficulty="label"),
        lambda s, t, y: losses.soft_rank(s, epsilon=0),
        lambda s, t, y: losses.soft_rank(s[0], epsilon=1),
        lambda s, t, y: losses.ctkd(s, t, y, theta=0.0, t_end=0),
        lambda s, t, y: losses.mlkd_single_view(
            s, t, y, temperatures=[4], ce_weight=1, kd_weight=1, enable_mask=True, quantile=2
        ),
        lambda s, t, y: losses.dist(s, t, temperature=-1, beta=1, gamma=1),
    ],
)
def test_settings_that_mean_nothing_are_refused(call):
    with pytest.raises(ValueError, match="must"):
        call(*draw())


def test_a_term_may_look_at_the_sample_and_the_epoch():
    """Of memory banks and curricula: they come with every lesson."""
    seen = []

    class Looking(losses.KDTerm):
        def __call__(self, lesson, module=None):
            seen.append((lesson.sample_B, lesson.epoch))
            return super().__call__(lesson, module)

    student, teacher, target = draw()
    Looking()(Lesson(student, teacher, target, sample_B=torch.arange(8), epoch=3))

    assert seen[0][0].tolist() == list(range(8))
    assert seen[0][1] == 3


def test_a_look_is_a_key():
    assert {Look("a"): 1}[Look("a", "vector")] == 1
    assert Look("a") != Look("a", "map")
