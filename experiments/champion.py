"""Makes the selector that ships with the package: collect, train, certify, copy into adaptivekv/champion, record.

    python -m experiments.champion --requests 64 --workers 2

An interrupted run goes on where it was. Everything but the champion and its record stays in build/study, where
`python -m experiments.selector` finds the collections and says on split test what they are worth.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from adaptivekv.cluster.collect import collect, summary
from adaptivekv.errors import AdaptiveKVError
from adaptivekv.selector import TreeSelector
from adaptivekv.trainer import dataset, registry, rivals, scoring
from adaptivekv.trainer.certify import certify
from adaptivekv.trainer.scoring import QUALITIES, Request
from adaptivekv.trainer.train import train
from experiments.selector import facts, rounded

ROOT = Path(__file__).parents[1]
TARGET, RESULTS = ROOT / "adaptivekv" / "champion", ROOT / "experiments" / "results"
SCENARIOS = ("multi_turn", "reasoning", "serving", "edge", "hardware", "minimal", "prefill", "long_context")
LONG = {"prefill": 5 / 8, "long_context": 5 / 8}  # of the requests asked for: theirs take several times as long


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64, help="of each scenario")
    parser.add_argument("--certify", type=int, default=4, help="more of each for split certify, next seed")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "study")
    parser.add_argument("--skip-collect", action="store_true", help="take what --work holds")
    parser.add_argument("--collected", help="where, if not on this machine: goes into the record")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    store = f"sqlite:///{args.work.resolve() / 'mlflow.db'}"
    failed: dict[str, str] = {}
    for name in () if args.skip_collect else SCENARIOS:
        every = max(1, int(args.requests * LONG.get(name, 1)))
        for folder, count, seed, splits in (
            (name, every, args.seed, None), (f"{name}-certify", args.certify, args.seed + 1, ("certify",))
        ):  # fmt: skip
            show(f"collecting {folder}")
            limits = {"workers": args.workers, "seed": seed, "max_tokens": args.max_tokens, "splits": splits}
            out = args.work / folder / "trajectories"
            failed |= collect(name, count, **limits, out=out, tracking_uri=store, progress=show)["failed"]
    sources = sorted(folder for folder in args.work.glob("*/trajectories") if any(folder.glob("*.parquet")))
    trained = train(sources, args.seed, args.work / "policy", store, progress=show)
    shipped, refused = trained["policy"], None
    try:
        shipped = certify(sources, trained["policy"], out_dir=args.work / "certified", tracking_uri=store)["policy"]
    except AdaptiveKVError as error:
        refused = str(error)
    policy = TreeSelector.load(shipped)
    show(f"shipping {policy.name}, " + (f"not certified: {refused}" if refused else f"margin {policy.margin:g}"))
    TARGET.mkdir(exist_ok=True)
    for name in ("policy.npz", "policy.json"):
        shutil.copyfile(Path(shipped) / name, TARGET / name)
    table = dataset.load(sources)
    RESULTS.mkdir(exist_ok=True)
    command = "python -m experiments.champion " + " ".join(sys.argv[1:])
    made = {"command": command, "collected": args.collected} | record(table, policy, trained)
    made |= {"failed": failed, "not_certified": refused}
    (RESULTS / "champion.json").write_text(json.dumps(rounded(made), indent=1) + "\n")
    with tempfile.TemporaryDirectory() as empty:
        found = registry.find_champion(None, f"sqlite:///{empty}/none.db")
    show(f"champion {found.name}: selector less static {made['selector_minus_static']}")


def show(*what: Any) -> None:
    print(*what, flush=True)


def record(table: Any, policy: TreeSelector, trained: dict[str, Any]) -> dict[str, Any]:
    """What ships, from what, and its scores on the select split under its margin."""
    rows = dataset.rows(table)
    select = scoring.requests(rows.of("select"))
    way = rivals.trusting(policy)
    choose = (way if policy.margin else rivals.shy(way)).at(policy.margin)  # as the controller does
    ways = {"selector": choose, "static": scoring.always(trained["best_static"]), "oracle": scoring.oracle}
    played = {name: scoring.play(way, select) for name, way in ways.items()}
    documents = np.array([request.document for request in select])
    metrics = trained["metrics"]
    return facts(rows) | {
        "rows": len(rows),
        "data_sha256": dataset.digest(table),
        "train_seconds": trained["seconds"],
        "best_static": trained["best_static"],
        "margin": policy.margin,
        "certificate": policy.manifest.get("certificate"),
        "model": {k: metrics[k] for k in ("mae_log10_loss", "bias_log10_loss", "coverage_high", "mae_log10_step_ms")},
        "select": {
            name: {"cost": p.cost.mean(0).tolist(), "violation": p.broken.mean(0).tolist()}
            for name, p in played.items()
        },
        "selector_minus_static": scoring.paired(played["selector"].charged, played["static"].charged, documents),
        "chosen": chosen(choose, select),
        "plan_means": {k: v for k, v in summary(table).items() if "/" in k},
        "notes": [
            f"select: lists over the SLOs {QUALITIES}, on documents that the trees have not seen, but which decide on "
            "promotion; experiments/results/selector.json has the test split",
            "cost: relative to the request's full cache; a certified margin is conservative, so it costs more",
            "step time is a step's processor time plus what a link of the drawn speed would add for host bytes",
        ],
    }  # fmt: skip


def chosen(choose: scoring.Choice, requests: list[Request]) -> dict[str, dict[str, int]]:
    """How often the selector takes which plan, by SLO."""
    return {str(q): dict(Counter(str(r.rows.plan[choose(r, q)]) for r in requests).most_common()) for q in QUALITIES}


if __name__ == "__main__":
    try:
        main()
    except AdaptiveKVError as error:
        sys.exit(f"champion: {error}")
