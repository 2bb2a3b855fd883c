"""Runs side by side: a table and a plot of cost and violations by quality SLO."""

import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.trainer import registry, tracking
from adaptivekv.trainer.scoring import ALPHA, QUALITIES

KINDS = ("collect", "train", "certify")


def compare(
    kind: str = "train",
    tracking_uri: str | None = None,
    experiment: str | None = None,
    out_dir: str | Path | None = None,
    name: str = registry.NAME,
) -> dict[str, Any]:
    """{"rows": [{run_id, name, kind, created, champion, metrics}], "plot": path or None, "run_id": of the compare run}.

    Rows are finished runs of a kind ("train", "collect", "certify" or "all"), oldest first.
    """
    if kind not in (*KINDS, "all"):
        raise AdaptiveKVError(f"compare: kind {kind!r} is not train, collect, certify or all")
    mlflow = tracking.client(tracking_uri)
    champion = champion_run(mlflow, name)
    runs = [(k, run) for k in KINDS if kind in (k, "all") for run in tracking.runs(mlflow, k, experiment)]
    rows = [
        {
            "run_id": run.info.run_id,
            "name": run.info.run_name,
            "kind": k,
            "created": datetime.fromtimestamp(run.info.start_time / 1000, UTC).isoformat(timespec="seconds"),
            "champion": run.info.run_id == champion,
            "metrics": {key: value for key, value in sorted(run.data.metrics.items()) if is_key(key, k)},
        }
        for k, run in runs
    ]
    trained = [(row, run.data.metrics) for row, (k, run) in zip(rows, runs, strict=True) if k == "train"]
    if not trained:
        return {"rows": rows, "plot": None, "run_id": None}
    folder = Path(out_dir or tempfile.mkdtemp(prefix="adaptivekv-compare-"))
    folder.mkdir(parents=True, exist_ok=True)
    path = plot(trained, folder / "compare.png")
    with tracking.run(mlflow, "compare", experiment or tracking.EXPERIMENT, f"compare-{len(trained)}") as run_id:
        mlflow.log_dict(run_id, rows, "compare.json")
        mlflow.log_artifact(run_id, str(path))
    return {"rows": rows, "plot": str(path), "run_id": run_id}


def is_key(metric: str, kind: str) -> bool:
    """Of a train run the means and the selector's own numbers; of a collect run everything."""
    return kind != "train" or metric.count("/") < 2 or metric.endswith("/selector")


def champion_run(mlflow: Any, name: str = registry.NAME, alias: str = registry.ALIAS) -> str | None:
    """The run whose policy the alias points at."""
    from mlflow.exceptions import MlflowException

    try:
        return str(mlflow.get_model_version_by_alias(name, alias).run_id)
    except MlflowException:
        return None


def plot(trained: list[tuple[dict[str, Any], dict[str, float]]], path: Path) -> Path:
    """Left the cost, right the violation rate, by SLO; the best fixed plan and the oracle of the newest run in grey."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, what in zip(made.subplots(1, 2), ("cost", "violation"), strict=True):
        for row, metrics in trained:
            y = [metrics.get(f"{what}/{quality}/selector", float("nan")) for quality in QUALITIES]
            label = f"{row['name']} {row['run_id'][:8]}{' (champion)' if row['champion'] else ''}"
            axes.plot(QUALITIES, y, marker="o", linewidth=2.5 if row["champion"] else 1.2, label=label)
        for way, style in (("static", "--"), ("oracle", ":")):
            y = [trained[-1][1].get(f"{what}/{quality}/{way}", float("nan")) for quality in QUALITIES]
            axes.plot(QUALITIES, y, style, color="0.5", label=f"{way} ({trained[-1][0]['run_id'][:8]})")
        axes.set(xscale="log", xlabel="quality SLO, nats per token", ylim=(0, None))
        axes.set_xticks(QUALITIES, [str(quality) for quality in QUALITIES])
        axes.minorticks_off()
        axes.set_ylabel("cost / full cache" if what == "cost" else "share of requests that break their SLO")
        if what == "violation":
            axes.axhline(ALPHA, color="0.8", linewidth=0.8)
    made.axes[0].legend(fontsize=7)
    made.savefig(path, dpi=110)
    return path
