"""IKL: Cui et al., Decoupled Kullback-Leibler Divergence Loss, arXiv 2305.13948.

GKL: Cui et al., Generalized Kullback-Leibler Divergence Loss, arXiv 2503.08038.

The gradient of KL is that of a squared difference between all pairs of classes, weighed by their probabilities, and of
a cross-entropy with soft labels. Taken apart, the two are weighed freely, and the weights of the pairs may come from
elsewhere: from a softer teacher, or from what it says of a class on average.

Shape suffixes: B batch, C classes.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cakd_cli.losses.base import Lesson, LossOutput, Objectives, Shapes, SoftenedTerm
from cakd_cli.losses.logits import check_pair, check_target, soften
from cakd_cli.losses.weights import Weight


def ikl(
    student_BC: Tensor,
    teacher_BC: Tensor,
    target_B: Tensor,
    *,
    temperature: float,
    t2: float,
    alpha: float,
    beta: float,
    class_prior: Tensor | None = None,
) -> LossOutput:
    """``beta * mse + alpha * ce_soft``: differences of logits between all pairs of classes, and soft labels.

    mse = mean sum_ij q_i q_j ((z_t,i - z_t,j) - (z_s,i - z_s,j))^2 / 4 on the logits as they are;
    ce_soft = -mean sum p_t log p_s, softened, without temperature squared: it is not 0 where both networks agree.

    Args:
        student_BC: Student logits, (batch, classes), any float type; computed in float32 at least.
        teacher_BC: Teacher logits, same shape; treated as constant.
        target_B: Class indices, used with a class prior alone.
        temperature: Softening of ``ce_soft``, > 0; the paper uses 4 on CIFAR-100.
        t2: Softening of q = softmax(z_t / t2), > 0. The official code's 100 makes q almost even.
        alpha: Weight of ``ce_soft``; the paper uses 1 on CIFAR-100.
        beta: Weight of ``mse``; the paper uses 8 on CIFAR-100.
        class_prior: Instead of q the row of a sample's label, (classes, classes), see :class:`ClassPrior`; constant.

    Returns:
        ``total`` with the parts ``mse`` and ``ce_soft``, unweighted; the latter in nats.

    Raises:
        ValueError: If shapes do not fit or a temperature is not positive.
    """
    weight_BC = _log_weights(student_BC, teacher_BC, target_B, t2, class_prior).exp()
    mse = _pairs(student_BC, teacher_BC, weight_BC).mean()
    ce_soft = _soft_cross_entropy(student_BC, teacher_BC, temperature)
    return LossOutput(beta * mse + alpha * ce_soft, {"mse": mse, "ce_soft": ce_soft})


def gkl(
    student_BC: Tensor,
    teacher_BC: Tensor,
    target_B: Tensor,
    *,
    temperature: float,
    t2: float,
    gamma: float,
    alpha: float,
    beta: float,
    class_prior: Tensor | None = None,
) -> LossOutput:
    """:func:`ikl` with q to the power gamma, and ``mse`` by the batch's sum of q_i q_j in the place of its size.

    Args:
        student_BC: As of :func:`ikl`; so are the parts, results and errors.
        teacher_BC: Likewise.
        target_B: Likewise.
        temperature: Likewise.
        t2: Likewise; the paper uses 4.
        gamma: Power of q, in (0, 1]: the smaller, the more even; the paper uses 0.05.
        alpha: Likewise; the paper uses 1.
        beta: Likewise; the paper uses 16 for ResNet32x4 -> ResNet8x4.
        class_prior: Likewise; the paper uses one.
    """
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma must be in (0, 1], got {gamma}")
    weight_BC = (gamma * _log_weights(student_BC, teacher_BC, target_B, t2, class_prior)).exp()
    mse = _pairs(student_BC, teacher_BC, weight_BC).sum() / weight_BC.sum(1).square().sum()
    ce_soft = _soft_cross_entropy(student_BC, teacher_BC, temperature)
    return LossOutput(beta * mse + alpha * ce_soft, {"mse": mse, "ce_soft": ce_soft})


def _log_weights(
    student_BC: Tensor, teacher_BC: Tensor, target_B: Tensor, t2: float, class_prior: Tensor | None
) -> Tensor:
    """Log of q, without gradient."""
    check_pair(student_BC, teacher_BC, t2)
    log_BC = soften(teacher_BC.detach(), t2).log_softmax(1)
    if class_prior is None:
        return log_BC
    check_target(student_BC, target_B)
    classes = teacher_BC.shape[1]
    if class_prior.shape != (classes, classes):
        raise ValueError(f"class_prior must have shape {(classes, classes)}, got {tuple(class_prior.shape)}")
    return class_prior.detach()[target_B].to(log_BC.dtype).log()


def _pairs(student_BC: Tensor, teacher_BC: Tensor, weight_BC: Tensor) -> Tensor:
    """Sum over all pairs of classes, by four, (batch,)."""
    # Half the sum of the weights times the spread around their mean: no matrix of pairs is needed.
    gap_BC = soften(teacher_BC.detach(), 1.0) - soften(student_BC, 1.0)
    sum_B1 = weight_BC.sum(1, keepdim=True)
    mean_B1 = (weight_BC * gap_BC).sum(1, keepdim=True) / sum_B1
    return sum_B1.squeeze(1) * (weight_BC * (gap_BC - mean_B1).square()).sum(1) / 2


def _soft_cross_entropy(student_BC: Tensor, teacher_BC: Tensor, temperature: float) -> Tensor:
    check_pair(student_BC, teacher_BC, temperature)
    teacher_probability_BC = soften(teacher_BC.detach(), temperature).softmax(1)
    return -(teacher_probability_BC * soften(student_BC, temperature).log_softmax(1)).sum(1).mean()


class ClassPrior(nn.Module):
    """The teacher's mean softened probabilities over the images of each class, as the last epoch found them.

    Even in the first epoch, and for a class of which no image has been seen. Counted while training; never saved with
    the student.

    Args:
        num_classes: Of the teacher.
    """

    prior_CC: Tensor
    sum_CC: Tensor
    count_C: Tensor
    epoch: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("prior_CC", torch.full((num_classes, num_classes), 1 / num_classes))
        self.register_buffer("sum_CC", torch.zeros(num_classes, num_classes))
        self.register_buffer("count_C", torch.zeros(num_classes))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, probability_BC: Tensor, target_B: Tensor, epoch: int) -> Tensor:
        """Give the prior of an epoch, (classes, classes), one row a label; in training count the batch in.

        Args:
            probability_BC: The teacher's, softened.
            target_B: Class indices.
            epoch: From 1; at the first batch of another epoch the means of the last take their place.
        """
        if self.training:
            # On the device: that an epoch begins is not asked of it, and a checkpoint keeps which one it is.
            begins = self.epoch != epoch
            mean_CC = self.sum_CC / self.count_C.clamp(min=1).unsqueeze(1)
            self.prior_CC.copy_(torch.where((begins & (self.count_C > 0)).unsqueeze(1), mean_CC, self.prior_CC))
            self.sum_CC.mul_(~begins).index_add_(0, target_B, probability_BC.to(self.sum_CC.dtype))
            self.count_C.mul_(~begins).index_add_(0, target_B, torch.ones_like(target_B, dtype=self.count_C.dtype))
            self.epoch.fill_(epoch)
        return self.prior_CC


class _PriorTerm(SoftenedTerm):
    of_labels = True

    t2: float = Field(4.0, gt=0, le=1000, description="softening of the teacher where it weighs pairs of classes")
    alpha: Weight = Field(1.0, description="weight of ce_soft, the soft labels")
    class_prior: bool = Field(
        False, description="weigh pairs of classes by the teacher's mean over the label's images in the last epoch"
    )

    @property
    def takes_several_labels(self) -> bool:
        """Whether no label is needed."""
        return not self.class_prior

    def module(self, shapes: Shapes) -> ClassPrior | None:
        """Make the means of each class."""
        return ClassPrior(shapes.num_classes) if self.class_prior else None

    def __call__(self, lesson: Lesson, module: nn.Module | None = None) -> LossOutput:
        student_BC, teacher_BC = self._logits(lesson)
        prior_CC = None
        if self.class_prior:
            assert isinstance(module, ClassPrior)
            check_target(student_BC, lesson.target_B)
            probability_BC = soften(teacher_BC.detach(), self.t2).softmax(1)
            prior_CC = module(probability_BC, lesson.target_B, lesson.epoch)
        settings = self.settings() | {"class_prior": prior_CC}
        return type(self).function(student_BC, teacher_BC, lesson.target_B, **settings)


class IKLTerm(_PriorTerm):
    """Differences of logits between all pairs of classes, and soft labels, weighted freely."""

    paper = "Cui et al. 2024, arXiv 2305.13948"
    formula = (
        "beta mean sum_ij q_i q_j ((z_t,i - z_t,j) - (z_s,i - z_s,j))^2 / 4 - alpha mean sum p_t log p_s,  "
        "q = softmax(z_t / t2)"
    )
    # CIFAR-100 settings of the official configs, some with a beta of up to 20; 20 of 240 epochs of warm-up.
    objectives: ClassVar[Objectives] = {"ikl": ({"type": "cross-entropy"}, {"type": "ikl", "warmup_epochs": "auto"})}
    function = staticmethod(ikl)

    type: Literal["ikl"] = "ikl"
    t2: float = Field(100.0, gt=0, le=1000, description="softening of the teacher where it weighs pairs of classes")
    beta: Weight = Field(8.0, description="weight of mse, the differences of logits")


class GKLTerm(_PriorTerm):
    """IKL with flatter weights of pairs, which a class has in common."""

    paper = "Cui et al. 2025, arXiv 2503.08038"
    formula = "as ikl with q^gamma, and mse by the batch's sum of q_i q_j; q is the mean over the label's images"
    # CIFAR-100 settings of the official config for ResNet32x4 -> ResNet8x4; 20 of 240 epochs of warm-up.
    objectives: ClassVar[Objectives] = {
        "gkl": ({"type": "cross-entropy"}, {"type": "gkl", "class_prior": True, "warmup_epochs": "auto"})
    }
    function = staticmethod(gkl)

    type: Literal["gkl"] = "gkl"
    gamma: float = Field(0.05, gt=0, le=1, description="power of the weights of pairs")
    beta: Weight = Field(16.0, description="weight of mse, the differences of logits")
