"""What each network of the literature costs, so that listing them need not build them; a test computes it again."""

from typing import NamedTuple

# Of the figures below.
CLASSES, CHANNELS = 100, 3


class Size(NamedTuple):
    """What a network costs.

    Attributes:
        parameters: Elements of all weights.
        flops: Of one image's forward pass, 2 per multiply-add.
        side: Height and width of the image, in pixels.
    """

    parameters: int
    flops: int
    side: int = 32


SIZES: dict[str, Size] = {
    "resnet8": Size(83_892, 25_014_784),
    "resnet14": Size(181_108, 53_326_336),
    "resnet20": Size(278_324, 81_637_888),
    "resnet32": Size(472_756, 138_260_992),
    "resnet44": Size(667_188, 194_884_096),
    "resnet56": Size(861_620, 251_507_200),
    "resnet110": Size(1_736_564, 506_311_168),
    "resnet8x4": Size(1_233_540, 354_142_208),
    "resnet32x4": Size(7_433_860, 2_166_081_536),
    "resnet18": Size(11_220_132, 1_110_937_600),
    "resnet34": Size(21_328_292, 2_318_897_152),
    "resnet50": Size(23_705_252, 2_596_028_416),
    "wrn-16-1": Size(180_916, 53_326_336),
    "wrn-16-2": Size(703_284, 202_236_928),
    "wrn-40-1": Size(569_780, 166_572_544),
    "wrn-40-2": Size(2_255_156, 655_221_760),
    "vgg8": Size(3_965_028, 192_385_024),
    "vgg11": Size(9_277_284, 418_877_440),
    "vgg13": Size(9_462_180, 569_872_384),
    "vgg16": Size(14_774_436, 796_364_800),
    "vgg19": Size(20_086_692, 1_022_857_216),
    "mobilenet-v1": Size(3_309_476, 1_135_637_504, 224),
    "mobilenet-v2": Size(812_836, 13_047_296),
    "mobilenet-v2-tiny-imagenet": Size(2_369_380, 431_161_984, 64),
    "shufflenet-v1": Size(949_258, 77_382_912),
    "shufflenet-v2": Size(1_355_528, 89_008_896),
}
