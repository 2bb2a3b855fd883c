"""Other ways to choose a plan, each as good as it can honestly be made: what a selector must beat to be worth it.

All are fitted on the train split; what must be tuned is tuned on select. Every way has one safety knob, a margin in
log10, so that all can be certified for the same violation budget by the same test (ltt.py) on split certify:

- a way that bounds losses (table, static, random) takes the cheapest plan whose bound times 10**margin meets the SLO;
- a way that weighs risks (selector, rules, forest, bandit) takes the plan of least cost + 10**margin x chance of a
  violation.

Margin 0 is the way as it is. Requests must all have been replayed through the same P plans.
"""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.selector import KEEP, SURE, Selector, is_lossless
from adaptivekv.trainer import ltt, scoring
from adaptivekv.trainer.certify import GRID, PROMPT
from adaptivekv.trainer.scoring import ALPHA, QUALITIES, Choice, Request

Predict = Callable[[Request, float], tuple[np.ndarray, np.ndarray]]  # (request, SLO) to price and risk of each plan [P]
Pick = Callable[[np.ndarray, np.ndarray, float, np.ndarray], np.ndarray]  # price, risk, SLO, 10**margins [L] to [L]


@dataclasses.dataclass(frozen=True)
class Way:
    """How to choose: what is predicted of each plan, and what is picked from that under each margin."""

    predict: Predict
    pick: Pick

    def at(self, margin: float = 0.0) -> Choice:
        scale = np.array([10.0**margin])
        return lambda request, quality: int(self.picks(request, quality, scale)[0])

    def picks(self, request: Request, quality: float, scale: np.ndarray) -> np.ndarray:
        """Of the plans that fit, the one picked under each of 10**margins: [L]."""
        return self.pick(*request.limited(*self.predict(request, quality)), quality, scale)


def bounded(price: np.ndarray, high: np.ndarray, quality: float, scale: np.ndarray) -> np.ndarray:
    """The cheapest plan whose high loss, scaled, meets the SLO; if none does, the safest."""
    meets = high * scale[:, None] <= quality
    safest = np.lexsort((price, high))[0]
    return np.where(meets.any(1), np.argmin(np.where(meets, price, np.inf), axis=1), safest)


def weighed(price: np.ndarray, chance: np.ndarray, quality: float, scale: np.ndarray) -> np.ndarray:
    """The plan of least cost, a violation costing `scale` full caches."""
    return np.argmin(price + scale[:, None] * chance, axis=1)


def certify(
    way: Way, requests: Sequence[Request], alpha: float = ALPHA, delta: float = 0.05, grid: Sequence[float] = GRID
) -> float | None:
    """The most liberal margin under which at most alpha of the requests break any SLO, at confidence 1 - delta.

    The walk of trainer/certify.py: from conservative to liberal, up to the first margin that fails. None: none passes.
    """
    scale = np.array([10.0**margin for margin in grid])
    broken = np.empty((len(requests), len(QUALITIES), len(grid)), bool)
    for i, request in enumerate(requests):
        for j, quality in enumerate(QUALITIES):
            at = way.picks(request, quality, scale)
            risk = request.limited(*way.predict(request, quality))[1].min()
            # where no bound meets the SLO, or no plan is sure to keep it, nothing is promised, as the controller does
            promised = risk * scale <= quality if way.pick is bounded else risk < SURE
            broken[i, j] = promised & (request.rows.loss[at] > quality)
    last = ltt.walk(broken, alpha, delta).last
    return None if last < 0 else grid[last]


# -- ways that bound losses ------------------------------------------------------------------------------------------


class Table:
    """For each cell of requests and SLO, the cheapest plan that at most `share` of the cell's train requests break.

    by: what makes a cell besides the length, "" for one table of lengths, or a property of a request: "scenario",
    "kind" (of text) or "link". Cells with fewer than `least` requests answer as the next coarser one: without length,
    then all requests. A server would have to be told scenario and kind; the selector is not.
    """

    def __init__(
        self, train: Sequence[Request], by: str = "scenario", bins: int = 1, least: int = 1, share: float = ALPHA
    ):
        self.by = by
        lengths = [request.rows.state[0, PROMPT] for request in train]
        self.ends = np.quantile(lengths, np.arange(1, bins) / bins)  # log2 tokens
        cells: dict[tuple[Any, ...], list[int]] = {}
        for i, request in enumerate(train):
            for cell in self.cells(request):
                cells.setdefault(cell, []).append(i)
        cost, loss = stacked(train)
        free = is_lossless(train[0].rows.plan_features)
        self.known: dict[tuple[Any, ...], tuple[np.ndarray, np.ndarray]] = {}
        for cell, members in cells.items():
            if len(members) >= least or cell == ():
                falling = -np.sort(-loss[members], axis=0)
                self.known[cell] = cost[members].mean(0), np.where(free, 0.0, falling[int(share * len(members))])

    def cells(self, request: Request) -> list[tuple[Any, ...]]:
        """From fine to coarse."""
        name = getattr(request, self.by) if self.by else ""
        length = int(np.searchsorted(self.ends, request.rows.state[0, PROMPT]))
        return list(dict.fromkeys([(name, length), (name,), ()]))

    def __call__(self, request: Request, quality: float) -> tuple[np.ndarray, np.ndarray]:
        return next(self.known[cell] for cell in self.cells(request) if cell in self.known)


def table(train: Sequence[Request], select: Sequence[Request], by: str = "scenario") -> tuple[Way, dict[str, Any]]:
    """The best of the tables, by charged cost on the select split, and its settings."""
    settings: list[dict[str, Any]] = [
        {"by": by, "bins": bins, "least": least, "share": share}
        for bins, least, share in itertools.product((1, 2, 3, 4), (4, 8, 16), (0.0, ALPHA, 2 * ALPHA))
    ]
    return best(((Way(Table(train, **some), bounded), some) for some in settings), select)


def static(train: Sequence[Request]) -> Way:
    """One plan for each SLO: the cheapest that at most ALPHA of the train requests break."""
    return Way(Table(train, ""), bounded)


def random(train: Sequence[Request]) -> Way:
    """Any of the plans that `static` considers safe, each as likely."""
    known = Table(train, "")

    def predict(request: Request, quality: float) -> tuple[np.ndarray, np.ndarray]:
        order = np.random.default_rng(zlib.crc32(f"{request.name} {quality}".encode()))
        high = known(request, quality)[1]
        return order.random(len(high)), high  # a random order makes the cheapest a random one

    return Way(predict, bounded)


# -- ways that weigh risks -------------------------------------------------------------------------------------------


def trusting(selector: Selector) -> Way:
    """A selector, as scoring.trusting has it."""

    def predict(request: Request, quality: float) -> tuple[np.ndarray, np.ndarray]:
        cost, chance = scoring.asked(selector, request, quality)
        return cost / cost[request.full], chance

    return Way(predict, weighed)


def shy(way: Way) -> Way:
    """Never an eviction: what the controller does with a selector that is not certified, if memory allows."""

    def predict(request: Request, quality: float) -> tuple[np.ndarray, np.ndarray]:
        price, high = way.predict(request, quality)
        evicts = request.rows.plan_features[:, KEEP] < 1
        evicts &= bool((request.fits & ~evicts & (high < SURE)).any())
        return np.where(evicts, np.inf, price), np.where(evicts, np.inf, high)

    return Way(predict, way.pick)


class Inputs:
    """States as a linear model wants them: [n, F + 1], of mean 0 and deviation 1, unknown ones 0, and a constant."""

    def __init__(self, train: Sequence[Request]):
        x = self.states(train)
        known = np.isfinite(x).any(0)
        self.mean, self.deviation = np.zeros(x.shape[1]), np.ones(x.shape[1])
        self.mean[known], self.deviation[known] = np.nanmean(x[:, known], 0), np.nanstd(x[:, known], 0)
        self.deviation[self.deviation < 1e-9] = 1.0

    def __call__(self, requests: Sequence[Request]) -> np.ndarray:
        x = np.nan_to_num((self.states(requests) - self.mean) / self.deviation)
        return np.column_stack([np.clip(x, -5, 5), np.ones(len(x))])

    @staticmethod
    def states(requests: Sequence[Request]) -> np.ndarray:
        x = np.stack([request.rows.state[0] for request in requests])
        x[:, scoring.QUALITY] = np.nan  # each SLO has a target of its own
        return x


class Risks:
    """Cost and chance of a violation of every plan, from the state alone: a plan is a name, its features are unseen.

    model: [n, F + 1] to the targets [n, P + Q P], the costs and for each SLO the violations.
    """

    def __init__(self, inputs: Inputs, model: Callable[[np.ndarray], np.ndarray]):
        self.inputs, self.model = inputs, model
        self.seen: dict[str, np.ndarray] = {}

    def __call__(self, request: Request, quality: float) -> tuple[np.ndarray, np.ndarray]:
        if request.name not in self.seen:
            found = self.model(self.inputs([request]))[0]
            self.seen[request.name] = found.reshape(1 + len(QUALITIES), -1)
        cost, *chances = self.seen[request.name]
        nearest = int(np.abs(np.log(QUALITIES) - np.log(quality)).argmin())
        return cost, np.clip(chances[nearest], 0.0, 1.0)


def targets(train: Sequence[Request]) -> np.ndarray:
    """[n, P + Q P] for `Risks`."""
    cost, loss = stacked(train)
    return np.concatenate([cost, *(loss > quality for quality in QUALITIES)], axis=1)


def bandit(train: Sequence[Request], select: Sequence[Request]) -> tuple[Way, dict[str, Any]]:
    """Ridge regression for each plan: LinUCB with disjoint arms, where every arm was seen and nothing is explored."""
    inputs, y = Inputs(train), targets(train)
    x = inputs(train)

    def fitted(penalty: float) -> Way:
        weights = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)
        return Way(Risks(inputs, lambda new: new @ weights), weighed)

    return best(((fitted(p), {"penalty": p}) for p in (1.0, 10.0, 100.0, 1000.0)), select)


def forest(train: Sequence[Request], select: Sequence[Request], seed: int = 0) -> tuple[Way, dict[str, Any]]:
    """Cost-sensitive classification, reduced to regression: a random forest for the charged cost of each plan."""
    from sklearn.ensemble import RandomForestRegressor

    inputs, y = Inputs(train), targets(train)
    x = inputs(train)

    def fitted(least: int) -> Way:
        settings = {"n_estimators": 100, "min_samples_leaf": least, "max_features": 0.4, "random_state": seed}
        return Way(Risks(inputs, RandomForestRegressor(**settings).fit(x, y).predict), weighed)

    return best(((fitted(least), {"min_samples_leaf": least}) for least in (2, 4, 8)), select)


# -- for all of them -------------------------------------------------------------------------------------------------


def best(ways: Iterable[tuple[Way, dict[str, Any]]], select: Sequence[Request]) -> tuple[Way, dict[str, Any]]:
    """The first of least charged cost."""
    return min(ways, key=lambda pair: float(scoring.play(pair[0].at(), select).charged.mean()))


def stacked(requests: Sequence[Request]) -> tuple[np.ndarray, np.ndarray]:
    """Cost, relative to the full cache, and loss of every plan: [n, P] each."""
    plans = requests[0].rows.plan.tolist()
    for request in requests:
        if request.rows.plan.tolist() != plans:
            odd = sorted({*plans} ^ {*request.rows.plan.tolist()})[0]
            raise AdaptiveKVError(f"plan {odd!r} was replayed for some requests only; collect all with the same plans")
    return np.stack([r.cost for r in requests]), np.stack([r.rows.loss for r in requests])
