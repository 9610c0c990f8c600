"""Bridges to the networks of torchvision and timm."""

import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, cast

import torch
from pydantic import Field
from torch import nn

from cakd_cli.errors import InputError, RecipeError, first_line, nearest
from cakd_cli.models.base import ModelSpec
from cakd_cli.models.weights import load_state, read_state


class PublishedForm(NamedTuple):
    """What a library says of published weights.

    Attributes:
        mean: Of each channel, for pixels in [0, 1], as the weights expect images to be normalised.
        std: Likewise.
        input_size: Channels, height and width of the images.
        num_classes: Logits.
        class_names: In the order of the logits; none where the library does not tell them.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: tuple[int, int, int]
    num_classes: int
    class_names: tuple[str, ...] | None


class ExternalSpec(ModelSpec):
    """A network of another library, with its published weights if wanted."""

    shorthand: ClassVar[str | None] = "name"

    name: str
    pretrained: bool | str = False

    def published(self, *, in_channels: int, num_classes: int) -> nn.Module:
        """Make the network with the published weights; a head of another size is fresh.

        Raises:
            InputError: If the weights are not here and cannot be fetched.
            RecipeError: If the library has none for this network.
        """
        raise NotImplementedError

    def could_be_pretrained(self) -> bool:
        """Whether it starts fresh although its library has published weights of it."""
        if self.pretrained or self.weights is not None:
            return False
        try:
            self.model_copy(update={"pretrained": True}).published_form()
        except RecipeError:
            return False
        return True

    @property
    def published_label(self) -> str:
        """What a person calls this network with the weights that it starts from."""
        return self.label

    def published_form(self) -> PublishedForm:
        """Say what the published weights are made for; nothing is downloaded.

        Raises:
            RecipeError: If the library has none for this network, or they have no classifier.
        """
        raise NotImplementedError

    def count_classes(self, published: int) -> int:
        """Count the classes that the weights tell apart: a file of them may have another head than the published ones.

        Raises:
            InputError: If the file is missing or damaged.
        """
        if self.weights is None:
            return published
        shown = self.published_form()
        model = self.build(in_channels=shown.input_size[0], num_classes=published)
        rows = read_state(Path(self.weights).expanduser()).get(f"{_last_linear(model)}.weight")
        return published if rows is None else len(rows)

    @property
    def label(self) -> str:
        return f"{self.type}:{self.name}"

    @property
    def architecture(self) -> str:
        # Another version of the library may compute something else under the same name.
        settings = self.model_dump_json(exclude={"weights", "pretrained"})
        return f"{settings} of {self.type} {importlib.metadata.version(self.type)}"

    @property
    def origin(self) -> str:
        if self.pretrained and self.weights is None:
            named = f" {self.pretrained}" if isinstance(self.pretrained, str) else ""
            return f"{self.type}'s published weights{named}"
        return super().origin


# Of torchvision's classifiers.
_SEVERAL_OUTPUTS = ("googlenet", "inception_v3")


class TorchvisionSpec(ExternalSpec):
    """A torchvision classifier: torchvision:NAME; torchvision:NAME@WEIGHTS starts from those published weights."""

    type: Literal["torchvision"] = "torchvision"
    name: str = Field(description="as in torchvision.models, for example resnet18 or mobilenet_v3_small")
    pretrained: bool | Annotated[str, Field(min_length=1)] = Field(
        False, description="start from published weights, by name (IMAGENET1K_V1); true = torchvision's default"
    )

    @staticmethod
    def known() -> list[str]:
        """Names of torchvision's classifiers that answer with one output."""
        from torchvision import models

        return [name for name in models.list_models(module=models) if name not in _SEVERAL_OUTPUTS]

    def _check_names(self) -> None:
        known = self.known()
        if self.name in _SEVERAL_OUTPUTS:
            raise RecipeError(
                f"torchvision:{self.name} answers with several outputs while it trains", hint="choose another network"
            )
        if self.name not in known:
            raise RecipeError(f"torchvision has no classifier '{self.name}'", hint=nearest(self.name, known))
        if self.pretrained:
            self._published_weights()

    def _check(self, in_channels: int) -> None:
        self._check_names()
        if in_channels != 3:
            raise RecipeError(
                f"torchvision:{self.name} takes 3 channels, the images have {in_channels}",
                hint="use colour images, or a network of any channels such as resnet20",
            )

    def build(self, *, in_channels: int, num_classes: int) -> nn.Module:
        from torchvision import models

        self._check(in_channels)
        return cast(nn.Module, models.get_model(self.name, weights=None, num_classes=num_classes))

    def _published_weights(self) -> Any:
        from torchvision import models

        published = models.get_model_weights(self.name)
        if not isinstance(self.pretrained, str):
            return published.DEFAULT
        # Those without categories, as VGG16's for detectors, have no classifier.
        known = {weights.name: weights for weights in published if weights.meta["categories"]}
        if self.pretrained not in known:
            raise RecipeError(
                f"torchvision has no weights '{self.pretrained}' of {self.name}", hint=f"choose from {', '.join(known)}"
            )
        return known[self.pretrained]

    def missing_file(self) -> str | None:
        if not self.pretrained or self.weights is not None:
            return None
        self._check_names()
        return _missing_download(self.label, self._published_weights().url)

    def published(self, *, in_channels: int, num_classes: int) -> nn.Module:
        model = self.build(in_channels=in_channels, num_classes=num_classes)
        try:
            state = self._published_weights().get_state_dict(progress=False, check_hash=True)
        except OSError as error:
            raise InputError(
                f"cannot fetch the weights of torchvision:{self.name}: {error}",
                hint="without a network, give a file: model.weights=PATH.pth (or teacher.weights)",
            ) from error
        load_but_head(model, state, source=self.label)
        return model

    @property
    def published_label(self) -> str:
        return f"{self.label}@{self._published_weights().name}" if self.weights is None else self.label

    def published_form(self) -> PublishedForm:
        self._check_names()
        weights = self._published_weights()
        shown, names = weights.transforms(), tuple(weights.meta["categories"])
        (size,) = shown.crop_size
        return PublishedForm(tuple(shown.mean), tuple(shown.std), (3, size, size), len(names), names)


class TimmSpec(ExternalSpec):
    """A timm classifier: timm:NAME."""

    type: Literal["timm"] = "timm"
    name: str = Field(description="as in timm.create_model, for example vit_tiny_patch16_224")
    # Which weights is part of timm's names, as in resnet50.a1_in1k.
    pretrained: bool = Field(False, description="start from the library's published weights")

    def _timm(self) -> Any:
        try:
            import timm
        except ImportError as error:
            raise RecipeError(f"timm:{self.name} needs timm", hint="pip install 'cakd[timm]'") from error
        if not timm.is_model(self.name):
            raise RecipeError(f"timm has no model '{self.name}'", hint=nearest(self.name, timm.list_models()))
        return timm

    def build(self, *, in_channels: int, num_classes: int) -> nn.Module:
        return cast(nn.Module, self._timm().create_model(self.name, in_chans=in_channels, num_classes=num_classes))

    def missing_file(self) -> str | None:
        if not self.pretrained or self.weights is not None:
            return None
        config = self._timm().get_pretrained_cfg(self.name)
        if config is None:
            return None
        if not config.hf_hub_id:
            return _missing_download(self.label, config.url) if config.url else None
        from huggingface_hub import try_to_load_from_cache

        here = [try_to_load_from_cache(config.hf_hub_id, name) for name in ("model.safetensors", "pytorch_model.bin")]
        found = any(isinstance(path, str) and os.path.exists(path) for path in here)
        return None if found else f"the weights of {self.label}, from the Hugging Face hub ({config.hf_hub_id})"

    def published(self, *, in_channels: int, num_classes: int) -> nn.Module:
        timm = self._timm()
        try:
            model = timm.create_model(self.name, pretrained=True, in_chans=in_channels, num_classes=num_classes)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"cannot fetch the weights of timm:{self.name}: {first_line(error)}",
                hint="without a network, give a file: model.weights=PATH.safetensors (or teacher.weights)",
            ) from error
        return cast(nn.Module, model)

    def published_form(self, *, classifier: bool = True) -> PublishedForm:
        config = self._timm().get_pretrained_cfg(self.name)
        if config is None:
            raise RecipeError(
                f"timm has no published weights of {self.name}", hint=f"give a file: weights=PATH of timm:{self.name}"
            )
        if classifier and not config.num_classes:
            raise RecipeError(
                f"the published weights of {self.label} have no classifier",
                hint=f"train one on it: cakd train-teacher --model {self.label} model.pretrained=true",
            )
        return PublishedForm(
            tuple(config.mean),
            tuple(config.std),
            tuple(config.input_size),
            config.num_classes,
            timm_classes(config.to_dict()),
        )


def timm_classes(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Name the classes of timm's weights, if their configuration tells them; ImageNet's are WordNet's ids."""
    from timm.data import imagenet_info

    names = config.get("label_names")
    if isinstance(names, list | tuple) and len(names) == config["num_classes"]:
        return tuple(map(str, names))
    told: Any = imagenet_info
    subset = told.infer_imagenet_subset(config)
    return tuple(told.ImageNetInfo(subset).label_names()) if subset else None


def _missing_download(label: str, url: str) -> str | None:
    here = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    return None if here.is_file() else f"the weights of {label}, from {url}"


def load_but_head(model: nn.Module, state: Mapping[str, Any], *, source: str) -> None:
    """Load published weights into a network whose last linear layer may have another number of classes.

    Raises:
        InputError: If anything else does not fit.
    """
    own = model.state_dict()
    fresh = {
        name: own[name]
        for name in (f"{_last_linear(model)}.{kind}" for kind in ("weight", "bias"))
        if name in own and (name not in state or state[name].shape != own[name].shape)
    }
    load_state(model, {**state, **fresh}, source=source)


def _last_linear(model: nn.Module) -> str:
    """Name the classifier; empty where no layer is linear."""
    return next((name for name, module in reversed([*model.named_modules()]) if isinstance(module, nn.Linear)), "")
