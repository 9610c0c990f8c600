"""CRD: Tian et al., Contrastive Representation Distillation, arXiv 1910.10699.

Shape suffixes: B batch, C classes, D elements of a layer, E elements of an embedding, K negatives, J the sample itself
and then its negatives, N samples of the training file, 2 the student's anchor and the teacher's.
"""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, distributed, nn

from cakd_cli.losses.base import Lesson, LossOutput, Objectives, Shapes
from cakd_cli.losses.features.layers import VectorsTerm
from cakd_cli.losses.features.maps import precise
from cakd_cli.losses.features.pairs import unit


def crd(
    student_BE: Tensor,
    teacher_BE: Tensor,
    student_bank_NE: Tensor,
    teacher_bank_NE: Tensor,
    contrast_BJ: Tensor,
    *,
    temperature: float,
    n_data: int,
    eps: float = 1e-7,
    log_normalisers_2: Tensor | None = None,
) -> LossOutput:
    """Tell each sample from others by the embedding that the other network has of it (noise-contrastive estimation).

    With P = exp(bank . anchor / T) / Z and the noise's share m = K / n_data, the loss of an anchor is
    -[sum log (P+ / (P+ + m + eps)) + sum log (m / (P- + m + eps))] / B. The student's anchor looks into the teacher's
    bank, the teacher's anchor into the student's; the banks and Z are constant.

    Args:
        student_BE: Student embeddings of length 1, (batch, elements), any float type; computed in float32 at least.
        teacher_BE: Teacher embeddings, same shape, with a gradient: their projection is trained along.
        student_bank_NE: The student's embeddings of all samples.
        teacher_bank_NE: The teacher's.
        contrast_BJ: Numbers of the samples to compare with, int64; first the sample itself, then its negatives.
        temperature: Of the scores, > 0; the paper uses 0.07.
        n_data: Samples that train, > 0.
        eps: Added to the denominators.
        log_normalisers_2: Log Z of both anchors; by default of this batch, see :func:`crd_log_normalisers`.

    Returns:
        ``total``, the sum of the parts ``student_anchor`` and ``teacher_anchor``.

    Raises:
        ValueError: If shapes do not fit or a setting is out of range.
    """
    _check(student_BE, teacher_BE, student_bank_NE, teacher_bank_NE, contrast_BJ)
    if not (temperature > 0 and n_data > 0):
        raise ValueError(f"temperature and n_data must be positive, got {temperature} and {n_data}")
    scores_2BJ = (
        _scores(student_BE, teacher_bank_NE, contrast_BJ, temperature),
        _scores(teacher_BE, student_bank_NE, contrast_BJ, temperature),
    )
    if log_normalisers_2 is None:
        log_normalisers_2 = crd_log_normalisers(*scores_2BJ, n_data=n_data)
    return _contrasted(*scores_2BJ, log_normalisers_2, n_data=n_data, eps=eps)


def crd_log_normalisers(student_BJ: Tensor, teacher_BJ: Tensor, *, n_data: int) -> Tensor:
    """Log Z of both anchors, (2,), without gradient: log (n_data * mean exp score).

    Args:
        student_BJ: Scores of the student's anchors, products with the bank by the temperature.
        teacher_BJ: Of the teacher's.
        n_data: Samples that train.
    """
    return torch.stack(
        [
            scores_BJ.detach().flatten().logsumexp(0) + math.log(n_data / scores_BJ.numel())
            for scores_BJ in (student_BJ, teacher_BJ)
        ]
    )


def _check(
    student_BE: Tensor, teacher_BE: Tensor, student_bank_NE: Tensor, teacher_bank_NE: Tensor, contrast_BJ: Tensor
) -> None:
    if student_BE.ndim != 2 or student_BE.shape != teacher_BE.shape:
        raise ValueError(
            "both embeddings must have one shape (batch, elements), "
            f"got {tuple(student_BE.shape)} and {tuple(teacher_BE.shape)}"
        )
    width = student_BE.shape[1]
    if student_bank_NE.shape != teacher_bank_NE.shape or student_bank_NE.shape[1:] != (width,):
        raise ValueError(
            f"both banks must have one shape (samples, {width}), "
            f"got {tuple(student_bank_NE.shape)} and {tuple(teacher_bank_NE.shape)}"
        )
    if contrast_BJ.ndim != 2 or len(contrast_BJ) != len(student_BE) or contrast_BJ.shape[1] < 2:
        raise ValueError(
            f"needs {len(student_BE)} rows of a sample and its negatives, got numbers of shape "
            f"{tuple(contrast_BJ.shape)}"
        )


def _scores(anchor_BE: Tensor, bank_NE: Tensor, contrast_BJ: Tensor, temperature: float) -> Tensor:
    # Products with the whole bank, (batch, samples), are smaller than its gathered rows, (batch, negatives, elements).
    with torch.autocast(anchor_BE.device.type, enabled=False):
        products_BN = precise(anchor_BE) @ bank_NE.detach().to(precise(anchor_BE).dtype).T
    return products_BN.gather(1, contrast_BJ) / temperature


def _contrasted(
    student_BJ: Tensor, teacher_BJ: Tensor, log_normalisers_2: Tensor, *, n_data: int, eps: float = 1e-7
) -> LossOutput:
    parts = {
        "student_anchor": _anchored(student_BJ - log_normalisers_2[0], n_data=n_data, eps=eps),
        "teacher_anchor": _anchored(teacher_BJ - log_normalisers_2[1], n_data=n_data, eps=eps),
    }
    return LossOutput(parts["student_anchor"] + parts["teacher_anchor"], parts)


def _anchored(log_BJ: Tensor, *, n_data: int, eps: float) -> Tensor:
    # In logarithms, because the exponential of a score overflows at low temperatures.
    batch, count = log_BJ.shape
    noise = (count - 1) / n_data
    denominator_BJ = log_BJ.logaddexp(log_BJ.new_full((), math.log(noise + eps)))
    own = (log_BJ[:, 0] - denominator_BJ[:, 0]).sum()
    others = (math.log(noise) - denominator_BJ[:, 1:]).sum()
    return -(own + others) / batch


class ContrastiveMemory(nn.Module):
    """Embeddings of both networks and what they were for each sample: trained and kept, never saved with the student.

    Two banks of N x E float32 numbers, 8 N E bytes: 51 MB for the 50,000 images of CIFAR-100 with 128 elements, 1.3 GB
    for ImageNet; while a step computes, as much again, and two matrices of batch x N. Under several processes all
    banks are alike: each process enters the samples of all.

    Args:
        student_size: Elements of the student's layer.
        teacher_size: Of the teacher's.
        labels_N: Class of each sample by its number, int64, -1 for samples that do not train.
        dim: Elements of an embedding.

    Raises:
        ValueError: If there are fewer than two classes.
    """

    labels_N: Tensor
    by_class_N: Tensor
    count_C: Tensor
    start_C: Tensor
    student_bank_NE: Tensor
    teacher_bank_NE: Tensor
    log_normalisers_2: Tensor

    def __init__(self, student_size: int, teacher_size: int, labels_N: Tensor, *, dim: int) -> None:
        super().__init__()
        self.embed_student = nn.Linear(student_size, dim)
        self.embed_teacher = nn.Linear(teacher_size, dim)
        trains_N = labels_N >= 0
        count_C = labels_N[trains_N].bincount()
        if (count_C > 0).sum() < 2:
            raise ValueError("needs images of two classes at least")
        # What trains, class by class: all but one class are two ranges.
        by_class_N = labels_N.argsort(stable=True)[(~trains_N).sum() :]
        for name, indices in {
            "labels_N": labels_N,
            "by_class_N": by_class_N,
            "count_C": count_C,
            "start_C": count_C.cumsum(0) - count_C,
        }.items():
            self.register_buffer(name, indices, persistent=False)
        limit = math.sqrt(3 / dim)
        self.register_buffer("student_bank_NE", torch.empty(len(labels_N), dim).uniform_(-limit, limit))
        self.register_buffer("teacher_bank_NE", torch.empty(len(labels_N), dim).uniform_(-limit, limit))
        # Not finite as long as no batch has been seen.
        self.register_buffer("log_normalisers_2", torch.full((2,), -torch.inf))

    @property
    def n_data(self) -> int:
        """Number of the samples that train."""
        return len(self.by_class_N)

    def embed(self, student_BD: Tensor, teacher_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Give both networks' embeddings, of length 1."""
        student_BE, teacher_BE = self.embed_student(student_BD), self.embed_teacher(teacher_BD.detach())
        return unit(precise(student_BE), 1), unit(precise(teacher_BE), 1)

    def draw(self, sample_B: Tensor, negatives: int) -> Tensor:
        """Draw samples of other classes, evenly and with replacement, and put each sample itself before its own."""
        label_B1 = self.labels_N[sample_B].unsqueeze(1)
        own_B1, start_B1 = self.count_C[label_B1], self.start_C[label_B1]
        # A remainder of 48 bits is even enough, and its range may differ from sample to sample without a wait.
        drawn_BK = torch.randint(2**48, (len(sample_B), negatives), device=sample_B.device) % (self.n_data - own_B1)
        place_BK = drawn_BK + own_B1 * (drawn_BK >= start_B1)
        return torch.cat([sample_B.unsqueeze(1), self.by_class_N[place_BK]], dim=1)

    @torch.no_grad()
    def normalisers(self, seen_2: Tensor) -> Tensor:
        """Give log Z of the first batch in training, or what is seen now if there was none."""
        mean_2 = _gathered(seen_2.unsqueeze(0)).logsumexp(0) - math.log(_processes())
        first_2 = torch.where(self.log_normalisers_2.isfinite(), self.log_normalisers_2, mean_2)
        if self.training:
            self.log_normalisers_2.copy_(first_2)
        return first_2

    @torch.no_grad()
    def update(self, sample_B: Tensor, student_BE: Tensor, teacher_BE: Tensor, *, momentum: float) -> None:
        """Move the samples' rows towards their new embeddings: normalise(momentum * old + (1 - momentum) * new)."""
        sample_B = _gathered(sample_B)
        for name, fresh_BE in (("student_bank_NE", student_BE), ("teacher_bank_NE", teacher_BE)):
            bank_NE = getattr(self, name)
            mixed_BE = momentum * bank_NE[sample_B] + (1 - momentum) * _gathered(fresh_BE.to(bank_NE.dtype))
            # The backward pass still needs the bank as it was.
            setattr(self, name, bank_NE.index_copy(0, sample_B, unit(mixed_BE, 1)))


def _processes() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _gathered(rows: Tensor) -> Tensor:
    """The rows of all processes, of which each has as many."""
    count = _processes()
    if count == 1:
        return rows
    gathered = [torch.empty_like(rows) for _ in range(count)]
    distributed.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered)


class CRDTerm(VectorsTerm):
    """Each sample told from others by the other network's embedding of it."""

    paper = "Tian et al. 2020, arXiv 1910.10699"
    formula = (
        "-mean [log (P+ / (P+ + K/n)) + sum log (K/n / (P- + K/n))],  P = exp(bank . anchor / T) / Z, both anchors"
    )
    # 0.8 is RepDistiller's and mdistiller's.
    objectives: ClassVar[Objectives] = {"crd": ({"type": "cross-entropy"}, {"type": "crd", "weight": 0.8})}

    type: Literal["crd"] = "crd"
    dim: int = Field(128, ge=1, description="elements of an embedding")
    negatives: int = Field(16384, ge=1, description="samples of other classes that each sample is told from")
    temperature: float = Field(0.07, gt=0, le=1000, description="of the scores")
    momentum: float = Field(0.5, ge=0, lt=1, description="share of a bank's old row in its new one")

    @property
    def takes_several_labels(self) -> bool:
        """Negatives are samples of another class."""
        return False

    def module(self, shapes: Shapes) -> ContrastiveMemory:
        """Make the embeddings and the banks.

        Raises:
            ValueError: If samples have not one label each, of two classes at least.
        """
        if shapes.labels_N is None:
            raise ValueError("needs one label an image")
        return ContrastiveMemory(*self.widths(shapes), shapes.labels_N, dim=self.dim)

    def __call__(self, lesson: Lesson, module: nn.Module | None = None) -> LossOutput:
        assert isinstance(module, ContrastiveMemory)
        assert lesson.sample_B is not None
        student_BE, teacher_BE = module.embed(*self.vectors(lesson))
        contrast_BJ = module.draw(lesson.sample_B, self.negatives)
        student_BJ = _scores(student_BE, module.teacher_bank_NE, contrast_BJ, self.temperature)
        teacher_BJ = _scores(teacher_BE, module.student_bank_NE, contrast_BJ, self.temperature)
        seen_2 = crd_log_normalisers(student_BJ, teacher_BJ, n_data=module.n_data)
        output = _contrasted(student_BJ, teacher_BJ, module.normalisers(seen_2), n_data=module.n_data)
        if module.training:
            module.update(lesson.sample_B, student_BE, teacher_BE, momentum=self.momentum)
        return output
