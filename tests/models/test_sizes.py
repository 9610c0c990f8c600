"""The table of what networks cost is what they cost."""

import pytest
import torch

from cakd_cli import models
from cakd_cli.evaluation import cost
from cakd_cli.models.sizes import CHANNELS, CLASSES, SIZES, Size

# Enough to see that the table and the networks are told apart; the others are slow.
QUICK = ("resnet8", "wrn-16-1", "vgg8")


def measured(name: str) -> Size:
    with torch.device("meta"):
        model = models.names()[name](type=name).build(in_channels=CHANNELS, num_classes=CLASSES)
    side = SIZES[name].side
    return Size(models.num_parameters(model), cost.flops(model, (CHANNELS, side, side)), side)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SIZES]
)
def test_a_network_costs_what_the_table_says(name):
    assert measured(name) == SIZES[name]


def test_every_network_that_is_not_a_librarys_is_in_the_table():
    assert set(SIZES) == {name for name, spec in models.names().items() if spec.shorthand is None}
