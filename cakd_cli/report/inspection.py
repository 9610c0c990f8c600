"""One student looked at closely, beside its teacher: all answers on the test images, and the images themselves.

Shape suffixes: N samples, C classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cakd_cli.data import ImageDataSet
from cakd_cli.evaluation.predict import predict
from cakd_cli.machine.hardware import choose_hardware
from cakd_cli.models import saving
from cakd_cli.models.normalisation import Normalisation
from cakd_cli.recipe import class_map
from cakd_cli.report.finished import FinishedRun
from cakd_cli.teachers import load_teacher


@dataclass(frozen=True)
class Inspected:
    """What two networks answer to the same images.

    Attributes:
        data: With the images.
        student_NC: Logits.
        teacher_NC: Likewise; none without a teacher.
        labels_N: Classes; bool (samples, classes) where an image may have several.
    """

    data: ImageDataSet
    student_NC: Tensor
    teacher_NC: Tensor | None
    labels_N: Tensor

    @property
    def has_one_label(self) -> bool:
        """Whether each image has one label."""
        return self.labels_N.ndim == 1

    def images(self, samples: list[int]) -> list[Tensor]:
        """Take test images as uint8 (channels, height, width)."""
        if not samples:
            return []
        part = self.data.test.subset(torch.tensor(samples))
        batches = part.ordered_batches(batch_size=len(samples), device=torch.device("cpu"))
        return [image.cpu() for batch in batches for image in batch.images]


def inspect(run: FinishedRun) -> Inspected:
    """Ask a student and its teacher about the test images.

    Raises:
        CakdError: If the data or the teacher is gone.
    """
    saved, recipe = saving.read(run.path), run.recipe
    machine = choose_hardware("auto", "fp32", channels_last=recipe.engine.channels_last)
    shown, size = saved.preprocessing, recipe.engine.evaluation_batch_size
    data = recipe.data.shown_as(shown.input_size[1:], shown.crop_pct).load()
    student = machine.place(saved.model).eval()
    answers = predict(student, data.test, Normalisation(shown.mean, shown.std, machine), machine, batch_size=size)
    theirs = None
    if recipe.comparable_teacher is not None:
        teacher = load_teacher(recipe.comparable_teacher, data, machine, class_map=class_map.read(recipe.class_map))
        normalisation = Normalisation(teacher.mean, teacher.std, machine)
        theirs, _ = predict(teacher.model, data.test, normalisation, machine, batch_size=size)
    return Inspected(data, answers[0], theirs, answers[1])
