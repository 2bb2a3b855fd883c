"""What is known of a request and of each decision about it, and the report of both."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from adaptivekv.memory.pages import PagePool
from adaptivekv.memory.sequence import Sequence
from adaptivekv.memory.shapes import DEVICE, DISK, HOST
from adaptivekv.plan import Plan

if TYPE_CHECKING:
    from adaptivekv.controller import Controller


@dataclass
class Decision:
    """One decision as it is reported and logged; `probs`, over `plans`, is after mask and hysteresis."""

    step: int
    moment: str  # "admission", "prefill", "epoch" or "pressure"
    plan: str
    reason: str
    selector: str
    features: dict[str, float] = field(default_factory=dict)
    plans: list[str] = field(default_factory=list)
    allowed: list[bool] = field(default_factory=list)
    probs: list[float] = field(default_factory=list)
    pressure: bool = False
    room: tuple[int, int] | None = None  # device (without staging) and host bytes it might use; None: no choice
    shadow: str | None = None  # the plan that the challenger would have chosen
    promised: bool = True  # a plan that might be chosen was sure to keep the SLO


@dataclass
class Request:
    """What the controller knows of one request: its cache, its limits, its plan and how it came to it."""

    sequence: Sequence
    prompt: int  # tokens
    new: int  # max_new_tokens
    budget: int | None  # device bytes for this request; None: no limit asked
    full: int  # bytes of the full 16-bit cache of prompt + new
    plan: Plan = field(default_factory=Plan)
    prefilling: bool = True
    generated: int = 0
    turn: int = 0
    facts: dict[str, float] = field(default_factory=dict)  # text and logit features, from whoever sees them
    logits: torch.Tensor | None = None  # the last ones [V], read only when a decision is due: that waits for the GPU
    decisions: list[Decision] = field(default_factory=list)
    kept: float = 1.0  # the smallest share an eviction stage has left
    evictor: str = ""  # the stage that left it


def report(controller: Controller, requests: list[Request], pool: PagePool | None) -> dict[str, Any]:
    """What happened, in numbers and words: plan and reason per decision, bytes per tier, cost of deciding."""
    out: dict[str, Any] = {"selector": controller.name, "quality": controller.quality, "requests": []}
    out["controller_us_per_step"] = round(1e6 * controller.seconds / max(1, controller.steps), 1)
    for request in requests:
        sequence = request.sequence
        out["requests"].append(
            {
                "plan": str(request.plan),
                "tokens": sequence.length,
                "held": round(sequence.held(), 4),
                "device_bytes": sequence.bytes(DEVICE),
                "host_bytes": sequence.bytes(HOST),
                "disk_bytes": sequence.bytes(DISK),
                "decisions": [
                    {"step": d.step, "moment": d.moment, "plan": d.plan, "reason": d.reason, "selector": d.selector}
                    for d in request.decisions
                ],
            }
        )
    if pool:
        out["device_peak"] = pool.arena(DEVICE).peak + pool.staging_bytes
        out["device_bytes"] = pool.device_used + pool.staging_bytes
        out["host_bytes"], out["disk_bytes"], out["moved_bytes"] = pool.host_used, pool.disk_used, pool.moved_bytes
    return out
