"""Two versions of the program on the same prompts, from the lines that `experiments.pareto run` of each has written.

    python -m experiments.paired before.jsonl after.jsonl --out experiments/results/paired.json

A row a plan: bytes relative to a 16-bit cache, mean loss (KL, nats per token) and score before and after, and the ratio
of the losses with its 95 % bootstrap interval over prompts. Plans of one version only are left out.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.pareto import Cell, read

Row = dict[str, Any]


def paired(before: list[Row], after: list[Row]) -> list[Row]:
    """Rows in the order of what they held after; those that failed are left out."""
    cells: list[dict[tuple[Any, ...], Row]] = [
        {(*(row[key] for key in Cell._fields[:5]), row["plan"]): row for row in rows if "error" not in row}
        for rows in (before, after)
    ]
    plans = defaultdict(list)
    for key in (key for key in cells[1] if key in cells[0]):  # in their order: draws of prompts depend on it
        plans[key[-1]].append((cells[0][key], cells[1][key]))
    return sorted((_row(plan, pairs) for plan, pairs in plans.items()), key=lambda row: row["bytes"][1])


def _row(plan: str, pairs: list[tuple[Row, Row]]) -> Row:
    both = np.array([[(_bytes(row), row["kl"], row["score"]) for row in pair] for pair in pairs])  # [prompts, 2, 3]
    share, loss, score = both.mean(0).T.tolist()
    draws = np.random.default_rng(0).integers(0, len(pairs), (4000, len(pairs)))
    drawn = both[draws, :, 1].mean(1)  # [draws, 2]
    ratio = np.quantile(drawn[:, 1] / drawn[:, 0], [0.025, 0.975]).tolist()
    return {
        "plan": plan, "prompts": len(pairs), "bytes": share, "kl": loss, "score": score,
        "kl_ratio": loss[1] / loss[0], "kl_ratio_low": ratio[0], "kl_ratio_high": ratio[1],
    }  # fmt: skip


def _bytes(row: Row) -> float:
    return (row["device_bytes"] + row["host_bytes"]) / row["full_bytes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, nargs="+")
    parser.add_argument("after", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--note", help="what the two versions are")
    args = parser.parse_args()
    after = read(args.after)
    rows = paired([row for path in args.before for row in read(path)], after)
    if not rows:
        raise SystemExit(f"paired: {args.after} has no plan and prompt in common with the lines before")
    facts = {key: sorted({str(row[key]) for row in after if key in row}) for key in ("device", "model", "length")}
    made = {"command": __doc__.split("\n")[2].strip(), "note": args.note} | facts | {"rows": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(made, indent=1) + "\n")
    shown = Table("plan", "prompts", "bytes", "KL before", "after", "ratio (95 %)")
    for row in rows:
        ratio = f"{row['kl_ratio']:.2f} ({row['kl_ratio_low']:.2f} to {row['kl_ratio_high']:.2f})"
        shown.add_row(
            row["plan"], str(row["prompts"]), f"{row['bytes'][1]:.1%}", *(f"{x:.4f}" for x in row["kl"]), ratio
        )
    Console().print(shown)


if __name__ == "__main__":
    main()
