"""What a selector would have cost: the cheapest plan it trusts, against rules, the best fixed plan and the oracle.

The cost of a plan is (device bytes + 0.1 host bytes) x step time, relative to the request's full cache. A request whose
plan breaks its quality SLO is charged a full cache on top: that is what doing it again costs.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from adaptivekv.features import schema
from adaptivekv.selector import RuleTable, Selector
from adaptivekv.trainer.dataset import Rows, by_plan

KAPPA = 0.1  # a host byte, in device bytes
QUALITIES = (0.003, 0.01, 0.03, 0.1)  # the SLO ladder, nats per token
ALPHA = 0.05  # share of requests that may break their SLO
QUALITY = schema.NAMES.index("log10_quality")


@dataclasses.dataclass(frozen=True)
class Request:
    """The plans of one request that were replayed, n of them."""

    rows: Rows
    price: np.ndarray  # [n] bytes that count
    cost: np.ndarray  # [n] relative to the full cache
    full: int  # index of the full cache


def requests(rows: Rows) -> list[Request]:
    rows = by_plan(rows)
    starts = np.flatnonzero(np.append(True, rows.request[1:] != rows.request[:-1]))
    made = []
    for part in np.split(np.arange(len(rows)), starts[1:]):
        one = rows.where(part)
        price = one.device_bytes + KAPPA * one.host_bytes
        cost = price * one.step_ms
        named = np.flatnonzero(one.plan == "full")
        full = int(named[0]) if len(named) else int(np.lexsort((-cost, one.loss))[0])
        made.append(Request(one, price, cost / max(cost[full], 1e-9), full))
    return made


Choice = Callable[[Request, float], int]


def trusting(selector: Selector) -> Choice:
    """The cheapest predicted plan whose high loss meets the SLO; if none does, the safest."""

    def choose(request: Request, quality: float) -> int:
        state = request.rows.state[0].copy()
        state[QUALITY] = np.log10(quality)
        seen = selector.predict(state, request.rows.plan_features)
        high = seen.loss_high * 10**selector.margin
        return cheapest(request.price * seen.step_ms, high, quality)

    return choose


def oracle(request: Request, quality: float) -> int:
    return cheapest(request.cost, request.rows.loss, quality)


def always(plans: dict[str, str]) -> Choice:
    """The fixed plan of each SLO; the full cache where a request was not replayed through it."""

    def choose(request: Request, quality: float) -> int:
        found = np.flatnonzero(request.rows.plan == plans.get(str(quality)))
        return int(found[0]) if len(found) else request.full

    return choose


def cheapest(cost: np.ndarray, loss: np.ndarray, quality: float) -> int:
    meets = loss <= quality
    return int(np.argmin(np.where(meets, cost, np.inf))) if meets.any() else int(np.lexsort((cost, loss))[0])


def best_static(requests: list[Request]) -> dict[str, str]:
    """Per SLO, the cheapest plan that at most ALPHA of the requests break; plans seen in nine of ten requests count."""
    seen: dict[str, list[tuple[float, float]]] = {}
    for request in requests:
        for plan, cost, loss in zip(request.rows.plan, request.cost, request.rows.loss, strict=True):
            seen.setdefault(str(plan), []).append((cost, loss))
    common = {plan: np.array(pairs) for plan, pairs in seen.items() if len(pairs) >= 0.9 * len(requests)}
    best = {}
    for quality in QUALITIES:
        broken = {plan: float((pairs[:, 1] > quality).mean()) for plan, pairs in common.items()}
        safe = [plan for plan in common if broken[plan] <= ALPHA]
        if safe:
            best[str(quality)] = min(safe, key=lambda plan: common[plan][:, 0].mean())
        elif common:
            best[str(quality)] = min(common, key=lambda plan: broken[plan])
    return best


def compare(selector: Selector, static: dict[str, str], requests: list[Request]) -> dict[str, float]:
    """cost/, violation/ and charged/ (their sum) per SLO and way of choosing, and the means over the SLOs.

    select_cost, by which policies are promoted, is the selector's mean charged cost.
    """
    ways: dict[str, Choice] = {
        "selector": trusting(selector),
        "static": always(static),
        "rules": trusting(RuleTable()),
        "oracle": oracle,
    }
    kinds = ("cost", "violation", "charged")
    metrics: dict[str, float] = {}
    for way, choose in ways.items():
        mean = np.zeros(3)
        for quality in QUALITIES:
            chosen = [(r.cost[i], r.rows.loss[i] > quality) for r in requests for i in [choose(r, quality)]]
            cost, violation = np.array(chosen, dtype=np.float64).mean(axis=0)
            found = np.array([cost, violation, cost + violation])
            mean += found / len(QUALITIES)
            metrics |= {f"{k}/{quality}/{way}": float(v) for k, v in zip(kinds, found, strict=True)}
        metrics |= {f"{k}/{way}": float(v) for k, v in zip(kinds, mean, strict=True)}
    metrics["select_cost"] = metrics["charged/selector"]
    return metrics
