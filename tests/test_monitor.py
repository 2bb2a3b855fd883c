"""The monitor: when it widens a margin, what that changes, and `watch`, which applies its advice."""

from typing import Any

import numpy as np
import pytest

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.features import schema
from adaptivekv.selector import RuleTable

pytest.importorskip("mlflow")
pytest.importorskip("ray.serve")
from adaptivekv.cluster import watch as watching
from adaptivekv.cluster.monitor import FALLBACK, WIDEST, Monitor, Widened


def test_the_monitor_is_quiet_while_the_promise_is_kept() -> None:
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(60):
        monitor = Monitor()
        alarms += any(monitor.feed(bool(x)) for x in rng.random(1000) < monitor.alpha)
    assert alarms <= 0.05 * 60


def test_the_monitor_reacts_soon_to_three_times_the_rate() -> None:
    rng, waited = np.random.default_rng(0), []
    for _ in range(100):
        monitor = Monitor()
        waited.append(next(i for i, x in enumerate(rng.random(5000) < 3 * monitor.alpha) if monitor.feed(bool(x))))
    assert np.median(waited) < 80 and np.quantile(waited, 0.95) < 250


def test_the_monitor_widens_and_then_falls_back() -> None:
    monitor, advice = Monitor(margin=0.5, widenings=2), []
    for _ in range(60):
        if (advised := monitor.feed(True)) is not None:
            advice.append(advised)
            assert monitor.labels == 0 and monitor.evidence == 1
    assert advice[:3] == [{"margin": 0.6}, {"margin": 0.7}, FALLBACK]
    assert Monitor(margin=3.0, widenings=9).feed(False) is None
    nearly = Monitor(margin=3.0)
    assert next(a for _ in range(60) if (a := nearly.feed(True))) == FALLBACK


def test_a_wider_margin_is_not_a_certificate() -> None:
    """A margin that is not 0 says "certified", which lets evictions in: widening must not."""
    plain = RuleTable()
    wide = Widened(plain, 0.3)
    rest = [0] * (len(schema.PLAN_NAMES) - 5)
    rows = np.array([[1, 4, 4, 1, 1] + rest, [1, 16, 16, 1, 1] + rest], np.float64)
    state = np.full(len(schema.NAMES), np.nan)
    before, after = (s.predict(state, rows) for s in (plain, wide))
    assert wide.margin == 0 and wide.name == "rules~0.3"
    assert after.loss_high == pytest.approx(before.loss_high * 10**0.3) and after.loss_high[1] == 0
    assert after.chance == pytest.approx(before.chance * 10**0.3) and after.chance[1] == 0 < after.chance[0]
    assert Widened(plain, WIDEST).predict(state, rows).chance.tolist() == [1e6, 0]  # trusts what is lossless alone


def test_watching_applies_the_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a made-up server that keeps its promise from the second margin on."""
    asked: list[dict[str, Any]] = []

    def reload(url: str, api_key: str | None, **config: Any) -> dict[str, Any]:
        asked.append(config)
        margin = config.get("margin", 0.5)
        return {"selector": f"champion@1~{margin:g}" if config else "champion@1", "margin": margin}

    kept, hopeless = ("champion@1~0.6", True, False), ("champion@1~0.6", False, False)
    outcomes = [("rules", True, True)] * 50 + [("champion@1", True, True)] * 30 + [kept] * 40 + [hopeless] * 5
    monkeypatch.setattr(watching, "reload", reload)
    monkeypatch.setattr(watching, "label", lambda *_: None)
    monkeypatch.setattr(watching, "_outcomes", lambda *_: outcomes)
    found = watching.watch("samples", "labels", every=0.0, rounds=3)
    assert asked == [{}, {"margin": 0.6}] == [{}, *found["advice"]]
    assert found["selector"] == "champion@1~0.6"
    assert (found["labels"], found["promises"], found["violations"]) == (45, 40, 0)
    with pytest.raises(AdaptiveKVError, match="alpha is 2"):
        watching.watch("samples", "labels", alpha=2)
