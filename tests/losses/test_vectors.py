"""Every logit loss against the official implementations."""

import pytest
import torch
from torch.testing import assert_close

from cakd_cli import losses
from cakd_cli.losses import Lesson, Shapes, grouping
from tests.losses import reference

# The terms that a recipe runs, by the vectors' name, with settings that the name stands for.
TERMS = {
    "KD": (losses.KDTerm, {}),
    "DKD": (losses.DKDTerm, {}),
    "DKDMod": (losses.DKDTerm, {}),
    "GDKD": (losses.GDKDTerm, {}),
    "GDKD3": (losses.GDKD3Term, {}),
    "GDKDAutoW": (losses.GDKDAutoWTerm, {}),
    "GDKDAutok": (losses.GDKDAutoKTerm, {}),
    "LSKD_KD": (losses.KDTerm, {"standardise": True}),
    "LSKD_DKD": (losses.DKDTerm, {"standardise": True}),
    "DIST": (losses.DISTTerm, {}),
    "NKD": (losses.NKDTerm, {}),
}
# Public functions that no recipe has as a term of its own; those of LSKD are compositions of the terms above.
FUNCTIONS = {
    "LS_GDKD": (losses.ls_gdkd, False),
    "LSKD_KD": (losses.lskd_kd, False),
    "LSKD_DKD": (losses.lskd_dkd, True),
    "MLKD_instance_kd": (losses.mlkd_instance_kd, False),
    "MLKD_class_correlation": (losses.mlkd_class_correlation, False),
    "MLKD_batch_correlation": (losses.mlkd_batch_correlation, False),
}
# Whole objectives: what is distilled, and the method it is made of.
STEPS = {"KD_step": "KD", "DKD_step": "DKD", "GDKD_step": "GDKD", "LSKD_KD_step": "LSKD_KD"}
OTHERS = {
    "CAKD",
    "CTKD",
    "MLKD_single_view",
    "MLKD_step",
    "SoftRank",
    "SoftSpearman",
    "HardSpearman",
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def term_of(method, params, **more):
    """The term as a recipe would have it."""
    kind, settings = TERMS[method]
    return kind(**settings, **params, **more)


@DTYPES
@pytest.mark.parametrize("name", reference.cases(*TERMS))
def test_term(name, dtype):
    case, student, teacher, target = reference.inputs(name, dtype)

    loss = term_of(case["method"], case["params"])(Lesson(student, teacher, target))

    reference.assert_matches(case, loss.total, loss.parts, student)


@DTYPES
@pytest.mark.parametrize("name", reference.cases("LS_GDKD"))
def test_the_term_of_standardised_logits_shows_its_three_parts(name, dtype):
    case, student, teacher, target = reference.inputs(name, dtype)
    params = dict(case["params"])
    norm_mode = params.pop("norm_mode", "global")

    term = losses.GDKDTerm(standardise=True if norm_mode == "global" else norm_mode, **params)
    loss = term(Lesson(student, teacher, target))

    components = {name: case["components"][name] for name in ("high", "low_top", "low_other")}
    assert set(loss.parts) == set(components)
    reference.assert_matches(case | {"components": components}, loss.total, loss.parts, student)


@DTYPES
@pytest.mark.parametrize("name", reference.cases(*FUNCTIONS))
def test_function(name, dtype):
    case, student, teacher, target = reference.inputs(name, dtype)
    function, labelled = FUNCTIONS[case["method"]]

    loss = function(student, teacher, *([target] if labelled else []), **case["params"])

    reference.assert_matches(case, loss.total, loss.parts, student)


@DTYPES
@pytest.mark.parametrize("name", reference.cases("CAKD"))
def test_cakd(name, dtype):
    case, student, teacher, _ = reference.inputs(name, dtype)
    settings = {key: case["params"][key] for key in ("temperature", "alpha", "beta")}

    multiply = case["params"]["reading"] == "multiply"

    loss = losses.cakd(student, teacher, reference.mask(case), **settings, scale_by_mass=multiply)

    reference.assert_matches(case, loss.total, loss.parts, student)


@DTYPES
@pytest.mark.parametrize("name", reference.cases(*STEPS))
def test_whole_objective(name, dtype):
    case, student, teacher, target = reference.inputs(name, dtype)
    params = dict(case["params"])
    ce_weight, kd_weight = params.pop("ce_weight"), params.pop("kd_weight", 1.0)
    epoch, warmup = params.pop("epoch", 1), params.pop("warmup_epochs", 0)
    terms = [
        losses.CrossEntropyTerm(weight=ce_weight),
        term_of(STEPS[case["method"]], params, weight=kd_weight, warmup_epochs=float(warmup)),
    ]

    supervised, distilled = (
        term.factor * term(Lesson(student, teacher, target)).total for term in losses.Weights(terms).at(epoch)
    )

    parts = {"loss_ce": supervised, "loss_kd": distilled}
    reference.assert_matches(case, supervised + distilled, parts, student)


@DTYPES
@pytest.mark.parametrize("name", reference.cases("MLKD_single_view"))
def test_mlkd_on_one_view(name, dtype):
    case, student, teacher, target = reference.inputs(name, dtype)

    params = dict(case["params"])
    ce_weight, kd_weight = params.pop("ce_weight"), params.pop("kd_weight")
    lesson = Lesson(student, teacher, target)
    term = losses.MLKDTerm(**params, reference_quirks=True)

    supervised, levels = ce_weight * losses.CrossEntropyTerm()(lesson).total, term(lesson)

    parts = {"loss_ce": supervised, "loss_kd": kd_weight * levels.total, **levels.parts}
    reference.assert_matches(case, supervised + kd_weight * levels.total, parts, student)
    whole = losses.mlkd_single_view(student, teacher, target, **case["params"], reference_quirks=True)
    assert_close(whole.total, supervised + kd_weight * levels.total)


@DTYPES
@pytest.mark.parametrize("name", reference.cases("MLKD_step"))
def test_mlkd_on_two_views(name, dtype):
    case, student, teacher, target = reference.inputs(name, dtype)
    strong = reference.CONTENT["input_sets"][case["input_set_strong"]]
    student_strong = reference.TENSORS[strong["student"]].to(dtype).requires_grad_()
    teacher_strong = reference.TENSORS[strong["teacher"]].to(dtype)
    settings = {key: case["params"][key] for key in ("temperature", "ce_weight", "kd_weight", "logit_standardisation")}

    loss = losses.mlkd_step(student, teacher, target, student_strong, teacher_strong, **settings, reference_quirks=True)

    reference.assert_matches(case, loss.total, loss.parts, student)
    reference.assert_gradient(case["grad_student_strong"], loss.total, student_strong)


@DTYPES
@pytest.mark.parametrize("name", reference.cases("CTKD"))
def test_ctkd(name, dtype):
    case, student, teacher, target = reference.inputs(name, dtype)
    params = dict(case["params"])
    names = ("t_start", "t_end")
    term = losses.CTKDTerm(
        **{name: params[name] for name in names if name in params}, reversal=-params.get("reversal_lambda", -1.0)
    )
    module = term.module(Shapes({}, {})).to(dtype)
    with torch.no_grad():
        module.theta.fill_(params["theta"])
    lesson = Lesson(student, teacher, target)

    supervised, distilled = losses.CrossEntropyTerm()(lesson), term(lesson, module)
    total = params.get("ce_weight", 0.1) * supervised.total + params.get("kd_weight", 0.9) * distilled.total
    parts = {**distilled.parts, "ce": supervised.total}
    (gradient,) = torch.autograd.grad(total, module.theta, retain_graph=True)
    assert_close(losses.ctkd(student, teacher, target, **params).total, total)
    # The small difference of two large terms: 2 T KL, and what softer answers take from it.
    limit = 1e-9 if dtype == torch.float64 else 1e-5
    assert_close(gradient.item(), case["grad_theta"], rtol=0, atol=limit)
    # At a temperature of 15.6 log probabilities near -4.6 differ by 0.1: float32 has a digit less for the difference.
    reference.assert_matches(case, total, parts, student, relative=1e-9 if dtype == torch.float64 else 2e-5)


@DTYPES
@pytest.mark.parametrize("name", reference.cases("SoftRank"))
def test_soft_rank(name, dtype):
    case = reference.CONTENT["cases"][name]
    values = torch.atleast_2d(reference.TENSORS[case["values"]].to(dtype)).requires_grad_()
    cotangent = torch.atleast_2d(reference.TENSORS[case["cotangent"]].to(dtype))

    ranks = losses.soft_rank(values, epsilon=case["params"]["epsilon"])
    (gradient,) = torch.autograd.grad(ranks, values, cotangent)

    expected = torch.atleast_2d(reference.TENSORS[case["soft_rank"]])
    expected_gradient = torch.atleast_2d(reference.TENSORS[case["grad_values"]])
    limit = 1e-9 if dtype == torch.float64 else 1e-4
    assert_close(ranks.double(), expected, rtol=limit, atol=limit)
    assert_close(gradient.double(), expected_gradient, rtol=limit, atol=limit * max(1, expected_gradient.abs().max()))


@DTYPES
@pytest.mark.parametrize("name", reference.cases("SoftSpearman"))
def test_soft_spearman(name, dtype):
    case, student, teacher, _ = reference.inputs(name, dtype)
    params = case["params"]

    loss = losses.soft_spearman(student, teacher, epsilon=params["epsilon"], zscore=params["zscore"])

    case = case | {"components": {"one_minus_rho": case["components"]["one_minus_rho"]}}
    reference.assert_matches(case, loss.total, loss.parts, student)


@pytest.mark.parametrize("name", reference.cases("HardSpearman"))
def test_hard_spearman(name):
    case, student, teacher, _ = reference.inputs(name, torch.float64)

    correlation = losses.hard_spearman(student, teacher)

    assert_close(correlation, torch.tensor(case["rho_per_sample"], dtype=torch.float64), rtol=0, atol=1e-9)


def test_the_number_of_classes_that_stand_out():
    (name,) = reference.cases("GDKDAutok")
    case, _, teacher, _ = reference.inputs(name, torch.float64)
    params = case["params"]

    k = grouping.auto_k(
        teacher,
        ratio_threshold=params["ratio_threshold"],
        topk_cap=params["topk_cap"],
        temperature=params["temperature"],
    )

    assert k.tolist() == case["per_sample_k"]


def test_no_vector_is_left_out():
    methods = {case["method"] for case in reference.CONTENT["cases"].values()}

    assert methods == set(TERMS) | set(FUNCTIONS) | set(STEPS) | OTHERS
    assert len(reference.CONTENT["cases"]) == 85
