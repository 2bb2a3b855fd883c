"""Features of the machine: how full the device is, how much room the host has, how fast the link between them is."""

from __future__ import annotations

import math
import time
from functools import lru_cache

import torch

from adaptivekv.memory.pages import PagePool


def system_features(pool: PagePool, budget: int, full: int, held: int) -> dict[str, float]:
    """Bytes: the device budget, what the request's full 16-bit cache would take, and what it holds on the host."""
    return {
        "pressure": (pool.device_used + pool.staging_bytes) / max(1, budget),
        "host_room": (pool.host_free + held) / max(1, full),
        "log10_link": math.log10(link_gbs(str(pool.device))),
    }


@lru_cache
def link_gbs(device: str) -> float:
    """Measured host-to-device copy bandwidth in GB/s (on a CPU: a copy within the same memory), once a process."""
    cuda = device.startswith("cuda")
    source = torch.ones(8 << 20, dtype=torch.uint8, pin_memory=cuda)
    target = torch.empty_like(source, device=device)
    target.copy_(source)
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(4):
        target.copy_(source, non_blocking=True)
    if cuda:
        torch.cuda.synchronize()
    return 4 * source.numel() / (time.perf_counter() - start) / 1e9
