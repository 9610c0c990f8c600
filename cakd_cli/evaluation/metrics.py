"""Figures from logits: accuracy, calibration, and fidelity to a teacher.

Shape suffixes: N samples, C classes.
"""

from torch import Tensor
from torch.nn import functional

from cakd_cli.losses import decouple, grouping

# The temperature that the literature distils with: at 1 a sure teacher hides its second thoughts.
FIDELITY_TEMPERATURE = 4.0


def brief(logits_NC: Tensor, labels_N: Tensor) -> dict[str, float]:
    """Top-1 accuracy in [0, 1] and negative log-likelihood in nats: what an epoch's line shows."""
    return {
        "top1": (logits_NC.argmax(1) == labels_N).float().mean().item(),
        "nll": functional.cross_entropy(logits_NC, labels_N).item(),
    }


def quality(logits_NC: Tensor, labels_N: Tensor) -> dict[str, float]:
    """Top-1, top-5, negative log-likelihood (nats) and expected calibration error (15 bins); shares are in [0, 1].

    With fewer than five classes top-5 is 1.
    """
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

    num_classes = logits_NC.shape[1]
    top5 = multiclass_accuracy(logits_NC, labels_N, num_classes, average="micro", top_k=min(5, num_classes))
    # torchmetrics 1.9 puts a confidence of exactly 1 into a sixteenth bin of its own.
    probabilities_NC = logits_NC.softmax(1).clamp(max=1 - 2**-24)
    error = multiclass_calibration_error(probabilities_NC, labels_N, num_classes, n_bins=15, norm="l1")
    figures = brief(logits_NC, labels_N)
    return {"top1": figures["top1"], "top5": top5.item(), "nll": figures["nll"], "ece": error.item()}


def per_class(logits_NC: Tensor, labels_N: Tensor, class_names: tuple[str, ...]) -> dict[str, float | None]:
    """Share of each class's samples that are recognised; none for a class without samples."""
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
        (~strong_NC).long(),
        num_groups=2,
        temperature=FIDELITY_TEMPERATURE,
    )
    scd, wcd = split.within_BK.mean(0).tolist()
    return {
        "agreement": (student_NC.argmax(1) == teacher_NC.argmax(1)).float().mean().item(),
        "kl": split.kl_B.mean().item(),
        "bcd": split.between_B.mean().item(),
        "scd": scd,
        "wcd": wcd,
        "strong_mass": split.teacher_mass_BK[:, 0].mean().item(),
    }


def near_chance(top1: float, num_classes: int) -> bool:
    """Whether an accuracy is less than a twentieth of the way from guessing to perfect."""
    chance = 1 / num_classes
    return top1 < chance + 0.05 * (1 - chance)


def is_better(figures: dict[str, float], best: dict[str, float] | None) -> bool:
    """Compare by top-1, and by likelihood where that is equal."""
    return best is None or (figures["top1"], -figures["nll"]) > (best["top1"], -best["nll"])


def differ(first_NC: Tensor, second_NC: Tensor) -> tuple[float, float]:
    """Largest absolute difference of two sets of logits, and share of samples with one answer."""
    largest = (first_NC - second_NC).abs().max().item()
    return largest, (first_NC.argmax(1) == second_NC.argmax(1)).float().mean().item()


__all__ = ["brief", "differ", "fidelity", "is_better", "near_chance", "per_class", "quality"]
