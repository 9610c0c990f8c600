"""The newer logit losses: the official vectors, identities, and what happens at the edges."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from cakd_cli.losses import Lesson, Shapes, dkd, kd, reverse_kl, standardise
from cakd_cli.losses.alpha_beta import ABDivergenceTerm, ab
from cakd_cli.losses.cross_view import crld_step
from cakd_cli.losses.decoupled_kl import ClassPrior, GKLTerm, IKLTerm, gkl, ikl
from cakd_cli.losses.features.class_attention import class_activation_maps
from cakd_cli.losses.refined import RLDTerm, rld, rld_step
from cakd_cli.losses.scale_decoupled import (
    SDDDKDTerm,
    SDDKDTerm,
    SDDNKDTerm,
    region_weights,
    sdd_dkd,
    sdd_kd,
    sdd_nkd,
    sdd_regions,
)
from cakd_cli.losses.sorted_logits import SortDKDTerm, SortKDTerm, sort_dkd, sort_kd, sorted_logits
from cakd_cli.losses.supervised import CrossEntropyTerm
from cakd_cli.losses.swapped import sld_step, swapped
from cakd_cli.losses.transformed import TTMTerm, WTTMTerm, ttm, wttm
from cakd_cli.losses.wasserstein import WKDTerm, classifier_distance, wkd_l, wkd_l_step
from cakd_cli.losses.weights import CosineWeight
from tests.losses import reference
from tests.losses.test_methods import Waits, draw

VECTORS = reference.NEWER_LOGITS
# On logits of one view, by the vectors' name; whether they take labels.
FUNCTIONS = {
    "RLD": (rld, True),
    "RLD_step": (rld_step, True),
    "TTM": (ttm, False),
    "WTTM": (wttm, False),
    "IKL": (ikl, True),
    "GKL": (gkl, True),
    "WKD_L": (wkd_l, True),
    "WKD_L_step": (wkd_l_step, True),
    "AB": (ab, False),
    "SortKD": (sort_kd, True),
    "SortDKD": (sort_dkd, True),
}
TERMS = {
    "RLD": RLDTerm,
    "TTM": TTMTerm,
    "WTTM": WTTMTerm,
    "IKL": IKLTerm,
    "GKL": GKLTerm,
    "WKD_L": WKDTerm,
    "AB": ABDivergenceTerm,
    "SortKD": SortKDTerm,
    "SortDKD": SortDKDTerm,
}
TWO_VIEWS = {"SLD_step": sld_step, "CRLD_step": crld_step}
REGIONS = {"SDD_KD": sdd_kd, "SDD_DKD": sdd_dkd, "SDD_NKD": sdd_nkd}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def arguments(case, dtype):
    """Settings of the function, and what it takes beside logits and labels."""
    settings = {"class_prior": None} if case["method"] in ("IKL", "GKL") else {}
    settings |= {name: value for name, value in case["params"].items() if name != "class_prior"}
    given = {role: VECTORS.tensor(name, dtype) for role, name in case.get("inputs", {}).items()}
    if "prior" in given:
        settings["class_prior"] = given["prior"]
    if case["method"].startswith("WKD"):
        return [given["distance"] if "distance" in given else classifier_distance(given["class_weights"])], settings
    return [], settings


def in_a_recipe(case):
    """No recipe has a stored distance, or a negative exponent, whose powers have no bound."""
    return "distance" not in case.get("inputs", {}) and case["params"].get("beta", 0) >= 0


@DTYPES
@pytest.mark.parametrize("name", VECTORS.cases(*FUNCTIONS))
def test_function(name, dtype):
    case, student, teacher, target = VECTORS.inputs(name, dtype)
    function, labelled = FUNCTIONS[case["method"]]
    more, settings = arguments(case, dtype)

    loss = function(student, teacher, *([target] if labelled else []), *more, **settings)

    assert set(loss.parts) == set(case["components"])
    reference.assert_matches(case, loss.total, loss.parts, student, vectors=VECTORS)


@DTYPES
@pytest.mark.parametrize("name", VECTORS.cases(*TWO_VIEWS))
def test_two_views(name, dtype):
    case, student, teacher, target = VECTORS.inputs(name, dtype)
    student_strong, teacher_strong, target_strong = VECTORS.input_set(case["input_set_strong"], dtype)
    assert torch.equal(target, target_strong)

    loss = TWO_VIEWS[case["method"]](student, teacher, target, student_strong, teacher_strong, **case["params"])

    reference.assert_matches(case, loss.total, loss.parts, student, vectors=VECTORS)
    VECTORS.assert_gradient(case["grad_student_strong"], loss.total, student_strong, reference.tolerance(dtype))


@DTYPES
@pytest.mark.parametrize("name", VECTORS.cases(*REGIONS))
def test_regions(name, dtype):
    case = VECTORS.case(name)
    names = VECTORS.content["input_sets"][case["input_set"]]
    student = VECTORS.tensor(names["student_multi"], dtype).requires_grad_()
    teacher, target = VECTORS.tensor(names["teacher_multi"], dtype), VECTORS.tensor(names["target"])

    loss = REGIONS[case["method"]](student, teacher, target, **case["params"])

    relative = reference.tolerance(dtype)
    VECTORS.assert_values(case, loss.total, loss.parts, relative)
    VECTORS.assert_gradient(case["grad_student_multi"], loss.total, student, relative)


@DTYPES
@pytest.mark.parametrize("name", VECTORS.cases("SDD_regions"))
def test_logits_of_regions(name, dtype):
    case = VECTORS.case(name)
    given = {role: VECTORS.tensor(tensor, dtype) for role, tensor in case["inputs"].items()}
    features = given["features"].requires_grad_()

    logits = sdd_regions(features, given["fc_weight"], given["fc_bias"], scales=(1, 2, 4))
    total = (logits * given["cotangent"]).sum()

    relative = reference.tolerance(dtype)
    assert_close(logits.double(), VECTORS.tensors[case["tensors"]["multi"]], rtol=0, atol=relative)
    VECTORS.assert_values(case, total, {}, relative)
    VECTORS.assert_gradient(case["grad_features"], total, features, relative)


@pytest.mark.parametrize("name", [name for name in VECTORS.content["cases"] if "tensors" in VECTORS.case(name)])
def test_what_is_made_on_the_way(name):
    case = VECTORS.case(name)
    tensors = {role: VECTORS.tensors[tensor] for role, tensor in case["tensors"].items()}
    sets = [VECTORS.content["input_sets"][case[key]] for key in ("input_set", "input_set_strong") if key in case]
    for given, suffix in zip(sets, ("", "_strong"), strict=False):
        target = VECTORS.tensor(given["target"])
        for role in ("student", "teacher"):
            if f"swapped_{role}{suffix}" in tensors:
                expected = tensors.pop(f"swapped_{role}{suffix}")
                assert torch.equal(swapped(VECTORS.tensor(given[role]), target), expected)
        if "sorted_teacher" in tensors:
            assert torch.equal(sorted_logits(VECTORS.tensor(given["teacher"]), target), tensors.pop("sorted_teacher"))
        if "region_weight" in tensors:
            expected = tensors.pop("region_weight")
            weights = region_weights(VECTORS.tensor(given["teacher_multi"]), target)
            assert torch.equal(weights.double(), expected.T)
    if "cost" in tensors:
        (distance,), settings = arguments(case, torch.float64)
        sharpen = settings["sharpen"]
        cost = 1 - (-sharpen * distance).exp() if sharpen else distance
        assert_close(cost, tensors.pop("cost"), rtol=0, atol=1e-12)
    tensors.pop("multi", None)
    assert not tensors


@DTYPES
@pytest.mark.parametrize("name", [name for name in VECTORS.cases(*TERMS) if in_a_recipe(VECTORS.case(name))])
def test_term(name, dtype):
    case, student, teacher, target = VECTORS.inputs(name, dtype)
    params = dict(case["params"])
    settings = {"standardise": params.pop("logit_stand")} if "logit_stand" in params else {}
    term = TERMS[case["method"]](**params, **settings)
    weight = VECTORS.tensor(case["inputs"]["class_weights"], dtype) if case["method"] == "WKD_L" else None
    module = term.module(Shapes({}, {}, weight, num_classes=student.shape[1]))
    if isinstance(module, ClassPrior):
        module = module.to(dtype).eval()
        module.prior_CC.copy_(VECTORS.tensor(case["inputs"]["prior"], dtype))

    loss = term(Lesson(student, teacher, target), module)

    reference.assert_matches(case, loss.total, loss.parts, student, vectors=VECTORS)


def test_no_vector_is_left_out():
    methods = {case["method"] for case in VECTORS.content["cases"].values()}

    assert methods == set(FUNCTIONS) | set(TWO_VIEWS) | set(REGIONS) | {"SDD_regions"}
    assert len(VECTORS.content["cases"]) == 41


# Identities, oracles, and the edges.

BATCH, CLASSES = 8, 20


def distances(classes=CLASSES):
    return classifier_distance(torch.randn(classes, 6, generator=torch.Generator().manual_seed(1)).double())


def prior(classes=CLASSES):
    return torch.rand(classes, classes, generator=torch.Generator().manual_seed(2)).double().softmax(1)


def as_regions(function, **settings):
    """Of three regions that are shifted copies."""

    def loss(student, teacher, target):
        several = [torch.stack([x, x.roll(1, 0), 0.5 * x], dim=2) for x in (student, teacher)]
        return function(*several, target, **settings)

    return loss


# Every method on (student, teacher, labels), with settings of the literature.
METHODS = {
    "rld": lambda s, t, y: rld(s, t, y, temperature=4, alpha_temperature=1, alpha=1, beta=8),
    "rld stand": lambda s, t, y: rld(s, t, y, temperature=4, alpha_temperature=1, alpha=1, beta=8, logit_stand=True),
    "rld step": lambda s, t, y: rld_step(s, t, y, temperature=4, alpha_temperature=1, alpha=1, beta=8, epoch=3),
    "ttm": lambda s, t, y: ttm(s, t, gamma=0.1),
    "wttm": lambda s, t, y: wttm(s, t, gamma=0.2),
    "ikl": lambda s, t, y: ikl(s, t, y, temperature=4, t2=100, alpha=1, beta=8),
    "ikl prior": lambda s, t, y: ikl(s, t, y, temperature=4, t2=4, alpha=1, beta=8, class_prior=prior(s.shape[1])),
    "gkl": lambda s, t, y: gkl(s, t, y, temperature=4, t2=4, gamma=0.05, alpha=1, beta=16),
    "gkl prior": lambda s, t, y: gkl(
        s, t, y, temperature=4, t2=4, gamma=0.05, alpha=1, beta=16, class_prior=prior(s.shape[1])
    ),
    "wkd": lambda s, t, y: wkd_l(s, t, y, distances(t.shape[1]), temperature=8, gamma=600),
    "wkd step": lambda s, t, y: wkd_l_step(
        s, t, y, distances(t.shape[1]), temperature=8, gamma=600, epoch=9, epochs=9, cosine_decay_epoch=3
    ),
    **{
        f"ab {alpha} {beta}": lambda s, t, y, alpha=alpha, beta=beta: ab(s, t, temperature=4, alpha=alpha, beta=beta)
        for alpha, beta in ((0.8, 0.3), (1, 0), (0, 1), (0, 0), (2, 0.5))
    },
    "sort kd": lambda s, t, y: sort_kd(s, t, y, temperature=4),
    "sort dkd": lambda s, t, y: sort_dkd(s, t, y, temperature=4, alpha=1, beta=8),
    "sld": lambda s, t, y: sld_step(s, t, y, 0.5 * s, t.roll(1, 0), ce_weight=0.1, kd_weight=0.9, epoch=200),
    "crld": lambda s, t, y: crld_step(s, t, y, 0.5 * s, t.roll(1, 0), temperature=4, tau_w=0.1),
    "sdd kd": as_regions(sdd_kd, temperature=4),
    "sdd dkd": as_regions(sdd_dkd, temperature=4, alpha=1, beta=8),
    "sdd nkd": as_regions(sdd_nkd, temperature=1, gamma=1.5),
}
EACH = pytest.mark.parametrize("name", METHODS)


@EACH
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
def test_finite(name, autocast):
    dtype = torch.bfloat16 if autocast else torch.float32
    for scale, batch, classes in ((0.0, 4, 100), (1e4, 1, 2), (1e4, 4, 3), (1e4, 4, 100)):
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
def test_the_teacher_is_a_constant_inputs_stay_as_they_are_and_nothing_waits(name):
    student, teacher, target = draw()
    before = student.clone(), teacher.clone(), target.clone()

    with Waits() as waits:
        METHODS[name](student.requires_grad_(), teacher.requires_grad_(), target).total.backward()

    assert not waits.seen
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0
    assert all(torch.equal(x, was) for x, was in zip((student, teacher, target), before, strict=True))


@EACH
def test_gradients_agree_with_finite_differences(name):
    student, teacher, target = draw(batch=3, classes=5)

    assert torch.autograd.gradcheck(lambda s: METHODS[name](s, teacher, target).total, student.requires_grad_())


@EACH
def test_adding_a_number_to_all_logits_of_a_network_changes_nothing(name):
    student, teacher, target = draw()

    assert_close(METHODS[name](student + 3, teacher - 2, target).total, METHODS[name](student, teacher, target).total)


@EACH
def test_what_cannot_be_compared_does_not_pass_unseen(name):
    student, teacher, target = draw()
    broken = student.clone()
    broken[2, 3] = torch.inf

    assert METHODS[name](broken, teacher, target).total.isnan()
    with pytest.raises(ValueError, match=r"must have one shape \(batch, classes"):
        METHODS[name](student, teacher[:, :19], target.clamp(max=18))


@pytest.mark.parametrize("name", ["rld", "ikl prior", "gkl prior", "wkd", "sort kd", "sort dkd", "sld", "sdd dkd"])
def test_labels_that_do_not_fit_are_refused(name):
    student, teacher, target = draw()

    with pytest.raises(ValueError, match="labels must be 8 class indices"):
        METHODS[name](student, teacher, target[:7])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, t, y: rld(s, t, y, temperature=4, alpha_temperature=0, alpha=1, beta=8), "temperature must be pos"),
        (lambda s, t, y: ttm(s, t, gamma=0.0), "gamma must be positive"),
        (lambda s, t, y: gkl(s, t, y, temperature=4, t2=4, gamma=2.0, alpha=1, beta=1), r"gamma must be in \(0, 1\]"),
        (
            lambda s, t, y: ikl(s, t, y, temperature=4, t2=4, alpha=1, beta=1, class_prior=prior(19)),
            r"class_prior must have shape \(20, 20\), got \(19, 19\)",
        ),
        (lambda s, t, y: ikl(s, t, y, temperature=4, t2=0, alpha=1, beta=1), "temperature must be positive"),
        (lambda s, t, y: wkd_l(s, t, y, distances(19), temperature=8, gamma=1), "distances must be of 20 classes each"),
        (lambda s, t, y: wkd_l(s, t, y, distances(), temperature=8, gamma=1, sinkhorn_iter=0), "at least 1"),
        (lambda s, t, y: ab(s, t, temperature=0, alpha=1, beta=1), "temperature must be positive"),
        (
            lambda s, t, y: sld_step(s, t, y, s, t, ce_weight=1, kd_weight=1, epoch=1, temperatures=()),
            "temperatures is empty",
        ),
        (lambda s, t, y: crld_step(s, t, y, s[:7], t, temperature=4), "must have one shape"),
        (lambda s, t, y: sdd_kd(s, t, y, temperature=4), r"\(batch, classes, regions\)"),
        (lambda s, t, y: sdd_regions(s, t), r"needs a map \(batch, channels, height, width\)"),
        (lambda s, t, y: sdd_regions(s[..., None, None], t, scales=(2, 1)), "scales must be positive and begin with 1"),
    ],
)
def test_settings_and_shapes_that_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(*draw())


# RLD.


def test_rld_by_loops():
    student, teacher, target = draw()
    # The label first, in the middle, last; and a class that ties with it.
    target[0], target[1] = teacher[0].argmax(), teacher[1].argmin()
    teacher[2, (target[2] + 1) % CLASSES] = teacher[2, target[2]]
    scd = mcd = 0.0
    for s, t, y in zip(student, teacher, target.tolist(), strict=True):
        p, q = t.softmax(0).max().item(), s.softmax(0)[y].item()
        scd += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
        kept = [c for c in range(CLASSES) if t[c] < t[y]]
        if kept:
            p, q = (t[kept] / 4).log_softmax(0), (s[kept] / 4).log_softmax(0)
            mcd += 16 * (p.exp() * (p - q)).sum().item()

    loss = METHODS["rld"](student, teacher, target)

    assert loss.parts["scd"].item() == pytest.approx(scd / BATCH)
    assert loss.parts["mcd"].item() == pytest.approx(mcd / BATCH)


def test_rld_is_dkd_where_the_teacher_is_right():
    student, teacher, _ = draw()
    target = teacher.argmax(1)

    ours = rld(student, teacher, target, temperature=4, alpha_temperature=4, alpha=1, beta=8)

    assert_close(ours.total, dkd(student, teacher, target, temperature=4, alpha=1, beta=8).total)


# TTM and WTTM.


def test_ttm_of_power_one_is_kd_and_wttm_weighs_by_the_power_sum():
    student, teacher, _ = draw()
    power = teacher.softmax(1) ** 0.3

    assert_close(ttm(student, teacher, gamma=1.0).total, kd(student, teacher, temperature=1).total)
    assert_close(wttm(student, teacher, gamma=1.0).total, kd(student, teacher, temperature=1).total)
    each = [ttm(student[i : i + 1], teacher[i : i + 1], gamma=0.3).total for i in range(BATCH)]
    assert_close(wttm(student, teacher, gamma=0.3).total, (torch.stack(each) * power.sum(1)).mean())


# IKL and GKL.


@pytest.mark.parametrize("class_prior", [None, prior()], ids=["own", "prior"])
def test_pairs_of_classes_by_loops(class_prior):
    student, teacher, target = draw()
    weight = (teacher / 4).softmax(1) if class_prior is None else class_prior[target]
    gap = (teacher - student).unsqueeze(2) - (teacher - student).unsqueeze(1)
    settings = {"temperature": 4, "t2": 4, "alpha": 1, "beta": 1, "class_prior": class_prior}

    pairs = weight.unsqueeze(2) * weight.unsqueeze(1)
    assert_close(ikl(student, teacher, target, **settings).parts["mse"], (pairs * gap**2).sum() / 4 / BATCH)
    pairs = pairs**0.5
    flat = gkl(student, teacher, target, gamma=0.5, **settings)
    assert_close(flat.parts["mse"], (pairs * gap**2).sum() / 4 / pairs.sum())


def test_the_gradient_of_ikl_of_the_students_own_weights_is_that_of_kl():
    _, teacher, target = draw()
    student = (teacher + 1e-6 * torch.randn_like(teacher)).requires_grad_()

    apart = ikl(student, teacher, target, temperature=1, t2=1, alpha=0, beta=1).total
    (gradient,) = torch.autograd.grad(apart, student)

    # KL is mse of the teacher's weights to second order: q_s is q_t to the first.
    (expected,) = torch.autograd.grad(kd(student, teacher, temperature=1).total, student)
    assert_close(gradient, expected, rtol=0, atol=1e-11)


def test_the_prior_of_a_class_is_its_mean_over_the_epoch_before():
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.rand(4, 3, generator=generator), torch.tensor(labels)) for labels in ([0, 0, 1, 0], [1, 0, 1, 1])]
    means = ClassPrior(3)
    even = torch.full((3, 3), 1 / 3)

    for probability, target in batches:
        assert torch.equal(means(probability, target, 1), even)
    second = means(*batches[0], 2).clone()

    probability, target = (torch.cat(both) for both in zip(*batches, strict=True))
    for label in (0, 1):
        assert_close(second[label], probability[target == label].mean(0))
    # No image of the third class has been seen.
    assert torch.equal(second[2], even[2])
    assert_close(means(*batches[1], 3)[0], batches[0][0][batches[0][1] == 0].mean(0))
    # Validation counts nothing, and a checkpoint goes on in the midst of an epoch.
    seen = {name: tensor.clone() for name, tensor in means.state_dict().items()}
    means.eval()(*batches[0], 4)
    assert all(torch.equal(tensor, seen[name]) for name, tensor in means.state_dict().items())
    resumed = ClassPrior(3)
    resumed.load_state_dict(seen)
    means.train()
    assert torch.equal(resumed(*batches[0], 4), means(*batches[0], 4))


def test_a_term_with_a_prior_counts_its_batches():
    student, teacher, target = draw()
    term = GKLTerm(class_prior=True, t2=2.0)
    module = term.module(Shapes({}, {}, num_classes=CLASSES))

    first, second = (term(Lesson(student, teacher, target, epoch=epoch), module).total for epoch in (1, 2))

    settings = {"temperature": 4, "t2": 2, "gamma": 0.05, "alpha": 1, "beta": 16}
    means = torch.full((CLASSES, CLASSES), 1 / CLASSES).double()
    assert_close(first, gkl(student, teacher, target, class_prior=means, **settings).total)
    for label in target:
        means[label] = (teacher / 2).softmax(1)[target == label].mean(0)
    # The counts are float32.
    assert_close(second, gkl(student, teacher, target, class_prior=means, **settings).total, rtol=1e-6, atol=0)


# WKD-L.


def test_transport_by_loops_over_samples():
    student, teacher, target = draw()
    cost = 1 - (-2 * distances()).exp()
    expected = 0.0
    for s, t, y in zip(student, teacher, target.tolist(), strict=True):
        rest = [c for c in range(CLASSES) if c != y]
        p, q, c = (s[rest] / 2).softmax(0), (t[rest] / 2).softmax(0), cost[rest][:, rest].relu() + 1e-8
        kernel, u = (-c / 0.1).exp(), torch.full_like(p, 1 / (CLASSES - 1))
        for _ in range(7):
            v = q / (kernel.T @ u + 1e-8)
            u = p / (kernel @ v + 1e-8)
        expected += (u[:, None] * kernel * v * c).sum().item() / BATCH

    settings = {"sinkhorn_reg": 0.1, "sinkhorn_iter": 7, "sharpen": 2.0}
    loss = wkd_l(student, teacher, target, distances(), temperature=2, gamma=3, **settings)

    assert loss.parts["wkd"].item() == pytest.approx(expected)
    assert_close(loss.total, loss.parts["target"] + 3 * loss.parts["wkd"])


def test_with_two_classes_nothing_is_moved():
    student, teacher, target = draw(classes=2)
    student.requires_grad_()

    moved = wkd_l(student, teacher, target, distances(2), temperature=8, gamma=1).parts["wkd"]

    assert torch.autograd.grad(moved, student)[0].abs().max() < 1e-12


def test_gamma_falls_late_in_the_run():
    student, teacher, target = draw()
    term = WKDTerm(decay_start=0.625).over(240)
    module = term.module(Shapes({}, {}, torch.randn(CLASSES, 6), num_classes=CLASSES))
    whole = WKDTerm()(Lesson(student, teacher, target, epoch=240), module)

    def share(epoch):
        loss = term(Lesson(student, teacher, target, epoch=epoch), module)
        return ((loss.total - loss.parts["target"]) / (whole.total - whole.parts["target"])).item()

    assert [share(epoch) for epoch in (1, 150, 195, 240)] == pytest.approx([1, 1, 0.5, 0], abs=1e-12)
    assert WKDTerm(gamma=CosineWeight(start=600, end=0)).over(7).gamma.epochs == 7
    with pytest.raises(ValueError, match="linear classifier"):
        term.module(Shapes({}, {}))


# AB divergence.


def test_special_cases_of_the_alpha_beta_divergence():
    student, teacher, _ = draw()

    def of(alpha, beta):
        return ab(student, teacher, temperature=4, alpha=alpha, beta=beta).total

    assert_close(of(1, 0), kd(student, teacher, temperature=4).total / 16)
    assert_close(of(0, 1), reverse_kl(student, teacher, temperature=4).total / 16)
    # Limits come with a factor, as in the official code: alpha, or beta where alpha is 0.
    assert_close(of(0.5, 0), 0.5 * of(0.5, 1e-7), rtol=1e-5, atol=0)
    assert_close(of(0, 0.5), 0.5 * of(1e-7, 0.5), rtol=1e-5, atol=0)
    assert_close(of(0.5, -0.5), 0.5 * of(0.5, -0.5 + 1e-7), rtol=1e-5, atol=0)
    assert_close(of(0.3, 0.6), ab(teacher, student, temperature=4, alpha=0.6, beta=0.3).total)
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        ABDivergenceTerm(beta=-0.5)


# SortKD, SLD, CRLD.


def test_sorted_and_swapped_logits():
    logits, target = torch.tensor([[3.0, 1.0, 2.0, 0.0]] * 3), torch.tensor([3, 2, 0])

    assert sorted_logits(logits, target).tolist() == [[2, 0, 1, 3], [2, 1, 3, 0], [3, 1, 2, 0]]
    assert swapped(logits, target).tolist() == [[0, 1, 2, 3], [2, 1, 3, 0], [3, 1, 2, 0]]
    # What is equal keeps the order of classes.
    assert sorted_logits(torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([2])).tolist() == [[1, 0, 1]]


def test_a_teacher_that_is_right_is_neither_sorted_nor_swapped():
    student, teacher, _ = draw()
    target = teacher.argmax(1)

    assert torch.equal(sorted_logits(teacher, target), teacher)
    assert torch.equal(swapped(teacher, target), teacher)
    assert_close(sort_kd(student, teacher, target, temperature=4).total, kd(student, teacher, temperature=4).total)


def test_the_swapped_student_teaches_itself_late():
    student, teacher, target = draw()
    student.requires_grad_()

    early, late = (
        sld_step(student, teacher, target, student, teacher, ce_weight=0, kd_weight=1, epoch=epoch, temperatures=(3,))
        for epoch in (150, 151)
    )

    p, q = ((logits / 3).log_softmax(1) for logits in (swapped(student, target), student))
    own = 9 * (p.exp() * (p - q)).sum(1).mean()
    assert_close(late.total - early.total, 2 * own)
    gradient, expected = (
        torch.autograd.grad(x, student, retain_graph=True)[0] for x in (late.total - early.total, 2 * own)
    )
    assert_close(gradient, expected)


def test_two_equal_views_of_a_sure_teacher_are_kd():
    student, teacher, target = draw()

    loss = crld_step(student, teacher, target, student, teacher, temperature=4, tau_w=0.0, tau_s=0.0)
    none = crld_step(student, teacher, target, student, teacher, temperature=4, tau_w=1.1, tau_s=1.1)

    assert_close(loss.parts["loss_kd"], 5 * kd(student, teacher, temperature=4).total)
    assert none.parts["loss_kd"] == 0


# SDD.


def test_one_region_is_the_method_itself():
    student, teacher, target = draw()
    one = student.unsqueeze(2), teacher.unsqueeze(2), target

    assert_close(sdd_kd(*one, temperature=4).total, kd(student, teacher, temperature=4).total)
    whole = dkd(student, teacher, target, temperature=4, alpha=1, beta=8).total
    assert_close(sdd_dkd(*one, temperature=4, alpha=1, beta=8).total, whole)


def test_regions_that_contradict_the_whole_image_weigh_twice():
    # The whole image and the first region are class 0, the second is class 1.
    teacher = torch.tensor([[[3.0, 2.0, 0.0], [0.0, 1.0, 5.0]]]).expand(2, 2, 3)

    assert region_weights(teacher, torch.tensor([0, 1])).tolist() == [[1, 1, 2], [1, 1, 2]]


@pytest.mark.parametrize("scales", [(1, 2, 4), (1, 3)])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (SDDKDTerm, {"temperature": 3.0}),
        (SDDDKDTerm, {"temperature": 3.0, "alpha": 2.0, "beta": 5.0}),
        (SDDNKDTerm, {"temperature": 2.0, "gamma": 0.5}),
    ],
)
def test_a_term_of_regions_needs_class_maps_and_logits_alone(kind, settings, scales):
    generator = torch.Generator().manual_seed(0)
    term, target = kind(scales=scales, **settings), torch.tensor([0, 1, 2])
    logits, regions, maps = [], [], []
    for channels, size in ((6, 5), (7, 8)):  # 5 does not divide
        shapes = (3, channels, size, size), (4, channels), (4,)
        features, weight, bias = (torch.randn(shape, generator=generator).double() for shape in shapes)
        logits.append(features.mean((2, 3)) @ weight.T + bias)
        regions.append(sdd_regions(features, weight, bias, scales=scales))
        maps.append(class_activation_maps(features, weight))
    layers = [{look: one} for (look,), one in zip(term.needs[1:3], maps, strict=True)]

    loss = term(Lesson(*logits, target, *layers))

    (function,) = (function for name, function in REGIONS.items() if name.replace("_", "") in kind.__name__)
    assert_close(loss.total, function(*regions, target, **settings).total)


@pytest.mark.parametrize("scales", [(2, 1), (), (1, 0)])
def test_scales_begin_with_the_whole_image(scales):
    with pytest.raises(ValidationError, match="scales"):
        SDDKDTerm(scales=scales)


# Terms.

MADE = [*(kind() for kind in TERMS.values()), IKLTerm(class_prior=True), GKLTerm(class_prior=True)]


@pytest.mark.parametrize("term", MADE, ids=lambda term: term.type)
def test_no_term_waits_for_the_device(term):
    student, teacher, target = draw()
    module = term.module(Shapes({}, {}, torch.randn(CLASSES, 6), num_classes=CLASSES))

    with Waits() as waits:
        term(Lesson(student.requires_grad_(), teacher, target), module).total.backward()

    assert not waits.seen


@pytest.mark.parametrize("term", MADE, ids=lambda term: term.type)
def test_a_term_of_standardised_logits(term):
    student, teacher, target = draw()
    module = term.module(Shapes({}, {}, torch.randn(CLASSES, 6), num_classes=CLASSES))
    switched = term.model_copy(update={"standardise": True})

    ours = switched(Lesson(student, teacher, target), module).total

    assert_close(ours, term(Lesson(standardise(student), standardise(teacher), target), module).total)


@pytest.mark.parametrize("kind", TERMS.values(), ids=lambda kind: kind.__name__)
def test_objectives_are_recipes(kind):
    for name, (supervised, distilled) in kind.objectives.items():
        assert name == distilled["type"]
        assert CrossEntropyTerm(**supervised).weight in (0.1, 1.0)
        assert kind(**distilled).over(240).warmup_epochs in (0, 20)
