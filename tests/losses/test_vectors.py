"""KD, DKD and CAKD against the official implementations."""

import pytest
import torch

from cakd_cli.losses import cakd, cross_entropy, dkd, kd
from tests.losses import reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


@DTYPES
@pytest.mark.parametrize("name", reference.cases("KD"))
def test_kd(name, dtype):
    case, student, teacher, _ = reference.inputs(name, dtype)

    loss = kd(student, teacher, temperature=case["params"]["temperature"])

    reference.assert_matches(case, loss.total, loss.parts, student)


@DTYPES
@pytest.mark.parametrize("name", reference.cases("DKD"))
def test_dkd(name, dtype):
    case, student, teacher, target = reference.inputs(name, dtype)

    loss = dkd(student, teacher, target, **case["params"])

    reference.assert_matches(case, loss.total, loss.parts, student)


@DTYPES
@pytest.mark.parametrize("name", reference.cases("CAKD"))
def test_cakd(name, dtype):
    case, student, teacher, _ = reference.inputs(name, dtype)
    settings = {key: case["params"][key] for key in ("temperature", "alpha", "beta")}

    loss = cakd(
        student, teacher, reference.mask(case), **settings, scale_by_mass=case["params"]["reading"] == "multiply"
    )

    reference.assert_matches(case, loss.total, loss.parts, student)


@DTYPES
@pytest.mark.parametrize("name", reference.cases("KD_step", "DKD_step"))
def test_whole_objective(name, dtype):
    case, student, teacher, target = reference.inputs(name, dtype)
    settings = case["params"]

    supervised = cross_entropy(student, target).total * settings["ce_weight"]
    if case["method"] == "KD_step":
        distilled = settings["kd_weight"] * kd(student, teacher, temperature=settings["temperature"]).total
    else:
        weights = {key: settings[key] for key in ("temperature", "alpha", "beta")}
        warmup = min(settings["epoch"] / settings["warmup_epochs"], 1)
        distilled = warmup * dkd(student, teacher, target, **weights).total

    parts = {"loss_ce": supervised, "loss_kd": distilled}
    reference.assert_matches(case, supervised + distilled, parts, student)


def test_no_vector_was_forgotten():
    counts = {method: len(reference.cases(method)) for method in ("KD", "DKD", "CAKD", "KD_step", "DKD_step")}

    assert counts == {"KD": 4, "DKD": 6, "CAKD": 7, "KD_step": 1, "DKD_step": 2}
