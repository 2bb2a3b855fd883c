"""What another selector would have cost on logged traffic, without running it: off-policy evaluation.

Each logged decision carries the probabilities it was drawn with. The target is the controller with the selector under
test (logged.py), deterministic or epsilon-greedy. Per outcome four estimates, by request (estimators.py): the direct
method (a regression, cross-fitted by request), importance sampling (ips), the same self-normalised (snips), and doubly
robust (dr). A request with several decisions is one episode: each outcome is weighted by the decisions up to it.

Outcomes. cost: (device + 0.1 host) MiB x ms of a decode step, the token-weighted mean of a request, as in scoring.py
but not relative to the full cache, which a served request was not run with; for the same reason a violation is not
charged a full cache but estimated beside it. loss: nats per token, and violation: the share of requests whose mean loss
breaks their SLO; both only where labelled, weighted by the chance of the label.

Assumed: how long an answer gets does not depend on the plan; the labels of a request are taken together or not at all;
requests are independent (those of one session are not quite).
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from threadpoolctl import threadpool_limits

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.features import schema
from adaptivekv.plan import Plan
from adaptivekv.selector import RuleTable, Selector
from adaptivekv.trainer import dataset, estimators, frozen, logged, scoring
from adaptivekv.trainer.estimators import Episodes
from adaptivekv.trainer.logged import Decisions
from adaptivekv.trainer.trajectories import SPLITS

SUPPORT = 0.9  # least share of the target's probability on plans that the log could have chosen
EFFECTIVE = 50  # least effective sample size, requests
FOLDS = 5
Fit = Callable[[np.ndarray, np.ndarray], Any]  # x [n, F + PF], y [n]: something that predicts


def ope(
    sources: Sequence[str | Path],
    policy: str = "champion",
    epsilon: float = 0.0,
    split: str | None = None,
    resamples: int = 1000,
    seed: int = 0,
    tracking_uri: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Sources are folders of `serve` or ids of runs that hold such trajectories.

    policy: "rules", "champion", a folder or a run id. epsilon: the target's chance of exploring. split: only its
    requests. resamples: of the bootstrap. progress(decisions done, of all).

    Returns policy, requests, decisions, left_out (requests without a choice or an answer), support (share),
    effective_sample_size (requests), agreement (share), and cost, loss and violation: each {unit, logged, dm, ips,
    snips, dr}, or {"refused": why} where labels are too few. Below SUPPORT or EFFECTIVE: AdaptiveKVError.
    """
    if not 0 <= epsilon <= 1:
        raise AdaptiveKVError(f"ope: epsilon is {epsilon:g}; a chance between 0 and 1")
    if resamples < 100:
        raise AdaptiveKVError(f"ope: resamples is {resamples}; at least 100 for an interval")
    if split is not None and split not in SPLITS:
        raise AdaptiveKVError(f"ope: split {split!r} is not one of {', '.join(SPLITS)}")
    selector: Selector = RuleTable() if policy == "rules" else frozen.find(policy, tracking_uri).selector
    table = dataset.load(sources, tracking_uri)
    dataset.model(table, selector.model)
    if split is not None:
        table = table.filter(pa.array(dataset.column(table, "split") == split))
    if not table.num_rows:
        raise AdaptiveKVError(
            f"ope: {f'split {split!r} has' if split else 'the sources have'} 0 rows; serve some first"
        )
    log, left_out = logged.decisions(table)
    wanted = logged.target(log, selector, epsilon, progress)
    found = {"policy": selector.name, "requests": int(log.request[-1]) + 1, "decisions": len(log), "left_out": left_out}
    with threadpool_limits(1):
        return found | evaluate(log, wanted, resamples=resamples, seed=seed)


def evaluate(
    log: Decisions, target: list[np.ndarray], fit: Fit | None = None, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """target: the probability of each of a decision's plans. fit: of the direct method, default boosted trees."""
    fit = fit or (lambda x, y: trees(x, y, seed))
    pairs = list(zip(target, log.probs, strict=True))
    ratio = np.array([t[a] / p[a] for (t, p), a in zip(pairs, log.taken, strict=True)])
    many = np.array([len(p) > 1 for p in log.probs])
    support = float(np.mean([t[p > 0].sum() for t, p in pairs if len(p) > 1]))
    weight = estimators.reach(_bare(estimators.pad(log.request, ratio, 1.0)))[:, -1]
    size = estimators.effective(weight)
    if support < SUPPORT or size < EFFECTIVE:
        raise AdaptiveKVError(
            f"ope: support {support:.3f} (at least {SUPPORT}), effective sample size {size:.1f} of {len(weight)} "
            f"requests (at least {EFFECTIVE}): the log says too little of this policy; log more, with exploration"
        )
    agreement = float(np.mean([t[a] for t, a in zip(target, log.taken, strict=True)], where=many))
    result: dict[str, Any] = {"support": support, "effective_sample_size": size, "agreement": agreement}
    for name, outcome in outcomes(log).items():
        last = np.append(log.request[1:] != log.request[:-1], True)
        judged = weight * outcome.seen[last]
        if (size := estimators.effective(judged)) < EFFECTIVE:
            n = int((outcome.seen[last] > 0).sum())
            result[name] = {"refused": f"{n} labelled requests, effective sample size {size:.1f}, below {EFFECTIVE}"}
            continue
        e = episodes(log, target, ratio, outcome, fit)
        chances = outcome.seen[last]
        observed = (e.outcome * (e.seen > 0)).sum(axis=1)
        result[name] = {"unit": outcome.unit, "logged": float(np.average(observed, weights=chances))}
        result[name] |= estimators.estimates(e, resamples, seed)
    return result


@dataclasses.dataclass(frozen=True)
class Outcome:
    unit: str
    y: np.ndarray  # [n] what a model learns: of the plan taken
    now: np.ndarray  # [n] this decision's part of the request's outcome, in units of y
    togo: np.ndarray  # [n] its part and that of all later decisions
    seen: np.ndarray  # [n] 1 / chance of the label, 0 without one


def outcomes(log: Decisions) -> dict[str, Outcome]:
    """Cost always; loss and violation by labels. A request counts as labelled when every plan that generated was."""
    counts = np.bincount(log.request)
    ends = np.cumsum(counts) - 1
    before = np.cumsum(log.share) - log.share
    togo = 1.0 - (before - np.repeat(before[ends - counts + 1], counts))
    labelled = ~np.isnan(log.loss) | (log.share == 0)
    whole = (np.bincount(log.request, labelled) == counts)[log.request]
    chance = np.where(np.isnan(log.loss), 1.0, log.label_prob)
    least = np.minimum.reduceat(chance, ends - counts + 1)[log.request]
    seen = np.where(whole, 1 / least, 0.0)
    mean = np.bincount(log.request, log.share * np.where(labelled, np.nan_to_num(log.loss), 0.0))[log.request]
    broken = (mean > 10.0 ** log.state[:, scoring.QUALITY]).astype(np.float64)
    last = np.zeros(len(log))
    last[ends] = 1.0
    one = np.ones(len(log))
    return {
        "cost": Outcome("MiB ms", log.cost, log.share, togo, one),
        "loss": Outcome("nats per token", np.nan_to_num(log.loss), log.share, togo, seen),
        "violation": Outcome("share of requests", broken, last, one, seen),
    }


def episodes(log: Decisions, target: list[np.ndarray], ratio: np.ndarray, outcome: Outcome, fit: Fit) -> Episodes:
    """The model's value of a plan is for the tokens it rules; for what follows it is as if the plan stayed."""
    q, v = model(log, target, outcome, fit)
    parts = ratio, outcome.y * outcome.now, q * outcome.togo, v * outcome.togo, q * outcome.now, outcome.seen
    fills = 1.0, 0.0, 0.0, 0.0, 0.0, 1.0
    return Episodes(*(estimators.pad(log.request, x, fill) for x, fill in zip(parts, fills, strict=True)))


def model(log: Decisions, target: list[np.ndarray], outcome: Outcome, fit: Fit) -> tuple[np.ndarray, np.ndarray]:
    """q [n] of the plan taken and v [n] of the target's, each predicted by a model that saw other requests only."""
    from sklearn.model_selection import GroupKFold

    names = sorted({name for row in log.plans for name in row})
    known = {name: schema.row(Plan.parse(name).features(), schema.PLAN_NAMES) for name in names}
    picks = [(i, a) for i, row in enumerate(target) for a in np.flatnonzero(row)]
    row_of = np.array([i for i, _ in picks])
    theirs = np.stack([known[log.plans[i][a]] for i, a in picks])
    chance = np.array([target[i][a] for i, a in picks])
    x = np.concatenate([log.state, log.plan_features], axis=1)
    learn = (outcome.seen > 0) & (log.share > 0)
    q, predicted = np.zeros(len(log)), np.zeros(len(picks))
    folds = GroupKFold(min(FOLDS, int(log.request[-1]) + 1))
    for others, mine in folds.split(x, groups=log.request):
        others = others[learn[others]]
        fitted = fit(x[others], outcome.y[others])
        q[mine] = fitted.predict(x[mine])
        at = np.isin(row_of, mine)
        predicted[at] = fitted.predict(np.concatenate([log.state[row_of[at]], theirs[at]], axis=1))
    return q, np.bincount(row_of, chance * predicted, minlength=len(log))


def trees(x: np.ndarray, y: np.ndarray, seed: int = 0) -> Any:
    from sklearn.ensemble import HistGradientBoostingRegressor

    x = np.where(np.isnan(x).all(axis=0), 0.0, x)  # scikit-learn cannot bin a column without any value
    least = max(2, min(20, len(x) // 20))
    settings: dict[str, Any] = {"max_iter": 60, "max_leaf_nodes": 15, "min_samples_leaf": least}
    return HistGradientBoostingRegressor(**settings, early_stopping=False, random_state=seed).fit(x, y)


def _bare(ratio: np.ndarray) -> Episodes:
    """For what needs no outcome."""
    return Episodes(ratio, *([np.zeros_like(ratio)] * 5))
