"""Which accelerator, precision and memory layout a run uses, and why."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from cakd_cli.errors import HardwareError
from cakd_cli.machine import memory

# 16-bit formats by the name that recipes give them.
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# First generation of CUDA devices that multiplies fp16 matrices faster than fp32 ones.
_TENSOR_CORES = 7
# AMD's generations that multiply bf16 matrices faster than fp32 ones: CDNA, RDNA 3 and RDNA 4.
_MATRIX_CORES = re.compile(r"gfx(908|90a|94\d|95\d|11\d\d|12\d\d)")


@dataclass(frozen=True)
class Hardware:
    """The machine as a run sees it.

    Attributes:
        device: Where networks and batches live.
        precision: ``fp32``, ``bf16`` or ``fp16``.
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
        with torch.autocast(self.device.type, dtype=HALVES.get(self.precision), enabled=self.is_half):
            yield

    @property
    def is_half(self) -> bool:
        """Whether networks compute in 16 bits."""
        return self.precision in HALVES

    @property
    def fast_bf16(self) -> bool:
        """Whether the device multiplies bf16 matrices faster than fp32 ones."""
        return bool(_native_bf16(self.device))

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
            memory.keep_freed_memory()

    def give_back_memory(self) -> None:
        """Give what an accelerator's allocator keeps back to the device."""
        if self.device.type != "cpu":
            torch.accelerator.empty_cache()

    def full_precision(self) -> "Hardware":
        """Return the same machine computing in float32: what reported figures are measured in."""
        return replace(self, precision="fp32")

    def free_bytes(self) -> int | None:
        """Free memory of an accelerator in bytes; none where the device cannot tell, or there is none."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        if self.device.type != "cpu" and hasattr(torch.accelerator, "get_memory_info"):
            return int(torch.accelerator.get_memory_info(self.device)[0])
        return None

    def random_state(self) -> dict[str, Tensor]:
        """States of the random number generators that a step may draw from: the CPU's, and the accelerator's."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type != "cpu":
            states[self.device.type] = torch.get_device_module(self.device).get_rng_state(*self._which())
        return states

    def restore_random_state(self, states: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`random_state` gave; another kind of accelerator begins anew."""
        torch.set_rng_state(states["cpu"])
        if self.device.type != "cpu" and self.device.type in states:
            torch.get_device_module(self.device).set_rng_state(states[self.device.type], *self._which())

    @contextlib.contextmanager
    def same_random_numbers(self) -> Iterator[None]:
        """Leave the random numbers of a step as they were before what is inside drew some."""
        states = self.random_state()
        try:
            yield
        finally:
            self.restore_random_state(states)

    def _which(self) -> tuple[torch.device, ...]:
        # torch.mps has one generator, and its functions take no device.
        return () if self.device.type == "mps" else (self.device,)

    @property
    def name(self) -> str:
        """The device as its maker calls it, where torch knows."""
        return describe(self.device)


def choose_hardware(
    device: str = "auto", precision: str = "auto", *, channels_last: bool = True, number: int | None = None
) -> Hardware:
    """Find the device and the precision that were asked for, or the best that are here, and make it the process's own.

    Args:
        device: ``auto``, or a name of torch's.
        precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        channels_last: Layout of image tensors.
        number: Of this process among those of its run on this machine, which is its accelerator's; none of one alone.

    Raises:
        HardwareError: If the device does not exist or cannot compute in the precision.
    """
    reasons: dict[str, str] = {}
    found = _find_device(device, reasons)
    if number is not None and found.type != "cpu":
        found = _own_device(found, number)
    if found.type != "cpu" and found.index is not None:
        # Events and streams that name no device are the current one's.
        torch.accelerator.set_device_index(found.index)
    if found.type == "cuda":
        _check_kernels(found)
        # cuDNN's default would round the inputs of fp32 convolutions to 10 bits.
        torch.backends.cudnn.allow_tf32 = False
        # Batches have one size, so the fastest kernel of each convolution is worth a search.
        torch.backends.cudnn.benchmark = True
    native = _native_bf16(found)
    if precision == "auto":
        precision, reasons["engine.precision"] = _best_precision(found, native)
    elif precision == "bf16" and found.type in ("cuda", "xpu") and not native:
        raise HardwareError(f"{describe(found)} cannot compute in bf16", hint="engine.precision=fp32")
    return Hardware(found, precision, channels_last, reasons)


def _find_device(name: str, reasons: dict[str, str]) -> torch.device:
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


def _own_device(device: torch.device, number: int) -> torch.device:
    """Give each process of a machine an accelerator of its own."""
    count = torch.accelerator.device_count()
    if number >= count:
        raise HardwareError(
            f"process {number} of this machine has no {device.type}: there are {count}",
            hint=f"start {count} processes a machine, or --device cpu",
        )
    return torch.device(device.type, number)


def _check_kernels(device: torch.device) -> None:
    """Refuse a GPU that this build of torch has no kernels for, which the first kernel would say in words of its own.

    Kernels for a generation (``sm_80``) run on its later members too, those for one member (``sm_90a``) there alone,
    and PTX (``compute_90``) on all that came later.

    Raises:
        HardwareError: Naming the GPU, and what there are kernels for.
    """
    built = torch.cuda.get_arch_list()
    # AMD's names are others, and promise nothing about a later GPU.
    found = [match for name in built if (match := re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name))]
    if not found:
        return
    here = torch.cuda.get_device_capability(device)
    for kind, major, minor, suffix in (match.groups() for match in found):
        least = int(major), int(minor)
        if least == here or (suffix != "a" and least <= here and (kind == "compute" or least[0] == here[0])):
            return
    raise HardwareError(
        f"torch {torch.__version__} has no kernels for {describe(device)}, of compute capability {here[0]}.{here[1]}: "
        f"it is built for {', '.join(built)}",
        hint="install a torch that is built for it (https://pytorch.org/get-started), or --device cpu",
    )


def _best_precision(device: torch.device, native_bf16: str) -> tuple[str, str]:
    """Choose the fastest precision that trains alike, and say why."""
    if native_bf16:
        return "bf16", native_bf16
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] >= _TENSOR_CORES:
        return "fp16", f"tensor cores, and no native bf16 on {describe(device)}"
    return "fp32", f"no native bf16 on {describe(device)}"


def _native_bf16(device: torch.device) -> str:
    """Say why bf16 is fast here, or nothing."""
    if device.type == "cuda" and torch.version.hip:
        # torch says of every AMD GPU that it can.
        return "matrix cores" if _MATRIX_CORES.match(torch.cuda.get_device_properties(device).gcnArchName) else ""
    if device.type == "cuda":
        return "tensor cores" if torch.cuda.is_bf16_supported(including_emulation=False) else ""
    if device.type == "xpu":
        return "native bf16" if torch.xpu.is_bf16_supported(including_emulation=False) else ""
    if device.type == "cpu":
        return next((name for name in ("amx_bf16", "avx512_bf16") if _cpu_capabilities().get(name)), "")
    return ""


def _cpu_capabilities() -> Mapping[str, Any]:
    # Not every build of torch can tell.
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def describe(device: torch.device) -> str:
    """Name a device as its maker does, where torch knows."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{_cpu_capabilities().get('cpu_name', 'CPU')}, {torch.get_num_threads()} threads"
    return device.type
