"""Figures from logits: accuracy, calibration, and fidelity to a teacher.

Shape suffixes: N samples, C classes.
"""

from collections.abc import Mapping

from torch import Tensor

from cakd_cli.losses import cross_entropy, decouple, grouping, two_groups

# The temperature that the literature distils with: at 1 a sure teacher hides its second thoughts.
FIDELITY_TEMPERATURE = 4.0


def hits(logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    """Whether the largest logit of each sample is its label, or one of its labels, bool (samples,)."""
    answer_N = logits_NC.argmax(1)
    return labels_N.gather(1, answer_N.unsqueeze(1)).squeeze(1) if labels_N.ndim == 2 else answer_N == labels_N


def brief(logits_NC: Tensor, labels_N: Tensor) -> dict[str, float]:
    """What an epoch's line shows.

    Top-1 accuracy in [0, 1] (of several labels: the share of samples whose first answer is one of them) and negative
    log-likelihood in nats; of several labels also ``map``, the mean average precision, in [0, 1].
    """
    figures = {"top1": hits(logits_NC, labels_N).double().mean().item()}
    if labels_N.ndim == 2:
        figures["map"] = _mean(average_precision(logits_NC, labels_N))
    return figures | {"nll": cross_entropy(logits_NC, labels_N).total.item()}


def quality(logits_NC: Tensor, labels_N: Tensor) -> dict[str, float]:
    """Top-1, top-5, negative log-likelihood (nats) and expected calibration error (15 bins); shares are in [0, 1].

    With fewer than five classes top-5 is 1. Of several labels: what :func:`brief` says.
    """
    figures = brief(logits_NC, labels_N)
    if labels_N.ndim == 2:
        return figures
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

    num_classes = logits_NC.shape[1]
    top5 = multiclass_accuracy(logits_NC, labels_N, num_classes, average="micro", top_k=min(5, num_classes))
    # torchmetrics 1.9 puts a confidence of exactly 1 into a sixteenth bin of its own.
    probabilities_NC = logits_NC.softmax(1).clamp(max=1 - 2**-24)
    error = multiclass_calibration_error(probabilities_NC, labels_N, num_classes, n_bins=15, norm="l1")
    return {"top1": figures["top1"], "top5": top5.item(), "nll": figures["nll"], "ece": error.item()}


def average_precision(logits_NC: Tensor, labels_NC: Tensor) -> list[float | None]:
    """Average precision of each class, in [0, 1]; none for a class that no sample has."""
    from torchmetrics.functional.classification import binary_average_precision

    # In float64: sigmoids of large logits would tie in float32.
    scores_NC = logits_NC.double().sigmoid()
    return [
        binary_average_precision(scores_N, labels_N.long()).item() if labels_N.any() else None
        for scores_N, labels_N in zip(scores_NC.unbind(1), labels_NC.unbind(1), strict=True)
    ]


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0


def per_class(logits_NC: Tensor, labels_N: Tensor, class_names: tuple[str, ...]) -> dict[str, float | None]:
    """Share of each class's samples that are recognised; of several labels the class's average precision.

    None for a class without samples.
    """
    if labels_N.ndim == 2:
        return dict(zip(class_names, average_precision(logits_NC, labels_N), strict=True))
    right_N = logits_NC.argmax(1) == labels_N
    counts_C = labels_N.bincount(minlength=len(class_names))
    rights_C = labels_N[right_N].bincount(minlength=len(class_names))
    return {
        name: right / count if count else None
        for name, right, count in zip(class_names, rights_C.tolist(), counts_C.tolist(), strict=True)
    }


def fidelity(student_NC: Tensor, teacher_NC: Tensor) -> dict[str, float]:
    """What the student has and has not learnt of its teacher.

    ``agreement`` is the share of samples with one answer. The rest is at temperature 4, in nats, without the factor
    temperature squared: ``kl`` = KL(teacher || student) = ``bcd`` + p_s ``scd`` + p_w ``wcd`` sample by sample, where
    the strong classes are the teacher's top five (half of all if there are fewer than ten) and ``strong_mass`` is p_s.
    """
    num_classes = student_NC.shape[1]
    strong_NC = grouping.top_k(teacher_NC, min(5, max(1, num_classes // 2)))
    # In float64 so that a student equal to its teacher shows 0.
    split = decouple(
        student_NC.double(),
        teacher_NC.double(),
        two_groups(strong_NC),
        num_groups=2,
        temperature=FIDELITY_TEMPERATURE,
    )
    scd, wcd = split.within_BK.mean(0).tolist()
    return {
        "agreement": (student_NC.argmax(1) == teacher_NC.argmax(1)).double().mean().item(),
        "kl": split.kl_B.mean().item(),
        "bcd": split.between_B.mean().item(),
        "scd": scd,
        "wcd": wcd,
        "strong_mass": split.teacher_mass_BK[:, 0].mean().item(),
    }


def near_chance(top1: float, chance: float) -> bool:
    """Whether an accuracy is less than a twentieth of the way from guessing to perfect."""
    return top1 < chance + 0.05 * (1 - chance)


def chance(labels_N: Tensor, num_classes: int) -> float:
    """Top-1 of whoever guesses."""
    return labels_N.float().mean().item() if labels_N.ndim == 2 else 1 / num_classes


def headline(figures: Mapping[str, float]) -> tuple[str, float]:
    """Name the figure that decides, and give it: mean average precision of several labels, else top-1."""
    return ("mAP", figures["map"]) if "map" in figures else ("top-1", figures["top1"])


def is_better(figures: dict[str, float], best: dict[str, float] | None) -> bool:
    """Compare by the headline, and by likelihood where that is equal."""
    return best is None or (headline(figures)[1], -figures["nll"]) > (headline(best)[1], -best["nll"])


def differ(first_NC: Tensor, second_NC: Tensor) -> tuple[float, float]:
    """Largest absolute difference of two sets of logits, and share of samples with one answer."""
    largest = (first_NC - second_NC).abs().max().item()
    return largest, (first_NC.argmax(1) == second_NC.argmax(1)).float().mean().item()
