"""What happens to memory that the CPU's tensors give back.

glibc returns large blocks to the system when they are freed, and the next step takes them again, page by page: on two
cores a tenth and more of a small network's step. A run keeps them instead.
"""

import ctypes
import platform

import torch

# Of malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_KEPT = 2**30
_MOST_ADAPTED = 32 * 2**20


def keep_freed_memory() -> None:
    """Keep what tensors free for the tensors to come, to the end of the process; does nothing without glibc."""
    _set(mmap_threshold=_KEPT, trim_threshold=2**31 - 1, top_pad=64 * 2**20)


def free_as_usual(largest: int) -> None:
    """Treat freed memory as glibc does by itself, for comparisons after :func:`keep_freed_memory`.

    Args:
        largest: Bytes of the largest block in use: glibc raises its thresholds to what a program frees, up to 32 MiB.
    """
    threshold = min(largest, _MOST_ADAPTED)
    _set(mmap_threshold=threshold, trim_threshold=2 * threshold, top_pad=128 * 2**10)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch's says that there is no room, on whatever device."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)


def _set(*, mmap_threshold: int, trim_threshold: int, top_pad: int) -> None:
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    # An older glibc refuses more than this, and each of the other calls ends its own adapting.
    if not (mallopt(_MMAP_THRESHOLD, mmap_threshold) or mallopt(_MMAP_THRESHOLD, _MOST_ADAPTED)):
        return
    mallopt(_TRIM_THRESHOLD, trim_threshold)
    mallopt(_TOP_PAD, top_pad)
