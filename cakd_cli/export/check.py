"""Does the file answer as the network does?

Shape suffixes: N samples, C classes.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cakd_cli.data import Split
from cakd_cli.errors import CheckFailedError
from cakd_cli.evaluation import metrics
from cakd_cli.evaluation.measure import check_finite
from cakd_cli.machine.hardware import Hardware
from cakd_cli.models.normalisation import Normalisation
from cakd_cli.models.saving import SavedModel

# What a file answers to normalised images.
Answers = Callable[[Tensor], Tensor]

SAMPLES = 256
LEAST_AGREEMENT = 0.995
# Test images of which the accuracy of a quantised file is measured, at most.
TEST_SAMPLES = 10_000
_BATCH = 256
# How long latencies are measured, and calls in a row of each file.
_SECONDS = 2.0
_CALLS = 10


def real_images(saved: SavedModel, split: Split, count: int) -> Tensor:
    """Up to ``count`` images without augmentation, as :func:`spread` picks them, normalised, on the CPU."""
    return torch.cat([images for images, _ in _batches(saved, spread(split, count))])


def spread(split: Split, count: int) -> Split:
    """Up to ``count`` samples, always the same: spread over the classes, and over the split within each."""
    labels_N = split.labels_by_number()
    # In order of their numbers, as the split's samples are; where an image has one label.
    own_N = torch.zeros(0) if labels_N is None else labels_N[labels_N >= 0]
    order_N = own_N.argsort(stable=True) if len(own_N) == len(split) else torch.arange(len(split))
    return split.subset(order_N[torch.linspace(0, len(split) - 1, min(count, len(split))).round().long()])


def _batches(saved: SavedModel, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield normalised images and labels."""
    cpu, shown = torch.device("cpu"), saved.preprocessing
    normalisation = Normalisation(shown.mean, shown.std, Hardware(cpu, "fp32", channels_last=False))
    for batch in split.ordered_batches(batch_size=_BATCH, device=cpu):
        yield normalisation(batch.images), batch.labels


def compare(model: nn.Module, exported: Answers, images: Tensor, *, tolerance: float) -> dict[str, Any]:
    """Compare answers in batches of several sizes, one image among them.

    Raises:
        InputError: If the network's own answers are not finite.
        CheckFailedError: If a logit differs by more than ``tolerance`` times the largest, or an answer in 200.
    """
    parts = [part for part in images.tensor_split([1, 64]) if len(part)]
    with torch.inference_mode():
        expected_NC = torch.cat([model.eval()(part) for part in parts])
        answered_NC = torch.cat([exported(part) for part in parts])
    check_finite(expected_NC, "the network")
    largest, agreement = metrics.differ(expected_NC, answered_NC)
    limit = tolerance * max(1.0, expected_NC.abs().max().item())
    # Written so that a NaN fails as well.
    if not (largest <= limit and agreement >= LEAST_AGREEMENT):
        raise CheckFailedError(
            f"the exported file answers differently: largest difference of an answer {largest:.1e} "
            f"(at most {limit:.1e}), top-1 agreement {agreement:.1%} on {len(images)} images; nothing was written"
        )
    return {"samples": len(images), "largest_difference": largest, "agreement": agreement}


def compare_quantised(
    original: Answers, quantised: Answers, saved: SavedModel, test: Split, *, max_drop: float | None
) -> dict[str, Any]:
    """Compare a quantised file with the float32 file that it was made from, on test images.

    Args:
        original: What the float32 file answers.
        quantised: What the quantised file answers.
        saved: The network.
        test: Up to 10,000 of these are shown to both.
        max_drop: By how much the metric may fall, in [0, 1]; none for any.

    Returns:
        ``samples``, ``agreement`` (share of equal first answers), ``metric`` (``top1``, or ``map`` of several labels),
        ``before`` and ``after`` (that metric in [0, 1], ``latency_ms`` of one image), ``drop`` of the metric,
        ``threads`` and ``rounds`` of the latencies.

    Raises:
        InputError: If answers of either are not finite.
        CheckFailedError: If the metric falls by more than ``max_drop``; its document is the report.
    """
    answered = [
        (original(images), quantised(images), labels) for images, labels in _batches(saved, spread(test, TEST_SAMPLES))
    ]
    before_NC, after_NC, labels_N = (torch.cat(column) for column in zip(*answered, strict=True))
    check_finite(before_NC, "the network")
    check_finite(after_NC, "the quantised file")
    figures = [metrics.brief(logits_NC, labels_N) for logits_NC in (before_NC, after_NC)]
    metric = "map" if "map" in figures[0] else "top1"
    times, rounds = latencies([original, quantised], torch.zeros(1, *saved.preprocessing.input_size))
    before, after = ({metric: own[metric], "latency_ms": latency} for own, latency in zip(figures, times, strict=True))
    drop = before[metric] - after[metric]
    report = {
        "samples": len(labels_N),
        "agreement": metrics.differ(before_NC, after_NC)[1],
        "metric": metric,
        "before": before,
        "after": after,
        "drop": drop,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
    }
    # Not for a difference that float64 makes.
    if max_drop is not None and drop > max_drop + 1e-9:
        raise CheckFailedError(
            f"{fall(report)}, more than --max-drop {max_drop:g} allows; nothing was written",
            hint="--format onnx loses nothing; a larger network loses less than a small one",
            document=report,
        )
    return report


def fall(report: Mapping[str, Any]) -> str:
    """Say what became of the metric."""
    name = "mAP" if report["metric"] == "map" else "top-1"
    before, after = (report[when][report["metric"]] for when in ("before", "after"))
    return f"in 8 bits {name} is {after:.1%} instead of {before:.1%} on {report['samples']:,} test images"


def latencies(files: list[Answers], image: Tensor) -> tuple[list[float], int]:
    """Time a call of each file in milliseconds, the median of rounds, and count these.

    In each round the files take turns: what else the machine does slows all of them alike.
    """
    times: list[list[float]] = [[] for _ in files]
    start = time.perf_counter()
    while len(times[0]) < 5 or time.perf_counter() - start < _SECONDS:
        for answers, own in zip(files, times, strict=True):
            # The others have just emptied the caches.
            answers(image)
            before = time.perf_counter()
            for _ in range(_CALLS):
                answers(image)
            own.append(1000 * (time.perf_counter() - before) / _CALLS)
    return [statistics.median(own) for own in times], len(times[0])
