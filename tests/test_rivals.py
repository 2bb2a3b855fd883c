"""Ways to choose on requests whose right plan is known, the bootstrap's coverage, and arithmetic of the simulation."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("sklearn")

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.features import schema
from adaptivekv.selector import RuleTable
from adaptivekv.trainer import goodput, rivals, scoring
from adaptivekv.trainer.certify import GRID, outcomes
from adaptivekv.trainer.dataset import Rows
from adaptivekv.trainer.scoring import QUALITIES, Request

# plan: (keep, bits, share of the bytes on the device, loss in the scenarios "easy" and "hard")
PLANS = {
    "full": (1, 16, 1.0, 0.0, 0.0),
    "int4": (1, 4, 1.0, 0.001, 0.05),
    "int8": (1, 8, 1.0, 0.0001, 0.002),
    "offload(0.9)": (1, 16, 0.9, 0.0, 0.0),
    "snapkv(0.1)": (0.1, 16, 1.0, 0.02, 5.0),
}
COST = {"full": 1.0, "int4": 0.25, "int8": 0.5, "offload(0.9)": 0.91, "snapkv(0.1)": 0.1}
BEST = {"easy": ["int4", "int4", "snapkv(0.1)", "snapkv(0.1)"], "hard": ["int8", "int8", "int8", "int4"]}


def made(requests: int, seed: int = 0, noise: float = 0.0, ms: float = 2.0, room: float = np.inf) -> list[Request]:
    """Half of them easy, half hard, as their digits say; every fifth is of the same document as the one before."""
    rng = np.random.default_rng(seed)
    n, plans = requests * len(PLANS), list(PLANS)
    plan = np.tile(plans, requests)
    keep, bits, device, *losses = (np.tile(column, requests) for column in zip(*PLANS.values(), strict=True))
    number = np.repeat(np.arange(requests), len(PLANS))
    hard = number % 2
    state = np.full((n, len(schema.NAMES)), np.nan)
    for name, values in {
        "log2_prompt": 9 + (number * 7 % requests) / requests,
        "digit_share": 0.1 + 0.8 * hard,
        "log10_quality": np.log10(np.array(QUALITIES))[number % 4],
    }.items():
        state[:, schema.NAMES.index(name)] = values
    features = np.zeros((n, len(schema.PLAN_NAMES)))
    for name, values in {"keep": keep, "k_bits": bits, "v_bits": bits, "device_share": device, "read_share": 1}.items():
        features[:, schema.PLAN_NAMES.index(name)] = values
    size = 1_600_000 * keep * bits / 16
    return scoring.requests(
        Rows(
            state=state,
            plan_features=features,
            request=np.array([f"{seed}-{i:05d}" for i in number]),
            document=np.array([f"{seed}-{i - (i % 5 == 4)}" for i in number]),
            plan=plan,
            scenario=np.array(["easy", "hard"])[hard],
            kind=np.array(["prose", "table"])[hard],
            split=np.full(n, "train"),
            step=np.zeros(n, int),
            tokens=np.full(n, 10),
            loss=np.where(hard == 1, losses[1], losses[0]) * 10 ** rng.normal(0, noise, n),
            worst=np.ones(n),
            flip=np.zeros(n),
            halves=np.full((n, 2), np.nan),
            right=np.full(n, np.nan),
            step_ms=np.full(n, ms),
            device_bytes=(size * device).astype(int),
            host_bytes=(size * (1 - device)).astype(int),
            device_room=np.full(n, room * 1_600_000),
            host_room=np.full(n, np.inf if room == np.inf else 0.0),
        )
    )


def chosen(way: rivals.Way, requests: list[Request], margin: float = 0.0) -> dict[str, list[set[str]]]:
    """The plans taken in each scenario, by SLO."""
    choose = way.at(margin)
    return {
        scenario: [{str(r.rows.plan[choose(r, q)]) for r in requests if r.scenario == scenario} for q in QUALITIES]
        for scenario in ("easy", "hard")
    }


RIGHT = {scenario: [{plan} for plan in plans] for scenario, plans in BEST.items()}


@pytest.mark.parametrize("way", [rivals.table, rivals.forest, rivals.bandit], ids=lambda way: way.__name__)
def test_each_way_finds_the_right_plan(way):
    found, settings = way(made(80, 0), made(20, 1))
    assert settings and chosen(found, made(40, 2)) == RIGHT
    if way is rivals.table:  # of bounded losses, none but 0 is sure under such a margin
        assert chosen(found, made(4, 2), 3.05) == dict.fromkeys(RIGHT, [{"offload(0.9)"}] * 4)
    played = scoring.play(found.at(), made(40, 2))
    assert played.cost[0].tolist() == pytest.approx([COST[plan] for plan in BEST["easy"]])
    assert not played.broken.any() and played.worst.min() == 1


def test_nobody_takes_what_does_not_fit():
    """With room for int4 and snapkv(0.1) alone, hard requests cannot keep a strict SLO: no way is blamed for that."""
    train, select, tight = made(80), made(20, 1), made(12, 2, room=0.3)
    some = (rivals.table(train, select)[0], rivals.forest(train, select)[0], rivals.bandit(train, select)[0])
    ways = [w.at() for w in (*some, rivals.static(train), rivals.random(train), rivals.trusting(RuleTable()))]
    for choose in (*ways, scoring.oracle, scoring.always({}), scoring.always({"0.1": "int8"})):
        taken = {str(r.rows.plan[choose(r, q)]) for r in tight for q in QUALITIES}
        assert taken <= {"int4", "snapkv(0.1)"}
    hard = tight[1]
    broken = [[bool(hard.broken(i, q)) for q in QUALITIES] for i in np.flatnonzero(hard.fits)]
    assert hard.scenario == "hard" and sorted(broken) == [[False] * 4, [False, False, False, True]]
    strict, loose, *_ = outcomes(RuleTable(), tight, GRID)[0][1]  # nothing is promised; a promise that is broken
    assert np.isnan(strict).all() and loose[0] == pytest.approx(0.05)
    nothing = made(2, room=0.01)[0]
    assert nothing.rows.plan[nothing.fits].tolist() == ["snapkv(0.1)"]


def test_a_table_by_kind_is_told_the_kind():
    assert chosen(rivals.table(made(80), made(20, 1), "kind")[0], made(10, 2)) == RIGHT


def test_static_and_random_must_suit_the_hard():
    """At most 5 % may break: what the hard half needs, everybody gets; random takes all that is safe."""
    train, test = made(80), made(200, 2)
    assert chosen(rivals.static(train), test)["easy"] == RIGHT["hard"]
    choose = scoring.always(scoring.best_static(train))
    assert np.array_equal(scoring.play(rivals.static(train).at(), test).cost, scoring.play(choose, test).cost)
    safe = [{"full", "offload(0.9)", "int8"}] * 3 + [{"full", "offload(0.9)", "int8", "int4"}]
    assert chosen(rivals.random(train), test)["hard"] == safe


def test_small_cells_answer_as_larger_ones():
    train = [r for r in made(80) if r.scenario == "hard"][:40] + [r for r in made(80) if r.scenario == "easy"][:3]
    at = {"by": "scenario", "share": 0.1}
    few, many = (rivals.Way(rivals.Table(train, least=n, **at), rivals.bounded) for n in (3, 4))
    assert chosen(few, made(10, 2)) == RIGHT
    assert chosen(many, made(10, 2))["easy"] == RIGHT["hard"]
    bins = rivals.Table(train, bins=2, least=3, **at)
    assert len({cell for cell in bins.known if len(cell) == 2}) >= 2
    unknown = dataclasses.replace(train[0].rows, scenario=np.full(5, "new"))
    assert bins.cells(dataclasses.replace(train[0], rows=unknown))[-1] == ()


def test_share_is_of_requests():
    """The bound is the loss that exactly `share` of the requests exceed."""
    train = made(40, noise=0.5)
    table, loss = rivals.Table(train, "", share=0.1), rivals.stacked(train)[1]
    high = table(train[0], 0.01)[1]
    assert ((loss > high).mean(0)[1:3] == 0.1).all() and high[0] == 0


def test_a_selector_is_scored_as_the_trainer_scores_it():
    requests = made(30)
    mine, theirs = (scoring.play(c, requests) for c in (
        rivals.trusting(RuleTable()).at(), scoring.trusting(RuleTable())))  # fmt: skip
    assert np.array_equal(mine.cost, theirs.cost) and np.array_equal(mine.broken, theirs.broken)
    loss, cost = outcomes(RuleTable(), requests, GRID)
    played = scoring.play(rivals.trusting(RuleTable()).at(GRID[20]), requests)
    assert np.array_equal(played.loss, loss[:, :, 20]) and np.array_equal(played.cost, cost[:, :, 20])
    keep = [r.rows.plan_features[rivals.shy(rivals.trusting(RuleTable())).at(-3)(r, 0.1), 0] for r in requests]
    assert set(keep) == {1.0}


def test_certify_keeps_the_budget_and_says_when_it_cannot():
    way = rivals.static(made(80))
    assert rivals.certify(way, made(58, 3)) is None and rivals.certify(way, made(59, 3)) is not None
    noisy = made(400, 4, noise=0.4)
    margin = rivals.certify(way, noisy)
    assert margin is not None and scoring.play(way.at(margin), noisy).broken.mean(0).max() < scoring.ALPHA
    assert scoring.play(way.at(), noisy).broken.mean(0).max() > scoring.ALPHA  # as it is it breaks too many
    assert scoring.play(way.at(margin), noisy).cost.mean() > scoring.play(way.at(), noisy).cost.mean()


def test_plans_must_be_the_same():
    few = made(3)
    few[1] = scoring.requests(few[1].rows.where(np.arange(4)))[0]
    with pytest.raises(AdaptiveKVError, match="replayed for some requests only"):
        rivals.static(few)


def test_half_of_the_tokens():
    """Whoever knows one half knows the other if they are alike, and breaks SLOs if they are not."""
    from experiments import parts

    def with_halves(noise: float) -> list[Request]:
        rng = np.random.default_rng(1)
        return [
            dataclasses.replace(r, rows=dataclasses.replace(
                r.rows, halves=r.rows.loss[:, None] * 10 ** rng.normal(0, noise, (len(r.rows), 2))
            ))
            for r in made(60)
        ]  # fmt: skip

    choices = {"selector": rivals.static(made(60)).at()}
    for noise in (0.0, 1.0):
        requests = with_halves(noise)
        study = SimpleNamespace(
            test=requests,
            split={"train": requests, "select": requests},
            against=lambda a, b: scoring.paired(a.cost, b.cost, np.arange(60)),
        )
        got = parts.halved(study, choices)
        assert got["hindsight"]["broken"] == 0 and (got["half oracle"]["broken"] > 0.05) == (noise > 0)
        assert got["with a margin"]["charged"] <= got["half oracle"]["charged"]


def test_bootstrap_covers_only_with_documents():
    """Two-level draws of known mean 0: the interval over documents covers it, that over requests is far too short."""
    held = np.zeros(2)
    for seed in range(200):
        rng = np.random.default_rng(seed)
        document = np.repeat(np.arange(40), 6)
        values = rng.normal(0, 1, 40)[document] + rng.normal(0, 0.3, 240)
        for i, clusters in enumerate((document, np.arange(240))):
            low, high = np.quantile(scoring.resampled(values[:, None], clusters, 400, seed), [0.025, 0.975])
            held[i] += low <= 0 <= high
    assert 0.88 < held[0] / 200 <= 0.99 and held[1] / 200 < 0.7


def test_paired_differences():
    ours = np.full((50, 4), 0.6)
    theirs = np.linspace(0.7, 0.9, 50)[:, None].repeat(4, 1)
    found = scoring.paired(ours, theirs, np.arange(50))
    assert found["difference"] == pytest.approx(-0.2) and found["saved"] == pytest.approx(0.25)
    assert -0.22 < found["low"] < -0.2 < found["high"] < -0.18 and 0.22 < found["saved_low"] < 0.25
    both = scoring.mean([scoring.play(scoring.oracle, made(4)), scoring.play(scoring.always({}), made(4))])
    assert both.cost[0, 0] == pytest.approx((COST["int4"] + 1) / 2)


def test_arrivals_have_the_mean_and_the_bursts():
    trace = goodput.trace(7, 40_000, 5.0, seed=1)
    gaps = np.diff(trace.at)
    assert gaps.mean() == pytest.approx(5.0, rel=0.05) and set(trace.request) == set(range(7))
    assert gaps.std() > 1.02 * gaps.mean()  # Poisson has 1
    windows = np.bincount((trace.at // 100).astype(int))
    assert windows.var() > 2 * windows.mean()  # Poisson has 1


@pytest.mark.parametrize("plan", ["full", "int4"])
def test_an_arena_is_never_exceeded_and_no_request_is_lost(plan):
    requests = made(8)
    arena = 3_300_000  # two full caches
    choose = scoring.always(dict.fromkeys(map(str, QUALITIES), plan))
    trace = goodput.trace(len(requests), 400, goodput.capacity_gap(requests, arena), seed=2)
    served = goodput.serve(requests, choose, trace, arena)
    assert served.good + served.late + served.broken + served.refused == 400 and served.refused == 0
    start, end, size = served.intervals.T
    held = [size[(start <= t) & (t < end)].sum() for t in start]
    assert max(held) == served.peak <= arena
    assert (np.diff(start) >= 0).all() and (start >= trace.at).all() and np.allclose(end - start, 20)
    for i in np.flatnonzero(start > trace.at):  # who waits starts with the one before, or did not fit until then
        before = size[(start < start[i]) & (end >= start[i])].sum()
        assert start[i] == start[i - 1] or before + size[i] > arena
    assert (start > trace.at).mean() > (0.3 if plan == "full" else 0)
    assert goodput.serve(requests, choose, trace, 1000).refused == 400


def test_smaller_plans_serve_more():
    requests = made(8)
    trace = goodput.trace(len(requests), 400, goodput.capacity_gap(requests, 1_600_000) / 1.5, seed=2)
    full = goodput.serve(requests, scoring.always({}), trace, 1_600_000)
    best = goodput.serve(requests, scoring.oracle, trace, 1_600_000)
    assert best.good > 3 * full.good and full.wait_ms > 3 * best.wait_ms and best.broken == full.broken == 0
    assert best.goodput == pytest.approx(best.good * 60_000 / trace.at[-1])
