"""Off-policy estimators over logged requests of one or more decisions, as functions of plain arrays.

N requests, T decisions at most; shorter requests are padded with ratio 1 and outcome 0. `ratio` is the target policy's
probability of the logged action over the log's. All return one value a request, or sums of which the estimate is made,
so that resampling requests is a weighted sum.
"""

from typing import NamedTuple

import numpy as np


class Episodes(NamedTuple):
    """Everything [N, T] float64. q and v include what the model expects of the decisions that follow."""

    ratio: np.ndarray  # target / log, of the action taken
    outcome: np.ndarray  # observed, the decision's part of the request's; whatever where `seen` is 0
    q: np.ndarray  # model's outcome-to-go of the action taken
    v: np.ndarray  # the same, averaged over the target's actions
    now: np.ndarray  # model's outcome of this decision alone, action taken
    seen: np.ndarray  # 1 / chance of being observed where it was, 0 where it was not


def pad(request: np.ndarray, values: np.ndarray, fill: float = 0.0) -> np.ndarray:
    """values [n] in rows by request [n] (rising from 0): [N, T]."""
    counts = np.bincount(request)
    at = np.arange(len(request)) - np.repeat(np.cumsum(counts) - counts, counts)
    out = np.full((len(counts), counts.max()), fill)
    out[request, at] = values
    return out


def reach(e: Episodes) -> np.ndarray:
    """[N, T]: ratio of the probabilities of all decisions up to and including each."""
    return np.cumprod(e.ratio, axis=1)


def direct(e: Episodes) -> np.ndarray:
    """[N]: the model alone, at the first decision."""
    return e.v[:, 0]


def ips(e: Episodes) -> np.ndarray:
    """[N]: per-decision importance sampling; each outcome is weighted by the decisions up to it."""
    return (reach(e) * e.seen * np.where(e.seen > 0, e.outcome, 0.0)).sum(axis=1)


def snips(e: Episodes) -> tuple[np.ndarray, np.ndarray]:
    """Numerator and weight [N, T]: self-normalised (Swaminathan and Joachims 2015), decision by decision.

    The estimate is the sum over decisions of total numerator / total weight.
    """
    weight = reach(e) * e.seen
    return weight * np.where(e.seen > 0, e.outcome, 0.0), weight


def doubly_robust(e: Episodes) -> np.ndarray:
    """[N]: https://arxiv.org/abs/1103.4601, recursively over decisions: https://arxiv.org/abs/1511.03722.

    Unbiased whatever the model says if the propensities are right, and if the outcome's chance of being seen is.
    """
    corrected = e.now + e.seen * np.where(e.seen > 0, e.outcome - e.now, 0.0)
    value = np.zeros(len(e.ratio))
    for t in reversed(range(e.ratio.shape[1])):
        value = e.v[:, t] + e.ratio[:, t] * (corrected[:, t] + value - e.q[:, t])
    return value


def effective(weight: np.ndarray) -> float:
    """Effective sample size of weights [N] (Kish)."""
    square = float((weight**2).sum())
    return float(weight.sum()) ** 2 / square if square > 0 else 0.0


def estimates(
    e: Episodes, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, dict[str, float | list[float]]]:
    """{dm, ips, snips, dr}: each {estimate, interval [low, high]}; percentiles of a bootstrap that draws requests.

    The model is not fitted again in the bootstrap, so dm's interval says nothing of its bias.
    """
    n = len(e.ratio)
    numerator, weight = snips(e)
    columns = np.concatenate([np.stack([direct(e), ips(e), doubly_robust(e)], axis=1), numerator, weight], axis=1)
    rng = np.random.default_rng(seed)
    totals = np.stack(
        [columns.sum(axis=0), *(np.bincount(rng.integers(n, size=n), minlength=n) @ columns for _ in range(resamples))]
    )
    top, bottom = np.split(totals[:, 3:], 2, axis=1)
    ratio = np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0).sum(axis=1)
    values = {"dm": totals[:, 0] / n, "ips": totals[:, 1] / n, "snips": ratio, "dr": totals[:, 2] / n}
    tails = [50 * (1 - level), 50 * (1 + level)]
    return {
        name: {"estimate": float(x[0]), "interval": [float(y) for y in np.percentile(x[1:], tails)]}
        for name, x in values.items()
    }
