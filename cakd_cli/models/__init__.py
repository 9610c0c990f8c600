"""Who teaches and who learns: small-image networks of the literature, and bridges to torchvision and timm."""

from typing import Annotated, get_args

from pydantic import Field

from cakd_cli.models.base import ModelSpec, num_parameters
from cakd_cli.models.external import ExternalSpec, TimmSpec, TorchvisionSpec, load_but_head
from cakd_cli.models.four_stage_resnet import FourStageResNetSpec
from cakd_cli.models.mobilenet import MobileNetSpec
from cakd_cli.models.mobilenet_tiny_imagenet import MobileNetTinyImageNetSpec
from cakd_cli.models.mobilenet_v1 import MobileNetV1Spec
from cakd_cli.models.own_code import OwnCodeSpec
from cakd_cli.models.resnet import ResNetSpec
from cakd_cli.models.shufflenet import ShuffleNetSpec
from cakd_cli.models.vgg import VGGSpec
from cakd_cli.models.weights import load_state, read_state
from cakd_cli.models.wide_resnet import WideResNetSpec

ModelOptions = Annotated[
    ResNetSpec
    | FourStageResNetSpec
    | WideResNetSpec
    | VGGSpec
    | MobileNetV1Spec
    | MobileNetSpec
    | MobileNetTinyImageNetSpec
    | ShuffleNetSpec
    | TorchvisionSpec
    | TimmSpec
    | OwnCodeSpec,
    Field(discriminator="type"),
]

# The union is the registry.
SPECS: tuple[type[ModelSpec], ...] = get_args(get_args(ModelOptions)[0])


def names() -> dict[str, type[ModelSpec]]:
    """Every ``type`` that a recipe's ``model:`` may have, and its options class."""
    return {name: spec for spec in SPECS for name in get_args(spec.model_fields["type"].annotation)}


__all__ = [
    "SPECS",
    "ExternalSpec",
    "FourStageResNetSpec",
    "MobileNetSpec",
    "MobileNetTinyImageNetSpec",
    "MobileNetV1Spec",
    "ModelOptions",
    "ModelSpec",
    "OwnCodeSpec",
    "ResNetSpec",
    "ShuffleNetSpec",
    "TimmSpec",
    "TorchvisionSpec",
    "VGGSpec",
    "WideResNetSpec",
    "load_but_head",
    "load_state",
    "names",
    "num_parameters",
    "read_state",
]
