"""CLIP and SigLIP as teachers: an image is compared with a sentence about each class, and no image was trained on.

A folder in the layout of transformers, or a repository of the hub. The sentences are made of the class names and
templates, and embedded once; the image tower and they are then a network like any other. Both models compare by the
cosine, times a scale that was learnt with the pairs of their training, and not for these classes: what the logits are
divided by, the temperature, is chosen on images with labels.

Shape suffixes: N samples, C classes, D elements of an embedding.
"""

import importlib.metadata
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from cakd_cli.data import ImageDataSet
from cakd_cli.errors import InputError, RecipeError, first_line
from cakd_cli.files import read_json
from cakd_cli.machine.hardware import Hardware
from cakd_cli.models import hub
from cakd_cli.options import mistakes
from cakd_cli.teachers.network import Found, TeacherSpec, outputs_on

_KINDS = {"clip": "CLIP", "siglip": "SigLIP"}
_HUB = "hf-hub:"
# Images on which the temperature is chosen, and between what.
_MOST_IMAGES = 2048
_LEAST, _LARGEST = 1e-2, 1e2


class ZeroShotTeacher(TeacherSpec):
    """CLIP or SigLIP, by what classes are called, without training: clip:FOLDER or clip:hf-hub:OWNER/NAME."""

    shorthand: ClassVar[str | None] = "model"

    type: Literal["clip"] = "clip"
    model: str = Field(min_length=1, description="folder in the layout of transformers, or hf-hub:OWNER/NAME")
    templates: tuple[str, ...] = Field(
        ("a photo of a {}.",), strict=False, min_length=1, description="sentences about a class, whose name is for {}"
    )
    logit_temperature: Literal["auto"] | float = Field(
        "auto", description="by which its logits are divided, above 0; auto is the best on held-out images"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for place, template in enumerate(self.templates):
            if template.count("{}") != 1:
                raise mistakes([(("templates", place), f"must have {{}} once, got '{template}'")], self)
        if self.logit_temperature != "auto" and not self.logit_temperature > 0:
            raise mistakes([(("logit_temperature",), f"must be above 0, got {self.logit_temperature:g}")], self)
        return self

    @property
    def label(self) -> str:
        return f"clip:{self.model}"

    @property
    def origin(self) -> str:
        return "published weights, and sentences made of the class names"

    def missing_file(self) -> str | None:
        name = self.model.removeprefix(_HUB)
        return None if name == self.model or hub.is_here(name) else f"{self.label}, from the Hugging Face hub"

    def find(self, data: ImageDataSet, hardware: Hardware, *, fetch: bool) -> Found:
        if data.multi_label:
            raise RecipeError(
                f"{self.label} tells which class an image shows, and images of {data.name} may show several",
                hint="take a teacher that was trained on them",
            )
        name = self.model.removeprefix(_HUB)
        folder = Path(name).expanduser() if name == self.model else hub.snapshot(name, fetch=fetch)
        kind = _kind(folder, self.label)
        network, tokenizer = _read(folder)
        mean, std, size = hub.preprocessing(folder, network.config.vision_config.num_channels)
        model = ZeroShot(network, self._embedded(network, tokenizer, data, kind))
        shown = (len(mean), *size)
        found = Found(
            model=model.eval(),
            mean=mean,
            std=std,
            name=self.label,
            architecture=json.dumps(
                [network.config.to_diff_dict(), f"transformers {importlib.metadata.version('transformers')}"],
                sort_keys=True,
                default=str,
            ),
            class_names=data.class_names,
            input_size=shown,
            notes=(f"{self.label}: {kind}, which compares an image with '{self.templates[0]}'" + self._others(),),
        )
        return self._at_temperature(model, found, data, hardware, kind)

    def _others(self) -> str:
        more = len(self.templates) - 1
        return f" and {more} other template{'s' * (more > 1)} of each class" if more else " of each class"

    @torch.no_grad()
    def _embedded(self, network: Any, tokenizer: Any, data: ImageDataSet, kind: str) -> Tensor:
        """Embed each class as the mean of its sentences, of length 1, (classes, elements)."""
        # As the two were trained: SigLIP reads its padding.
        padding = "max_length" if kind == "SigLIP" else True
        length = network.config.text_config.max_position_embeddings
        classes = []
        for name in data.class_names:
            sentences = [template.replace("{}", name.replace("_", " ")) for template in self.templates]
            tokens = tokenizer(sentences, padding=padding, truncation=True, max_length=length, return_tensors="pt")
            mask = {} if kind == "SigLIP" else {"attention_mask": tokens["attention_mask"]}
            found_ND = network.text_model(input_ids=tokens["input_ids"], **mask).pooler_output
            if hasattr(network, "text_projection"):
                found_ND = network.text_projection(found_ND)
            classes.append(functional.normalize(found_ND, dim=1).mean(0))
        return functional.normalize(torch.stack(classes), dim=1)

    def _at_temperature(
        self, model: "ZeroShot", found: Found, data: ImageDataSet, hardware: Hardware, kind: str
    ) -> Found:
        """Divide the logits by a temperature, and say which and why."""
        chosen, why = self.logit_temperature, "as asked for"
        if chosen == "auto":
            chosen, why = 1.0, "no image has a label to choose it on"
            split = data.validation or (data.train if data.labelled else None)
            if split is not None and data.fingerprint and data.channels == len(found.mean):
                where = "held-out" if data.validation else "training"
                count = min(len(split), _MOST_IMAGES)
                part = split.subset(torch.linspace(0, len(split) - 1, count).round().long())
                # Few digits: so that it does not depend on the last ones of a machine.
                chosen = float(f"{best_temperature(*outputs_on(part, model, found, hardware)):.3g}")
                why = f"the best on {count:,} {where} images"
        with torch.no_grad():
            model.classifier.weight /= chosen
        own = "; its sigmoid of each class is taken for a softmax over all" if kind == "SigLIP" else ""
        notes = (f"{found.notes[0]}; temperature {chosen:g}, {why}{own}",)
        return replace(found, notes=notes)


class ZeroShot(nn.Module):
    """The image tower, and the embedded classes as a linear classifier of its normalised embeddings.

    Args:
        network: Of transformers, with ``vision_model`` and for CLIP ``visual_projection``.
        classes_CD: Embedded, of length 1.
    """

    def __init__(self, network: Any, classes_CD: Tensor) -> None:
        super().__init__()
        self.tower: nn.Module = network.vision_model
        self.projection: nn.Module = getattr(network, "visual_projection", nn.Identity())
        self.classifier = nn.Linear(classes_CD.shape[1], classes_CD.shape[0], bias=False)
        with torch.no_grad():
            self.classifier.weight.copy_(network.logit_scale.exp() * classes_CD)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images to logits (batch, classes)."""
        embedded = self.projection(self.tower(pixel_values=images).pooler_output)
        logits: Tensor = self.classifier(functional.normalize(embedded, dim=1))
        return logits


def best_temperature(logits_NC: Tensor, labels_N: Tensor) -> float:
    """Find by which number, from 0.01 to 100, logits are divided for the least negative log-likelihood.

    It is convex in the inverse of that number: its derivative, how much larger the mean logit is that is expected than
    that of the label, grows, and where it is zero is found by halving.
    """
    logits_NC = logits_NC.double()
    right_N = logits_NC.gather(1, labels_N[:, None])[:, 0]
    least, largest = math.log(1 / _LARGEST), math.log(1 / _LEAST)
    for _ in range(50):
        middle = (least + largest) / 2
        expected_N = ((math.exp(middle) * logits_NC).softmax(1) * logits_NC).sum(1)
        if (expected_N - right_N).mean() > 0:
            largest = middle
        else:
            least = middle
    return math.exp(-(least + largest) / 2)


def _kind(folder: Path, label: str) -> str:
    """Tell CLIP from SigLIP.

    Raises:
        InputError: If it is neither.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{label}: {folder} has no config.json", hint="give a folder in the layout of transformers")
    try:
        kind = read_json(path)["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: does not say what model it is: {first_line(error)}") from error
    if kind not in _KINDS:
        raise InputError(f"{label} is {kind}, neither CLIP nor SigLIP", hint=f"--teacher {folder} takes a classifier")
    return _KINDS[kind]


def _read(folder: Path) -> tuple[Any, Any]:
    """Read the network and its tokenizer; no code and no pickle of anybody's.

    Raises:
        RecipeError: If transformers is not installed.
        InputError: If a file is missing or damaged.
    """
    try:
        import transformers
    except ImportError as error:
        raise RecipeError("a teacher by sentences needs transformers", hint="pip install 'cakd[clip]'") from error
    library: Any = transformers
    library.logging.disable_progress_bar()
    here = {"local_files_only": True, "trust_remote_code": False}
    try:
        network = library.AutoModel.from_pretrained(folder, use_safetensors=True, **here)
        return network.eval().float(), library.AutoTokenizer.from_pretrained(folder, **here)
    except Exception as error:
        # The library refuses a folder with whatever it likes.
        raise InputError(
            f"{folder}: transformers cannot read the network: {first_line(error)}",
            hint="it needs config.json, model.safetensors, preprocessor_config.json and the tokenizer's files",
        ) from error
