"""How much a network's features say of other images: a linear classifier is trained on them, the network is not.

The tables of transfer in the field's papers are such probes (CRD, arXiv 1910.10699; DKD, arXiv 2203.08679). They train
by SGD for some epochs; here the optimum itself is found, for the loss is convex.
"""

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cakd_cli.data import ImageDataSet, Split
from cakd_cli.data.base import DataSpec, hold_out
from cakd_cli.errors import RecipeError
from cakd_cli.evaluation import metrics
from cakd_cli.machine.hardware import Hardware
from cakd_cli.models import saving
from cakd_cli.models.layers import Tap, Tapped, locate
from cakd_cli.models.linear import Labelled, best_linear
from cakd_cli.models.normalisation import Normalisation
from cakd_cli.models.preprocessing import Preprocessing
from cakd_cli.models.saving import SavedModel

# Share of the training images that chooses the penalty, where the data holds nothing out itself.
_HELD_OUT = 0.1


def linear_probe(run: Path, spec: DataSpec, machine: Hardware, *, batch_size: int) -> dict[str, Any]:
    """Train a linear classifier on what a network's own classifier is given, and measure it on the test images.

    Training images are not augmented. Images of another size than the network's are resized to it.

    Args:
        run: A finished run, or an exported folder.
        spec: Other data than the network was trained on.
        machine: Where the features are computed; in float32.
        batch_size: Images at a time.

    Returns:
        ``data``, ``classes``, ``train`` and ``test`` (images), ``features`` (elements), ``penalty`` (the L2 penalty
        chosen on held-out images), ``top1`` and ``nll`` (nats) on the test images.

    Raises:
        CakdError: If the run or the data is missing, or they do not fit.
    """
    saved = saving.read(run)
    shown = saved.preprocessing
    data = spec.shown_as(shown.input_size[1:], shown.crop_pct).load()
    _check(saved, data)
    parts = {"train": data.train, "test": data.test}
    if data.validation is not None:
        parts["held out"] = data.validation
    network = machine.place(saved.model).eval()
    example = torch.zeros(1, *shown.input_size, device=machine.device)
    taps = locate(network, [Tap()], len(saved.class_names), example, name=saved.spec.label).taps
    with contextlib.closing(Tapped(network, taps)) as tapped:
        features = {name: _features(tapped, shown, split, machine, batch_size) for name, split in parts.items()}
    if "held out" not in features:
        train = features["train"]
        keep, out = hold_out(train.labels, _HELD_OUT, seed=0)
        features["train"], features["held out"] = (Labelled(*(x[part] for x in train)) for part in (keep, out))
    classifier, penalty = best_linear(features["train"], features["held out"], data.num_classes)
    test = features["test"]
    figures = metrics.brief(classifier(test.features), test.labels)
    counts = {"classes": data.num_classes, "train": len(data.train), "test": len(data.test)}
    counts["features"] = classifier.in_features
    return {"data": data.name, **counts, "penalty": penalty, **figures}


def _check(saved: SavedModel, data: ImageDataSet) -> None:
    if data.multi_label:
        raise RecipeError(f"a probe needs one label an image, and images of {data.name} may have several")
    if not data.labelled:
        raise RecipeError(
            f"a probe learns from labels, and the training images of {data.name} have none",
            hint="probe with other data",
        )
    channels = saved.preprocessing.input_size[0]
    if channels != data.channels:
        raise RecipeError(
            f"the network takes images of {channels} channels, those of {data.name} have {data.channels}",
            hint="probe with other data",
        )


@torch.no_grad()
def _features(tapped: Tapped, shown: Preprocessing, split: Split, machine: Hardware, batch_size: int) -> Labelled:
    """What the classifier is given."""
    (tap,), normalise = tapped.taps, Normalisation(shown.mean, shown.std, machine)
    features, labels = [], []
    for batch in split.ordered_batches(batch_size=batch_size, device=machine.device):
        images = _resized(batch.images, shown.input_size[1:])
        features.append(tapped(normalise(images))[str(tap)].cpu())
        labels.append(batch.labels.cpu())
    return Labelled(torch.cat(features), torch.cat(labels))


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    if images.shape[2:] == size:
        return images
    resized = functional.interpolate(images.float(), size=size, mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)
