"""What the selector's trees know of a plan that nobody replayed, and what its features are worth for that.

    python -m experiments.unseen experiments/data/study --out experiments/results/unseen.json

Each lossy plan is left out in turn, and with it what differs from it in the offload alone and so loses the same: trees
are trained on the other plans' rows of split train and asked for its loss on split test. The forest, which knows only
plans it was grown on, has no say. Errors are of log10 losses, mean over plans; beside them the error of the same trees
when they were trained on the plan, too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from rich.progress import track

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.features import schema
from adaptivekv.plan import Plan
from adaptivekv.selector import LOSS_FLOOR, TreeSelector, is_lossless
from adaptivekv.trainer import dataset, export, scoring
from adaptivekv.trainer.train import fit, predict_rows
from experiments import output
from experiments.parts import blank

WITHOUT = {
    "all features": (),
    "no attention": schema.ATTENTION + schema.KEYS,
    "nothing but the plan": schema.NAMES,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sources = sorted(args.study.glob("*/trajectories"))
    if not sources:
        raise AdaptiveKVError(f"study {args.study}: no <scenario>/trajectories there")
    output.check(args.out)
    rows = dataset.rows(dataset.load(sources))
    train, test = rows.of("train"), rows.of("test")
    alike = {plan: str(Plan.parse(plan).without("offload")) for plan in set(rows.plan)}
    plans = sorted({alike[plan] for plan in test.plan[~is_lossless(test.plan_features)]} & set(test.plan))
    if not len(train) or not plans:
        raise AdaptiveKVError(f"study {args.study}: needs lossy plans in splits train and test; collect more")
    requests = np.unique(test.request)
    document = dict(zip(test.request, test.document, strict=True))
    documents = np.array([document[request] for request in requests])
    errors = {(name, seen): np.empty((len(requests), len(plans))) for name in WITHOUT for seen in (False, True)}
    for name, columns in WITHOUT.items():
        change = blank(columns)
        whole = TreeSelector(export.flatten(fit(change(train), args.seed)), {"margin": 0.0}, name)
        for i, plan in enumerate(track(plans, name)):
            part = change(train.where(np.array([alike[other] != plan for other in train.plan])))
            asked = change(test.where(test.plan == plan))
            order = np.argsort(asked.request)
            if not np.array_equal(asked.request[order], requests):
                raise AdaptiveKVError(f"study {args.study}: {plan} was not replayed for every request of split test")
            unseen = TreeSelector(export.flatten(fit(part, args.seed)), {"margin": 0.0}, name)
            for seen, policy in ((False, unseen), (True, whole)):
                found = np.log10(predict_rows(policy, asked).loss + LOSS_FLOOR) - np.log10(asked.loss + LOSS_FLOOR)
                errors[name, seen][:, i] = np.abs(found)[order]
    base = errors["all features", False]
    result = {
        "requests": {"train": len(set(train.request)), "test": len(requests)},
        "plans": {p: {n: float(errors[n, False][:, i].mean()) for n in WITHOUT} for i, p in enumerate(plans)},
        "error": {
            n: {
                "unseen": float(errors[n, False].mean()), "seen": float(errors[n, True].mean()),
                "unseen less all features": scoring.paired(errors[n, False], base, documents),
            }
            for n in WITHOUT
        },
    }  # fmt: skip
    output.emit("unseen", result, args.out)


if __name__ == "__main__":
    try:
        main()
    except AdaptiveKVError as error:
        sys.exit(f"unseen: {error}")
