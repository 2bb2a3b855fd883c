"""What the parts of the selector are worth: its stages, its features, its data, and what it knows of a scenario."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from adaptivekv.features import schema
from adaptivekv.plan import Plan
from adaptivekv.selector import Selector, TreeSelector, is_lossless
from adaptivekv.trainer import export, rivals, scoring
from adaptivekv.trainer.dataset import Rows
from adaptivekv.trainer.scoring import Played
from adaptivekv.trainer.train import fit

STAGES = ("evict", "quantize", "offload", "retrieve")
TEXT = ("digit_share", "punct_share", "upper_share", "distinct_share")
BLANKED = {
    "no attention, no probe": schema.ATTENTION + schema.PROBE + schema.KEYS,
    "no probe": schema.PROBE,
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

    def requests(self, split: str, change: Change = lambda rows: rows) -> list[scoring.Request]:
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
    return TreeSelector(export.flatten(fit(rows, seed)), {"margin": 0.0}, f"seed {seed}")


def stages(study: Study, base: Played, perfect: Played) -> dict[str, Any]:
    """Without the plans of a stage: how much the charged cost rises, where most, and the oracle's."""
    out: dict[str, Any] = {}
    for stage in STAGES:
        gone = np.array([name for name in set(study.rows.plan) if Plan.parse(name).stage(stage)])

        def change(rows: Rows, gone: np.ndarray = gone) -> Rows:
            return rows.where(~np.isin(rows.plan, gone))

        without = study.played(study.selectors(change), change)
        rise = (without.charged - base.charged).mean(1)
        each = {s: float(rise[study.scenario == s].mean()) for s in sorted(set(study.scenario))}
        most = max(each, key=lambda s: each[s])
        out[stage] = {
            "plans": len(gone), "rise": study.against(without, base), "hurts most": most, "there": each[most],
            "oracle": study.against(scoring.play(scoring.oracle, study.requests("test", change)), perfect),
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


def shuffled(rows: Rows) -> Rows:
    """Each request with the state of another."""
    names, first, at = np.unique(rows.request, return_index=True, return_inverse=True)
    return dataclasses.replace(rows, state=rows.state[first[np.random.default_rng(0).permutation(len(names))]][at])


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
