"""What is done to a picture before a network sees it, said in every file that leaves, so that others can do so too."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preprocessing:
    """From a picture to a network's input.

    Pictures of any size are resized so that the shorter side has ``resize`` pixels (bilinear, antialiased, as Pillow
    does), the middle is cropped, pixels are divided by 255, and the mean is subtracted and the result divided by the
    standard deviation. Data that already has the network's size is not resized.

    Attributes:
        input_size: Channels, height and width.
        mean: Of each channel, for pixels in [0, 1].
        std: Likewise.
        crop_pct: Share of the shorter side that the middle crop keeps.
        resized: Whether pictures are resized at all.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 1.0
    resized: bool = False
    interpolation: str = "bilinear"

    @property
    def resize(self) -> int | None:
        """Length of the shorter side before the crop, in pixels; none where pictures are taken as they are."""
        return round(self.input_size[1] / self.crop_pct) if self.resized else None

    def document(self, *, pixels: bool = False) -> dict[str, Any]:
        """Say all of it, in the order in which it is done.

        Args:
            pixels: Of a file that takes uint8 pixels, channels last, and does the rest itself.
        """
        channels, height, width = self.input_size
        steps: dict[str, Any] = {"colour": {1: "grey", 3: "RGB"}.get(channels, f"{channels} channels")}
        if self.resized:
            steps |= {"resize": self.resize, "interpolation": self.interpolation, "antialias": True}
        steps |= {"centre_crop": [height, width]} if self.resized else {"size": [height, width]}
        if pixels:
            return steps | {"layout": "NHWC, uint8"}
        return steps | {"divide_by": 255, "mean": list(self.mean), "std": list(self.std), "layout": "NCHW, float32"}

    @classmethod
    def of_timm(cls, pretrained_cfg: Mapping[str, Any], *, resized: bool) -> "Preprocessing":
        """Read timm's ``pretrained_cfg``.

        Raises:
            KeyError, TypeError, ValueError: If a part is missing or of another kind.
        """
        channels, height, width = map(int, pretrained_cfg["input_size"])
        mean, std = (tuple(map(float, pretrained_cfg[key])) for key in ("mean", "std"))
        interpolation = str(pretrained_cfg["interpolation"])
        if interpolation != "bilinear":
            raise ValueError(f"interpolation {interpolation} is not bilinear")
        return cls((channels, height, width), mean, std, float(pretrained_cfg["crop_pct"]), resized)
