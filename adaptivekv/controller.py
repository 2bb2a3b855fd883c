"""The controller: when to decide, what is allowed, apply, record. It decides how memory is used, never what exists."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from adaptivekv.candidates import CANDIDATES
from adaptivekv.decisions import Decision, Request
from adaptivekv.errors import AdaptiveKVError, BudgetError
from adaptivekv.features import schema
from adaptivekv.features.attention import prompt_features
from adaptivekv.features.request import logit_features, request_features
from adaptivekv.features.system import system_features
from adaptivekv.memory.formats import BY_CODE, FORMATS, Format
from adaptivekv.memory.sequence import Sequence
from adaptivekv.memory.shapes import DEVICE, DISK, HOST
from adaptivekv.plan import Plan
from adaptivekv.policies.base import NEEDS
from adaptivekv.pressure import bring_back, make_room
from adaptivekv.selector import STRICT, SURE, Prediction, RuleTable, Selector, foreign, is_lossless, price, warn

KAPPA = 0.1  # price of a host or disk byte-second against a device byte-second
DEFAULT_QUALITY = 0.03  # nats per token
STAY = 0.9  # a switch must cut cost and risk below this share, or the plan stays
log = logging.getLogger("adaptivekv")


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
        self.names = [str(plan) for plan in self.plans]
        self.rows = np.stack([schema.row(p.features(), schema.PLAN_NAMES) for p in self.plans])
        self.evicts = np.array([plan.stage("evict") is not None for plan in self.plans])
        self.foretold = np.array(["surrogate" in plan.needs for plan in self.plans])
        self.full = next((i for i, plan in enumerate(self.plans) if not plan.stages), 0)  # what prices are relative to
        self.epoch, self.epsilon = epoch, epsilon
        self.rng = np.random.default_rng(seed)
        self.shadow: Selector | None = None  # a challenger that is asked too and never obeyed
        self.seconds, self.steps = 0.0, 0  # spent deciding; decode steps seen

    @property
    def name(self) -> str:
        return "fixed" if self.fixed is not None else self.selector.name

    def meet(self, mark: str) -> None:
        """Say which model it decides for (`layers.model_mark`): what was trained on another one decides nothing."""
        if fault := foreign(self.selector, mark):
            warn(f"{fault}; using the rule table instead")
            self.selector = RuleTable()

    @property
    def possible(self) -> list[Plan]:
        """The plans whose needs must be met before the prompt has ended."""
        return self.plans if self.fixed is None else [self.fixed, *(self.plans if self.watch else [])]

    @property
    def window(self) -> int:
        """Queries the observation ring must hold until the prompt has ended."""
        return max(plan.window for plan in self.possible)

    @property
    def recalls(self) -> bool:
        """Whether a plan needs the prompt to be read a second time (`adaptivekv.recall`)."""
        return any("recall" in plan.needs for plan in self.possible)

    # -- moments -----------------------------------------------------------------------------------------------------

    def admit(self, request: Request) -> None:
        """A provisional plan from request and system features; nothing lossy happens before the prompt has ended."""
        request.plan = self._decide(request, "admission")

    def begin_turn(self, request: Request) -> None:
        """More prompt has come: observe again until it ends."""
        request.prefilling, request.turn = True, request.turn + 1
        if self.window and not request.sequence.ring:
            self._guard(request, lambda sequence: sequence.open_ring(self.window))

    def end_prefill(self, request: Request) -> None:
        """The prompt has ended: decide with attention features, apply, bring back what fits on the device."""
        request.prefilling = False
        if self.fixed is None:
            start = time.perf_counter()
            request.facts |= prompt_features(request.sequence)
            self.seconds += time.perf_counter() - start
        request.plan = self._decide(request, "prefill")
        if "recall" in request.plan.needs and "recall" not in request.sequence.credits:
            raise AdaptiveKVError(
                f"plan {request.plan}: needs {NEEDS['recall']} before the first new token; use generate with "
                "**cache.generate_kwargs, or call adaptivekv.recall.recall(model, cache, ids)"
            )
        self._apply(request)
        if not self.watch:
            request.sequence.drop_ring()

    def step(self, request: Request, new: int = 1) -> None:
        """Before a decode step of `new` tokens: decide again when an epoch is over, otherwise keep the plan's state."""
        epoch = request.generated // self.epoch
        request.generated += new
        self.steps += 1
        if request.generated // self.epoch > epoch and self.fixed is None:
            plan = self._decide(request, "epoch")
            if plan != request.plan:
                request.plan = plan
                self._apply(request)
        if request.sequence.tail_len == 0:  # pages were just sealed
            self._guard(request, request.plan.maintain)

    def wants_mass(self, request: Request) -> bool:
        """Whether this step should measure page mass: any step of a prompt, or the last step of an epoch."""
        if request.prefilling:
            return any("mass" in plan.needs for plan in self.possible)
        return (request.generated + 1) % self.epoch == 0

    def reserve(self, requests: list[Request], need: int) -> None:
        """Have `need` device bytes free for the step under way, or raise BudgetError; what gave way is recorded."""
        pool = requests[0].sequence.pool
        pool.reserved = need
        if pool.arena(DEVICE).free_bytes >= need:
            return
        done = make_room(
            [r.sequence for r in requests], [r.plan for r in requests], [r.prefilling for r in requests], need
        )
        for request in requests:
            for what in done:
                if what == "plan applied early" and (evict := request.plan.stage("evict")):
                    request.kept, request.evictor = min(request.kept, evict.keep), evict.name
                self._record_pressure(request, what)

    # -- deciding ----------------------------------------------------------------------------------------------------

    def features(self, request: Request) -> dict[str, float]:
        """Everything a decision sees (features/schema.py)."""
        pool = request.sequence.pool
        if request.logits is not None:
            request.facts |= logit_features(request.logits)
        ratio = request.budget / request.full if request.budget else 1.0
        values = request_features(request.prompt, request.new, request.generated, request.turn, ratio, self.quality)
        values |= request.facts
        limit = request.budget or pool.arena(DEVICE).capacity
        return values | system_features(pool, limit, request.full, request.sequence.bytes(HOST))

    def _decide(self, request: Request, moment: str) -> Plan:
        if self.fixed is not None:
            if moment == "admission":
                request.decisions.append(Decision(0, moment, str(self.fixed), "fixed by the caller", "fixed"))
            return self.fixed
        start = time.perf_counter()
        values = self.features(request)
        state = schema.row(values)
        prediction = self._predict(state)
        room, host_room = self._room(request)
        device, host, disk = self._sizes(request)
        stays = np.maximum(0, host - host_room)  # an offload is as large as the host allows
        device, host = device + stays, host - stays
        reach = self._reachable(request)
        if not reach.any() and request.plan in self.plans:  # nothing else can be had: it stays as it is
            reach[self.plans.index(request.plan)] = True
        allowed = reach & (device <= room)
        stay = self.plans.index(request.plan) if moment == "epoch" and request.plan in self.plans else None

        def choose(selector: Selector, seen: Prediction) -> tuple[int, str, np.ndarray, np.ndarray]:
            """The plan under a selector and why, which others keep the SLO rather than not, and what all are worth."""
            cost = (device + KAPPA * (host + disk)) * np.maximum(seen.step_ms, 1e-3)
            chance = seen.chance if self.quality else np.where(is_lossless(self.rows), 0.0, 1e6)  # 0: no loss at all
            worth = price(cost, self.full, chance, selector.margin)
            free, good = allowed, allowed & (chance < SURE)
            if selector.margin == 0 and (good & ~self.evicts).any():
                # no later decision repairs an eviction: only a certified selector may prefer one
                free, good = free & ~self.evicts, good & ~self.evicts
            if self.quality < STRICT and good.any():
                free = good
            if allowed.any():
                best = int(np.argmin(np.where(free, worth, np.inf)))
                if stay is not None and free[stay] and worth[best] > STAY * worth[stay]:
                    best = stay
                why = f"least cost and risk of {int(free.sum())} plans"
                if not good.any():
                    why = f"no plan within {self.quality:g} nats fits {room / 2**20:.1f} MiB; {why}"
            else:
                best = stay if stay is not None else int(np.argmin(np.where(reach, device, np.inf)))
                why = f"no plan fits {room / 2**20:.1f} MiB; the smallest, and pressure does the rest"
            return best, why, good, worth

        best, why, good, worth = choose(self.selector, prediction)
        probs = self._explore(best, good, worth)
        chosen = int(self.rng.choice(len(probs), p=probs)) if self.epsilon else best
        reason = (
            f"{why}: predicted loss {prediction.loss[chosen]:.4f}, more than {self.quality:g} with a chance of "
            f"{min(1.0, prediction.chance[chosen]):.0%}, "
            f"{device[chosen] / 2**20:.1f} MiB device, {host[chosen] / 2**20:.1f} MiB host"
        )
        if chosen != best:
            reason = f"exploring instead of {self.names[best]}: " + reason
        request.decisions.append(
            Decision(
                request.generated,
                moment,
                self.names[chosen],
                reason,
                self.selector.name,
                values,
                self.names,
                allowed.tolist(),
                probs.tolist(),
                room=(room, host_room),
                shadow=self._shadowed(state, choose),
                promised=bool(good.any()),
            )
        )
        self.seconds += time.perf_counter() - start
        return self.plans[chosen]

    def _predict(self, state: np.ndarray) -> Prediction:
        prediction = self.selector.predict(state, self.rows)
        if not all(np.isfinite(part).all() for part in prediction):
            warn(f"selector {self.selector.name}: predicts NaN; using the rule table instead")
            self.selector = RuleTable()  # from here on: a selector that says NaN once is not asked again
            prediction = self.selector.predict(state, self.rows)
        return prediction

    def _shadowed(self, state: np.ndarray, choose: Callable[..., tuple[Any, ...]]) -> str | None:
        """The challenger's plan in the same state and under the same mask. One that fails is asked no more."""
        if self.shadow is None:
            return None
        try:
            seen = self.shadow.predict(state, self.rows)
            if all(np.isfinite(part).all() for part in seen):
                return self.names[choose(self.shadow, seen)[0]]
            fault = "predicts NaN"
        except Exception as error:  # whatever is wrong with it must not reach the request
            fault = f"{type(error).__name__}: {error}"
        log.warning(f"shadow {self.shadow.name}: {fault}; not asked any more")
        self.shadow = None
        return None

    def _explore(self, best: int, good: np.ndarray, cost: np.ndarray) -> np.ndarray:
        """epsilon spread evenly over up to eight good plans near the frontier, the rest on the best."""
        probs = np.zeros(len(good))
        near = [i for i in np.argsort(cost) if good[i]][:8] or [best]
        probs[near] = self.epsilon / len(near)
        probs[best] += 1 - probs.sum()
        return probs

    def _sizes(self, request: Request) -> tuple[np.ndarray, ...]:
        """Device, host and disk bytes of every plan once the answer is written, were the host large enough."""
        pool = request.sequence.pool
        sizes = [plan.estimate(pool.layers, pool.dtype, self._tokens(request)) for plan in self.plans]
        return tuple(np.array([size[tier] for size in sizes]) for tier in ("device", "host", "disk"))

    @staticmethod
    def _tokens(request: Request) -> int:
        """Of prompt and answer, once this is written."""
        return max(request.prompt, request.sequence.length) + max(0, request.new - request.generated)

    def _room(self, request: Request) -> tuple[int, int]:
        """Device and host bytes this request may use, what it holds already included."""
        pool, mine = request.sequence.pool, request.sequence
        column = pool.column_bytes(FORMATS["native"])  # the next tail to be sealed
        free = pool.arena(DEVICE).free_bytes + mine.bytes(DEVICE) - column
        if request.budget:
            free = min(free, request.budget - pool.staging_bytes - column)
        return free, pool.host_free + mine.bytes(HOST)

    def _reachable(self, request: Request) -> np.ndarray:
        """Which plans the present state can still become: no evicted token, no lost bit, no past query comes back."""
        pool, sequence = request.sequence.pool, request.sequence
        codes = set().union(*(np.unique(pool.code[ids]).tolist() for ids in sequence.pages()))
        formats = {BY_CODE[code] for code in codes} - {FORMATS["native"]}
        can = [self._can_become(request, plan, formats) and self._disk_has_room(request, plan) for plan in self.plans]
        return np.array(can) & ~(self.foretold & (pool.surrogate is None))

    def _disk_has_room(self, request: Request, plan: Plan) -> bool:
        """Whether the disk holds what the plan would send there, what the request has there included."""
        pool, offload = request.sequence.pool, plan.stage("offload")
        if not (offload and offload.disk):
            return True
        need = plan.estimate(pool.layers, pool.dtype, self._tokens(request))["disk"]
        return need <= pool.away_free(DISK) + request.sequence.bytes(DISK)

    @staticmethod
    def _can_become(request: Request, plan: Plan, formats: set[Format]) -> bool:
        evict, quantize = plan.stage("evict"), plan.stage("quantize")
        keep, name = (evict.keep, evict.name) if evict else (1.0, "")
        if request.kept < 1 and not (keep < request.kept or (keep == request.kept and name == request.evictor)):
            return False
        done = (keep, name) == (request.kept, request.evictor) or plan == request.plan
        if plan.window and not request.sequence.ring and not done:  # without its queries it evicts nothing more
            return False
        return all(quantize.reaches(fmt) for fmt in formats) if quantize else not formats

    # -- applying ----------------------------------------------------------------------------------------------------

    def _apply(self, request: Request) -> None:
        evict = request.plan.stage("evict")
        if evict and (request.sequence.ring or not request.plan.window):
            self._guard(request, request.plan.apply)
            request.kept, request.evictor = min(request.kept, evict.keep), evict.name
        else:  # nothing to evict, or evicted before and its queries are gone
            request.sequence.retrieve = None
            self._guard(request, request.plan.maintain)
        if not request.plan.stage("offload"):
            bring_back(request.sequence, request.sequence.pool.column_bytes(FORMATS["native"]))

    def _guard(self, request: Request, change: Callable[[Sequence], None]) -> None:
        """Run a change of the cache; where it lacks room, make some once and run it again (stages are repeatable)."""
        try:
            change(request.sequence)
        except BudgetError:
            pool = request.sequence.pool
            need = min(pool.column_bytes(FORMATS["native"]), pool.arena(DEVICE).capacity // 4)
            if request.sequence.bases is None:
                need += request.plan.beside(pool.layers, pool.dtype)
            self.reserve([request], need)
            change(request.sequence)

    def _record_pressure(self, request: Request, what: str) -> None:
        if not any(d.pressure and d.reason == what for d in request.decisions[-4:]):  # once a kind, not once a chunk
            request.decisions.append(
                Decision(request.generated, "pressure", str(request.plan), what, self.name, pressure=True)
            )
