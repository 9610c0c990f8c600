"""CAT-KD: Guo et al., Class Attention Transfer Based Knowledge Distillation, arXiv 2304.12777.

The authors rebuild both networks so that a 1x1 convolution without bias on the last map, after its ReLU, gives a map a
class, and their averages are the logits. The term leaves the networks as they are: a map is what the network's own
classifier, without its bias, makes of each position, so that the student's logits keep a bias that theirs have not.

Shape suffixes: B batch, C classes, D channels, H and W height and width.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from cakd_cli.losses.base import Lesson, LossOutput, Objectives
from cakd_cli.losses.features.layers import ClassMapsTerm
from cakd_cli.losses.features.maps import check_maps, precise, to_size
from cakd_cli.losses.features.pairs import unit
from cakd_cli.losses.supervised import cross_entropy


def cat_kd(
    student_BCHW: Tensor,
    teacher_BCHW: Tensor,
    target_B: Tensor | None = None,
    *,
    cam_resolution: int,
    normalize: bool,
    binarize: bool = False,
    weight: float = 1.0,
    ce_weight: float = 1.0,
    cams_nums: int | None = None,
    strategy: Literal[0, 1] = 0,
) -> LossOutput:
    """``ce_weight * CE + weight * mean squared difference`` of the class activation maps.

    Args:
        student_BCHW: Class activation maps of the student; their averages are its logits.
        teacher_BCHW: Of the teacher, in any height and width; treated as constant.
        target_B: Class indices; without them the maps alone are learnt from (CAT).
        cam_resolution: Height and width to which both are averaged, >= 1; 2 or 4 in the paper.
        normalize: Whether each averaged map is brought to length 1 over its positions.
        binarize: Whether the teacher's maps say only where they are above the mean of their absolute values.
        weight: Of the maps; in the paper 0.7 to 15 as they are, 15 to 600 normalised.
        ce_weight: Of cross-entropy.
        cams_nums: If given, maps of some classes alone are learnt from, by the teacher's logits of each sample.
        strategy: 0 takes those with a larger logit than the ``cams_nums``-th largest, which are one fewer; 1 leaves
            those out that are larger than the ``cams_nums + 1``-th smallest, which keeps one more. As the
            official code does, but for its number of classes, which is always 100.

    Returns:
        ``total`` with the parts ``loss_cat`` and, with labels, ``loss_ce``, both weighted.

    Raises:
        ValueError: If shapes do not fit or a setting is out of range.
    """
    check_maps(student_BCHW, teacher_BCHW)
    if student_BCHW.shape[1] != teacher_BCHW.shape[1]:
        raise ValueError(f"both must have a map a class, got {student_BCHW.shape[1]} and {teacher_BCHW.shape[1]}")
    if cam_resolution < 1:
        raise ValueError(f"cam_resolution must be at least 1, got {cam_resolution}")
    student_BCHW, teacher_BCHW = precise(student_BCHW), precise(teacher_BCHW).detach()
    compared_BCHW = _binarized(teacher_BCHW) if binarize else teacher_BCHW
    mine, theirs = (_prepared(maps, cam_resolution, normalize=normalize) for maps in (student_BCHW, compared_BCHW))
    error_BC = (mine - theirs).square().mean((2, 3))
    if cams_nums is None:
        loss_cat = weight * error_BC.mean()
    else:
        kept_BC = _kept(teacher_BCHW.mean((2, 3)), cams_nums, strategy)
        loss_cat = weight * (error_BC * kept_BC).sum() / kept_BC.sum().clamp(min=1)
    if target_B is None:
        return LossOutput(loss_cat, {"loss_cat": loss_cat})
    loss_ce = ce_weight * cross_entropy(student_BCHW.mean((2, 3)), target_B).total
    return LossOutput(loss_ce + loss_cat, {"loss_ce": loss_ce, "loss_cat": loss_cat})


def class_activation_maps(map_BDHW: Tensor, weight_CD: Tensor) -> Tensor:
    """Apply a linear classifier, without its bias, to every position of its map: (batch, classes, height, width).

    Raises:
        ValueError: If the classifier does not take the map's channels.
    """
    check_maps(map_BDHW)
    if weight_CD.ndim != 2 or weight_CD.shape[1] != map_BDHW.shape[1]:
        raise ValueError(f"a classifier {tuple(weight_CD.shape)} does not take maps {tuple(map_BDHW.shape)}")
    return functional.conv2d(map_BDHW, weight_CD[:, :, None, None])


def _prepared(maps_BCHW: Tensor, resolution: int, *, normalize: bool) -> Tensor:
    small_BCHW = to_size(maps_BCHW, (resolution, resolution))
    if not normalize:
        return small_BCHW
    return unit(small_BCHW.flatten(2), 2).view_as(small_BCHW)


def _binarized(maps_BCHW: Tensor) -> Tensor:
    return (maps_BCHW > maps_BCHW.abs().mean((2, 3), keepdim=True)).to(maps_BCHW.dtype)


def _kept(teacher_BC: Tensor, count: int, strategy: int) -> Tensor:
    classes = teacher_BC.shape[1]
    if strategy not in (0, 1):
        raise ValueError(f"strategy must be 0 or 1, got {strategy!r}")
    lowest, highest = (2, classes) if strategy == 0 else (0, classes - 1)
    if not lowest <= count <= highest:
        raise ValueError(f"cams_nums must be from {lowest} to {highest}, got {count}")
    place = count - 1 if strategy == 0 else classes - 1 - count
    edge_B1 = teacher_BC.sort(dim=1, descending=True).values[:, place, None]
    return torch.gt(teacher_BC, edge_B1) if strategy == 0 else torch.le(teacher_BC, edge_B1)


class CATKDTerm(ClassMapsTerm):
    """Class activation maps: where in an image each network sees each class."""

    paper = "Guo et al. 2023, CVPR, arXiv 2304.12777"
    formula = "mean (avg_size CAM_student - avg_size CAM_teacher)^2,  CAM = classifier at each position, without bias"
    # The weight is that of ResNet32x4 and ResNet8x4 on CIFAR-100; other pairs have 0.7 to 12, or normalised maps.
    objectives: ClassVar[Objectives] = {"cat-kd": ({"type": "cross-entropy"}, {"type": "cat-kd", "weight": 15.0})}
    summaries: ClassVar[Mapping[str, str]] = {
        "cat-kd": "Class activation maps: where in an image each network sees each class."
    }

    type: Literal["cat-kd"] = "cat-kd"
    resolution: int = Field(2, ge=1, le=256, description="height and width to which the maps are averaged")
    normalise: bool = Field(
        False, description="bring each averaged map to length 1; the weight is then 15 to 600 in the paper"
    )
    binarise: bool = Field(
        False, description="of the teacher's maps keep only where they are above the mean of their absolute values"
    )

    def __call__(self, lesson: Lesson, module: nn.Module | None = None) -> LossOutput:
        output = cat_kd(
            *self.class_maps(lesson),
            cam_resolution=self.resolution,
            normalize=self.normalise,
            binarize=self.binarise,
        )
        return LossOutput(output.total, {"cat_kd": output.total})
