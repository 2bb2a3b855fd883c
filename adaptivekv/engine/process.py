"""A process's memory: as the operating system or the GPU's allocator sees it, and as the collector walks it."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


class ProcessMemory:
    """Peak bytes above the level at construction: resident memory on a CPU, allocated memory on a GPU."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
            return
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what earlier work freed goes back first
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: restart the high-water mark
        self.start = _field("VmRSS")

    def peak(self) -> int:
        """Bytes; 0 where the operating system does not tell."""
        top = torch.cuda.max_memory_allocated() if self.cuda else _field("VmHWM")
        return max(0, top - self.start)


def freeze() -> None:
    """Take what lives now out of the garbage collector's sight, once a process has loaded what it serves.

    A full collection walks every object of torch, transformers and the model: 150 ms, in the middle of some step.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # or the extensions report all of it as leaked when the process ends


def _field(name: str) -> int:
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
