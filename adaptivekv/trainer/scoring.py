"""What a selector would have cost: the plan it takes, against rules, the best fixed plan and the oracle.

The cost of a plan is (device bytes + 0.1 host bytes) x step time, relative to the request's full cache. Every way of
choosing has only the plans that fit the request's budget and host room. A request whose plan breaks its quality SLO
although one that fits would have kept it is charged a full cache on top: that is what doing it again costs.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from adaptivekv.selector import LINK, QUALITY, RuleTable, Selector, price
from adaptivekv.trainer.dataset import Rows, by_plan

KAPPA = 0.1  # a host byte, in device bytes
QUALITIES = (0.003, 0.01, 0.03, 0.1)  # the SLO ladder, nats per token
ALPHA = 0.05  # share of requests that may break their SLO


@dataclasses.dataclass(frozen=True)
class Request:
    """The plans of one request that were replayed, n of them."""

    rows: Rows
    price: np.ndarray  # [n] bytes that count
    cost: np.ndarray  # [n] relative to the full cache
    full: int  # index of the full cache
    fits: np.ndarray  # [n] bool: within its budget and host room; if nothing is, the smallest on the device

    def limited(self, cost: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cost and loss [..., n], infinite for plans that do not fit."""
        return np.where(self.fits, cost, np.inf), np.where(self.fits, loss, np.inf)

    def broken(self, at: Any, quality: float) -> Any:
        """Whether plan `at` (an index, or an array of them) breaks an SLO that a plan which fits would have kept."""
        loss = self.rows.loss
        return (loss[at] > quality) & (loss[self.fits].min() <= quality)

    @property
    def name(self) -> str:
        return str(self.rows.request[0])

    @property
    def scenario(self) -> str:
        return str(self.rows.scenario[0])

    @property
    def kind(self) -> str:
        """Of text."""
        return str(self.rows.kind[0])

    @property
    def link(self) -> str:
        """Its class of link to the host, GB/s."""
        return f"{10 ** self.rows.state[0, LINK]:.2g}"

    @property
    def document(self) -> str:
        return str(self.rows.document[0])

    @property
    def quality(self) -> float:
        """The SLO it was drawn with, nats per token."""
        return float(f"{10 ** self.rows.state[0, QUALITY]:.6g}")


def requests(rows: Rows, kappa: float = KAPPA) -> list[Request]:
    rows = by_plan(rows)
    starts = np.flatnonzero(np.append(True, rows.request[1:] != rows.request[:-1]))
    made = []
    for part in np.split(np.arange(len(rows)), starts[1:]):
        one = rows.where(part)
        price = one.device_bytes + kappa * one.host_bytes
        cost = price * one.step_ms
        named = np.flatnonzero(one.plan == "full")
        full = int(named[0]) if len(named) else int(np.lexsort((-cost, one.loss))[0])
        fits = (one.device_bytes <= one.device_room) & (one.host_bytes <= one.host_room)
        fits[np.argmin(one.device_bytes)] |= not fits.any()
        made.append(Request(one, price, cost / max(cost[full], 1e-9), full, fits))
    return made


Choice = Callable[[Request, float], int]


def trusting(selector: Selector) -> Choice:
    """Of the plans that fit, the one of least cost and risk, as the controller takes it under a certified margin (under
    margin 0 it shuns evictions)."""

    def choose(request: Request, quality: float) -> int:
        cost, chance = asked(selector, request, quality)
        return int(np.argmin(np.where(request.fits, price(cost, request.full, chance, selector.margin), np.inf)))

    return choose


def asked(selector: Selector, request: Request, quality: float) -> tuple[np.ndarray, np.ndarray]:
    """What a selector predicts of the request's plans [n]: cost, and the chance that they break the SLO."""
    state = request.rows.state[0].copy()
    state[QUALITY] = np.log10(quality)
    seen = selector.predict(state, request.rows.plan_features)
    return request.price * seen.step_ms, seen.chance


def oracle(request: Request, quality: float) -> int:
    return cheapest(*request.limited(request.cost, request.rows.loss), quality)


def always(plans: dict[str, str]) -> Choice:
    """The fixed plan of each SLO; where it does not fit, or was not replayed, what keeps most tokens and bits."""

    def choose(request: Request, quality: float) -> int:
        return fixed(request, plans.get(str(quality)))

    return choose


def fixed(request: Request, plan: str | None) -> int:
    found = np.flatnonzero((request.rows.plan == plan) & request.fits)
    keep, k_bits, v_bits, device, read = request.rows.plan_features.T[:5]
    return int(found[0]) if len(found) else int(np.lexsort((device, k_bits + v_bits, read, keep, request.fits))[-1])


def cheapest(cost: np.ndarray, loss: np.ndarray, quality: float) -> int:
    meets = loss <= quality
    return int(np.argmin(np.where(meets, cost, np.inf))) if meets.any() else int(np.lexsort((cost, loss))[0])


def best_static(requests: list[Request]) -> dict[str, str]:
    """Per SLO, the cheapest plan that at most ALPHA of the requests break, `always` taken."""
    plans = sorted({str(plan) for request in requests for plan in request.rows.plan})
    taken = {plan: [fixed(request, plan) for request in requests] for plan in plans}
    cost = {plan: np.mean([r.cost[i] for r, i in zip(requests, at, strict=True)]) for plan, at in taken.items()}
    best = {}
    for quality in QUALITIES:
        broken = {
            plan: np.mean([r.broken(i, quality) for r, i in zip(requests, at, strict=True)])
            for plan, at in taken.items()
        }
        best[str(quality)] = min(plans, key=lambda plan: (max(ALPHA, broken[plan]), cost[plan]))
    return best


@dataclasses.dataclass(frozen=True)
class Played:
    """What a way of choosing got: n requests, each at the Q SLOs of the ladder."""

    cost: np.ndarray  # [n, Q] relative to the full cache
    broken: np.ndarray  # [n, Q] 1: the plan broke the SLO, and need not have; between 0 and 1 in a mean over seeds
    loss: np.ndarray  # [n, Q] nats per token
    worst: np.ndarray  # [n, Q] the same, of the worst token
    flip: np.ndarray  # [n, Q] share of tokens

    @property
    def charged(self) -> np.ndarray:
        return self.cost + self.broken

    def where(self, pick: np.ndarray) -> "Played":
        return Played(*(getattr(self, f.name)[pick] for f in dataclasses.fields(self)))

    def means(self) -> dict[str, float]:
        """Over requests and SLOs; worst is the largest token loss of a request, its 90th percentile."""
        found = {name: float(getattr(self, name).mean()) for name in ("cost", "broken", "charged", "loss", "flip")}
        return found | {"worst_p90": float(np.quantile(self.worst, 0.9))}


def play(choose: Choice, requests: Sequence[Request]) -> Played:
    got = np.empty((5, len(requests), len(QUALITIES)))
    for i, request in enumerate(requests):
        rows = request.rows
        for j, quality in enumerate(QUALITIES):
            at = choose(request, quality)
            broken = request.broken(at, quality)
            got[:, i, j] = request.cost[at], broken, rows.loss[at], rows.worst[at], rows.flip[at]
    return Played(*got)


def mean(seeds: Sequence[Played]) -> Played:
    """What to expect of a way that depends on a seed."""
    return Played(*(np.mean([getattr(p, f.name) for p in seeds], axis=0) for f in dataclasses.fields(Played)))


def resampled(values: np.ndarray, clusters: np.ndarray, draws: int = 4000, seed: int = 0) -> np.ndarray:
    """Bootstrap means [draws, k] of values [n, k]. Whole clusters [n] are drawn: requests of a document are alike."""
    names, at = np.unique(clusters, return_inverse=True)
    sums = np.zeros((len(names), values.shape[1]))
    np.add.at(sums, at, values)
    picks = np.random.default_rng(seed).integers(len(names), size=(draws, len(names)))
    return sums[picks].sum(1) / np.bincount(at)[picks].sum(1)[:, None]


def paired(ours: np.ndarray, theirs: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """ours less theirs [n, Q], mean over both, and what is saved, 1 - ours / theirs; each with its 95 % interval."""
    both = np.stack([ours.mean(1), theirs.mean(1)], 1)
    (a, b), (x, y) = both.mean(0), resampled(both, clusters).T
    low, high = np.quantile(x - y, [0.025, 0.975])
    saved_low, saved_high = np.quantile(1 - x / y, [0.025, 0.975])
    found = {"difference": a - b, "low": low, "high": high}
    found |= {"saved": 1 - a / b, "saved_low": saved_low, "saved_high": saved_high}
    return {key: float(value) for key, value in found.items()}


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
    metrics: dict[str, float] = {}
    for way, choose in ways.items():
        played = play(choose, requests)
        for kind, values in (("cost", played.cost), ("violation", played.broken), ("charged", played.charged)):
            metrics |= {f"{kind}/{q}/{way}": float(v) for q, v in zip(QUALITIES, values.mean(0), strict=True)}
            metrics[f"{kind}/{way}"] = float(values.mean())
    metrics["select_cost"] = metrics["charged/selector"]
    return metrics
