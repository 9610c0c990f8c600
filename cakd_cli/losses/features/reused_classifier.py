"""SimKD: Chen et al., Knowledge Distillation with the Reused Teacher Classifier, arXiv 2203.14001.

No term of a recipe: the student's own classifier is thrown away, and what is trained, evaluated and saved is its body
with :class:`ReusedClassifier` on the map before its pooling. The whole objective is :func:`sim_kd` with weight 1,
without labels and without KD.

Shape suffixes: B batch, C classes, D channels, H and W height and width.
"""

from typing import cast

from torch import Tensor, nn
from torch.nn import functional

from cakd_cli.losses.base import LossOutput
from cakd_cli.losses.features.maps import check_maps, mean_squared, to_size, to_smaller


def sim_kd(projected_BDHW: Tensor, teacher_BDHW: Tensor) -> LossOutput:
    """Mean squared difference of the last maps over all elements.

    Args:
        projected_BDHW: The student's map in the teacher's channels, see :class:`ReusedClassifier`.
        teacher_BDHW: The teacher's, treated as constant; averaged to the student's size where it is larger.

    Returns:
        ``total`` with the part ``mse``.

    Raises:
        ValueError: If channels or batches differ, or the teacher's map is smaller.
    """
    check_maps(projected_BDHW, teacher_BDHW)
    _, smaller_BDHW = to_smaller(projected_BDHW, teacher_BDHW)
    total = mean_squared(projected_BDHW, smaller_BDHW)
    return LossOutput(total, {"mse": total})


class ReusedClassifier(nn.Module):
    """Three convolutions that bring the student's last map to the teacher's channels, then the teacher's classifier.

    A part of the student: it is needed at test time, and only its convolutions are trained.

    Args:
        student_shape: Channels, height and width of the student's last map.
        teacher_shape: Of the teacher's.
        classifier_CD: Weight of the teacher's linear classifier.
        classifier_C: Its bias, if it has one.
        factor: The convolutions work in the teacher's channels divided by it; 2 in the paper, 4 and 8 are cheaper.

    Raises:
        ValueError: If the classifier does not take the teacher's channels, or the factor leaves none.
    """

    weight_CD: Tensor
    bias_C: Tensor | None

    def __init__(
        self,
        student_shape: tuple[int, ...],
        teacher_shape: tuple[int, ...],
        classifier_CD: Tensor,
        classifier_C: Tensor | None = None,
        *,
        factor: int = 2,
    ) -> None:
        super().__init__()
        channels, wanted = student_shape[0], teacher_shape[0]
        if classifier_CD.shape[1] != wanted:
            raise ValueError(
                f"the classifier takes {classifier_CD.shape[1]} channels and the teacher's map has {wanted}"
            )
        if not 1 <= factor <= wanted:
            raise ValueError(f"factor must be from 1 to {wanted}, got {factor}")
        # As in the loss, the height decides which map is the larger one.
        self.size = teacher_shape[1:] if teacher_shape[1] < student_shape[1] else student_shape[1:]
        middle = wanted // factor
        self.transfer = nn.Sequential(
            nn.Conv2d(channels, middle, 1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(),
            nn.Conv2d(middle, middle, 3, padding=1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(),
            nn.Conv2d(middle, wanted, 1, bias=False),
            nn.BatchNorm2d(wanted),
            nn.ReLU(),
        )
        self.register_buffer("weight_CD", classifier_CD.detach())
        self.register_buffer("bias_C", None if classifier_C is None else classifier_C.detach())

    def forward(self, map_BDHW: Tensor) -> tuple[Tensor, Tensor]:
        """Give the logits, and the projected map that they are made of."""
        height, width = self.size
        projected_BDHW = cast(Tensor, self.transfer(to_size(map_BDHW, (height, width))))
        return functional.linear(projected_BDHW.mean((2, 3)), self.weight_CD, self.bias_C), projected_BDHW
