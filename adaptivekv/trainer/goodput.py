"""Requests served in time and within their quality, by a device whose bytes are shared: a simulation.

Bytes and step times are the measured ones; how requests meet is made up. A request holds the device bytes of its plan
for as many steps as it has tokens; it starts when all before it have started and its bytes are free. Steps do not slow
each other down, prompts cost nothing (the same for every plan), and the host has room for what is offloaded.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence

import numpy as np

from adaptivekv.trainer.scoring import Choice, Request

PATIENCE = 3.0  # a request must be done within this many times its time alone with the full cache
BURST = 4.0  # how much faster than on average requests arrive in a burst
SHARE = 0.2  # of the requests that come in bursts
RUN = 20  # requests of a burst, about


@dataclasses.dataclass(frozen=True)
class Trace:
    """m arrivals."""

    at: np.ndarray  # [m] ms
    request: np.ndarray  # [m] index


@dataclasses.dataclass(frozen=True)
class Served:
    good: int  # in time and within the quality
    late: int  # the others within the quality
    broken: int  # over their quality SLO
    refused: int  # larger than the arena
    goodput: float  # good requests a minute
    peak: int  # most device bytes held at once
    wait_ms: float  # mean
    intervals: np.ndarray  # [served, (start ms, end ms, bytes)]


def trace(requests: int, arrivals: int, mean_gap: float, seed: int = 0) -> Trace:
    """Poisson arrivals with bursts, `mean_gap` ms apart on average; each is one of `requests`, all as likely."""
    rng = np.random.default_rng(seed)
    bursting, state = np.empty(arrivals, bool), False
    for i in range(arrivals):
        leave = 1 / RUN if state else SHARE / (1 - SHARE) / RUN
        state ^= bool(rng.random() < leave)
        bursting[i] = state
    calm = (1 - SHARE / BURST) / (1 - SHARE)  # so that the mean is as asked
    gaps = rng.exponential(mean_gap * np.where(bursting, 1 / BURST, calm))
    return Trace(np.cumsum(gaps), rng.integers(requests, size=arrivals))


def capacity_gap(requests: Sequence[Request], arena: float) -> float:
    """ms between arrivals at which full caches would fill an arena (bytes) exactly, without any waste."""
    return float(np.mean([r.rows.device_bytes[r.full] * duration(r, r.full) for r in requests])) / arena


def duration(request: Request, plan: int) -> float:
    """ms in memory."""
    return float(request.rows.tokens[plan] * request.rows.step_ms[plan])


def serve(requests: Sequence[Request], choose: Choice, arrivals: Trace, arena: float) -> Served:
    """First come, first served. Each request has the SLO it was drawn with."""
    chosen = [choose(request, request.quality) for request in requests]
    held: list[tuple[float, int]] = []  # (end, bytes), a heap
    used = peak = good = late = broken = refused = 0
    start, waited, intervals = 0.0, 0.0, []
    for at, which in zip(arrivals.at, arrivals.request, strict=True):
        request, plan = requests[which], chosen[which]
        size = int(request.rows.device_bytes[plan])
        if size > arena:
            refused += 1
            continue
        start = max(start, float(at))
        while held and (held[0][0] <= start or used + size > arena):
            end, freed = heapq.heappop(held)
            start, used = max(start, end), used - freed
        end = start + duration(request, plan)
        heapq.heappush(held, (end, size))
        used += size
        peak, waited = max(peak, used), waited + start - at
        intervals.append((start, end, size))
        if request.broken(plan, request.quality):
            broken += 1
        elif end - at > PATIENCE * duration(request, request.full):
            late += 1
        else:
            good += 1
    minutes = float(arrivals.at[-1]) / 60_000
    served = max(1, len(intervals))
    return Served(good, late, broken, refused, good / minutes, peak, waited / served, np.array(intervals))
