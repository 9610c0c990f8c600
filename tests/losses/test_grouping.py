"""Which classes each rule picks."""

import torch

from cakd_cli.losses import grouping

TEACHER = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(2, 1)


def test_label():
    expected = [[False, False, True, False], [True, False, False, False]]

    assert grouping.label(TEACHER, torch.tensor([2, 0])).tolist() == expected


def test_top_k_counts_exactly_k_also_with_ties():
    assert grouping.top_k(TEACHER, 2)[0].tolist() == [True, True, False, False]
    assert grouping.top_k(torch.zeros(1, 6), 3).sum() == 3
    assert grouping.top_k(TEACHER, 9).all()


def test_top_mass_is_the_smallest_set():
    for mass, count in ((0.4, 1), (0.5, 1), (0.51, 2), (0.81, 3), (0.96, 4), (1.0, 4)):
        assert grouping.top_mass(TEACHER.double(), mass)[0].sum() == count, mass


def test_top_mass_needs_more_classes_when_softer():
    assert grouping.top_mass(TEACHER, 0.75, temperature=4)[0].sum() > grouping.top_mass(TEACHER, 0.75)[0].sum()


def test_threshold_may_pick_none():
    assert grouping.threshold(TEACHER, 0.2)[0].tolist() == [True, True, False, False]
    assert not grouping.threshold(TEACHER, 0.9).any()
