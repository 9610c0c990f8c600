"""What a network gets wrong, how sure it is, and where it differs from its teacher; of one label an image.

Shape suffixes: N samples, C classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Bin(NamedTuple):
    """Answers of like confidence.

    Attributes:
        confidence: Their mean, in [0, 1].
        accuracy: The share of them that is right.
        share: Of all answers.
    """

    confidence: float
    accuracy: float
    share: float


def reliability(logits_NC: Tensor, labels_N: Tensor, *, bins: int = 10) -> list[Bin]:
    """Sort answers by their confidence into equal parts of [0, 1]; empty ones are left out (Guo et al., 2017)."""
    confidence_N, answer_N = logits_NC.softmax(1).max(1)
    right_N = (answer_N == labels_N).float()
    number_N = (confidence_N * bins).long().clamp(max=bins - 1)
    found = []
    for number in range(bins):
        of_bin_N = number_N == number
        if of_bin_N.any():
            mean = confidence_N[of_bin_N].mean().item()
            found.append(Bin(mean, right_N[of_bin_N].mean().item(), of_bin_N.float().mean().item()))
    return found


class Confusion(NamedTuple):
    """One class taken for another.

    Attributes:
        label: What it is.
        answer: What it was taken for.
        times: How often.
        samples: Their numbers, the surest first.
    """

    label: int
    answer: int
    times: int
    samples: tuple[int, ...]


def confusions(logits_NC: Tensor, labels_N: Tensor, *, most: int = 8) -> list[Confusion]:
    """List the pairs of classes that are confused most, the most frequent first."""
    classes = logits_NC.shape[1]
    confidence_N, answer_N = logits_NC.softmax(1).max(1)
    pair_N = labels_N * classes + answer_N
    wrong_N = answer_N != labels_N
    counts = pair_N[wrong_N].bincount(minlength=classes * classes)
    found = []
    for pair in counts.argsort(descending=True, stable=True)[:most].tolist():
        if not counts[pair]:
            break
        samples = (wrong_N & (pair_N == pair)).nonzero().squeeze(1)
        samples = samples[confidence_N[samples].argsort(descending=True)]
        found.append(Confusion(pair // classes, pair % classes, int(counts[pair]), tuple(samples.tolist())))
    return found


def disagreements(student_NC: Tensor, teacher_NC: Tensor, *, most: int = 12) -> list[int]:
    """Number the samples on which two networks differ, those first on which both are surest."""
    student, teacher = student_NC.softmax(1).max(1), teacher_NC.softmax(1).max(1)
    surest_N = torch.minimum(student.values, teacher.values)
    surest_N = torch.where(student.indices != teacher.indices, surest_N, -1.0)
    found = surest_N.argsort(descending=True)[:most]
    return [number for number in found.tolist() if surest_N[number] >= 0]


def class_correlation(logits_NC: Tensor) -> Tensor:
    """Pearson correlation of every two classes' logits over all samples, (classes, classes), in [-1, 1]."""
    return logits_NC.double().T.corrcoef().nan_to_num()
