"""Strong augmentation: torchvision's policies, Cutout and random erasing, drawn for each sample from a number.

Shape suffixes: B batch, C channels, H and W height and width.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from cakd_cli.data.base import DataSpec
from cakd_cli.data.images.mixing import Mix

Policy = Literal["none", "rand-augment", "auto-augment", "trivial-augment"]
Transform = Callable[[Tensor], Tensor]


class AugmentedSpec(DataSpec):
    """Settings of images that may be augmented beyond crops and flips; every epoch then has new views."""

    augment: Policy = Field("none", description="torchvision's policy for training images, after the crop and the flip")
    cutout: int = Field(
        0, ge=0, le=1024, description="side of a square that is blackened in training images, in pixels"
    )
    erasing: float = Field(
        0.0, ge=0, le=1, description="probability of a rectangle blackened at random (arXiv 1708.04896)"
    )
    second_view: Policy = Field(
        "rand-augment", description="policy of the second view, where a term of the loss needs one"
    )
    mix: Mix = Field(
        "none",
        description="mix training images in pairs: mixup, cutmix, or one of both for each batch; the teacher is asked "
        "about the mixed image; several processes each mix their share",
    )
    mix_alpha: float = Field(
        1.0, gt=0, le=100, description="of the beta distribution that an image's share in the mixture is drawn from"
    )

    def augmentation(self, *, second: bool = False, photographs: bool = False) -> Transform | None:
        """Make what is done to an image after its crop and flip; none if nothing is.

        Args:
            second: Of the second view.
            photographs: Whether the images are like ImageNet's, for which AutoAugment has other policies.
        """
        from torchvision.transforms import v2

        policies: dict[str, Callable[[], Transform]] = {
            "rand-augment": v2.RandAugment,
            "auto-augment": lambda: v2.AutoAugment(
                v2.AutoAugmentPolicy.IMAGENET if photographs else v2.AutoAugmentPolicy.CIFAR10
            ),
            "trivial-augment": v2.TrivialAugmentWide,
        }
        policy = self.second_view if second else self.augment
        steps: list[Transform] = [policies[policy]()] if policy != "none" else []
        if self.cutout:
            steps.append(_Cutout(self.cutout))
        if self.erasing:
            steps.append(v2.RandomErasing(self.erasing))
        return v2.Compose(steps) if steps else None


class _Cutout:
    """A black square around a place drawn evenly; what of it lies outside is lost (arXiv 1708.04552)."""

    def __init__(self, side: int) -> None:
        self._side = side

    def __call__(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        top, left = (int(torch.randint(size, ())) - self._side // 2 for size in (height, width))
        image = image.clone()
        image[..., max(0, top) : max(0, top + self._side), max(0, left) : max(0, left + self._side)] = 0
        return image


def each(transform: Transform, images_BCHW: Tensor, seeds: Sequence[int]) -> Tensor:
    """Augment every image by itself; its draws are those of its number, whatever was drawn before.

    The numbers are drawn on the host, so that no device is waited for.
    """
    with torch.random.fork_rng(devices=[]):
        augmented = []
        for image, seed in zip(images_BCHW, seeds, strict=True):
            # Not torch.manual_seed, which reseeds every device as well.
            torch.default_generator.manual_seed(seed)
            augmented.append(transform(image))
    return torch.stack(augmented)
