"""Does the file answer as the network does?

Shape suffixes: N samples, C classes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cakd_cli.data import ImageDataSet
from cakd_cli.errors import CheckFailedError
from cakd_cli.evaluation.measure import check_finite
from cakd_cli.evaluation.metrics import differ
from cakd_cli.machine.hardware import Hardware
from cakd_cli.models.normalisation import Normalisation
from cakd_cli.models.saving import SavedModel

SAMPLES = 256
LEAST_AGREEMENT = 0.995


def real_images(saved: SavedModel, data: ImageDataSet) -> Tensor:
    """Up to 256 test images, spread over the split, normalised for the network, on the CPU."""
    positions = torch.linspace(0, len(data.test) - 1, min(SAMPLES, len(data.test))).round().long()
    cpu, shown = torch.device("cpu"), saved.preprocessing
    normalisation = Normalisation(shown.mean, shown.std, Hardware(cpu, "fp32", channels_last=False))
    batches = data.test.subset(positions).ordered_batches(batch_size=SAMPLES, device=cpu)
    return torch.cat([normalisation(batch.images) for batch in batches])


def compare(
    model: nn.Module, exported: Callable[[Tensor], Tensor], images: Tensor, *, tolerance: float
) -> dict[str, Any]:
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
    largest, agreement = differ(expected_NC, answered_NC)
    limit = tolerance * max(1.0, expected_NC.abs().max().item())
    # Written so that a NaN fails as well.
    if not (largest <= limit and agreement >= LEAST_AGREEMENT):
        raise CheckFailedError(
            f"the exported file answers differently: largest difference of a logit {largest:.1e} "
            f"(at most {limit:.1e}), top-1 agreement {agreement:.1%} on {len(images)} images; nothing was written"
        )
    return {"samples": len(images), "largest_difference": largest, "agreement": agreement}
