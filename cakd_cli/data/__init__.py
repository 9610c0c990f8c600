"""What networks look at: embedded, in-memory and folder data, and augmentation."""

from typing import Annotated, get_args

from pydantic import Field

from cakd_cli.data.base import Batch, DataSpec, ImageDataSet, InputSpec, Share, Split, Views
from cakd_cli.data.images.csv_file import CsvSpec
from cakd_cli.data.images.folder import FolderSpec
from cakd_cli.data.images.hugging_face import HuggingFaceSpec
from cakd_cli.data.images.literature import CubSpec, ImageNetSpec, TinyImageNetSpec
from cakd_cli.data.images.memory import MemorySplit
from cakd_cli.data.images.mixing import MixedSplit
from cakd_cli.data.images.noise import NoiseSpec
from cakd_cli.data.images.tensors import DigitsSpec, TensorsSpec
from cakd_cli.data.images.torchvision_sets import CifarSpec, FashionMnistSpec, Stl10Spec
from cakd_cli.data.images.unlabelled import UnlabelledSpec
from cakd_cli.data.images.web_dataset import WebDatasetSpec

DataOptions = Annotated[
    DigitsSpec
    | CifarSpec
    | FashionMnistSpec
    | Stl10Spec
    | ImageNetSpec
    | TinyImageNetSpec
    | CubSpec
    | TensorsSpec
    | FolderSpec
    | CsvSpec
    | UnlabelledSpec
    | WebDatasetSpec
    | HuggingFaceSpec
    | NoiseSpec,
    Field(discriminator="type"),
]

# The union is the registry.
SPECS: tuple[type[DataSpec], ...] = get_args(get_args(DataOptions)[0])


def names() -> dict[str, type[DataSpec]]:
    """Every ``type`` that a recipe's ``data:`` may have, and its options class."""
    return {name: spec for spec in SPECS for name in get_args(spec.model_fields["type"].annotation)}


__all__ = [
    "SPECS",
    "Batch",
    "DataOptions",
    "DataSpec",
    "ImageDataSet",
    "InputSpec",
    "MemorySplit",
    "MixedSplit",
    "Share",
    "Split",
    "Views",
    "names",
]
