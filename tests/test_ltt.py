"""Learn-Then-Test on populations whose violation rates are known: how often it errs, and what it still finds."""

import numpy as np
import pytest

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.trainer import certificate, certify, ltt, scoring

ALPHA = DELTA = 0.05
QUALITIES = len(scoring.QUALITIES)


def population(rates: np.ndarray, n: int, rng: np.random.Generator, together: bool = True) -> np.ndarray:
    """bool [n, L]: one latent hardness a request (margins are dependent, as they are in truth), or one each."""
    return rng.random((n, 1 if together else len(rates))) < rates


def wrong(rates: np.ndarray, n: int, seeds: int, together: bool) -> float:
    """Share of runs that certify a margin whose true rate is above alpha."""
    bad = 0
    for seed in range(seeds):
        last = ltt.walk(population(rates, n, np.random.default_rng(seed), together), ALPHA, DELTA).last
        bad += last >= 0 and bool((rates[: last + 1] > ALPHA).any())
    return bad / seeds


ABOVE = ALPHA + 1e-4  # just bad enough: where the test errs most


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(
    "rates",
    [[ABOVE] * 20, [0.0, 0.01, 0.03, ABOVE, 0.1], [0.01, ABOVE, 0.0, ABOVE, 0.0]],
    ids=["all bad", "rising", "not monotone"],
)
@pytest.mark.parametrize("n", [93, 300])  # 93: the fewest that pass with one violation, where the test is tight
def test_error_rate(rates, n, together):
    seeds = 600
    assert wrong(np.array(rates), n, seeds, together) <= DELTA + 3 * np.sqrt(DELTA * (1 - DELTA) / seeds)


def test_taking_the_best_of_all_margins_would_err():
    """What the fixed sequence prevents: the same tests without an order certify bad margins far too often."""
    rates, bad = np.full(20, ABOVE), 0
    for seed in range(300):
        p = ltt.walk(population(rates, 300, np.random.default_rng(seed), together=False), ALPHA, DELTA).p
        bad += (p <= DELTA).any()
    assert bad / 300 > 0.3


def test_one_bad_slo_is_enough_to_fail():
    """Three SLOs never broken do not hide a fourth; and the joint claim errs at most delta."""
    seeds, bad = 600, 0
    for seed in range(seeds):
        broken = np.zeros((300, QUALITIES, 5), bool)
        broken[:, 2] = population(np.full(5, ABOVE), 300, np.random.default_rng(seed))
        bad += ltt.walk(broken, ALPHA, DELTA).last >= 0
    assert 0 < bad / seeds <= DELTA + 3 * np.sqrt(DELTA * (1 - DELTA) / seeds)
    pooled = np.zeros((300, QUALITIES, 1), bool)
    pooled[:36, 2] = True  # 12 % of one SLO, 3 % of all
    assert ltt.walk(pooled.reshape(-1, 1), ALPHA, DELTA).last == 0 and ltt.walk(pooled, ALPHA, DELTA).last == -1


def test_groups_share_delta():
    """Two groups that are never broken and one just bad: certified in at most delta / 3 of the runs, not delta."""
    group = np.arange(1200) % 3
    members, seeds, bad = {str(g): group == g for g in range(3)}, 1000, 0
    for seed in range(seeds):
        broken = np.zeros((1200, QUALITIES, 1), bool)
        broken[group == 1, 2] = population(np.array([ABOVE]), 400, np.random.default_rng(seed))
        try:
            certificate.by_group(broken, [1.0], members, ALPHA, DELTA)
            bad += 1
        except AdaptiveKVError as error:
            assert "group '1'" in str(error)
    share = DELTA / 3
    assert 0 < bad / seeds <= share + 3 * np.sqrt(share * (1 - share) / seeds) < DELTA
    last, found = certificate.by_group(np.zeros((300, QUALITIES, 2), bool), [1.0, 0.5], {
        "a": np.arange(300) < 150, "b": np.arange(300) >= 150,
    }, ALPHA, DELTA)  # fmt: skip
    assert last == 1 and found["a"]["margin"] == 0.5 and found["b"]["delta"] == 0.025


def test_power():
    """A margin that is never broken passes with 59 requests and not with 58; liberal margins are reached."""
    assert ltt.least(0.05, 0.05) == 59 and ltt.least(0.05, 0.01) == 90 and ltt.least(0.1, 0.1) == 22
    for n, last in ((58, -1), (59, 1)):
        assert ltt.walk(np.zeros((n, 2), bool), ALPHA, DELTA).last == last
    reached = [
        ltt.walk(population(np.array([0.0, 0.01, 0.02, 0.2]), 600, np.random.default_rng(s)), ALPHA, DELTA).last
        for s in range(200)
    ]
    assert np.mean(np.array(reached) == 2) > 0.9


def test_bound_and_test_say_the_same():
    from scipy.stats import binom

    for n in (10, 59, 93, 200):
        k = np.arange(n + 1)
        bound = ltt.upper(k, n, DELTA)
        assert ((bound <= ALPHA) == (binom.cdf(k, n, ALPHA) <= DELTA)).all()
        assert (np.diff(bound) >= 0).all() and bound[-1] == 1
        inside = k[:-1]
        np.testing.assert_allclose(binom.cdf(inside, n, bound[:-1]), DELTA, rtol=1e-6)  # its definition
    assert ltt.upper(0, 0, DELTA) == 1


def test_the_grid_is_ordered_and_never_says_uncertified():
    assert list(certify.GRID) == sorted(certify.GRID, reverse=True) and 0 not in certify.GRID
    assert len(set(certify.GRID)) == len(certify.GRID) == 41
