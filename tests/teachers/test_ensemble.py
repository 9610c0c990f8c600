"""Several teachers that answer as one."""

import json

import pytest
import torch
from torch.testing import assert_close

from cakd_cli.errors import RecipeError
from cakd_cli.machine.hardware import choose_hardware
from cakd_cli.models.layers import LOGITS
from cakd_cli.recipe.resolve import resolve
from cakd_cli.teachers import Teacher, forms, load_teacher
from cakd_cli.teachers.ensemble import Ensemble
from cakd_cli.teachers.forms import Form
from tests.conftest import train_toy
from tests.teachers.test_forms import used_teacher

CPU = choose_hardware("cpu", "fp32")
OWN = ((0.5,) * 3, (0.25,) * 3)


@pytest.fixture
def networks():
    return used_teacher("resnet8", CPU).model, used_teacher("wrn-16-1", CPU).model


@pytest.fixture
def images():
    return torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def ensemble(networks, combine, weights=(1.0, 3.0), normalisations=(OWN, OWN)):
    mean, std = OWN
    return Ensemble(networks, weights, combine, mean=mean, std=std, normalisations=normalisations).eval()


def test_probabilities_are_averaged(networks, images):
    p, q = (network(images).softmax(1) for network in networks)

    found = ensemble(networks, "probabilities")(images)

    assert_close(found.softmax(1), 0.25 * p + 0.75 * q)
    # Log probabilities: they stand for logits of a distribution that is whole already.
    assert_close(found.logsumexp(1), torch.zeros(6), atol=1e-5, rtol=0)


def test_logits_are_averaged(networks, images):
    a, b = (network(images) for network in networks)

    assert_close(ensemble(networks, "logits")(images), 0.25 * a + 0.75 * b)


def test_each_sample_trusts_whoever_is_sure(networks, images):
    p, q = (network(images).softmax(1) for network in networks)
    trust = torch.stack([0.25 * p.amax(1), 0.75 * q.amax(1)])
    trust = (trust / trust.sum(0)).unsqueeze(2)

    found = ensemble(networks, "confidence")(images).softmax(1)

    assert_close(found, trust[0] * p + trust[1] * q)


def test_each_member_sees_images_as_it_learnt_to(networks, images):
    """Images come normalised as the data's are; a member may want them otherwise."""
    other = ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in OWN)
    own_mean, own_std = (torch.tensor(x).view(1, 3, 1, 1) for x in other)

    found = ensemble(networks, "logits", (1.0, 1.0), (OWN, other))((images - mean) / std)

    expected = (networks[0]((images - mean) / std) + networks[1]((images - own_mean) / own_std)) / 2
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["folded", "folded-nchw"])
@pytest.mark.parametrize("combine", ["probabilities", "logits", "confidence"])
def test_an_ensemble_takes_the_faster_forms(networks, form, combine):
    teacher = Teacher(ensemble(networks, combine), *OWN, "two", "two", "", {LOGITS: (10,)})
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)

    plain, folded = (Form(teacher, name, CPU).answers_to(images) for name in ("plain", form))

    assert forms._distance(folded, plain) < 1e-5


@pytest.fixture(scope="session")
def second_teacher(toy_file, tmp_path_factory):
    return train_toy(toy_file, tmp_path_factory.mktemp("second") / "teacher", seed=1)


def test_a_student_of_two(cakd, toy_file, toy_teacher, second_teacher, tmp_path):
    words = ("distill", "--data", f"tensors:{toy_file}", "--student", "resnet8", "--loss", "kd", "--epochs", 2)
    words = (*words, "--batch-size", 16, f"teacher=[{toy_teacher}, {second_teacher}]")

    first = cakd(*words, "--out", tmp_path / "one")
    second = cakd(*words, "--out", tmp_path / "two", "--seed", 0)
    other = cakd(*words, "--out", tmp_path / "three", "teacher.combine=confidence", "teacher.weights=[1, 2]")

    assert (first.code, second.code, other.code) == (0, 0, 0), first.err + other.err
    assert f"teacher resnet8 of {toy_teacher} and resnet8 of {second_teacher}" in first.err
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two", "three")]
    asked = [sum(json.loads(line)["teacher"]["asked"] for line in run) for run in lines]
    # What two say together is remembered too, and another way to combine them is another teacher.
    assert asked[0] > 0
    assert asked[1] == 0
    assert asked[2] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["teacher=[a]", "loss=kd"], "teacher.members: list should have at least 2 items, not 1"),
        (["teacher=[a, b]", "teacher.weights=[1]", "loss=kd"], "there are 2 members and 1 weights"),
        (["teacher=[a, resnet8]", "loss=kd"], "teacher: resnet8 has fresh weights"),
        (["teacher=[a, b]", "loss=cakd"], "features are compared with one"),
        (["teacher=[a, b]", "teacher.combine=best", "loss=kd"], "teacher.combine: no 'best' here"),
    ],
)
def test_wrong_ensembles(words, message):
    with pytest.raises(RecipeError) as caught:
        resolve(["data=digits", "model=resnet8", *words], {})

    assert message in str(caught.value)


def test_a_member_must_know_the_same_classes(toy_teacher):
    recipe = resolve([f"teacher=[{toy_teacher}, {toy_teacher}]", "data=digits", "model=resnet8", "loss=kd"], {})

    with pytest.raises(RecipeError, match="has no class for 10 of the 10 classes of digits"):
        load_teacher(recipe.teacher, recipe.data.load(), CPU)
