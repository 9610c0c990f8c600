"""Which accelerator, precision and memory layout a run uses, and why."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from cakd_cli.engine import allocator
from cakd_cli.errors import HardwareError
from cakd_cli.recipe.schema import EngineOptions


@dataclass(frozen=True)
class Hardware:
    """The machine as a run sees it.

    Attributes:
        device: Where networks and batches live.
        precision: ``fp32`` or ``bf16``.
        channels_last: Whether image tensors are stored channels last.
        reasons: Why each automatic choice was made, by recipe key.
    """

    device: torch.device
    precision: str
    channels_last: bool = True
    reasons: dict[str, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Run the networks inside in the chosen precision."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            yield

    def place(self, model: nn.Module) -> nn.Module:
        """Move a network to the device in the chosen memory layout."""
        if self.channels_last:
            # Only convolution weights have four dimensions; torch leaves the others as they are.
            return model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
        return model.to(self.device)

    def wait(self) -> None:
        """Wait until the device has done what it was told; for measurements."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def keep_freed_memory(self) -> None:
        """Keep the CPU's freed tensors for the next step; accelerators do so by themselves."""
        if self.device.type == "cpu":
            allocator.keep_freed_memory()

    def full_precision(self) -> "Hardware":
        """Return the same machine computing in float32: what reported figures are measured in."""
        return Hardware(self.device, "fp32", self.channels_last, self.reasons)


def choose(options: EngineOptions) -> Hardware:
    """Resolve ``auto`` and check what was asked for.

    Raises:
        HardwareError: If the device does not exist or cannot compute in the precision.
    """
    reasons: dict[str, str] = {}
    device = _choose_device(options.device, reasons)
    if device.type != "cpu" and device.index is not None:
        # Events and streams that name no device are the current one's.
        torch.accelerator.set_device_index(device.index)
    if device.type == "cuda":
        # cuDNN's default would round the inputs of fp32 convolutions to 10 bits.
        torch.backends.cudnn.allow_tf32 = False
    precision = options.precision
    native = _native_bf16(device)
    if precision == "auto":
        precision = "bf16" if native else "fp32"
        reasons["engine.precision"] = native or f"no native bf16 on {describe(device)}"
    elif precision == "bf16" and device.type == "cuda" and not native:
        raise HardwareError(f"{describe(device)} cannot compute in bf16", hint="engine.precision=fp32")
    return Hardware(device, precision, options.channels_last, reasons)


def _choose_device(name: str, reasons: dict[str, str]) -> torch.device:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        device = accelerator or torch.device("cpu")
        reasons["engine.device"] = f"found {describe(device)}" if accelerator else "no accelerator found"
        return device
    here = "this machine has cpu" + (
        f" and {torch.accelerator.device_count()} {accelerator.type}" if accelerator is not None else " only"
    )
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise HardwareError(f"no such device '{name}'; {here}", hint="cakd env lists the devices") from error
    if device.type == "cpu" and not device.index:
        return device
    if (
        accelerator is None
        or device.type != accelerator.type
        or (device.index or 0) >= torch.accelerator.device_count()
    ):
        raise HardwareError(f"no device '{name}'; {here}", hint="leave --device out to use what is there")
    return device


def _native_bf16(device: torch.device) -> str:
    """Say why bf16 is fast here, or nothing."""
    if device.type == "cuda":
        return "tensor cores" if torch.cuda.is_bf16_supported(including_emulation=False) else ""
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return next((name for name in ("amx_bf16", "avx512_bf16") if capabilities.get(name)), "")
    return ""


def describe(device: torch.device) -> str:
    """Name the device as its maker does, where torch knows."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return f"{capabilities.get('cpu_name', 'CPU')}, {torch.get_num_threads()} threads"
    return device.type


def free_bytes(device: torch.device) -> int | None:
    """Free memory of an accelerator in bytes; none where the device cannot tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu" and hasattr(torch.accelerator, "get_memory_info"):
        return int(torch.accelerator.get_memory_info(device)[0])
    return None
