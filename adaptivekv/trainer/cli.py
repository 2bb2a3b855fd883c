"""The learning verbs: collect, train, promote, compare."""

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
    new_tokens: Annotated[int, typer.Option(min=1, help="tokens replayed per request")] = 24,
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
            experiment, progress=lambda done, total: progress.update(job, completed=done, total=total),
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
