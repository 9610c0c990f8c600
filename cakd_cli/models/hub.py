"""Folders in the layouts of timm and of transformers, as the Hugging Face hub holds them: config.json, *.safetensors.

Nothing of theirs is executed, and no pickle is read.
"""

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from cakd_cli.errors import InputError, RecipeError, first_line
from cakd_cli.files import read_json
from cakd_cli.models.external import PublishedForm, timm_classes

# What of a repository is wanted.
FILES = ("config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json")
# Of a network that reads sentences as well.
_TOKENIZER_FILES = ("tokenizer*.json", "special_tokens_map.json", "vocab.json", "merges.txt")
# transformers names so the classes that nobody named.
_UNNAMED = "LABEL_"
# Of what a library says is wrong with a folder.
_MOST_CHARACTERS = 200


class HubNetwork(NamedTuple):
    """A network of such a folder.

    Attributes:
        model: From normalised images to logits, on the CPU.
        form: What it is made for.
        name: Of its architecture.
        architecture: Everything but the weights that decides what it computes.
    """

    model: nn.Module
    form: PublishedForm
    name: str
    architecture: str


class ImageClassifier(nn.Module):
    """A classifier of transformers that answers with its logits alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images to logits (batch, classes)."""
        return cast(Tensor, self.network(pixel_values=images).logits)


def read_config(folder: Path) -> dict[str, Any] | None:
    """Read the config.json of a folder in one of the two layouts; none of any other folder."""
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError):
        return None
    known = isinstance(config, dict) and "cakd" not in config and ({"architecture", "architectures"} & {*config})
    return config if known else None


def read_folder(folder: Path, config: Mapping[str, Any], *, classifier: bool = True) -> HubNetwork:
    """Read a network.

    Args:
        folder: With its files.
        config: As of :func:`read_config`.
        classifier: Whether a network of timm without one is refused.

    Raises:
        InputError: If a file is missing or damaged, or there are no weights that can be read without running code.
        RecipeError: If its library is not installed, or it is no image classifier.
    """
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{folder} has no model.safetensors", hint="other files of weights could run code; convert them"
        )
    try:
        if "architecture" in config:
            return _of_timm(folder, config, classifier=classifier)
        return _of_transformers(folder, config)
    except (InputError, RecipeError):
        raise
    except Exception as error:
        # Their libraries refuse a folder with whatever they like.
        library = "timm" if "architecture" in config else "transformers"
        # torch puts what is wrong with weights on the lines after the first.
        what = " ".join(str(error).split())[:_MOST_CHARACTERS] or type(error).__name__
        raise InputError(f"{folder}: {library} cannot read the network: {what}") from error


def _of_timm(folder: Path, config: Mapping[str, Any], *, classifier: bool) -> HubNetwork:
    try:
        import timm
    except ImportError as error:
        raise _not_installed(folder, "timm") from error
    model: Any = timm.create_model(f"local-dir:{folder.resolve()}", pretrained=True)
    shown = model.pretrained_cfg
    if classifier and not shown["num_classes"]:
        raise RecipeError(f"{folder} has no classifier", hint="cakd needs a network that tells classes apart")
    form = PublishedForm(
        tuple(shown["mean"]),
        tuple(shown["std"]),
        tuple(shown["input_size"]),
        shown["num_classes"],
        timm_classes(shown),
    )
    name = str(config["architecture"])
    settings = json.dumps([name, config.get("model_args", {})], sort_keys=True)
    return HubNetwork(model, form, name, f"{settings} of timm {importlib.metadata.version('timm')}")


def _of_transformers(folder: Path, config: Mapping[str, Any]) -> HubNetwork:
    names = [str(name) for name in config["architectures"] or ()]
    if not any(name.endswith("ForImageClassification") for name in names):
        raise RecipeError(
            f"{folder} holds {' and '.join(names) or 'no architecture'}, not an image classifier of transformers",
            hint="cakd reads those whose name ends in ForImageClassification",
        )
    try:
        import transformers
    except ImportError as error:
        raise _not_installed(folder, "transformers") from error
    library: Any = transformers
    network = library.AutoModelForImageClassification.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    own = network.config
    labels = tuple(str(own.id2label[number]) for number in range(own.num_labels))
    named = not all(label.startswith(_UNNAMED) for label in labels)
    mean, std, size = preprocessing(folder, getattr(own, "num_channels", 3))
    form = PublishedForm(mean, std, (len(mean), *size), len(labels), labels if named else None)
    settings = {
        key: value for key, value in own.to_dict().items() if key not in ("_name_or_path", "transformers_version")
    }
    text = json.dumps(settings, sort_keys=True, default=str)
    version = importlib.metadata.version("transformers")
    return HubNetwork(ImageClassifier(network), form, names[0], f"{text} of transformers {version}")


def preprocessing(folder: Path, channels: int) -> tuple[tuple[float, ...], tuple[float, ...], tuple[int, int]]:
    """Mean and standard deviation for pixels in [0, 1], and height and width, of a preprocessor_config.json.

    Raises:
        InputError: If it is missing, or does not say so.
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise InputError(
            f"{folder} has no preprocessor_config.json, which says how images are normalised",
            hint="copy it from where the network comes from",
        )
    try:
        shown = read_json(path)
        size = _height_and_width(shown)
        # (pixel * factor - shift - mean) / std
        factor = 255 * float(shown.get("rescale_factor", 1 / 255)) if shown.get("do_rescale", True) else 255.0
        shift = 1.0 if shown.get("rescale_offset", False) else 0.0
        mean, std = [0.0] * channels, [1.0] * channels
        if shown.get("do_normalize", True):
            mean, std = (list(map(float, shown[key])) for key in ("image_mean", "image_std"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else first_line(error)
        raise InputError(f"{path}: does not say how images are prepared: {what}") from error
    return tuple((value + shift) / factor for value in mean), tuple(value / factor for value in std), size


def _height_and_width(shown: Mapping[str, Any]) -> tuple[int, int]:
    size = shown["crop_size"] if shown.get("do_center_crop") and "crop_size" in shown else shown["size"]
    if isinstance(size, Mapping):
        size = [size["height"], size["width"]] if "height" in size else [size["shortest_edge"]] * 2
    height, width = size if isinstance(size, list) else (size, size)
    return int(height), int(width)


def _not_installed(folder: Path, library: str) -> RecipeError:
    return RecipeError(f"{folder} is a network of {library}, which is not installed", hint="pip install 'cakd[hub]'")


def snapshot(name: str, *, fetch: bool) -> Path:
    """Give the folder of a repository of the hub, fetched where it is not here.

    Args:
        name: As OWNER/NAME.
        fetch: Whether it may be downloaded.

    Raises:
        InputError: If it is not here and cannot be fetched.
        RecipeError: If the hub's client is not installed.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise RecipeError(f"hf-hub:{name} needs huggingface_hub", hint="pip install 'cakd[hub]'") from error
    try:
        wanted = [*FILES, *_TOKENIZER_FILES]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted, local_files_only=not fetch))
    except Exception as error:
        # Of a dozen kinds, of three libraries.
        raise InputError(
            f"cannot fetch hf-hub:{name}: {first_line(error)}",
            hint="check its name, or without a network give a folder with its config.json and model.safetensors",
        ) from error


def is_here(name: str) -> bool:
    """Whether a repository is in the hub's cache on this machine."""
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return True  # what is missing is said when it is read
    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return True
