"""The numbers of docs/selector.md and the README, out of the JSON that `experiments.selector` wrote, in Markdown.

    python -m experiments.numbers experiments/results

Prints tables and sentences, so that none is copied by hand; what to say of them is for whoever writes.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

Json = dict[str, Any]
WAYS = {
    "selector": "selector, mean of 3 seeds", "table": "table per scenario and length",
    "table by kind of text": "table per kind of text and length", "table by link": "table per link and length",
    "forest": "forest of costs and risks", "static": "best fixed plan per SLO", "rules": "rule table",
    "oracle": "hindsight: the measured losses of this very answer",
}  # fmt: skip
SLOS = ("0.003", "0.01", "0.03", "0.1")


def less(found: Json) -> str:
    """23 % less (18 to 27)."""
    share, low, high = (100 * found[key] for key in ("saved", "saved_low", "saved_high"))
    if share < 0:
        share, low, high = -share, -high, -low
        return f"{share:.0f} % more ({low:.0f} to {high:.0f})"
    return f"{share:.0f} % less ({low:.0f} to {high:.0f})"


def rise(found: Json) -> str:
    """0.102 (0.082 to 0.123)."""
    return f"{found['difference']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def study(d: Json) -> str:
    counts = Counter[str]()
    for split in d["requests"].values():
        counts.update(split)
    per = {s: sorted(x[s] for x in d["requests"].values()) for s in ("train", "certify", "test")}
    return (
        f"{counts.total():,} requests of {d['documents']:,} documents: {dict(counts)}; "
        f"least and most a scenario: { {s: (x[0], x[-1]) for s, x in per.items()} }"
    )


def ways(eight: Json, cpu: Json) -> str:
    lines = [
        "| way of choosing, 8B times | certified: cost at 0.003 / 0.01 / 0.03 / 0.1 nats | cost | charged "
        "| as it is: charged | CPU times: cost, charged |\n" + "| --- " * 6 + "|"
    ]
    for name, label in WAYS.items():
        one, plain, other = eight["ways"]["certified"][name], eight["ways"]["as it is"][name], cpu["ways"]["certified"]
        slos = " / ".join(f"{one['slos'][slo]['cost']:.3f}" for slo in SLOS)
        lines.append(
            f"| {label} | {slos} | {one['cost']:.3f} | {one['charged']:.3f} | {plain['charged']:.3f} "
            f"| {other[name]['cost']:.3f}, {other[name]['charged']:.3f} |"
        )
    return "\n".join(lines)


def against(d: Json) -> str:
    found = d["selector less the others"]["certified"]
    lines = [
        f"{label}: cost {less(found[name]['cost'])}, charged {less(found[name]['charged'])}"
        for name, label in WAYS.items()
        if name in found
    ]
    gap = found["gap closed"]
    lines.append(f"gap closed {gap['share']:.0%} ({gap['low']:.0%} to {gap['high']:.0%})")
    slos = d["ways"]["certified"]["selector"]["slos"]
    lines.append("broken on split test: " + ", ".join(f"{100 * slos[slo]['violation']:.1f}" for slo in SLOS) + " %")
    return "\n".join(lines)


def scenarios(d: Json) -> str:
    names = ("selector", "table", "forest", "static", "oracle")
    found: Json = d["scenarios"]["certified"]
    lines = ["| scenario | requests | selector | table | forest | fixed plan | hindsight |\n" + "| --- " * 7 + "|"]
    for scenario, row in found.items():
        cells = " | ".join(f"{row[name]['charged']:.3f}" for name in names)
        lines.append(f"| `{scenario}` | {row['requests']} | {cells} |")
    gain = {s: row["requests"] * (row["table"]["charged"] - row["selector"]["charged"]) for s, row in found.items()}
    shares = {s: round(100 * x / sum(gain.values())) for s, x in sorted(gain.items(), key=lambda x: -x[1])}
    lines.append(f"of the gain over the table, %: {shares}")
    rest = {s: row for s, row in found.items() if s != "edge"}
    for name in names:
        total = sum(row["requests"] * row[name]["charged"] for row in rest.values())
        lines.append(f"without edge, {name}: {total / sum(row['requests'] for row in rest.values()):.3f}")
    return "\n".join(lines)


def elsewhere(d: Json) -> str:
    found: Json = d["elsewhere"]
    said = ", ".join(
        f"{row['selector']['charged']:.3f} instead of {row['trained on all']['charged']:.3f} (`{s}`)"
        for s, row in found.items()
    )
    return f"not trained on it: {said}\na table then: " + ", ".join(
        f"{row['table']['charged']:.3f} ({s})" for s, row in found.items()
    )


def pays(d: Json) -> str:
    lines = ["| without | | |\n| --- | --- | --- |"]
    for stage in ("evict", "quantize", "offload"):
        row = d["parts"][stage]
        most = f"most in `{row['hurts most']}`: {row['there']:.3f}"
        lines.append(f"| stage *{stage}* | {rise(row['rise'])} | {most} |")
    lines += [f"| {name} | {rise(row)} | |" for name, row in d["features"].items()]
    lines += [f"| {name} of another request | {rise(row)} | |" for name, row in d["stale"].items()]
    return "\n".join(lines)


def answers(d: Json) -> str:
    lost = d["right answers lost"]
    n = lost["requests"]
    lines = [f"right answers lost of {n} (full cache right in {lost['full right']:.0%}) at " + " / ".join(SLOS)]
    for name in ("selector", "table", "forest", "static", "oracle"):
        lines.append(
            f"{name}: " + ", ".join(f"{round(n * lost[name][slo])} ({100 * lost[name][slo]:.1f} %)" for slo in SLOS)
        )
    by: dict[tuple[float, float], dict[str, float]] = {}
    for row in d["goodput"]:
        by.setdefault((row["arena"], row["load"]), {})[row["way"]] = row["goodput"]
    for name in ("table", "static"):
        gains = [100 * (x["selector"] / x[name] - 1) for x in by.values()]
        lines.append(f"goodput over {name}: {min(gains):.0f} to {max(gains):.0f} %")
    for name, row in d["halves"].items():
        if isinstance(row, dict):
            lines.append(f"by halves, {name}: charged {row['charged']:.3f}")
    lines.append(
        "with fewer requests: " + ", ".join(f"{x['requests']}: {x['charged']:.3f}" for x in d["curve"].values())
    )
    return "\n".join(lines)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) == 2 else "experiments/results")
    try:
        eight, cpu, batch = (
            json.loads((folder / f"{name}.json").read_text()) for name in ("selector-8b", "selector", "selector-8b-x8")
        )
    except (OSError, ValueError) as error:
        raise SystemExit(f"numbers: {error}; run the commands of docs/selector.md first") from None
    try:
        print(study(eight), ways(eight, cpu), sep="\n\n")
        for name, d in (("8B", eight), ("CPU", cpu), ("8B, eight requests", batch)):
            print(f"\n# {name} times\n", against(d), scenarios(d), elsewhere(d), pays(d), answers(d), sep="\n\n")
    except (KeyError, TypeError, AttributeError) as error:
        raise SystemExit(f"numbers: {folder}: not what experiments.selector writes ({error!r}); make it anew") from None


if __name__ == "__main__":
    main()
