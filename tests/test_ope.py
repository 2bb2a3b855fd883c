"""Off-policy evaluation: simulators whose truth is known, formulas written out a second time, refusals, the verb."""

import json
from typing import Any

import numpy as np
import pytest

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.features import schema
from adaptivekv.plan import Plan
from adaptivekv.selector import RuleTable
from adaptivekv.trainer import estimators, logged, ope, scoring, trajectories
from adaptivekv.trainer.estimators import Episodes
from adaptivekv.trainer.logged import Decisions

from test_certify import verb  # isort: skip
from test_trainer import rows  # isort: skip

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


# -- logs ------------------------------------------------------------------------------------------------------------


def served(n: int, seed: int) -> tuple[list[dict], list[dict]]:
    """One logged decision a request, drawn evenly, with an online label; and the rows of every plan, for the truth."""
    rng, log, full = np.random.default_rng(seed), [], []
    made = rows(n, "test", seed)
    for i in range(0, len(made), 7):
        group = made[i : i + 7]
        for row in group:
            row["features"] = row["features"].copy()
            row["features"][[1, SLO]] = 5.0, np.log10(rng.choice(scoring.QUALITIES) if row is group[0] else 0.03)
            row["features"][SLO] = group[0]["features"][SLO]
            row["label_kind"] = "online"
        log.append(group[int(rng.integers(7))])
        full.append(group)
    return log, full


def test_the_target_is_the_controller(smol, tmp_path):
    """What a real controller decided with the embedded model comes out of its log again, epsilon included."""
    import torch

    from adaptivekv.cache import AdaptiveCache
    from adaptivekv.controller import Controller

    found = []
    ids = smol.tokenizer("The sea was calm and grey. " * 60, return_tensors="pt").input_ids
    for quality, budget in ((0.01, None), (0.1, 0.6), (0.03, 0.75)):
        controller = Controller(selector=RuleTable(), quality=quality, epsilon=0.4, epoch=8, seed=3)
        cache = AdaptiveCache(smol.model, budget, quality, kv_dtype=torch.bfloat16, controller=controller)
        smol.model.generate(
            ids, past_key_values=cache, max_new_tokens=20, min_new_tokens=20, do_sample=False, **cache.generate_kwargs
        )
        found.append([d for d in cache.requests[0].decisions if d.plans])
    for number, decisions in enumerate(found):
        assert len(decisions) == 4  # admission, prefill, two epochs
        n = len(decisions)
        log = Decisions(
            np.zeros(n, int), np.stack([schema.row(d.features) for d in decisions]),
            [tuple(d.plans) for d in decisions], [np.array(d.allowed) for d in decisions],
            [np.array(d.probs) for d in decisions],
            np.array([d.plans.index(d.plan) for d in decisions]), np.zeros((n, 8)),
            np.array([d.moment == "epoch" for d in decisions]), *np.zeros((4, n)),
        )  # fmt: skip
        for want, got in zip(log.probs, logged.target(log, RuleTable(), 0.4), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-12, err_msg=str(number))
        greedy = logged.target(log, RuleTable(), 0.0)
        assert all(p.max() == 1 and p.argmax() == want.argmax() for p, want in zip(greedy, log.probs, strict=True))
    assert len({d.plan for decisions in found for d in decisions}) > 2


def test_rows_become_decisions(tmp_path):
    """Order, shares of tokens, epochs, and requests that chose nothing or generated nothing."""
    (row,), _ = served(1, 0)
    admission = row | {"tokens": 0, "step_ms": 500.0}
    later = row | {"step": 32, "tokens": 10}
    other = row | {"request_id": "b", "plans": [row["plan"]], "probs": [1.0], "allowed": [True]}
    silent = row | {"request_id": "a", "tokens": 0}
    trajectories.write([later, other, admission, row, silent], tmp_path / "part-0000.parquet")
    log, left_out = logged.decisions(trajectories.read(tmp_path))
    assert left_out == 2 and log.request.tolist() == [0, 0, 0] and log.epoch.tolist() == [False, False, True]
    np.testing.assert_allclose(log.share, [0, 32 / 42, 10 / 42])
    price = row["device_bytes"] + scoring.KAPPA * row["host_bytes"]
    np.testing.assert_allclose(log.cost, [price * 500 / 2**20, *[price * row["step_ms"] / 2**20] * 2])
    outcomes = ope.outcomes(log)
    np.testing.assert_allclose(outcomes["cost"].togo, [1, 1, 10 / 42])
    assert outcomes["violation"].now.tolist() == [0, 0, 1] and (outcomes["loss"].seen == 1).all()


def feature(row: dict, name: str, value: float) -> dict:
    values = row["features"].copy()
    values[schema.NAMES.index(name)] = value
    return row | {"features": values}


REFUSED = {
    r"took '.*' with probability 0": lambda r: r | {"probs": [0.0 if p == r["plan"] else 1 / 6 for p in r["plans"]]},
    "are missing or no probabilities": lambda r: r | {"probs": [0.5] * 7},
    "request 'test-0' are missing": lambda r: r | {"probs": [float("nan")] * 7},
    "feature 'log10_quality' of request 'test-0' is nan": lambda r: feature(r, "log10_quality", np.nan),
    "feature 'turn' is infinite": lambda r: feature(r, "turn", np.inf),
    "feature 'keep' of request": lambda r: r | {"plan_features": [np.nan] * len(schema.PLAN_NAMES)},
    "policy_version 'replay'": lambda r: r | {"policy_version": "replay"},
    "label_kind is replay in some rows and online": lambda r: r | {"label_kind": "replay"},
    "label_prob of a labelled row": lambda r: r | {"label_prob": 0.0},
    "label_prob .* missing": lambda r: r | {"label_prob": None},
    "step_ms of a row is not finite": lambda r: r | {"step_ms": float("inf")},
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_logs_are_one_line(message, tmp_path):
    log, _ = served(3, 0)
    trajectories.write([REFUSED[message](log[0]), *log[1:]], tmp_path / "part-0000.parquet")
    with pytest.raises(AdaptiveKVError, match=message) as caught:
        ope.ope([tmp_path], "rules")
    assert "\n" not in str(caught.value)


def test_schema_and_arguments(tmp_path):
    log, _ = served(2, 0)
    part = trajectories.write(log, tmp_path / "part-0000.parquet")
    for wrong, message in (
        ({"epsilon": 2.0}, "epsilon is 2"), ({"split": "dev"}, "split 'dev' is not one of"),
        ({"split": "gate"}, "split 'gate' has 0 rows"), ({"resamples": 5}, "resamples is 5"),
    ):  # fmt: skip
        with pytest.raises(AdaptiveKVError, match=message):
            ope.ope(**({"sources": [tmp_path], "policy": "rules"} | wrong))
    table = trajectories.read(part)
    at = table.column_names.index("schema_version")
    old = table.set_column(at, "schema_version", trajectories.pa.array([1, 0]))
    trajectories.pq.write_table(old, part)
    with pytest.raises(AdaptiveKVError, match=f"schema_version is 0, not {schema.VERSION}"):
        ope.ope([tmp_path], "rules")


def test_support_and_effective_sample_size():
    """A log that never explored cannot say what another policy would do; a small one says too little."""
    log, target = bandit(400, 0)
    greedy = ope.dataclasses.replace(log, probs=[np.eye(5)[a] for a in log.taken])
    with pytest.raises(AdaptiveKVError, match=r"support 0\.\d+ \(at least 0.9\), effective sample size") as caught:
        ope.evaluate(greedy, target)
    assert "\n" not in str(caught.value)
    with pytest.raises(AdaptiveKVError, match=r"support 1.000 .* effective sample size \d\d?\.\d of 60"):
        ope.evaluate(*bandit(60, 0))
    same = ope.evaluate(log, log.probs, fit=blind, resamples=100)  # the log's own policy: all weights are 1
    assert same["effective_sample_size"] == pytest.approx(400)
    assert same["cost"]["ips"]["estimate"] == pytest.approx(same["cost"]["logged"]) == pytest.approx(log.cost.mean())


def test_command_line(tmp_path, monkeypatch, capsys):
    """From files: every plan's outcome is known, so the truth is; the verb's intervals contain it."""
    log, full = served(1500, 4)
    trajectories.write(log, tmp_path / "part-0000.parquet")
    table, _ = logged.decisions(trajectories.read(tmp_path))
    chosen = logged.target(table, RuleTable(), 0.0)
    by_id = {group[0]["request_id"]: group for group in full}
    ids = np.unique([row["request_id"] for row in log])
    picks = [by_id[name][int(p.argmax())] for name, p in zip(ids, chosen, strict=True)]
    cost = np.mean([(r["device_bytes"] + 0.1 * r["host_bytes"]) / 2**20 * r["step_ms"] for r in picks])
    loss = np.mean([r["label_loss"] for r in picks])
    broken = np.mean([r["label_loss"] > 10 ** r["features"][SLO] for r in picks])
    assert len({r["plan"] for r in picks}) > 1 and broken > 0.05

    code, shown, said = verb(monkeypatch, capsys, "ope", str(tmp_path), "--policy", "rules", "--json")
    assert code == 0 and not said.strip()
    got = json.loads(shown)
    assert got["requests"] == 1500 and got["policy"] == "rules" and got["support"] == 1
    for name, truth in (("cost", cost), ("loss", loss), ("violation", broken)):
        for way in ("ips", "snips", "dr"):
            low, high = got[name][way]["interval"]
            assert low < truth < high, (name, way, truth, got[name])
    code, shown, _ = verb(monkeypatch, capsys, "ope", str(tmp_path), "--policy", "rules", "--split", "test")
    assert code == 0 and "effective_sample_size" in shown and "violation" in shown
    code, shown, said = verb(monkeypatch, capsys, "ope", str(tmp_path), "--policy", "rules", "--epsilon", "3")
    assert code == 2 and said.strip() == "adaptivekv: ope: epsilon is 3; a chance between 0 and 1" and not shown
