"""DIST on dense predictions: Huang et al., Knowledge Distillation from A Stronger Teacher, arXiv 2205.10536.

No term of a recipe: the networks must answer with a map of logits, as in segmentation. Not DIST+, which compares
features.

Shape suffixes: B batch, C classes, H and W height and width, P positions of all samples.
"""

from torch import Tensor

from cakd_cli.losses.base import LossOutput
from cakd_cli.losses.features.maps import check_maps
from cakd_cli.losses.relational import dist


def dist_dense(
    student_BCHW: Tensor, teacher_BCHW: Tensor, *, temperature: float = 1.0, beta: float = 1.0, gamma: float = 1.0
) -> LossOutput:
    """``beta * inter + gamma * intra`` as of :func:`cakd_cli.losses.dist`, with every position as a sample.

    Args:
        student_BCHW: Logits at each position, (batch, classes, height, width); computed in float32 at least.
        teacher_BCHW: The teacher's, same shape; treated as constant.
        temperature: Softening, > 0; 1 in the paper.
        beta: Weight of ``inter``, over the classes; 1 in the paper.
        gamma: Weight of ``intra``, over the positions of all samples; 1 in the paper.

    Returns:
        ``total`` with the parts ``inter`` and ``intra``: unweighted, in [0, 2], not times temperature squared.

    Raises:
        ValueError: If shapes do not fit or the temperature is not positive.
    """
    check_maps(student_BCHW, teacher_BCHW)
    if student_BCHW.shape != teacher_BCHW.shape:
        raise ValueError(
            f"both maps must have one shape, got {tuple(student_BCHW.shape)} and {tuple(teacher_BCHW.shape)}"
        )
    student_PC, teacher_PC = (logits_BCHW.movedim(1, 3).flatten(0, 2) for logits_BCHW in (student_BCHW, teacher_BCHW))
    output = dist(student_PC, teacher_PC, temperature=temperature, beta=beta, gamma=gamma)
    return LossOutput(
        output.total / temperature**2, {name: part / temperature**2 for name, part in output.parts.items()}
    )
