"""Device time by CUDA-graph replay: launch gaps stay out, and inputs rotate so that no cache holds them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

L2 = 200 << 20  # bytes touched between two uses of one input: four times the L2 of an H100


def replay_ms(calls: Sequence[Callable[[], object]], seconds: float = 0.15) -> float:
    """Median milliseconds of one call. calls: the same work on different inputs, captured one after another."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    repeat = max(1, 4 // len(calls))
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            for call in calls:
                call()
    graph.replay()
    torch.cuda.synchronize()
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < 8 or time.perf_counter() < end:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        samples.append(start.elapsed_time(stop) / (repeat * len(calls)))
    return statistics.median(samples)


def copy_gbps() -> float:
    """Bytes read and written by a large device-to-device copy kernel, per second, in GB."""
    a = torch.empty(1 << 28, dtype=torch.int64, device="cuda")
    b = torch.empty_like(a)
    samples = []
    for _ in range(12):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        b.copy_(a)
        stop.record()
        stop.synchronize()
        samples.append(start.elapsed_time(stop))
    return 2 * a.nbytes / statistics.median(samples) / 1e6


def warm_up(seconds: float = 1.0) -> None:
    """Let the clocks settle: a fresh GPU and a fresh host are both slow for a while."""
    a, end = torch.randn(4096, 4096, device="cuda"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        a = a @ a * 1e-3
        torch.cuda.synchronize()
