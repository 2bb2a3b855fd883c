"""Off-policy evaluation of logs: what they become, what is refused, the verb; the estimators: test_estimators.py."""

import json

import numpy as np
import pytest

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.features import schema
from adaptivekv.selector import RuleTable
from adaptivekv.trainer import logged, ope, scoring, trajectories
from adaptivekv.trainer.logged import Decisions

from test_certify import verb  # isort: skip
from test_estimators import SLO, bandit, blind  # isort: skip
from test_trainer import rows  # isort: skip


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
    for quality, budget in ((0.01, None), (0.1, 0.6), (0.03, 0.75), (1e-4, None)):
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
    assert len({r["plan"] for r in picks}) > 1 and broken > 0.03

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
