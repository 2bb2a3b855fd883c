"""The learning verbs: calibrate, collect, label, train, certify, ope, promote, reload, watch, loop, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from adaptivekv.console import Device, Json, Model, Seed, Tracking, bar, err, out, show_facts

app = typer.Typer()


@app.command()
def collect(
    scenario: Annotated[Path | None, typer.Option(help="a scenario YAML; default: the mixed scenario")] = None,
    requests: Annotated[int, typer.Option(min=1)] = 24,
    plans: Annotated[list[str] | None, typer.Option(help="plans to replay; default: all candidates")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Ray workers")] = 1,
    max_tokens: Annotated[int, typer.Option(help="longest prompt")] = 2000,
    new_tokens: Annotated[int, typer.Option(min=1, help="most tokens of an answer")] = 256,
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
def calibrate(
    model: Model = None,
    file: Annotated[Path | None, typer.Option(help="a UTF-8 text; default: prompts of the mixed scenario")] = None,
    requests: Annotated[int, typer.Option(min=5, help="prompts to read, twice each")] = 100,
    max_tokens: Annotated[int, typer.Option(min=128, help="longest prompt")] = 4096,
    seed: Seed = 0,
    out_file: Annotated[Path | None, typer.Option("--out", help="default: where the cache finds it")] = None,
    device: Device = "auto",
    json_: Json = False,
) -> None:
    """Fit what `kvzap` needs to know of a model: which tokens a second reading of a prompt would look at."""
    from adaptivekv.trainer.calibrate import calibrate as run

    with bar(json_) as progress:
        job = progress.add_task("calibrate", total=requests)
        result = run(
            model, file, requests, max_tokens, seed, out_file, device,
            progress=lambda done, total: progress.update(job, completed=done, total=total),
        )  # fmt: skip
    out(result) if json_ else show_facts("calibrate", result)


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
    run_id: Annotated[str, typer.Argument(help="the train or certify run whose policy becomes champion")],
    gate: Annotated[
        list[str] | None,
        typer.Option(help="fresh labelled runs or folders; their split 'gate' must show that it is better"),
    ] = None,
    seen: Annotated[list[str] | None, typer.Option(help="the policy's training data, if its run is gone")] = None,
    name: str = "kv-selector",
    alias: str = "champion",
    force: Annotated[bool, typer.Option("--force", help="even if it is not better, or gives up a certificate")] = False,
    tracking_uri: Tracking = None,
    json_: Json = False,
) -> None:
    """Register a trained policy and point the alias at it. A running server takes it up with `reload`."""
    from adaptivekv.trainer.registry import promote as run

    result = run(run_id, name, alias, force, tracking_uri, gate, seen)
    out(result) if json_ else show_facts("promote", result)


@app.command()
def reload(
    selector: Annotated[
        str | None, typer.Option(help="champion, rules or a folder; default: as it was asked for")
    ] = None,
    margin: Annotated[float | None, typer.Option(help="above the policy's own; default: its own")] = None,
    epsilon: Annotated[float | None, typer.Option(min=0, max=1, help="chance of exploring from now on")] = None,
    shadow: Annotated[str | None, typer.Option(help="a challenger whose choices are logged")] = None,
    url: Annotated[str, typer.Option(help="of the server")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(help="of the server, if it has one")] = None,
    tracking_uri: Annotated[str | None, typer.Option(help="MLflow tracking URI; default: the server's")] = None,
    json_: Json = False,
) -> None:
    """Have a running server take up the champion, or what is named, between two answers: nothing is dropped."""
    from adaptivekv.cluster.reload import reload as run

    config = {"selector": selector, "margin": margin, "epsilon": epsilon, "shadow": shadow}
    result = run(url, api_key, **config, tracking_uri=tracking_uri)
    out(result) if json_ else show_facts("reload", result)


@app.command()
def label(
    samples: Annotated[Path, typer.Argument(help="the folder samples/ of a server's trajectories")],
    out_dir: Annotated[Path, typer.Option("--out", help="labelled trajectories; what is there is not done again")],
    plans: Annotated[list[str] | None, typer.Option(help="plans to replay; default: all candidates")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Ray workers")] = 1,
    new_tokens: Annotated[int, typer.Option(min=2, help="most tokens of an answer")] = 256,
    model: Model = None,
    json_: Json = False,
) -> None:
    """Replay served samples through plans on Ray workers: what `train` and `promote --gate` read."""
    from adaptivekv.cluster.labels import label as run

    with bar(json_) as progress:
        job = progress.add_task("label", total=None)
        result = run(
            samples, out_dir, plans or None, workers, new_tokens, model,
            lambda done, total: progress.update(job, completed=done, total=total),
        )  # fmt: skip
    out(result) if json_ else show_facts("label", result)


@app.command()
def watch(
    samples: Annotated[Path, typer.Argument(help="the folder samples/ of a server's trajectories")],
    out_dir: Annotated[Path, typer.Option("--out", help="labelled trajectories, as `label` writes them")],
    alpha: Annotated[float, typer.Option(help="share of requests that may break their SLO")] = 0.05,
    delta: Annotated[float, typer.Option(help="chance of a false alarm")] = 0.05,
    every: Annotated[float, typer.Option(min=0, help="seconds between two rounds")] = 60.0,
    rounds: Annotated[int | None, typer.Option(min=1, help="default: until Ctrl-C")] = None,
    plans: Annotated[list[str] | None, typer.Option(help="plans to replay; default: all candidates")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Ray workers")] = 1,
    url: Annotated[str, typer.Option(help="of the server")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(help="of the server, if it has one")] = None,
    json_: Json = False,
) -> None:
    """Label a server's samples; where too many break their SLO, widen its margin, at last keep all lossless."""
    from adaptivekv.cluster.watch import watch as run

    result = run(
        samples, out_dir, plans or None, workers, alpha, delta, every, rounds, url, api_key,
        lambda line: None if json_ else err.print(line),
    )  # fmt: skip
    out(result) if json_ else show_facts("watch", result)


@app.command()
def loop(
    scenario: Annotated[
        str, typer.Option(help="a scenario's name or YAML file, which the traffic comes from")
    ] = "serving",
    requests: Annotated[int, typer.Option(help="served with exploration, labelled and trained on")] = 30,
    held_out: Annotated[int, typer.Option(help="requests for the gate, and as many to measure before and after")] = 10,
    plans: Annotated[list[str] | None, typer.Option(help="plans to choose among; default: all candidates")] = None,
    sources: Annotated[list[str] | None, typer.Option(help="further labelled runs or folders to train on")] = None,
    epsilon: Annotated[float, typer.Option(min=0, max=1, help="chance of exploring while it logs")] = 0.2,
    max_tokens: Annotated[int, typer.Option(help="longest prompt")] = 600,
    new_tokens: Annotated[int, typer.Option(min=2, help="most tokens of an answer")] = 16,
    workers: Annotated[int, typer.Option(help="Ray workers that label")] = 1,
    seed: Seed = 0,
    out_dir: Annotated[Path | None, typer.Option("--out", help="keep trajectories, samples and labels there")] = None,
    model: Model = None,
    tracking_uri: Tracking = None,
    experiment: str = "adaptivekv",
    json_: Json = False,
) -> None:
    """The closed loop: serve, log, label, train, ope, gate, promote, swap under load, measure before and after."""
    from adaptivekv.cluster.loop import loop as run

    result = run(
        scenario, requests, held_out, plans or None, epsilon, seed, max_tokens, new_tokens, workers, sources or (),
        out_dir, model, tracking_uri, experiment, lambda line: None if json_ else err.print(line),
    )  # fmt: skip
    out(result) if json_ else show_facts("loop", result)


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
