"""Served requests as trajectory rows: what each decision saw, chose and cost. Labels stay empty."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptivekv.cache import AdaptiveCache
from adaptivekv.decisions import Decision
from adaptivekv.errors import AdaptiveKVError
from adaptivekv.features import schema
from adaptivekv.plan import Plan
from adaptivekv.trainer.trajectories import TrajectorySink

if TYPE_CHECKING:
    from adaptivekv.cluster.api import Job
    from adaptivekv.engine.session import Session

SHARES = (("train", 0.6), ("select", 0.1), ("certify", 0.1), ("gate", 0.1), ("test", 0.1))
log = logging.getLogger("adaptivekv")


class Meter:
    """What the forwards of one answer took. Each belongs to the decision that ruled it, or to the answer's first."""

    def __init__(self, cache: AdaptiveCache):
        self.first = len(cache.requests[0].decisions) if cache.requests else 0  # older ones are an earlier answer's
        self.steps: list[tuple[int, bool, float, int, int, int]] = []
        """(decision, whether it decoded, seconds, device bytes, bytes on host and disk, bytes moved between tiers)"""

    @contextlib.contextmanager
    def step(self, cache: AdaptiveCache, tokens: int) -> Iterator[None]:
        moved = cache.pool.moved_bytes if cache.pool else 0
        start = time.perf_counter()
        yield
        seconds, pool = time.perf_counter() - start, cache.pool
        assert pool is not None
        device, below = pool.device_used + pool.staging_bytes, pool.host_used + pool.disk_used
        at = max(self.first, len(cache.requests[0].decisions) - 1)
        self.steps.append((at, tokens == 1, seconds, device, below, pool.moved_bytes - moved))


class Recorder:
    """Writes rows into a folder, in parts of this process's own."""

    def __init__(self, folder: Path):
        self.sink = TrajectorySink(folder, prefix=f"serve-{socket.gethostname()}-{os.getpid()}")

    def add(self, job: Job, session: Session, meter: Meter) -> None:
        """Queue the rows of one answer. Never fails a request: what does not fit is logged."""
        try:
            for row in rows(job, session, meter):
                self.sink.add(row)
        except AdaptiveKVError as error:
            log.error(f"request {job.id}: {error}")

    def close(self) -> None:
        try:
            self.sink.close()
        except AdaptiveKVError as error:
            log.error(str(error))


def rows(job: Job, session: Session, meter: Meter) -> Iterator[dict[str, Any]]:
    """One row per decision taken in this answer that ruled at least one forward; a plan fixed earlier is none."""
    decisions, pool = session.cache.requests[0].decisions, session.cache.pool
    assert pool is not None
    document = document_of(job.messages[0]["content"])
    facts = {
        "request_id": job.id,
        "session_id": job.session or job.id,
        "schema_version": schema.VERSION,
        "seed": session.options.seed,
        "model": session.cache.mark,
        "scenario": "serve",
        "kind": "serve",
        "split": split_of(job.session or document),
        "document": document,
    }
    for at in sorted({step[0] for step in meter.steps if step[0] < len(decisions)}):
        took = np.array([step[1:] for step in meter.steps if step[0] == at], np.float64)
        yield facts | _decided(decisions[at], pool.staging_bytes) | _cost(took)


def _decided(d: Decision, staging: int) -> dict[str, Any]:
    """staging: bytes, which `device_bytes` counts too."""
    plans = d.plans or [d.plan]  # a fixed plan, or relief under pressure: there was no choice
    return {
        "step": d.step,
        "moment": d.moment,
        "features": schema.row(d.features).tolist(),
        "plans": plans,
        "allowed": d.allowed if d.plans else [True],
        "probs": d.probs if d.plans else [1.0],
        "plan": d.plan,
        "plan_features": schema.row(Plan.parse(d.plan).features(), schema.PLAN_NAMES).tolist(),
        "pressure_override": d.pressure,
        "policy_version": d.selector,
        "device_room": d.room and d.room[0] + staging,
        "host_room": d.room and d.room[1],
        "shadow": d.shadow,
    }


def _cost(took: np.ndarray) -> dict[str, Any]:
    """took [steps, (decoded, seconds, device, host, moved)]. switch_ms: the first decode step less the others."""
    decode = took[took[:, 0] == 1]
    mean = float((decode[1:] if len(decode) > 1 else decode if len(decode) else took)[:, 1].mean())
    return {
        "device_byte_s": float(took[:, 1] @ took[:, 2]),
        "host_byte_s": float(took[:, 1] @ took[:, 3]),
        "link_bytes": float(took[:, 4].sum()),
        "switch_ms": 1e3 * max(0.0, float(decode[0, 1]) - mean) if len(decode) > 1 else 0.0,
        "step_ms": 1e3 * mean,
        "device_bytes": int(took[-1, 2]),
        "host_bytes": int(took[-1, 3]),
        "tokens": len(decode),
    }


def document_of(text: str) -> str:
    """What a conversation's first message is known as."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def split_of(key: str) -> str:
    """The same split for the same session or, without one, document: by hash."""
    at = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 2**32
    for name, share in SHARES:
        at -= share
        if at < 0:
            return name
    return SHARES[-1][0]
