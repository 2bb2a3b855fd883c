"""The learning verbs: collect, train, certify, ope, promote, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from adaptivekv.console import Json, Model, Seed, Tracking, bar, err, out, show_facts

app = typer.Typer()


@app.command()
def collect(
    scenario: Annotated[Path | None, typer.Option(help="a scenario YAML; default: the mixed scenario")] = None,
    requests: Annotated[int, typer.Option(min=1)] = 24,
    plans: Annotated[list[str] | None, typer.Option(help="plans to replay; default: all candidates")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Ray workers")] = 1,
    max_tokens: Annotated[int, typer.Option(help="longest prompt")] = 2000,
    new_tokens: Annotated[int, typer.Option(min=1, help="most tokens of an answer")] = 64,
    split: Annotated[
        list[str] | None, typer.Option(help="train, select, certify, gate or test; default: all the scenario has")
    ] = None,
    seed: Seed = 0,
    out_dir: Annotated[Path | None, typer.Option("--out", help="working folder; a killed run resumes from it")] = None,
    model: Model = None,
    tracking_uri: Tracking = None,
    experiment: str = "adaptivekv",
    json_: Json = False,
) -> None:
    """Replay a workload through plans on Ray workers and log trajectories to MLflow."""
    from adaptivekv.cluster.collect import collect as run

    with bar(json_) as progress:
        job = progress.add_task("collect", total=requests)
        result = run(
            scenario, requests, plans or None, workers, seed, max_tokens, new_tokens, model, out_dir, tracking_uri,
            experiment, progress=lambda done, total: progress.update(job, completed=done, total=total), splits=split,
        )  # fmt: skip
    out(result) if json_ else show_facts("collect", result)


@app.command()
def train(
    sources: Annotated[
        list[str] | None, typer.Argument(help="collect runs or folders; default: the latest run")
    ] = None,
    seed: Seed = 0,
    out_dir: Annotated[Path, typer.Option("--out")] = Path("policy"),
    tracking_uri: Tracking = None,
    experiment: str = "adaptivekv",
    json_: Json = False,
) -> None:
    """Fit a selector on collected trajectories and export the flat policy."""
    from adaptivekv.trainer.train import train as run

    with err.status("train"):
        result = run(sources or None, seed, str(out_dir), tracking_uri, experiment)
    out(result) if json_ else show_facts("train", result)


@app.command()
def certify(
    sources: Annotated[
        list[str] | None, typer.Argument(help="collect runs or folders; default: the latest run")
    ] = None,
    policy: Annotated[str, typer.Option(help="a folder, a run id, or champion")] = "champion",
    alpha: Annotated[float, typer.Option(help="share of requests that may break their SLO")] = 0.05,
    delta: Annotated[float, typer.Option(help="chance that the certificate is wrong")] = 0.05,
    group: Annotated[str | None, typer.Option(help="scenario or length: certify each group")] = None,
    leave_out: Annotated[
        bool, typer.Option("--leave-out", help="report each scenario under the margin of the others")
    ] = False,
    seen: Annotated[list[str] | None, typer.Option(help="the policy's training data, if not in the sources")] = None,
    out_dir: Annotated[Path, typer.Option("--out", help="the certified copy")] = Path("certified"),
    tracking_uri: Tracking = None,
    experiment: str = "adaptivekv",
    json_: Json = False,
) -> None:
    """Certify a policy's margin on fresh requests, so that few break their SLO."""
    from adaptivekv.trainer.certify import certify as run

    with bar(json_) as progress:
        job = progress.add_task("certify", total=None)
        result = run(
            sources or None, policy, alpha, delta, group, leave_out, seen, out_dir, tracking_uri, experiment,
            progress=lambda done, total: progress.update(job, completed=done, total=total),
        )  # fmt: skip
    if json_:
        out(result)
        return
    made = result["certificate"]
    facts = {key: result[key] for key in ("run_id", "policy", "plot", "margin")}
    names = ("alpha", "delta", "n", "documents", "violations", "bound", "cost", "charged", "training", "earlier_tries")
    show_facts("certify", facts | {name: made[name] for name in names})
    table = Table("group", "n", "violations", "rate", "bound", title="violations of the SLO broken most")
    parts = [*made["groups"].items(), ("certified", made.get("certified_groups")), ("left out", made.get("leave_out"))]
    for kind, groups in parts:
        for name, row in (groups or {}).items():
            rate, bound = (f"{row[key]:.4f}" if key in row else "-" for key in ("rate", "bound"))
            table.add_row(f"{kind}: {name}", str(row["n"]), str(row.get("violations", "-")), rate, bound)
    Console().print(table)


@app.command()
def ope(
    sources: Annotated[list[str], typer.Argument(help="folders of logged requests, or runs that hold them")],
    policy: Annotated[str, typer.Option(help="rules, champion, a folder or a run id")] = "champion",
    epsilon: Annotated[float, typer.Option(help="the policy's chance of exploring")] = 0.0,
    split: Annotated[str | None, typer.Option(help="only requests of this split")] = None,
    resamples: Annotated[int, typer.Option(help="of the bootstrap")] = 1000,
    seed: Seed = 0,
    tracking_uri: Tracking = None,
    json_: Json = False,
) -> None:
    """Estimate from logged decisions what another policy would have cost."""
    from adaptivekv.trainer.ope import ope as run

    with bar(json_) as progress:
        job = progress.add_task("ope", total=None)
        result = run(
            sources, policy, epsilon, split, resamples, seed, tracking_uri,
            progress=lambda done, total: progress.update(job, completed=done, total=total),
        )  # fmt: skip
    if json_:
        out(result)
        return
    show_facts("ope", {key: value for key, value in result.items() if not isinstance(value, dict)})
    ways = ("dm", "ips", "snips", "dr")
    table = Table("outcome", "logged", *ways, title="estimate [95 % interval]")
    for name, found in result.items():
        if isinstance(found, dict) and "refused" in found:
            table.add_row(name, found["refused"], *[""] * len(ways))
        elif isinstance(found, dict):
            cells = ("{:.4g} [{:.4g}, {:.4g}]".format(found[way]["estimate"], *found[way]["interval"]) for way in ways)
            table.add_row(f"{name}, {found['unit']}", f"{found['logged']:.4g}", *cells)
    Console().print(table)


@app.command()
def promote(
    run_id: Annotated[str, typer.Argument(help="the train run whose policy becomes champion")],
    name: str = "kv-selector",
    alias: str = "champion",
    force: Annotated[bool, typer.Option("--force", help="even if it is not better")] = False,
    tracking_uri: Tracking = None,
    json_: Json = False,
) -> None:
    """Register a trained policy and point the alias at it."""
    from adaptivekv.trainer.registry import promote as run

    result = run(run_id, name, alias, force, tracking_uri)
    out(result) if json_ else show_facts("promote", result)


@app.command()
def compare(
    kind: Annotated[str, typer.Option(help="train, collect or all")] = "train",
    tracking_uri: Tracking = None,
    experiment: Annotated[str | None, typer.Option()] = None,
    json_: Json = False,
) -> None:
    """Runs side by side: a table and a plot, also logged to MLflow."""
    from adaptivekv.trainer.compare import compare as run

    result = run(kind, tracking_uri, experiment)
    if json_:
        out(result)
        return
    rows = result["rows"]
    names = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*names, title=f"{kind} runs")
    for row in rows:
        table.add_row(*(f"{row.get(n):.4g}" if isinstance(row.get(n), float) else str(row.get(n, "")) for n in names))
    Console().print(table)
    err.print(f"plot: {result['plot']}")
