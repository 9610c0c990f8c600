"""A linear classifier of given features: the optimum itself, for the loss is convex.

Shape suffixes: N samples, C classes, D elements of a feature.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

# Penalties that are tried, for features of unit variance; the best on held-out images is taken.
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_ITERATIONS = 200


class Labelled(NamedTuple):
    """Features of images and their labels.

    Attributes:
        features: float32 (samples, elements), on the CPU.
        labels: Class indices (samples,), on the CPU.
    """

    features: Tensor
    labels: Tensor


def best_linear(
    train: Labelled, held_out: Labelled, classes: int, penalties: Sequence[float] = PENALTIES
) -> tuple[nn.Linear, float]:
    """Fit a classifier to features, with the L2 penalty whose classifier is the best on held-out images.

    Returns:
        The classifier of the features as they are, and its penalty, which is one for features of unit variance.
    """
    mean_D, std_D = train.features.mean(0), train.features.std(0).clamp(min=1e-6)
    scaled_ND, held_ND = ((part.features - mean_D) / std_D for part in (train, held_out))
    found = []
    for penalty in penalties:
        classifier = fit_linear(scaled_ND, train.labels, classes, penalty)
        found.append((functional.cross_entropy(classifier(held_ND), held_out.labels).item(), penalty, classifier))
    _, penalty, classifier = min(found, key=lambda entry: entry[0])
    weight_CD = classifier.weight / std_D
    classifier.bias.sub_(weight_CD @ mean_D)
    classifier.weight.copy_(weight_CD)
    return classifier, penalty


@torch.enable_grad()
def fit_linear(features_ND: Tensor, labels_N: Tensor, classes: int, penalty: float) -> nn.Linear:
    """Minimise the cross-entropy plus half the penalty times the weights' squared norm, from weights of zero."""
    classifier = nn.Linear(features_ND.shape[1], classes)
    for parameter in classifier.parameters():
        nn.init.zeros_(parameter)
    solver = torch.optim.LBFGS(classifier.parameters(), max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> float:
        solver.zero_grad()
        loss = functional.cross_entropy(classifier(features_ND), labels_N)
        loss = loss + penalty / 2 * classifier.weight.square().sum()
        loss.backward()
        return loss.item()

    solver.step(closure)
    return classifier.requires_grad_(False)
