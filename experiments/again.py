"""Labels of the same requests taken a second time: on another machine, by other kernels, in another precision.

    A=experiments/data/again; python -m experiments.again $A/cpu $A/gpu --out experiments/results/again.json

A row a plan: mean losses, mean and standard deviation of the log10 ratio of second to first, bytes, and the share of
requests that keep an SLO in one and break it in the other. A study may hold rows of both kinds if these are small.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.features.schema import NAMES
from adaptivekv.selector import LOSS_FLOOR
from adaptivekv.trainer import dataset, trajectories
from experiments import output

SLOS = (0.003, 0.01, 0.03, 0.1)  # nats per token


def compare(first: dataset.Rows, second: dataset.Rows) -> dict[str, Any]:
    """What `main` writes, of the requests and plans that both have. Shares of 1, losses in nats per token."""
    keys = [
        {(str(r), str(p)): i for i, (r, p) in enumerate(zip(rows.request, rows.plan, strict=True))}
        for rows in (first, second)
    ]
    both = sorted(keys[0].keys() & keys[1].keys(), key=lambda key: key[::-1])
    if not both:
        raise AdaptiveKVError("again: the two folders have no request and plan in common")
    a, b = (rows.where(np.array([at[key] for key in both])) for rows, at in zip((first, second), keys, strict=True))
    ratio = np.log10(b.loss + LOSS_FLOOR) - np.log10(a.loss + LOSS_FLOOR)
    size = (b.device_bytes + b.host_bytes) / (a.device_bytes + a.host_bytes)
    turned = np.stack([(a.loss > slo) != (b.loss > slo) for slo in SLOS], 1)
    rows = []
    for plan in dict.fromkeys(a.plan):
        mine = a.plan == plan
        rows.append(
            {
                "plan": str(plan), "requests": int(mine.sum()), "first": a.loss[mine].mean(),
                "second": b.loss[mine].mean(), "log10_ratio": ratio[mine].mean(), "sd": ratio[mine].std(),
                "bytes_ratio": np.median(size[mine]), "verdicts_turned": turned[mine].mean(0).tolist(),
            }
        )  # fmt: skip
    _, one = np.unique(a.request, return_index=True)
    apart = np.abs(a.state - b.state)[one]
    furthest = int(np.nanargmax(np.nanmax(np.where(np.isnan(apart), -1, apart), 0)))
    return {
        "slos": SLOS,
        "requests": len(one),
        "answers_of_another_length": float((a.tokens != b.tokens)[one].mean()),
        "verdicts_turned": turned.mean(0).tolist(),
        "feature_furthest_apart": {NAMES[furthest]: float(np.nanmax(apart[:, furthest]))},
        "rows": [{k: float(v) if isinstance(v, np.floating) else v for k, v in row.items()} for row in rows],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    output.check(args.out)
    tables = [trajectories.read(sorted(folder.rglob("*.parquet")) or [folder]) for folder in (args.first, args.second)]
    dataset.model(pa.concat_tables(tables))  # refuses rows of two models
    result = compare(*(dataset.rows(table) for table in tables))
    output.emit("again", result, args.out)


if __name__ == "__main__":
    try:
        main()
    except AdaptiveKVError as error:
        sys.exit(f"again: {error}")
