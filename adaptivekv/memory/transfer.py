"""Transfers between device and pinned host memory, on a stream of their own, and kernels that reach host memory."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from adaptivekv.kernels import pageops
from adaptivekv.memory.shapes import DISK, HOST

if TYPE_CHECKING:
    from adaptivekv.memory.pages import PagePool


class Transfer:
    """Copies page parts between a device arena and a pinned host arena while the caller's stream goes on.

    Parts are gathered into a staging buffer on the device, and each run of them that is contiguous on the host is one
    DMA copy: allocation hands out long runs, so a copy is as long as the buffer. The buffer is one, for gathering runs
    at fifty times the speed of the bus. `size`: its bytes, made at first use.
    """

    def __init__(self, device: torch.device, size: int):
        self.device, self.size = device, size
        self.stream = torch.cuda.Stream(device)
        self.buffer: torch.Tensor | None = None
        self.idle = True  # nothing on any stream may still touch host memory

    def copy(self, src: torch.Tensor, dst: torch.Tensor, src_off: np.ndarray, dst_off: np.ndarray, size: int) -> None:
        """Copy parts of `size` bytes from `src` to `dst`, one of them on the device; returns before it is done.

        What the caller's stream did before is seen. Afterwards `fence` makes a stream wait, `settle` the host.
        """
        out = src.device.type == "cuda"
        order = np.argsort(dst_off if out else src_off)
        near, far = (src_off, dst_off) if out else (dst_off, src_off)
        near, far = near[order], far[order]
        self.idle = False
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            if self.buffer is None or len(self.buffer) < size:
                with torch.inference_mode(False):  # like the arenas
                    self.buffer = torch.empty(max(self.size, size), dtype=torch.uint8, device=self.device)
            step = len(self.buffer) // size
            at = torch.from_numpy(near).to(self.device)
            packed = torch.arange(0, min(step, len(near)) * size, size, device=self.device)
            for i in range(0, len(near), step):
                part, here = at[i : i + step], far[i : i + step]
                if out:
                    pageops.copy_parts(src, self.buffer, part, packed[: len(part)], size)
                edges = np.concatenate([[0], np.flatnonzero(np.diff(here) != size) + 1, [len(here)]]).tolist()
                for first, last in pairwise(edges):
                    mine = self.buffer[first * size : last * size]
                    start = int(here[first])
                    host = (dst if out else src)[start : start + len(mine)]
                    (host if out else mine).copy_(mine if out else host, non_blocking=True)
                if not out:
                    pageops.copy_parts(self.buffer, dst, packed[: len(part)], part, size)

    def fence(self) -> None:
        """Make the caller's stream wait for the copies so far: before it reuses or reads what they touch."""
        if not self.idle:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def settle(self) -> None:
        """Wait until host memory is as the operations so far leave it: before the processor reads or writes it."""
        if not self.idle:
            torch.cuda.synchronize(self.device)
            self.idle = True


def kernel_tables(pool: PagePool, tier: int, *arrays: np.ndarray) -> list[torch.Tensor]:
    """Arrays as int64 for kernels that work on pages of `tier`, in one transfer.

    On a GPU the kernels reach host pages themselves, since these are pinned. A file's pages are not: tables that stay
    on the processor make it do the work.
    """
    if tier == HOST and pool.transfer:
        pool.fence()
        pool.transfer.idle = False
    if tier == DISK:
        pool.settle()
    joined = torch.from_numpy(np.concatenate(arrays, dtype=np.int64)).to("cpu" if tier == DISK else pool.device)
    return list(joined.split([len(a) for a in arrays]))
