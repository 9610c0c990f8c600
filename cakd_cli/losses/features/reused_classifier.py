"""SimKD: Chen et al., Knowledge Distillation with the Reused Teacher Classifier, arXiv 2203.14001.

The student's own classifier is thrown away: behind its last map stand three convolutions to the teacher's channels and
the teacher's classifier, and this network is what is trained, evaluated and saved. The loss of the maps is the whole
objective, without labels and without KD. The networks are put together in ``engine/reuse.py``.

Shape suffixes: B batch, D channels, H and W height and width.
"""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from cakd_cli.losses.base import Lesson, Look, LossOutput, Needs, Objectives, Term
from cakd_cli.losses.features.maps import check_maps, mean_squared, to_smaller


def sim_kd(projected_BDHW: Tensor, teacher_BDHW: Tensor) -> LossOutput:
    """Mean squared difference of the last maps over all elements.

    Args:
        projected_BDHW: The student's map in the teacher's channels.
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


class SimKDTerm(Term):
    """The last map, projected to the teacher's, whose classifier the student takes over."""

    paper = "Chen et al. 2022, CVPR, arXiv 2203.14001"
    formula = "mean (projection(map_student) - map_teacher)^2;  the student ends with the teacher's classifier"
    of_whole_weights = True
    objectives: ClassVar[Objectives] = {"simkd": ({"type": "simkd"},)}

    type: Literal["simkd"] = "simkd"
    reduction: int = Field(
        2,
        ge=1,
        le=1024,
        description="the projection works in the teacher's channels divided by it; 4, 8 are cheaper",
    )

    @property
    def needs(self) -> Needs:
        """The last map of each network, and the input of the teacher's classifier for the classifier's sake."""
        return Needs(student_layers=(Look("", "map"),), teacher_layers=(Look("", "map"), Look()))

    def __call__(self, lesson: Lesson, module: nn.Module | None = None) -> LossOutput:
        last = Look("", "map")
        total = sim_kd(lesson.student[last], lesson.teacher[last]).total
        return LossOutput(total, {"simkd": total})
