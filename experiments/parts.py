"""What the parts of the selector are worth: its stages, its features, its data, and what it knows of a scenario."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from adaptivekv.features import schema
from adaptivekv.plan import Plan
from adaptivekv.selector import LOSS_FLOOR, Selector, TreeSelector, is_lossless
from adaptivekv.trainer import rivals, scoring
from adaptivekv.trainer.certify import GRID
from adaptivekv.trainer.dataset import Rows
from adaptivekv.trainer.scoring import QUALITIES, Choice, Played, Request
from adaptivekv.trainer.train import learned

STAGES = ("evict", "quantize", "offload")  # no candidate retrieves
TEXT = ("digit_share", "punct_share", "upper_share", "distinct_share")
BLANKED = {
    "no attention": schema.ATTENTION + schema.KEYS,
    "no key statistics": schema.KEYS,
    "no text": TEXT,
    "no logits": schema.LOGITS,
    "no system": (*schema.SYSTEM, "budget_ratio"),
    "no lengths": ("log2_prompt", "log2_new"),
}
SHARES = (0.25, 0.5, 0.75, 1.0)
Change = Callable[[Rows], Rows]


@dataclasses.dataclass
class Study:
    """The requests of every split, and the selector's seeds."""

    rows: Rows
    seeds: Sequence[int]
    kappa: float = scoring.KAPPA  # price of a host byte, in device bytes

    def __post_init__(self) -> None:
        self.split = {name: self.requests(name) for name in ("train", "select", "certify", "test")}
        self.test = self.split["test"]
        self.documents = np.array([r.document for r in self.test])
        self.scenario = np.array([r.scenario for r in self.test])

    def requests(self, split: str, change: Change = lambda rows: rows) -> list[Request]:
        return scoring.requests(change(self.rows.of(split)), self.kappa)

    def selectors(self, change: Change = lambda rows: rows) -> list[Selector]:
        """One a seed, trained on the changed rows of split train."""
        rows = change(self.rows.of("train"))
        return [trained(rows, seed) for seed in self.seeds]

    def played(self, selectors: Sequence[Selector], change: Change = lambda rows: rows) -> Played:
        """What they get on the changed rows of split test, mean over the seeds."""
        test = self.requests("test", change)
        return scoring.mean([scoring.play(scoring.trusting(s), test) for s in selectors])

    def against(self, ours: Played, theirs: Played, what: str = "charged") -> dict[str, float]:
        return scoring.paired(getattr(ours, what), getattr(theirs, what), self.documents)


def trained(rows: Rows, seed: int) -> Selector:
    return TreeSelector(learned(rows, seed), {"margin": 0.0}, f"seed {seed}")


def stages(study: Study, base: Played, perfect: Played) -> dict[str, Any]:
    """Without the plans of a stage: how much the charged cost rises, where most, and the oracle's.

    A request that no plan fits any more goes over its budget with the smallest one, which breaks no SLO; it is charged
    a full cache on top like a broken one, or taking away what fits would look like a gain.
    """

    def unfit(requests: Sequence[Request]) -> np.ndarray:
        """[n, 1] 1.0 where no plan fits."""
        rows = [r.rows for r in requests]
        return np.array([[not ((r.device_bytes <= r.device_room) & (r.host_bytes <= r.host_room)).any()] for r in rows])

    def charged(played: Played, requests: Sequence[Request]) -> Played:
        return dataclasses.replace(played, broken=np.maximum(played.broken, unfit(requests)))

    base, perfect = charged(base, study.test), charged(perfect, study.test)
    out: dict[str, Any] = {"nothing fits": float(unfit(study.test).mean())}
    for stage in STAGES:
        gone = np.array([name for name in set(study.rows.plan) if Plan.parse(name).stage(stage)])

        def change(rows: Rows, gone: np.ndarray = gone) -> Rows:
            return rows.where(~np.isin(rows.plan, gone))

        test = study.requests("test", change)
        if is_lossless(change(study.rows).plan_features).all():  # nothing to learn: the cheapest that fits
            without = charged(scoring.play(scoring.oracle, test), test)
        else:
            without = charged(study.played(study.selectors(change), change), test)
        rise = (without.charged - base.charged).mean(1)
        each = {s: float(rise[study.scenario == s].mean()) for s in sorted(set(study.scenario))}
        most = max(each, key=lambda s: each[s])
        ours = charged(scoring.play(scoring.oracle, test), test)
        out[stage] = {
            "plans": len(gone), "nothing fits": float(unfit(test).mean()), "rise": study.against(without, base),
            "hurts most": most, "there": each[most], "oracle": study.against(ours, perfect),
        }  # fmt: skip
    return out


def features(study: Study, base: Played) -> dict[str, Any]:
    """Trained and scored with some inputs unknown, mixed up, or a plan's name instead of its features."""
    changes: dict[str, Change] = {name: blank(columns) for name, columns in BLANKED.items()}
    changes |= {"states shuffled": shuffled, "a plan's name, not its features": named(study.rows.of("train"))}
    return {
        name: study.against(study.played(study.selectors(change), change), base) for name, change in changes.items()
    }


def blank(columns: Sequence[str]) -> Change:
    at = [schema.NAMES.index(column) for column in columns]

    def change(rows: Rows) -> Rows:
        state = rows.state.copy()
        state[:, at] = np.nan
        return dataclasses.replace(rows, state=state)

    return change


def shuffled(rows: Rows, columns: Sequence[str] = schema.NAMES) -> Rows:
    """Each request with the state of another, or with some columns of it."""
    names, first, at = np.unique(rows.request, return_index=True, return_inverse=True)
    other = rows.state[first[np.random.default_rng(0).permutation(len(names))]][at]
    return dataclasses.replace(rows, state=np.where(np.isin(schema.NAMES, columns), other, rows.state))


def stale(study: Study, base: Played) -> dict[str, Any]:
    """Features of another request when choosing, though not when trained: more wrong than any old ones can be."""
    selectors = study.selectors()
    groups = {
        "system": schema.SYSTEM,
        "attention": schema.ATTENTION + schema.KEYS,
        "logits": schema.LOGITS,
        "text": TEXT,
    }
    return {
        name: study.against(study.played(selectors, lambda rows, at=columns: shuffled(rows, at)), base)
        for name, columns in groups.items()
    }


def named(train: Rows) -> Change:
    """Plans as two numbers, their ranks by mean loss and by mean time in train: trees can tell all of them apart."""
    plans = sorted(set(train.plan))
    ranks = []
    for values in (np.log10(train.loss + 1e-6), np.log10(train.step_ms)):
        means = [values[train.plan == plan].mean() for plan in plans]
        ranks.append(dict(zip(plans, np.argsort(np.argsort(means)).astype(float), strict=True)))

    def change(rows: Rows) -> Rows:
        plain = {"keep": 1.0, "k_bits": 16.0, "v_bits": 16.0, "device_share": 1.0, "read_share": 1.0}
        features = np.tile(schema.row(dict.fromkeys(schema.PLAN_NAMES, 0.0) | plain, schema.PLAN_NAMES), (len(rows), 1))
        features[~is_lossless(rows.plan_features), 0] = 0.999  # so that they are predicted
        for column, rank in zip(("by_mass", "by_recall"), ranks, strict=True):
            features[:, schema.PLAN_NAMES.index(column)] = [rank[plan] for plan in rows.plan]
        return dataclasses.replace(rows, plan_features=features)

    return change


def curve(study: Study, base: Played) -> dict[str, Any]:
    """Trained on a part of the train requests, another part each seed."""
    out: dict[str, Any] = {}
    rows = study.rows.of("train")
    names = np.unique(rows.request)
    for share in SHARES:
        played, count = base, max(2, round(share * len(names)))
        if share < 1:
            some = [np.random.default_rng(seed).permutation(names)[:count] for seed in study.seeds]
            selectors = [
                trained(rows.where(np.isin(rows.request, s)), i) for i, s in zip(study.seeds, some, strict=True)
            ]
            played = study.played(selectors)
        out[str(share)] = {"requests": count} | played.means()
    return out


def elsewhere(study: Study, base: Played) -> dict[str, Any]:
    """Each scenario by a selector, a table and a static plan that were trained on the others. No claim."""
    out: dict[str, Any] = {}
    for scenario in sorted(set(study.scenario)):

        def change(rows: Rows, scenario: str = scenario) -> Rows:
            return rows.where(rows.scenario != scenario)

        pick = study.scenario == scenario
        here = [r for r, mine in zip(study.test, pick, strict=True) if mine]
        train, select = ([r for r in study.split[s] if r.scenario != scenario] for s in ("train", "select"))
        trees = [scoring.trusting(s) for s in study.selectors(change)]
        out[scenario] = {
            "requests": len(here),
            "trained on all": base.where(pick).means(),
            "selector": scoring.mean([scoring.play(t, here) for t in trees]).means(),
            "table": scoring.play(rivals.table(train, select)[0].at(), here).means(),
            "static": scoring.play(rivals.static(train).at(), here).means(),
            "oracle": scoring.play(scoring.oracle, here).means(),
        }  # fmt: skip
    return out


def halved(study: Study, choices: dict[str, Choice]) -> dict[str, Any]:
    """Every way judged by one half of an answer's tokens, mean over both halves: what knowing the other half is worth.

    "half oracle" takes the cheapest plan whose measured loss on the other half meets the SLO, "with a margin" that loss
    times the margin of least charged cost on split select. "forest told a half" is the forest with the other half's
    losses of all plans among its features. "hindsight" chooses by what it is judged by.
    """
    from sklearn.ensemble import RandomForestRegressor

    def half(requests: Sequence[Request], i: int) -> list[Request]:
        return [dataclasses.replace(r, rows=dataclasses.replace(r.rows, loss=r.rows.halves[:, i])) for r in requests]

    def knowing(requests: Sequence[Request]) -> rivals.Way:
        known = {request.name: request for request in requests}
        return rivals.Way(lambda request, _: (request.cost, known[request.name].rows.loss), rivals.bounded)

    def told(i: int) -> rivals.Way:
        def inputs(requests: Sequence[Request]) -> np.ndarray:
            losses = np.stack([np.log10(request.rows.halves[:, i] + LOSS_FLOOR) for request in requests])
            return np.column_stack([rivals.Inputs.states(requests), losses])

        train = half(study.split["train"], 1 - i)
        settings: dict[str, Any] = {"n_estimators": 100, "min_samples_leaf": 4, "max_features": 0.4, "random_state": 0}
        model = RandomForestRegressor(**settings).fit(inputs(train), rivals.targets(train))
        return rivals.Way(rivals.Risks(inputs, model.predict), rivals.weighed)

    def charged(margin: float) -> float:
        select = study.split["select"]
        both = [scoring.play(knowing(half(select, i)).at(margin), half(select, 1 - i)).charged.mean() for i in (0, 1)]
        return float(np.mean(both))

    margin = min(GRID, key=charged)
    got: dict[str, list[Played]] = {}
    for i in (0, 1):
        way, judged = knowing(half(study.test, i)), half(study.test, 1 - i)
        tried = choices | {"half oracle": way.at(), "with a margin": way.at(margin), "hindsight": scoring.oracle}
        tried["forest told a half"] = told(i).at()
        for name, choice in tried.items():
            got.setdefault(name, []).append(scoring.play(choice, judged))
    played = {name: scoring.mean(both) for name, both in got.items()}
    return {"margin": margin} | {
        name: p.means() | {"selector less this": study.against(played["selector"], p)} for name, p in played.items()
    }


def answers(study: Study, choices: dict[str, Choice]) -> dict[str, Any]:
    """Of the test requests with a known answer: how often the full cache is right, and the chosen plan then wrong."""
    known = [request for request in study.test if np.isfinite(request.rows.right).all()]
    out: dict[str, Any] = {"requests": len(known)}
    if known:
        out["full right"] = float(np.mean([r.rows.right[r.full] == 1 for r in known]))
    for name, choice in choices.items() if known else ():
        lost = [
            [r.rows.right[r.full] == 1 and r.rows.right[choice(r, quality)] < 1 for quality in QUALITIES]
            for r in known
        ]  # fmt: skip
        out[name] = {"lost": float(np.mean(lost))} | dict(
            zip(map(str, QUALITIES), np.mean(lost, axis=0).tolist(), strict=True)
        )
    return out
