"""The controller: when to decide, what is allowed, apply, record. It decides how memory is used, never what exists."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from adaptivekv.errors import BudgetError
from adaptivekv.features import schema
from adaptivekv.features.attention import attention_features
from adaptivekv.features.request import request_features
from adaptivekv.features.system import system_features
from adaptivekv.memory.formats import BY_CODE, FORMATS
from adaptivekv.memory.pages import DEVICE, HOST, PagePool
from adaptivekv.memory.sequence import Sequence
from adaptivekv.plan import Plan
from adaptivekv.policies.base import settled, worth
from adaptivekv.selector import RuleTable, Selector

CANDIDATES = (
    "full", "int8", "int4", "k4v2", "int2", "snapkv(0.5)", "snapkv(0.5) | int4", "snapkv(0.25) | k4v2",
    "h2o(0.5) | int4", "streaming(0.25)", "offload(0.15)", "int8 | offload(0.35)", "int4 | offload(0.6)",
    "int4 | offload(0.3)", "k4v2 | offload(0.6)", "k4v2 | offload(0.3)", "int4 | retrieve(0.25)",
    "int8 | offload(0.35) | retrieve(0.25)",
)  # fmt: skip
"""The plans a controller chooses among unless it is told others."""

KAPPA = 0.1  # price of a host byte-second against a device byte-second
DEFAULT_QUALITY = 0.03  # nats per token


@dataclass
class Decision:
    """One decision as it is reported and logged; `probs` is after mask and hysteresis, over `plans`."""

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


@dataclass
class Request:
    """What the controller knows of one request: its cache, its limits, its plan and how it came to it."""

    sequence: Sequence
    prompt: int  # tokens
    new: int  # max_new_tokens
    budget: int | None  # device bytes for this request, None: no limit asked
    full: int  # bytes of the full 16-bit cache of prompt + new
    plan: Plan = Plan()
    prefilling: bool = True
    generated: int = 0
    turn: int = 0
    facts: dict[str, float] = field(default_factory=dict)  # text and logit features, from whoever sees them
    decisions: list[Decision] = field(default_factory=list)
    kept: float = 1.0  # the smallest share any eviction has left
    evictor: str = ""  # the stage that left it
    touched: bool = False  # pages were lost to pressure


class Controller:
    """Chooses plans for requests from features, keeps the budget, and remembers why.

    plan: a fixed plan (nothing is selected). selector: ranks `candidates` otherwise. quality: largest acceptable mean
    loss, nats per token. epoch: decode steps between two decisions. epsilon: chance of exploring a near-frontier plan.
    watch: keep the queries and page mass that any candidate would need, though the plan is fixed (to branch from).
    """

    def __init__(
        self,
        plan: Plan | None = None,
        selector: Selector | None = None,
        quality: float = DEFAULT_QUALITY,
        candidates: tuple[str, ...] = CANDIDATES,
        epoch: int = 32,
        epsilon: float = 0.0,
        seed: int = 0,
        watch: bool = False,
    ):
        self.fixed, self.selector, self.quality, self.watch = plan, selector or RuleTable(), quality, watch
        self.plans = [Plan.parse(text) for text in candidates]
        self.rows = np.stack([schema.row(p.features(), schema.PLAN_NAMES) for p in self.plans])
        self.epoch, self.epsilon = epoch, epsilon
        self.rng = np.random.default_rng(seed)
        self.seconds, self.steps = 0.0, 0  # spent deciding; decode steps seen

    @property
    def name(self) -> str:
        return "fixed" if self.fixed is not None else self.selector.name

    @property
    def possible(self) -> list[Plan]:
        """The plans whose needs must be met before the prompt has ended."""
        return self.plans if self.fixed is None else [self.fixed, *(self.plans if self.watch else [])]

    @property
    def window(self) -> int:
        """Queries the observation ring must hold until the prompt has ended."""
        return max(plan.window for plan in self.possible)

    # -- moments -----------------------------------------------------------------------------------------------------

    def admit(self, request: Request) -> None:
        """A provisional plan from request and system features; nothing lossy happens before the prompt has ended."""
        request.plan = self._decide(request, "admission")

    def end_prefill(self, request: Request) -> None:
        """The prompt has ended: decide with attention features, apply, bring back what fits on the device."""
        request.prefilling = False
        request.plan = self._decide(request, "prefill")
        self._apply(request)
        if not ("queries" in request.plan.needs and request.plan.stage("evict").growing):
            request.sequence.drop_ring()

    def step(self, request: Request) -> None:
        """Before a decode step: decide again when an epoch is over, otherwise keep the plan's state."""
        request.generated += 1
        self.steps += 1
        if request.generated % self.epoch == 0 and self.fixed is None:
            plan = self._decide(request, "epoch")
            if plan != request.plan:
                request.plan = plan
                self._apply(request)
        if request.sequence.tail_len == 0:  # pages were just sealed
            self._guard(request, request.plan.maintain)

    def wants_mass(self, request: Request) -> bool:
        """Whether this step should measure page mass: the last step of an epoch, or any step of a prompt."""
        if request.prefilling:
            return self.fixed is None or self.watch or "mass" in self.fixed.needs
        return request.generated % self.epoch == self.epoch - 1

    # -- deciding ----------------------------------------------------------------------------------------------------

    def features(self, request: Request) -> dict[str, float]:
        pool = request.sequence.pool
        ratio = request.budget / request.full if request.budget else 1.0
        quality = self.quality
        values = request_features(request.prompt, request.new, request.generated, request.turn, ratio, quality)
        values |= request.facts | attention_features(request.sequence)
        return values | system_features(pool, request.budget or pool.arena(DEVICE).capacity, request.full)

    def _decide(self, request: Request, moment: str) -> Plan:
        start = time.perf_counter()
        if self.fixed is not None:
            plan = self.fixed
            if moment == "admission":
                request.decisions.append(Decision(0, moment, str(plan), "fixed by the caller", "fixed"))
            return plan
        values = self.features(request)
        prediction = self.selector.predict(schema.row(values), self.rows)
        sizes = [self._sizes(request, plan) for plan in self.plans]
        device, host = np.array([s[0] for s in sizes]), np.array([s[1] for s in sizes])
        room, host_room = self._room(request)
        reach = np.array([self._reachable(request, plan) for plan in self.plans])
        allowed = reach & (device <= room) & (host <= host_room)
        loss = prediction.loss_high * 10**self.selector.margin
        cost = (device + KAPPA * host) * np.maximum(prediction.step_ms, 1e-3)
        good = allowed & (loss <= self.quality)
        stay = self.plans.index(request.plan) if request.plan in self.plans and moment == "epoch" else None
        if good.any():
            best = int(np.argmin(np.where(good, cost, np.inf)))
            if stay is not None and good[stay] and cost[best] > 0.9 * cost[stay]:
                best = stay  # hysteresis: a switch must pay
            why = f"cheapest of {int(good.sum())} plans within {self.quality:g} nats"
        elif allowed.any():
            best = int(np.argmin(np.where(allowed, loss, np.inf)))
            why = f"no plan within {self.quality:g} nats fits {room / 2**20:.1f} MiB; least predicted loss"
        else:
            best = stay if stay is not None else int(np.argmin(np.where(reach, device, np.inf))) if reach.any() else 0
            why = f"no plan fits {room / 2**20:.1f} MiB; the smallest, and pressure does the rest"
        probs = self._explore(best, good, cost)
        chosen = int(self.rng.choice(len(probs), p=probs)) if self.epsilon else best
        plan = self.plans[chosen]
        reason = (
            f"{why}: predicted loss {prediction.loss[chosen]:.4f} (high {loss[chosen]:.4f}), "
            f"{device[chosen] / 2**20:.1f} MiB device, {host[chosen] / 2**20:.1f} MiB host"
        )
        if chosen != best:
            reason = f"exploring instead of {self.plans[best]}: " + reason
        request.decisions.append(
            Decision(
                request.generated, moment, str(plan), reason, self.selector.name, values,
                [str(p) for p in self.plans], allowed.tolist(), probs.tolist(),
            )  # fmt: skip
        )
        self.seconds += time.perf_counter() - start
        return plan

    def _explore(self, best: int, good: np.ndarray, cost: np.ndarray) -> np.ndarray:
        """epsilon spread evenly over up to eight good plans near the frontier, the rest on the best."""
        probs = np.zeros(len(good))
        near = [i for i in np.argsort(cost) if good[i]][:8] or [best]
        probs[near] = self.epsilon / len(near)
        probs[best] += 1 - probs.sum()
        return probs

    def _sizes(self, request: Request, plan: Plan) -> tuple[int, int]:
        pool = request.sequence.pool
        tokens = max(request.prompt, request.sequence.length) + (request.new if request.prefilling else 0)
        size = plan.estimate(pool.layers, pool.dtype, tokens)
        return size["device"], size["host"]

    def _room(self, request: Request) -> tuple[int, int]:
        """Device and host bytes this request may use, what it holds already included."""
        pool, mine = request.sequence.pool, request.sequence
        column = pool.column_bytes(FORMATS["native"])  # the next tail to be sealed
        free = pool.arena(DEVICE).free_bytes + mine.bytes(DEVICE) - column
        if request.budget:
            free = min(free, request.budget - pool.staging_bytes - column)
        return free, pool.host_free + mine.bytes(HOST)

    def _reachable(self, request: Request, plan: Plan) -> bool:
        """Whether the present state can still become `plan`: no evicted token and no lost bit comes back."""
        evict, quantize = plan.stage("evict"), plan.stage("quantize")
        keep = evict.keep if evict else 1.0
        if request.kept < 1 and not (keep < request.kept or (keep == request.kept and evict.name == request.evictor)):
            return False
        target = quantize.format if quantize else FORMATS["native"]
        return all(fmt == target or fmt.demotes(target) for fmt in self._formats(request))

    @staticmethod
    def _formats(request: Request) -> set[Any]:
        pool = request.sequence.pool
        codes = set().union(*(np.unique(pool.code[ids]).tolist() for ids in request.sequence.pages()))
        return {BY_CODE[code] for code in codes} - {FORMATS["native"]}

    # -- keeping the budget ------------------------------------------------------------------------------------------

    def _apply(self, request: Request) -> None:
        self._guard(request, request.plan.apply)
        evict = request.plan.stage("evict")
        if evict and evict.keep <= request.kept:
            request.kept, request.evictor = evict.keep, evict.name
        if not request.plan.stage("offload"):
            self._bring_back(request)

    def _guard(self, request: Request, change: Any) -> None:
        """Run a change of the cache; where it lacks room, make some once and run it again (stages are repeatable)."""
        try:
            change(request.sequence)
        except BudgetError:
            pool = request.sequence.pool
            self.make_room([request], min(pool.column_bytes(FORMATS["native"]), pool.arena(DEVICE).capacity // 4))
            change(request.sequence)

    def _bring_back(self, request: Request) -> None:
        """Host pages return to the device while it has room beside the next tail."""
        pool, sequence = request.sequence.pool, request.sequence
        spare = pool.column_bytes(FORMATS["native"])
        for layer, ids in enumerate(sequence.ids):
            away = (ids >= 0) & (pool.tier[ids] == HOST)
            size = sum(pool.page_bytes(layer, BY_CODE[code]) for code in pool.code[ids[away]])
            if size and size <= pool.arena(DEVICE).free_bytes - spare:
                sequence.move(layer, away, DEVICE)

    def make_room(self, requests: list[Request], need: int) -> None:
        """Free `need` device bytes, or raise BudgetError. Spill losslessly, then demote, then evict; all recorded.

        While a prompt is being read its plan has not been applied: its pages spill to the host as they are. Without
        host room a plan that evicts does so early, with the queries seen so far, and a plan that quantizes does so.
        """
        pool = requests[0].sequence.pool
        pool.reserved = need
        arena = pool.arena(DEVICE)
        for relief, what in (
            (self._spill, "spilled to host"),
            (self._squeeze, "plan applied early"),
            (self._demote, "demoted"),
            (self._evict_oldest, "oldest pages evicted"),
        ):
            if arena.free_bytes >= need:
                return
            before = arena.free_bytes
            for request in requests:
                relief(request, need)
            if arena.free_bytes > before:
                for request in requests:
                    self._record_pressure(request, what, arena.free_bytes - before)
        if arena.free_bytes < need:
            raise BudgetError(
                f"budget: {need / 2**20:.2f} MiB of device memory needed, {arena.free_bytes / 2**20:.2f} MiB left after "
                "demoting, offloading and evicting; raise the budget or shorten the request"
            )

    def _record_pressure(self, request: Request, what: str, freed: int) -> None:
        last = request.decisions[-1] if request.decisions else None
        if last and last.pressure and last.reason.startswith(what):
            return  # one line a kind of relief, not one a chunk
        request.decisions.append(
            Decision(request.generated, "pressure", str(request.plan), f"{what}, {freed / 2**20:.2f} MiB at first", self.name, pressure=True)
        )

    def _spill(self, request: Request, need: int) -> None:
        """Move the least worthy columns to the host, a layer after the other, as many as `need` asks of each layer."""
        pool, sequence = request.sequence.pool, request.sequence
        missing = need - pool.arena(DEVICE).free_bytes
        held = max(1, sequence.bytes(DEVICE) - Sequence.fixed_bytes(pool.layers, pool.dtype, sequence.window))
        for layer, ids in enumerate(sequence.ids):
            here = (ids >= 0) & (pool.tier[ids] == DEVICE)
            size = np.array([pool.page_bytes(layer, fmt) for fmt in BY_CODE])[pool.code[ids]] * here
            goal = math.ceil(missing * size.sum() / held)
            order = np.argsort(np.where(here, worth(sequence, layer), np.inf).min(0, initial=np.inf), kind="stable")
            ahead = np.cumsum(size.sum(0)[order]) - size.sum(0)[order]
            leave = np.zeros(ids.shape[1], bool)
            leave[order[ahead < goal]] = True
            moving = size[:, leave].sum()
            if missing > 0 and moving <= pool.host_free:
                sequence.move(layer, here & leave, HOST)

    def _squeeze(self, request: Request, need: int) -> None:
        """Apply the plan's own lossy stages now."""
        evict, quantize = request.plan.stage("evict"), request.plan.stage("quantize")
        if evict and (request.prefilling or evict.growing):
            evict.apply(request.sequence)
            request.kept, request.evictor = min(request.kept, evict.keep), evict.name
        if quantize:
            quantize.apply(request.sequence)

    def _demote(self, request: Request, need: int) -> None:
        """Lower the bits of everything but the recent window, a format at a time, until there is room."""
        pool, sequence = request.sequence.pool, request.sequence
        for name in ("int8", "int4r", "k4v2r", "int2r"):
            fmt = FORMATS[name]
            lowers = np.array([f.demotes(fmt) for f in BY_CODE])
            for layer, ids in enumerate(sequence.ids):
                if pool.arena(DEVICE).free_bytes >= need:
                    return
                select = settled(sequence, layer, 64, 0) & lowers[pool.code[ids]] & (pool.tier[ids] == DEVICE)
                request.touched |= bool(select.any())
                sequence.convert(layer, select, fmt)

    def _evict_oldest(self, request: Request, need: int) -> None:
        """The streaming rule at page granularity: drop the oldest pages behind the first, evenly over the layers."""
        pool, sequence = request.sequence.pool, request.sequence
        while pool.arena(DEVICE).free_bytes < need:
            dropped = False
            for layer, ids in enumerate(sequence.ids):
                open_ = settled(sequence, layer, 64, 4) & (pool.tier[ids] == DEVICE)
                first = open_ & (np.cumsum(open_, axis=1) == 1)
                dropped |= bool(first.any())
                sequence.drop(layer, first)
            request.touched |= dropped
            if not dropped:
                return


def report(controller: Controller, requests: list[Request], pool: PagePool | None) -> dict[str, Any]:
    """What happened, in numbers and words: plan and reason per decision, bytes per tier, cost of deciding."""
    out: dict[str, Any] = {"selector": controller.name, "quality": controller.quality, "requests": []}
    out["controller_us_per_step"] = round(1e6 * controller.seconds / max(1, controller.steps), 1)
    for request in requests:
        seq = request.sequence
        out["requests"].append(
            {
                "plan": str(request.plan),
                "tokens": seq.length,
                "held": round(seq.held(), 4),
                "device_bytes": seq.bytes(DEVICE),
                "host_bytes": seq.bytes(HOST),
                "lost_to_pressure": request.touched,
                "decisions": [
                    {"step": d.step, "moment": d.moment, "plan": d.plan, "reason": d.reason, "selector": d.selector}
                    for d in request.decisions
                ],
            }
        )
    if pool:
        out["device_peak"] = pool.arena(DEVICE).peak + pool.staging_bytes
        out["device_bytes"] = pool.device_used + pool.staging_bytes
        out["host_bytes"], out["moved_bytes"] = pool.host_used, pool.moved_bytes
    return out
