"""One preallocated run of bytes, in memory or in a file, and the extents of it that are free."""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import numpy as np
import torch

from adaptivekv.errors import BudgetError
from adaptivekv.kernels.codec import UNIT


class ArenaFull(BudgetError):
    """No free extent fits. The owner evicts, demotes or offloads, or compacts, and tries again."""


class Arena:
    """A byte buffer on one device, given out in multiples of `UNIT` bytes.

    Pages of any format share it: freed extents are merged with their neighbours, so room left by pages of one format
    can hold pages of another. Capacity is physical: `used` never passes `capacity`.
    folder: keep the bytes in a file there instead of in memory.
    """

    def __init__(
        self, capacity: int, device: torch.device | str = "cpu", pinned: bool = False, folder: Path | None = None
    ):
        self.capacity = capacity // UNIT * UNIT
        with torch.inference_mode(False):  # made inside a forward, changed outside of it too
            # empty, not zeros: untouched memory of a CPU arena is never committed by the operating system
            if folder and capacity:
                data = _mapped(self.capacity + UNIT, folder)
            else:
                data = torch.empty(self.capacity + UNIT, dtype=torch.uint8, device=device, pin_memory=pinned)
            start = -data.data_ptr() % UNIT  # aligned, so that one arena's offsets can lead into another
            self.data = data[start : start + self.capacity]
        free = int(self.capacity > 0)
        self.starts = np.zeros(free, np.int64)  # free extents, sorted, never adjacent
        self.ends = np.full(free, self.capacity, np.int64)
        self.used = 0
        self.peak = 0

    @property
    def free_bytes(self) -> int:
        return self.capacity - self.used

    def room(self, size: int) -> int:
        """How many blocks of `size` bytes fit into the free extents as they lie."""
        return int(((self.ends - self.starts) // size).sum())

    def alloc(self, size: int, n: int) -> np.ndarray:
        """Take `n` blocks of `size` bytes, lowest addresses first. Returns byte offsets, int64 [n]."""
        fits = (self.ends - self.starts) // size
        total = np.cumsum(fits)
        if n and (not len(total) or total[-1] < n):
            raise ArenaFull(f"arena full: {n} blocks of {size} bytes asked, {self.free_bytes} of {self.capacity} free")
        if not n:
            return np.zeros(0, np.int64)
        last = int(np.searchsorted(total, n))
        take = fits[: last + 1].copy()
        take[-1] = n - (total[last - 1] if last else 0)
        # block i is the i-th of its extent times `size` behind where that extent starts
        before = self.starts[: last + 1] - (np.cumsum(take) - take) * size
        offsets = np.arange(0, n * size, size) + np.repeat(before, take)
        self.starts[: last + 1] += take * size
        keep = self.starts < self.ends
        self.starts, self.ends = self.starts[keep], self.ends[keep]
        self.used += n * size
        self.peak = max(self.peak, self.used)
        return offsets

    def free(self, offsets: np.ndarray, size: int) -> None:
        """Give blocks of `size` bytes back and merge what touches."""
        if not len(offsets):
            return
        # Blocks mostly come in runs: joined before they are sorted, they are few.
        gap = offsets[1:] != offsets[:-1] + size
        starts = np.concatenate([self.starts, offsets[:1], offsets[1:][gap]])
        ends = np.concatenate([self.ends, offsets[:-1][gap] + size, offsets[-1:] + size])
        order = np.argsort(starts)
        starts, ends = starts[order], ends[order]
        assert (starts[1:] >= ends[:-1]).all(), "block freed twice"
        gap = starts[1:] > ends[:-1]
        self.starts, self.ends = starts[np.concatenate([[True], gap])], ends[np.concatenate([gap, [True]])]
        self.used -= len(offsets) * size

    def check_integrity(self) -> None:
        """The free extents are sorted, apart, inside the arena, and add up with what is used."""
        assert (self.starts < self.ends).all() and (self.starts[1:] > self.ends[:-1]).all()
        assert not len(self.ends) or (self.starts[0] >= 0 and self.ends[-1] <= self.capacity)
        assert self.used == self.capacity - int((self.ends - self.starts).sum()) <= self.capacity


def _mapped(size: int, folder: Path) -> torch.Tensor:
    """A file of `size` bytes as uint8 [size]. It has no name, so it ends with the process and nobody else changes it.

    Its blocks are taken at once: a full disk is a BudgetError here and not a signal at the first write.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)
            return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8)
    except OSError as error:
        raise BudgetError(
            f"disk tier: no {size / 2**20:.1f} MiB in {folder} ({error.strerror}); make room, or point "
            "ADAPTIVEKV_CACHE to another folder"
        ) from None
