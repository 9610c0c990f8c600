"""cakd env."""

import platform

import torch

from cakd_cli.console import Console
from cakd_cli.engine.record import versions
from cakd_cli.files import home
from cakd_cli.machine.hardware import choose_hardware

_WITHOUT_CUDA = "pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu"


def run(*, console: Console) -> None:
    """Say what a bug report needs."""
    machine = choose_hardware()
    facts = {
        **versions(),
        "platform": platform.platform(),
        "device": str(machine.device),
        "device_name": machine.name,
        "devices": torch.accelerator.device_count() if torch.accelerator.is_available() else 0,
        "precision": f"{machine.precision} ({machine.reasons['engine.precision']})",
        "data_folder": str(home() / "data"),
    }
    if torch.version.cuda and not torch.accelerator.is_available():
        console.note(f"this torch brings CUDA along, several GB, and there is no GPU; without it: {_WITHOUT_CUDA}")
    text = "\n".join(f"{key}: {value}" for key, value in facts.items())
    console.result(facts, lambda stdout: stdout.print(text, markup=False))
