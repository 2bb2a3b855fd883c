"""Adds up the lines of `experiments.pareto run`: ruler.json (all plans, all lengths), pareto.json (fronts), plots.

A row: accuracy relative to the full cache's on the same prompts (none where that is hardly ever right), the mean over
the task families with equal weight, its 95 % bootstrap interval over prompts; KL and flips over tokens; bytes held at
the end of the answer relative to a 16-bit cache of the same tokens, scales, native windows and the open tail included,
on the device and in all tiers together.
They are the bytes of full-attention layers: sliding windows are the same under every plan and left out.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from adaptivekv.plan import Plan

TARGETS = (  # question known, tier, share of the full bytes
    (True, "all", 0.18), (True, "all", 0.15), (False, "all", 0.25), (False, "all", 0.20), (True, "device", 0.10),
    (False, "device", 0.10),
)  # fmt: skip
KEPT = 0.95  # of the full cache's accuracy
RIGHT = 0.95  # of the bootstrap draws have a right answer of the full cache, or there is no ratio to it
COLOURS = {"evict": "tab:red", "quantize": "tab:blue", "offload": "tab:green", "retrieve": "tab:olive"}
TICKS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1)
Row = dict[str, Any]


def table(rows: list[Row], out: Path, kept: Row | None = None) -> None:
    """kept: an earlier ruler.json, whose rows stay where these lines have fewer prompts."""
    failed = [row for row in rows if "error" in row]
    rows = [row for row in rows if "error" not in row]
    found: dict[tuple[Any, ...], dict[tuple[Any, ...], Row]] = defaultdict(dict)
    for row in rows:
        prompt = (row["task"], row["length"], row["sample"])
        for length in {str(row["length"])} | ({"4096-7168"} if row["length"] >= 4096 else set()):
            found[row["model"], row["aware"], length, row["plan"]][prompt] = row
    made = []
    for (model, aware, length, plan), mine in sorted(found.items()):
        full = found.get((model, aware, length, "full"), {})
        shared = {prompt: (mine[prompt], full[prompt]) for prompt in sorted(mine) if prompt in full}
        if shared:
            made.append({"model": model, "aware": aware, "length": length, "plan": plan} | _sum(shared))
    kept = kept or {}
    more = {_name(row): row["prompts"] for row in made}
    made += [row for row in kept.get("rows", ()) if row["prompts"] > more.get(_name(row), 0)]
    named = {_name(row): row for row in made}  # the later ones: those kept
    made = [named[name] for name in sorted(named)]
    facts: Row = {
        key: sorted({row[key] for row in rows} | set(kept.get(key, ()))) for key in ("device", "torch", "transformers")
    }
    lines = (Path(__file__).with_name("pareto.py").read_text()).splitlines()
    facts["command"] = [line.strip() for line in lines if line.startswith("    python -m")]
    facts["failed"] = len(failed) + kept.get("failed", 0)
    out.mkdir(parents=True, exist_ok=True)
    (out / "ruler.json").write_text(_json(facts | {"rows": made}))
    fronts = _fronts(made)
    (out / "pareto.json").write_text(_json(facts | {"targets": _targets(made), "fronts": fronts}))
    for model in sorted({row["model"] for row in made}):
        for tier in ("all", "device"):
            _plot([row for row in made if row["model"] == model], tier, out / f"ruler-{model}-{tier}.png")
    _print(made, fronts)


def _name(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("model", "aware", "length", "plan"))


def _sum(shared: dict[Any, tuple[Row, Row]]) -> Row:
    """One plan over the prompts that it and the full cache answered."""
    scores: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (task, *_), (mine, full) in shared.items():
        scores[task].append((mine["score"], full["score"]))
    by_task = {task: [round(float(x), 4) for x in np.mean(pairs, 0)] for task, pairs in sorted(scores.items())}
    score, full_score = np.mean(list(by_task.values()), 0)
    weighed = np.concatenate([np.array(pairs) / len(pairs) for pairs in scores.values()])  # families weigh the same
    drawn = weighed[np.random.default_rng(0).integers(len(weighed), size=(2_000, len(weighed)))].sum(1)
    runs = [row for row, _ in shared.values()]
    tokens = [row["tokens"] for row in runs]
    out: Row = {"prompts": len(runs), "score": float(score), "full_score": float(full_score)}
    ratios = [np.nan] * 3
    if (drawn[:, 1] > 0).mean() > RIGHT:
        drawn = drawn[drawn[:, 1] > 0]
        ratios = [score / full_score, *np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])]
    out |= dict(zip(("relative", "low", "high"), map(float, ratios), strict=True))
    out |= {key: float(np.average([row[key] for row in runs], weights=tokens)) for key in ("kl", "flip_rate")}
    device, host = (
        float(np.mean([row[tier] / row["full_bytes"] for row in runs])) for tier in ("device_bytes", "host_bytes")
    )
    out |= {"device": device, "all": device + host}
    known = {key: None if np.isnan(value) else round(value, 5) for key, value in out.items()}
    return known | {"tasks": by_task}


def _front(rows: list[Row], tier: str) -> list[Row]:
    """Rows that none beats: more accuracy than all that hold fewer bytes."""
    best, front = -1.0, []
    for row in sorted(
        (row for row in rows if row["relative"] is not None), key=lambda row: (row[tier], -row["relative"])
    ):
        if row["relative"] > best:
            best = row["relative"]
            front.append(row)
    return front


def _fronts(rows: list[Row]) -> list[Row]:
    out = []
    for model, aware, length in sorted({(row["model"], row["aware"], row["length"]) for row in rows}):
        mine = [row for row in rows if (row["model"], row["aware"], row["length"]) == (model, aware, length)]
        for tier in ("all", "device"):
            for row in _front(mine, tier):
                out.append({"tier": tier} | {key: value for key, value in row.items() if key != "tasks"})
    return out


def _targets(rows: list[Row]) -> list[Row]:
    """For each target the plans that reach it over 4k to 7k tokens, the most accurate first."""
    out = []
    for model in sorted({row["model"] for row in rows}):
        for aware, tier, limit in TARGETS:
            mine = [row for row in rows if (row["model"], row["aware"], row["length"]) == (model, aware, "4096-7168")]
            reached = [row for row in mine if row[tier] <= limit and (row["relative"] or 0) >= KEPT]
            keys = ("plan", "prompts", "relative", "low", "high", "device", "all")
            best = [{key: row[key] for key in keys} for row in sorted(reached, key=lambda row: -row["relative"])]
            out.append({"model": model, "aware": aware, "tier": tier, "limit": limit, "reached": best})
    return out


def _plot(rows: list[Row], tier: str, path: Path) -> None:
    lengths = sorted({row["length"] for row in rows if row["length"].isdigit()}, key=int)
    if not lengths:
        return
    figure = Figure(figsize=(5.2 * len(lengths), 8.4), layout="constrained")
    axes = figure.subplots(2, len(lengths), squeeze=False, sharey="row")
    for line, aware in zip(axes, (True, False), strict=True):
        for place, length in zip(line, lengths, strict=True):
            mine = [row for row in rows if (row["aware"], row["length"]) == (aware, length)]
            for row in (row for row in mine if row["relative"] is not None):
                kinds = [stage.kind for stage in Plan.parse(row["plan"]).stages]
                colour = "black" if not kinds else COLOURS[kinds[0]] if len(kinds) == 1 else "tab:purple"
                place.plot(row[tier], row["relative"], "o", color=colour, ms=4)
                label = row["plan"].replace("(window=0, sinks=0)", "*")
                place.annotate(label, (row[tier], row["relative"]), fontsize=4.5, rotation=20, alpha=0.8)
            best = _front(mine, tier)
            place.plot([row[tier] for row in best], [row["relative"] for row in best], color="0.6", zorder=0)
            place.axhline(KEPT, color="0.8", lw=0.8, zorder=0)
            place.set(xscale="log", xticks=TICKS, xticklabels=[f"{x:.0%}" for x in TICKS])
            place.minorticks_off()
            place.set(title=f"{length} tokens, question {'known' if aware else 'not known'}")
            place.set(xlabel=f"bytes {'on the device' if tier == 'device' else 'held'} / 16-bit cache")
        line[0].set_ylabel("accuracy / full cache's")
    for name, colour in (*COLOURS.items(), ("pipeline", "tab:purple"), ("full", "black")):
        axes[0, 0].plot([], [], "o", color=colour, label=name)
    axes[0, 0].legend(fontsize=6)
    figure.savefig(path, dpi=120)


def _print(rows: list[Row], fronts: list[Row]) -> None:
    """The tables of the documentation, in Markdown."""
    best = {(row["model"], row["aware"], row["length"], row["plan"]) for row in fronts if row["tier"] == "all"}
    for model, aware, length in sorted({(row["model"], row["aware"], row["length"]) for row in rows}):
        mine = [row for row in rows if (row["model"], row["aware"], row["length"]) == (model, aware, length)]
        print(f"\n{model}, {length} tokens, question {'known' if aware else 'not known'}; * on the front\n")
        print("| plan | prompts | accuracy | of full (95 %) | KL | flips | device | all |\n" + "| --- " * 8 + "|")
        for row in sorted(mine, key=lambda row: row["all"]):
            star = " *" if (model, aware, length, row["plan"]) in best else ""
            plan = row["plan"].replace("|", "\\|")
            ratio = ""
            if row["relative"] is not None:
                ratio = f"{row['relative']:.0%} ({row['low']:.0%} to {row['high']:.0%})"
            print(
                f"| `{plan}`{star} | {row['prompts']} | {row['score']:.2f} | {ratio} | {row['kl']:.4f} "
                f"| {row['flip_rate']:.1%} | {row['device']:.1%} | {row['all']:.1%} |"
            )


def _json(content: Row) -> str:
    """Indented, with a line a row."""
    tables = {key: content[key] for key in ("rows", "targets", "fronts") if key in content}
    text = json.dumps({key: value for key, value in content.items() if key not in tables}, indent=1)[:-2]
    for key, rows in tables.items():
        text += f',\n "{key}": [\n  ' + ",\n  ".join(map(json.dumps, rows)) + "\n ]"
    return text + "\n}\n"
