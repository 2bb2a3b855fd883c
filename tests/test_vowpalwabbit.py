"""Off-policy estimates beside those of an independent program."""

import numpy as np
import pytest

from adaptivekv.trainer import ope

from test_estimators import TRUTH, X, bandit  # isort: skip

N = 3000


def evaluated(kind: str, log, target) -> float:
    """What Vowpal Wabbit says the target policy would have cost; its labels are `wanted taken:cost:probability`."""
    vw = pytest.importorskip("vowpalwabbit").Workspace(f"--cb 5 --eval --cb_type {kind} --noconstant --quiet")
    for i, (taken, cost) in enumerate(zip(log.taken, log.cost, strict=True)):
        x = log.state[i, X]
        label = f"{np.argmax(target[i]) + 1} {taken + 1}:{cost}:{log.probs[i][taken]}"
        vw.learn(f"{label} | one:1 x:{x} bin{int(10 * x)}:1")
    return vw.get_sum_loss() / vw.get_weighted_examples()


def test_the_same_estimates_as_vowpal_wabbit():
    log, target = bandit(N, 0)
    ours = ope.evaluate(log, target, resamples=300)["cost"]
    assert evaluated("ips", log, target) == pytest.approx(ours["ips"]["estimate"], rel=1e-5)
    theirs = evaluated("dr", log, target)  # with a linear model of its own that learns as it goes
    low, high = ours["dr"]["interval"]
    assert low - 0.02 < theirs < high + 0.02 and abs(theirs - TRUTH) < 0.05
