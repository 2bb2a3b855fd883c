"""A selector on a model it was not trained for, and how many requests of the new model it takes to do without it.

    python -m experiments.transfer experiments/data/study experiments/data/transfer --out experiments/results

The first folder holds collections of one model, the second of another, as `adaptivekv collect` leaves them, a folder a
scenario. Everything is scored on all requests of the second, by five folds over its documents: what is trained never
sees the documents that it is scored on, whichever model read them, and nothing is tuned. No margin (0): so few requests
certify nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.model_selection import GroupKFold
from threadpoolctl import threadpool_limits

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.selector import RuleTable
from adaptivekv.trainer import dataset, rivals, scoring
from adaptivekv.trainer.dataset import Rows
from adaptivekv.trainer.plots import figure
from adaptivekv.trainer.scoring import Choice, Played, Request
from experiments.parts import trained
from experiments.selector import facts, rounded, summary

FOLDS, SHARES = 5, (0.125, 0.25, 0.5, 1.0)


def load(folder: Path) -> Rows:
    found = sorted(path for path in folder.glob("*/trajectories") if any(path.glob("*.parquet")))
    if not found:
        raise AdaptiveKVError(f"{folder}: no <scenario>/trajectories there; collect some")
    table = dataset.load(found)
    dataset.model(table)
    return dataset.rows(table)


def joined(one: Rows, other: Rows) -> Rows:
    """Rows of both; ids of the first are marked, for two models may have been asked the same."""
    parts = {name: np.concatenate([getattr(one, name), getattr(other, name)]) for name in one.__dataclass_fields__}
    parts["request"] = np.concatenate([np.char.add("other ", one.request.astype(str)), other.request.astype(str)])
    return Rows(**parts)


def scored(old: Rows, new: Rows, seeds: int) -> tuple[dict[str, list[Played]], np.ndarray]:
    """What each way gets on the new model's requests, one a seed, and the requests' documents."""
    requests = scoring.requests(new)
    documents = np.array([request.document for request in requests])
    got: dict[str, list[Played]] = {}

    def judge(name: str, choose: Choice, seed: int, where: np.ndarray) -> None:
        part = scoring.play(choose, [requests[i] for i in where])
        whole = got.setdefault(name, [])
        if len(whole) <= seed:
            whole.append(Played(*(np.full((len(requests), len(scoring.QUALITIES)), np.nan) for _ in range(5))))
        for field in Played.__dataclass_fields__:
            getattr(whole[seed], field)[where] = getattr(part, field)

    folds = list(GroupKFold(FOLDS).split(documents, groups=documents))
    for seed in range(seeds):
        for learn, where in folds:
            other = old.where(~np.isin(old.document, documents[where]))
            judge("trained on the other model", scoring.trusting(trained(other, seed)), seed, where)
            names = np.random.default_rng(seed).permutation([requests[i].name for i in learn])
            for share in SHARES:
                some = new.where(np.isin(new.request, names[: round(share * len(names))]))
                judge(f"trained here, {share:g}", scoring.trusting(trained(some, seed)), seed, where)
                judge(f"trained on both, {share:g}", scoring.trusting(trained(joined(other, some), seed)), seed, where)
    everywhere = np.arange(len(requests))
    for learn, where in folds:
        mine = [requests[i] for i in learn]
        judge("fixed plan, chosen here", rivals.static(mine).at(), 0, where)
        judge("table per scenario", _table(mine), 0, where)
        there = scoring.requests(old.where(~np.isin(old.document, documents[where])))
        judge("fixed plan, chosen on the other model", rivals.static(there).at(), 0, where)
    judge("rules", scoring.trusting(RuleTable()), 0, everywhere)
    judge("full", scoring.always({}), 0, everywhere)
    judge("hindsight", scoring.oracle, 0, everywhere)
    return got, documents


def _table(requests: list[Request]) -> Choice:
    return rivals.Way(rivals.Table(requests, bins=1, least=8), rivals.bounded).at()


def plot(ways: dict[str, Any], learn: int, path: Path) -> Path:
    drawing, place = figure("Charged cost on the new model", "its requests trained on", "of the full cache's cost")
    for name, style in (("trained here", "o-"), ("trained on both", "s-")):
        mine = [ways[f"{name}, {share:g}"]["charged"] for share in SHARES]
        place.plot([share * learn for share in SHARES], mine, style, label=name)
    for name, style in (("trained on the other model", "--"), ("fixed plan, chosen here", ":"), ("hindsight", "-.")):
        place.axhline(ways[name]["charged"], color="0.4", ls=style, label=name)
    place.legend(fontsize=8)
    drawing.savefig(path, dpi=120)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--out", type=Path, default=Path("experiments/results"))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: at least 1")
    begun = time.monotonic()
    old, new = load(args.old), load(args.new)
    old = old.of("train")
    if (few := len(set(new.document))) < FOLDS:
        raise AdaptiveKVError(f"{args.new}: {few} documents; at least {FOLDS} for as many folds, collect more")
    if odd := sorted(set(old.plan) ^ set(new.plan)):
        raise AdaptiveKVError(f"plan {odd[0]!r} is in one of the folders only; collect both with the same plans")
    with threadpool_limits(1):
        got, documents = scored(old, new, args.seeds)
    means = {name: scoring.mean(seeds) for name, seeds in got.items()}
    ways = {
        name: summary(played) | {"spread": float(np.std([p.charged.mean() for p in got[name]]))}
        for name, played in means.items()
    }
    base = means.pop("trained here, 1").charged
    less = {name: scoring.paired(played.charged, base, documents) for name, played in means.items()}
    learn = round(len(documents) * (1 - 1 / FOLDS))
    record = {"command": "python -m experiments.transfer " + " ".join(sys.argv[1:])} | facts(new)
    record |= {"trained on, here": learn, "trained on, other": len(set(old.request)), "seeds": args.seeds}
    record |= {"ways": ways, "less trained here": less, "seconds": round(time.monotonic() - begun, 1)}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "transfer.json").write_text(json.dumps(rounded(record), indent=1) + "\n")
    plot(ways, learn, args.out / "transfer.png")
    for name, way in ways.items():
        gap = less.get(name)
        more = f"{gap['difference']:+.3f} ({gap['low']:+.3f} to {gap['high']:+.3f})" if gap else ""
        print(f"{name:40s} charged {way['charged']:.3f} cost {way['cost']:.3f} broken {way['broken']:.3f} {more}")


if __name__ == "__main__":
    try:
        main()
    except AdaptiveKVError as error:
        sys.exit(f"transfer: {error}")
