"""What a network says about pictures that nobody has labelled, each shown as ``cakd eval`` shows it.

Shape suffixes: C classes.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cakd_cli.data.images.pictures import all_pictures, decode, middle_crop
from cakd_cli.errors import InputError
from cakd_cli.evaluation.classifier import Classifier

# Pictures that are in memory at once.
BATCH = 64
_THREADS = 8


class Prediction(NamedTuple):
    """What came of one picture.

    Attributes:
        path: The picture.
        classes: The most probable ones: ``name`` and ``probability`` in [0, 1]; empty if it could not be used.
        why: Why not; empty if it could.
        fitted: Whether it was resized although the network learnt from images that were not.
        several_frames: Whether the file holds more than one picture, of which the first was shown.
    """

    path: str
    classes: list[dict[str, Any]]
    why: str = ""
    fitted: bool = False
    several_frames: bool = False


class _Shown(NamedTuple):
    pixels: Tensor
    fitted: bool
    several_frames: bool


def find_pictures(given: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """List pictures, each once: files as given, and those of folders and their subfolders, sorted.

    Returns:
        Their paths; and of each word that is neither a file nor a folder with pictures, why.
    """
    found: dict[str, None] = {}
    wrong = {}
    for word in given:
        path = Path(word).expanduser()
        if word and path.is_dir():
            pictures = all_pictures(path)
            found |= dict.fromkeys(pictures)
            if not pictures:
                wrong[word] = "no picture in this folder"
        elif path.is_file():
            found[str(path)] = None
        else:
            wrong[word] = "not a file" if word and path.exists() else "no such file or folder"
    return list(found), wrong


def classify(network: Classifier, paths: Sequence[str], *, top: int) -> Iterator[Prediction]:
    """Show pictures to a network, in order, 64 at a time.

    Raises:
        InputError: If the network takes images that no picture is, or its answers are not finite.
    """
    if network.input_size[0] not in (1, 3):
        raise InputError(
            f"{network.name} takes images of {network.input_size[0]} channels, and pictures have 1 or 3",
            hint="cakd eval measures it on the data that it was trained for",
        )
    with ThreadPoolExecutor(_THREADS) as pool:
        for first in range(0, len(paths), BATCH):
            batch = paths[first : first + BATCH]
            shown = list(pool.map(partial(_show, network), batch))
            usable = [each.pixels for each in shown if not isinstance(each, str)]
            answers = iter(network.answer(torch.stack(usable)) if usable else ())
            for path, each in zip(batch, shown, strict=True):
                if isinstance(each, str):
                    yield Prediction(path, [], each.removeprefix(f"{path}: "))
                else:
                    classes = _most_probable(network, next(answers), top)
                    yield Prediction(path, classes, fitted=each.fitted, several_frames=each.several_frames)


def _most_probable(network: Classifier, probabilities_C: Tensor, top: int) -> list[dict[str, Any]]:
    # Of equal ones the first, as the measured answer is.
    order = probabilities_C.argsort(descending=True, stable=True)[:top].tolist()
    return [{"name": network.class_names[label], "probability": probabilities_C[label].item()} for label in order]


def _show(network: Classifier, path: str) -> _Shown | str:
    """Make uint8 pixels (channels, height, width) of a picture, or say why it cannot be used."""
    from PIL import Image, ImageOps
    from torchvision.transforms.v2 import functional

    channels, height, width = network.input_size
    picture = decode(path, network.resize or max(height, width))
    if isinstance(picture, str):
        return picture
    with Image.open(path) as file:
        several_frames = getattr(file, "n_frames", 1) > 1
    if channels == 1:
        picture = picture.convert("L")
    if network.resize is not None:
        return _Shown(middle_crop(network.resize, height)(picture), fitted=False, several_frames=several_frames)
    fitted = picture.size != (width, height)
    if fitted:
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.BILINEAR)
    return _Shown(functional.pil_to_tensor(picture), fitted, several_frames)
