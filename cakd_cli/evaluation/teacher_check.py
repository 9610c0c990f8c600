"""Whether a teacher is worth learning from: measured before an hour is spent on it.

Shape suffixes: N samples, C classes.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from cakd_cli.data import ImageDataSet, Split
from cakd_cli.errors import InputError
from cakd_cli.evaluation import metrics
from cakd_cli.evaluation.predict import predict
from cakd_cli.machine.hardware import Hardware
from cakd_cli.models.normalisation import Normalisation
from cakd_cli.teachers import StoredLogits, Teacher

Part = Literal["validation", "test", "train"]
# What each part's images are called.
IMAGES: dict[Part, str] = {"validation": "held-out", "test": "test", "train": "training"}
# Answers that differ this much, in top-1, from what the teacher's own run recorded mean that something does not fit.
_TOLERANCE = 0.02
# Enough to tell a working teacher from a broken one.
_CHECKED_SAMPLES = 2048

# What makes a teacher answer near chance.
_BY_IMAGE = "check that it was trained on these classes, in this order, with this normalisation"
_BY_NUMBER = "check that its rows are in the order of the training images, and its numbers in that of the classes"


def check_teacher(
    teacher: Teacher, data: ImageDataSet, facts: Mapping[str, Any], hardware: Hardware, *, batch_size: int, on: Part
) -> dict[str, float]:
    """Measure the teacher before an hour is spent on it, in float32 as its own run did.

    Args:
        teacher: Who is measured.
        data: On what.
        facts: What the run to come records of the data; the comparison needs a teacher that recorded the same.
        hardware: Where.
        batch_size: Images at a time.
        on: On which images: those held out, or where there are none those of the test set or of training; a file of
            logits knows those of training alone.

    Returns:
        Its top-1 and the number of samples it was measured on.

    Raises:
        InputError: If it answers near chance, or not as its own run recorded on the same data.
    """
    split: Split | None = getattr(data, on)
    assert split is not None
    part = len(split) > _CHECKED_SAMPLES
    if part:
        split = split.subset(torch.linspace(0, len(split) - 1, _CHECKED_SAMPLES).round().long())
    logits_NC, labels_N = _answers(teacher, split, hardware, batch_size)
    top1 = metrics.brief(logits_NC, labels_N)["top1"]
    where = IMAGES[on]
    if metrics.near_chance(top1, metrics.chance(labels_N, data.num_classes)):
        raise InputError(
            f"the teacher {teacher.name} is near chance: top-1 {top1:.1%} on {len(split)} {where} images "
            f"of {data.num_classes} classes",
            hint=_BY_NUMBER if isinstance(teacher.model, StoredLogits) else _BY_IMAGE,
        )
    recorded = teacher.facts.get("metrics", {}).get(on, {}).get("top1")
    same_data = teacher.facts.get("data") == facts
    # One answer may always tip; on a part of the split the share also varies by chance: three standard deviations.
    slack = _TOLERANCE + 1 / len(split) + (3 * (top1 * (1 - top1) / len(split)) ** 0.5 if part else 0)
    if recorded is not None and same_data and abs(recorded - top1) > slack:
        raise InputError(
            f"the teacher {teacher.name} answers {top1:.1%} of {len(split)} {where} images, "
            f"its run recorded {recorded:.1%}",
            hint="its files or the data have changed since it was trained",
        )
    return {"top1": top1, "samples": len(split)}


def _answers(teacher: Teacher, split: Split, hardware: Hardware, batch_size: int) -> tuple[Tensor, Tensor]:
    """What a teacher says of a split, (samples, classes), and the labels."""
    if isinstance(teacher.model, StoredLogits):
        labels_N = split.labels_by_number()
        assert labels_N is not None, "of several labels an image this is not measured"
        samples_N = (labels_N >= 0).nonzero().squeeze(1)
        return teacher.model.of_samples(samples_N).cpu(), labels_N[samples_N]
    normalisation = Normalisation(teacher.mean, teacher.std, hardware)
    return predict(teacher.model, split, normalisation, hardware.full_precision(), batch_size=batch_size)
