"""What a network answers.

Shape suffixes: N samples, B batch, C classes.
"""

import torch
from torch import Tensor, nn

from cakd_cli.data import Split
from cakd_cli.machine.hardware import Hardware
from cakd_cli.models.normalisation import Normalisation


@torch.inference_mode()
def predict(
    model: nn.Module, split: Split, normalisation: Normalisation, hardware: Hardware, *, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Ask a network about every sample of a split, in order, in eval mode.

    Returns:
        Logits (samples, classes) in float32 and labels (samples,), both on the CPU.
    """
    was_training = model.training
    model.eval()
    logits, labels = [], []
    for batch in split.ordered_batches(batch_size=batch_size, device=hardware.device):
        with hardware.autocast():
            logits.append(model(normalisation(batch.images)).float())
        labels.append(batch.labels)
    model.train(was_training)
    return torch.cat(logits).cpu(), torch.cat(labels).cpu()
