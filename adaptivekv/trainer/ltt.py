"""Learn-Then-Test (https://arxiv.org/abs/2110.01052) with exact binomial tests, as functions of counted violations."""

import math
from typing import NamedTuple

import numpy as np


class Walk(NamedTuple):
    """A fixed-sequence test of L margins, in the order they were declared."""

    p: np.ndarray  # float64 [L], of "some SLO is violated more often than alpha"
    bound: np.ndarray  # float64 [L], upper confidence bound of the violation rate, of the worst SLO
    last: int  # index of the last margin certified; -1: none


def walk(broken: np.ndarray, alpha: float, delta: float) -> Walk:
    """broken: bool [n, L], or [n, Q, L] for Q SLOs. One row a request, independent of the others.

    For each margin in turn the null hypothesis is that the violation rate of at least one SLO exceeds alpha (a share).
    It is rejected when the exact one-sided binomial test of *every* SLO rejects at delta: an intersection-union test,
    whose p-value is the largest of the Q and which needs no correction. The walk ends at the first margin that is not
    rejected, so the chance that any margin before it is bad is at most delta, whether or not violations grow
    monotonically with the margin.
    """
    from scipy.stats import binom

    n = len(broken)
    counts = broken.sum(axis=0).reshape(-1, broken.shape[-1])
    p = binom.cdf(counts, n, alpha).max(axis=0)
    passed = p <= delta
    last = len(p) - 1 if passed.all() else int(np.argmin(passed)) - 1
    return Walk(p, upper(counts, n, delta).max(axis=0), last)


def upper(violations: np.ndarray | int, n: int, delta: float) -> np.ndarray:
    """The one-sided Clopper-Pearson bound of a rate at confidence 1 - delta; 1 without any request.

    It is at most alpha exactly when the binomial test rejects.
    """
    from scipy.stats import beta

    k = np.asarray(violations)
    if n == 0:
        return np.ones(k.shape)
    return np.where(k >= n, 1.0, beta.ppf(1 - delta, k + 1, np.maximum(n - k, 1)))


def least(alpha: float, delta: float) -> int:
    """The fewest requests that can pass, none of them a violation: 59 at alpha = delta = 0.05."""
    return math.ceil(math.log(delta) / math.log1p(-alpha) - 1e-12)
