"""Figures against their definitions."""

import math

import pytest
import torch

from cakd_cli.evaluation import cost, metrics
from cakd_cli.losses import kd
from cakd_cli.machine.hardware import Hardware
from cakd_cli.models import ResNetSpec


@pytest.fixture
def answers():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(500, 7, generator=generator)
    labels = torch.where(
        torch.rand(500, generator=generator) < 0.6, logits.argmax(1), torch.randint(0, 7, (500,), generator=generator)
    )
    return logits, labels


def test_quality_is_its_definition(answers):
    logits, labels = answers
    probabilities = logits.softmax(1).tolist()
    confidence = [max(row) for row in probabilities]
    right = [row.index(max(row)) == label for row, label in zip(probabilities, labels.tolist(), strict=True)]
    ece = 0.0
    for low in range(15):
        members = [i for i, c in enumerate(confidence) if low / 15 < c <= (low + 1) / 15]
        if members:
            gap = sum(right[i] for i in members) - sum(confidence[i] for i in members)
            ece += abs(gap) / len(labels)
    ranks = [sorted(row, reverse=True).index(row[y]) for row, y in zip(probabilities, labels.tolist(), strict=True)]

    figures = metrics.quality(logits, labels)

    assert figures["top1"] == pytest.approx(sum(right) / 500)
    assert figures["top5"] == pytest.approx(sum(rank < 5 for rank in ranks) / 500)
    nll = -sum(math.log(row[y]) for row, y in zip(probabilities, labels.tolist(), strict=True)) / 500
    assert figures["nll"] == pytest.approx(nll, rel=1e-5)
    assert figures["ece"] == pytest.approx(ece, abs=1e-6)


def test_ece_counts_a_confidence_of_one_in_the_last_bin():
    # 100 answers at confidence 1, 90 of them right, and 100 at 0.95, all right: one bin, 0.95 right, 0.975 sure.
    sure, nearly = torch.tensor([50.0, 0.0]), torch.tensor([0.95, 0.05]).log()
    logits = torch.cat([sure.repeat(100, 1), nearly.repeat(100, 1)])
    labels = torch.tensor([0] * 90 + [1] * 10 + [0] * 100)

    assert metrics.quality(logits, labels)["ece"] == pytest.approx(0.025, abs=1e-5)


def test_two_classes_have_a_top5_of_one():
    assert metrics.quality(torch.randn(9, 2), torch.zeros(9, dtype=torch.long))["top5"] == 1


def test_per_class(answers):
    logits, labels = answers
    labels = labels.clamp(max=5)
    shares = metrics.per_class(logits, labels, tuple("abcdefg"))

    assert shares["g"] is None
    assert shares["a"] == pytest.approx((logits.argmax(1)[labels == 0] == 0).float().mean().item())


def test_fidelity_parts_make_up_the_divergence():
    student, teacher = torch.randn(50, 20), torch.randn(50, 20)

    figures = metrics.fidelity(student, teacher)

    assert figures["kl"] == pytest.approx(kd(student.double(), teacher.double(), temperature=4).total.item() / 16)
    assert figures["agreement"] == pytest.approx((student.argmax(1) == teacher.argmax(1)).double().mean().item())
    assert 0 < figures["strong_mass"] < 1


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_a_student_like_its_teacher_has_nothing_left_to_learn(classes):
    teacher = 5 * torch.randn(30, classes)

    figures = metrics.fidelity(teacher.clone(), teacher)

    assert figures["agreement"] == 1
    assert max(abs(figures[key]) for key in ("kl", "bcd", "scd", "wcd")) < 1e-12


def test_better_is_top1_then_likelihood():
    assert metrics.is_better({"top1": 0.5, "nll": 9.0}, None)
    assert metrics.is_better({"top1": 0.6, "nll": 9.0}, {"top1": 0.5, "nll": 1.0})
    assert metrics.is_better({"top1": 0.5, "nll": 0.9}, {"top1": 0.5, "nll": 1.0})
    assert not metrics.is_better({"top1": 0.5, "nll": 1.0}, {"top1": 0.5, "nll": 1.0})


def test_near_chance():
    assert metrics.near_chance(0.11, 1 / 10)
    assert not metrics.near_chance(0.2, 1 / 10)
    assert metrics.near_chance(0.51, 1 / 2)
    assert not metrics.near_chance(0.6, 1 / 2)


def test_flops_count_two_per_multiply_add():
    model = ResNetSpec(type="resnet20").build(in_channels=3, num_classes=100)

    # 40.8 M multiply-adds, as the literature's 41 M.
    assert cost.flops(model, (3, 32, 32)) == pytest.approx(81.6e6, rel=0.01)


def test_memory_of_a_training_step_is_of_the_right_size():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten())

    # The input and the output of the ReLU, in float32.
    assert cost.saved_bytes_per_image(model, (3, 16, 16)) == 4 * (3 + 8) * 16 * 16


def test_two_views_of_one_memory_are_counted_once():
    class Halves(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(4, 4, 1)

        def forward(self, images):
            return sum(self.second(half) for half in self.first(images).chunk(2, dim=1))

    # The input, and the first output, which both halves are views of.
    assert cost.saved_bytes_per_image(Halves(), (3, 16, 16)) == 4 * (3 + 8) * 16 * 16


def test_latency_says_how_often_it_measured():
    report = cost.latency(torch.nn.Flatten(), (1, 4, 4), Hardware(torch.device("cpu"), "fp32"), 2)

    assert report["n"] >= 5
    assert report["quartiles_ms"][0] <= report["median_ms"] <= report["quartiles_ms"][1]
