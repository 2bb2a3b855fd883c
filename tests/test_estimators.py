"""Off-policy estimators: simulators whose truth is known, and formulas written out a second time."""

from typing import Any

import numpy as np
import pytest

from adaptivekv.features import schema
from adaptivekv.plan import Plan
from adaptivekv.trainer import estimators, ope, scoring
from adaptivekv.trainer.estimators import Episodes
from adaptivekv.trainer.logged import Decisions

NAMES = ("full", "int8", "int4", "k4v2", "int2")
FEATURES = np.stack([schema.row(Plan.parse(name).features(), schema.PLAN_NAMES) for name in NAMES])
X, SLO = schema.NAMES.index("digit_share"), scoring.QUALITY


class Linear:
    """A quick model; `columns` decides what it sees, so that it can be made blind."""

    def __init__(self, x: np.ndarray, y: np.ndarray, columns: list[int]):
        self.columns = columns
        self.weights = np.linalg.lstsq(self._inputs(x), y, rcond=None)[0]

    def _inputs(self, x: np.ndarray) -> np.ndarray:
        part = x[:, self.columns]
        return np.concatenate([np.ones((len(x), 1)), part, part**2], axis=1)

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self._inputs(x) @ self.weights


def blind(x, y):
    """The state alone: every plan costs the same to it."""
    return Linear(x, y, [X])


def sighted(x, y):
    return Linear(x, y, [X, len(schema.NAMES) + 1, len(schema.NAMES) + 2])


# -- a bandit whose truth is known -----------------------------------------------------------------------------------


def mean_cost(x: np.ndarray, a: np.ndarray) -> np.ndarray:
    return 2.0 + np.array([1.0, 0.6, 0.3, 0.2, 0.9])[a] + x * np.array([0.0, 0.2, 0.5, 1.2, 2.0])[a]


def wanted(x: np.ndarray) -> np.ndarray:
    """The target policy: k4v2 for easy requests, int8 for hard ones."""
    return np.where(x < 0.4, 3, 1)


GRID = (np.arange(100_000) + 0.5) / 100_000
TRUTH = float(mean_cost(GRID, wanted(GRID)).mean())


def bandit(n: int, seed: int, epsilon: float = 0.4, labelled: bool = False) -> tuple[Decisions, list[np.ndarray]]:
    """Logged by an epsilon policy that prefers int4 or int8; the target's probabilities."""
    rng = np.random.default_rng(seed)
    x = rng.random(n)
    probs = np.full((n, 5), epsilon / 5)
    probs[np.arange(n), np.where(x < 0.5, 2, 1)] += 1 - epsilon
    taken = np.array([rng.choice(5, p=row) for row in probs])
    cost = mean_cost(x, taken) + rng.normal(0, 0.3, n)
    state = np.full((n, len(schema.NAMES)), np.nan)
    state[:, X], state[:, SLO] = x, np.log10(3.0)
    chance = np.where(x < 0.4, 0.3, 0.8)  # hard requests are labelled more often
    loss = np.where(rng.random(n) < chance, cost, np.nan) if labelled else np.full(n, np.nan)
    log = Decisions(
        np.arange(n), state, [NAMES] * n, [np.ones(5, bool)] * n, list(probs), taken, FEATURES[taken],
        np.zeros(n, bool), np.ones(n), cost, loss, chance,
    )  # fmt: skip
    return log, list(np.eye(5)[wanted(x)])


def test_intervals_contain_the_truth():
    """With boosted trees, as the verb does it: the bandit's true value lies in all intervals, which are narrow."""
    log, target = bandit(3000, 0)
    got = ope.evaluate(log, target, resamples=300)
    assert got["support"] == 1 and 300 < got["effective_sample_size"] < 2000
    assert abs(got["cost"]["logged"] - TRUTH) > 0.05  # the log itself is no answer
    for way in ("ips", "snips", "dr"):
        low, high = got["cost"][way]["interval"]
        assert low < TRUTH < high and high - low < 0.5, way
    width = {way: np.ptp(got["cost"][way]["interval"]) for way in ("ips", "snips", "dr")}
    assert width["dr"] < width["snips"] < width["ips"]
    assert "0 labelled" in got["loss"]["refused"] and "0 labelled" in got["violation"]["refused"]


def test_coverage_and_bias_of_a_misspecified_model():
    """Over 200 logs: intervals cover; dr stays unbiased with a model blind to the plan, on which dm is biased."""
    found = {way: [] for way in ("dm", "ips", "snips", "dr")}
    covered = dict.fromkeys(found, 0)
    for seed in range(200):
        got = ope.evaluate(*bandit(500, seed), fit=blind, resamples=200)["cost"]
        for way, values in found.items():
            values.append(got[way]["estimate"])
            covered[way] += got[way]["interval"][0] <= TRUTH <= got[way]["interval"][1]
    for way in ("ips", "dr"):
        error = np.std(found[way]) / np.sqrt(200)
        assert abs(np.mean(found[way]) - TRUTH) < 3.5 * error < 0.1, way
    assert abs(np.mean(found["snips"]) - TRUTH) < 0.02  # consistent, not unbiased
    assert abs(np.mean(found["dm"]) - TRUTH) > 20 * np.std(found["dm"]) / np.sqrt(200)
    assert all(covered[way] >= 0.88 * 200 for way in ("ips", "snips", "dr")) and covered["dm"] < 0.2 * 200
    assert np.std(found["snips"]) < np.std(found["ips"])


def test_a_right_model_repairs_wrong_propensities():
    """The other half of double robustness: ips is off, dr is not."""

    def exact(x, y):
        class Model:
            def predict(self, x):
                bits = x[:, len(schema.NAMES) + 1 : len(schema.NAMES) + 3]
                plan = np.array([np.flatnonzero((FEATURES[:, 1:3] == b).all(1))[0] for b in bits])
                return mean_cost(x[:, X], plan)

        return Model()

    found = {"ips": [], "dr": []}
    for seed in range(40):
        log, target = bandit(500, seed)
        wrong = [0.5 * p + 0.1 for p in log.probs]
        got = ope.evaluate(ope.dataclasses.replace(log, probs=wrong), target, fit=exact, resamples=100)["cost"]
        for way, values in found.items():
            values.append(got[way]["estimate"])
    assert abs(np.mean(found["dr"]) - TRUTH) < 0.02 and abs(np.mean(found["ips"]) - TRUTH) > 0.2


def test_labels_taken_by_chance():
    """Loss where the chance of a label depends on the request: weighting by it finds the truth, ignoring does not."""
    weighted, ignored, broken = [], [], []
    for seed in range(60):
        log, target = bandit(1500, seed, labelled=True)
        got = ope.evaluate(log, target, fit=blind, resamples=100)
        weighted.append([got["loss"][way]["estimate"] for way in ("ips", "snips", "dr")])
        broken.append(got["violation"]["dr"]["estimate"])
        certain = ope.dataclasses.replace(log, label_prob=np.ones(len(log)))
        ignored.append(ope.evaluate(certain, target, fit=blind, resamples=100)["loss"]["snips"]["estimate"])
    weighted = np.array(weighted)
    assert (abs(weighted.mean(0) - TRUTH) < [0.06, 0.03, 0.03]).all() and abs(np.mean(ignored) - TRUTH) > 0.05
    noise = np.random.default_rng(0).normal(0, 0.3, len(GRID))
    true_broken = float(np.mean(mean_cost(GRID, wanted(GRID)) + noise > 3.0))
    assert abs(np.mean(broken) - true_broken) < 3.5 * np.std(broken) / np.sqrt(60)


# -- requests of several decisions -----------------------------------------------------------------------------------


def sequential(n: int, seed: int) -> tuple[Decisions, list[np.ndarray]]:
    """Two decisions, the second only in some requests, its state made worse by a cheap first plan."""
    rng = np.random.default_rng(seed)
    out: dict[str, list[Any]] = {k: [] for k in ("request", "x", "probs", "taken", "cost", "share", "epoch", "target")}
    for request in range(n):
        x, length = rng.random(), 1 + int(rng.random() < 0.6)
        for t in range(length):
            probs = np.array([0.1, 0.4, 0.2, 0.2, 0.1] if x > 0.5 else [0.1, 0.2, 0.2, 0.4, 0.1])
            a = int(rng.choice(5, p=probs))
            values = x, probs, a, mean_cost(np.array(x), np.array(a)) + rng.normal(0, 0.2), 1 / length, t > 0
            for key, value in zip(("x", "probs", "taken", "cost", "share", "epoch"), values, strict=True):
                out[key].append(value)
            out["request"].append(request)
            out["target"].append(np.eye(5)[int(wanted(np.array(x)))])
            x = min(1.0, 0.5 * x + 0.2 * a * rng.random())
    state = np.full((len(out["x"]), len(schema.NAMES)), np.nan)
    state[:, X], state[:, SLO] = out["x"], 0.0
    many, taken = len(state), np.array(out["taken"])
    log = Decisions(
        np.array(out["request"]), state, [NAMES] * many, [np.ones(5, bool)] * many, out["probs"], taken,
        FEATURES[taken], np.array(out["epoch"]), np.array(out["share"]), np.array(out["cost"]), np.full(many, np.nan),
        np.full(many, np.nan),
    )  # fmt: skip
    return log, out["target"]


def sequential_truth(n: int = 400_000) -> float:
    rng = np.random.default_rng(99)
    x, long = rng.random(n), rng.random(n) < 0.6
    first = mean_cost(x, wanted(x))
    later = np.minimum(1.0, 0.5 * x + 0.2 * wanted(x) * rng.random(n))
    return float(np.where(long, (first + mean_cost(later, wanted(later))) / 2, first).mean())


def test_several_decisions():
    truth, found, covered = sequential_truth(), {"ips": [], "snips": [], "dr": []}, dict.fromkeys(("ips", "dr"), 0)
    for seed in range(60):
        got = ope.evaluate(*sequential(1000, seed), fit=sighted, resamples=100)["cost"]
        for way, values in found.items():
            values.append(got[way]["estimate"])
        for way in covered:
            covered[way] += got[way]["interval"][0] <= truth <= got[way]["interval"][1]
    for way in ("ips", "dr"):
        assert abs(np.mean(found[way]) - truth) < 3.5 * np.std(found[way]) / np.sqrt(60) and covered[way] >= 50, way
    assert abs(np.mean(found["snips"]) - truth) < 0.03
    assert np.std(found["dr"]) < 0.5 * np.std(found["ips"])


def test_formulas_written_out():
    """IPS, SNIPS and DR as loops over requests and decisions, from the papers, on arbitrary numbers."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 5, size=40)
    request = np.repeat(np.arange(40), lengths)
    n = len(request)
    ratio, outcome, q, v, now = rng.exponential(1, (5, n))
    ratio[rng.random(n) < 0.3] = 0.0
    seen = np.where(rng.random(n) < 0.5, 1 / rng.uniform(0.2, 1, n), 0.0)
    fills = 1.0, 0.0, 0.0, 0.0, 0.0, 1.0
    arrays = zip((ratio, outcome, q, v, now, seen), fills, strict=True)
    got = estimators.estimates(Episodes(*(estimators.pad(request, x, fill) for x, fill in arrays)), resamples=100)

    ips, dr, tops, bottoms = [], [], [0.0] * 4, [0.0] * 4
    for i in range(40):
        rows_of = np.flatnonzero(request == i)
        total, weight = 0.0, 1.0
        for t in range(4):
            if t < len(rows_of):
                k = rows_of[t]
                weight *= ratio[k]
                total += weight * seen[k] * outcome[k]
                tops[t] += weight * seen[k] * outcome[k]
                bottoms[t] += weight * seen[k]
            else:
                bottoms[t] += weight
        ips.append(total)
        value = 0.0
        for k in reversed(rows_of):
            reward = now[k] + seen[k] * (outcome[k] - now[k])
            value = v[k] + ratio[k] * (reward + value - q[k])
        dr.append(value)
    assert got["ips"]["estimate"] == pytest.approx(np.mean(ips), rel=1e-12)
    assert got["snips"]["estimate"] == pytest.approx(sum(a / b for a, b in zip(tops, bottoms, strict=True)), rel=1e-12)
    assert got["dr"]["estimate"] == pytest.approx(np.mean(dr), rel=1e-12)
    assert got["dm"]["estimate"] == pytest.approx(np.mean([v[request == i][0] for i in range(40)]), rel=1e-12)
    assert (
        estimators.effective(np.array([1.0, 1.0, 0.0])) == pytest.approx(2) and estimators.effective(np.zeros(3)) == 0
    )


def test_bootstrap_draws_whole_requests():
    """Every row twice within its request changes nothing; every request twice narrows the interval."""
    rng = np.random.default_rng(0)
    outcome = rng.normal(size=(200, 1))
    one = Episodes(np.ones((200, 1)), outcome, *[np.zeros((200, 1))] * 3, np.ones((200, 1)))
    halves = Episodes(*(np.repeat(a / (2 if i == 1 else 1), 2, axis=1) for i, a in enumerate(one)))
    more = Episodes(*(np.repeat(a, 4, axis=0) for a in one))
    width = [np.ptp(estimators.estimates(e, 2000)["ips"]["interval"]) for e in (one, halves, more)]
    assert width[0] == pytest.approx(width[1], rel=1e-9) and width[2] == pytest.approx(width[0] / 2, rel=0.1)
