"""Fit a selector from trajectories, prove and score the exported files, log everything to one MLflow run."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.features import schema
from adaptivekv.forest import LEAVES
from adaptivekv.selector import LOSS_FLOOR, MAX_LEAVES, Prediction, TreeSelector, is_lossless
from adaptivekv.trainer import dataset, export, scoring, tracking
from adaptivekv.trainer.dataset import Rows

PLAN_TREES, REST_TREES, ERROR_TREES, TIME_TREES = 20, 60, 10, 15
FOREST_TREES = 100
QUANTILE = 0.9
LEAST = 60  # rows of which a quantile is taken: plans with fewer share one
FOLDS = 5


def train(
    sources: Sequence[str | Path] | None = None,
    seed: int = 0,
    out_dir: str | Path = "policy",
    tracking_uri: str | None = None,
    experiment: str = tracking.EXPERIMENT,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Sources are run ids of `collect` or local folders; without any, the experiment's latest collect run.

    Fits on split "train", scores on "select". Returns run_id, policy (folder), rows, requests, best_static, metrics
    and seconds.
    """
    say = progress or (lambda line: None)
    begun = time.monotonic()
    mlflow = tracking.client(tracking_uri)
    if not sources:
        found = tracking.runs(mlflow, "collect", experiment)
        if not found:
            raise AdaptiveKVError(f"train: no collect run in experiment {experiment!r}; run `adaptivekv collect`")
        sources = [found[-1].info.run_id]
    say("reading trajectories")
    table = dataset.load(sources, tracking_uri)
    rows, model = dataset.rows(table), dataset.model(table)
    parts = {split: rows.of(split) for split in ("train", "select")}
    for split, part in parts.items():
        if len(part) < 2:
            raise AdaptiveKVError(f"train: split {split!r} has {len(part)} labelled rows; collect more documents")
    requests = {split: scoring.requests(part) for split, part in parts.items()}
    best_static = scoring.best_static(requests["train"])

    # Small data: more threads than one make scikit-learn slower, and far slower on a busy machine.
    with threadpool_limits(1), tracking.run(mlflow, "train", experiment, f"train-seed{seed}") as run_id:
        say(f"fitting on {len(parts['train'])} rows of {len(requests['train'])} requests")
        models, grown = fit(parts["train"], seed), grow(parts["train"], seed)
        arrays = export.flatten(models) | export.flatten_forest(*grown)
        label = f"train-{run_id[:8]}"
        folder = export.save(out_dir, arrays, label, model=model)
        policy = TreeSelector.load(folder)
        say("checking the exported trees against scikit-learn")
        metrics = {"parity": export.parity(policy, models, inputs(parts["train"]), seed)}
        assert policy.forest is not None
        metrics["forest_parity"] = export.forest_parity(policy.forest, *grown[:2], seed)
        say("scoring on the select split")
        predicted = predict_rows(policy, parts["select"])
        metrics |= accuracy(parts["select"], predicted) | scoring.compare(policy, best_static, requests["select"])
        export.save(folder, arrays, label, best_static, metrics, model=model)
        policy = TreeSelector.load(folder)

        say("drawing and logging")
        params = {
            "seed": seed,
            "trees": PLAN_TREES + REST_TREES + ERROR_TREES + TIME_TREES,
            "forest": FOREST_TREES,
            "leaves": MAX_LEAVES,
            "quantile": QUANTILE,
            "rows": len(parts["train"]),
            "requests": len(requests["train"]),
            "select_requests": len(requests["select"]),
            "schema": schema.VERSION,
            "data_sha256": dataset.digest(table),
            "sources": " ".join(map(str, sources))[:6000],
        } | {f"static/{quality}": plan for quality, plan in best_static.items()}
        tracking.log(mlflow, run_id, params, metrics)
        for path in draw(folder, parts["select"], requests["select"], policy, predicted, models[0], seed):
            mlflow.log_artifact(run_id, str(path), "plots")
        for name in ("policy.npz", "policy.json"):
            mlflow.log_artifact(run_id, str(folder / name), "policy")
    return {
        "run_id": run_id,
        "policy": str(folder),
        "rows": len(parts["train"]),
        "requests": len(requests["train"]),
        "best_static": best_static,
        "metrics": metrics,
        "seconds": round(time.monotonic() - begun, 2),
    }


def inputs(rows: Rows) -> np.ndarray:
    """float64 [n, INPUTS]. The SLO is the caller's wish and no cause of loss, so the trees do not see it."""
    x = np.column_stack([rows.state, rows.plan_features, schema.link_time(rows.state, rows.plan_features)])
    x[:, scoring.QUALITY] = np.nan
    return x


def fit(rows: Rows, seed: int) -> export.Models:
    """The loss models see the lossy plans only: the others are 0 by construction.

    The loss of a plan is first learned from the plan alone, quickly; from the request then slowly what is left. All at
    once, few requests say little of plans: they differ more than requests do. The high loss adds a quantile of the
    error, a plan's own: of the state a quantile learns nothing, there are too few rows beyond it.
    """
    from sklearn.ensemble import HistGradientBoostingRegressor
    from sklearn.model_selection import GroupKFold

    def model(x: np.ndarray, y: np.ndarray, **settings: Any) -> Any:
        """Predicts y [n] from x [n, INPUTS]."""
        x = np.where(np.isnan(x).all(axis=0), 0.0, x)  # scikit-learn cannot bin a column without any value
        same = {"max_leaf_nodes": MAX_LEAVES, "early_stopping": False, "random_state": seed}
        least = {"min_samples_leaf": max(2, min(20, len(x) // 20))}
        return HistGradientBoostingRegressor(**(same | least | settings)).fit(x, y)

    def alone(x: np.ndarray) -> np.ndarray:
        """The same rows with the plan's own features only."""
        x = x.copy()
        x[:, : len(schema.NAMES)] = x[:, -1] = 0.0
        return x

    def loss_models(x: np.ndarray, y: np.ndarray) -> list[Any]:
        plan = model(alone(x), y, learning_rate=0.5, max_iter=PLAN_TREES)
        left = y - plan.predict(alone(x))
        return [plan, model(x, left, learning_rate=0.12, max_iter=REST_TREES, max_features=0.4)]

    x, lossy = inputs(rows), ~is_lossless(rows.plan_features)
    time_model = model(x, np.log10(rows.step_ms), learning_rate=0.2, max_iter=TIME_TREES, max_features=0.8)
    x, y, request = x[lossy], np.log10(rows.loss + LOSS_FLOOR)[lossy], rows.request[lossy]
    folds = min(FOLDS, len(set(request)))
    if folds < 2:
        raise AdaptiveKVError("train: split 'train' needs lossy plans of at least two requests; collect more documents")
    error = np.empty_like(y)  # of requests the model has not seen: those it has seen look too easy
    for seen, unseen in GroupKFold(folds).split(x, y, request):
        error[unseen] = y[unseen] - export.total(loss_models(x[seen], y[seen]), x[unseen])
    losses = loss_models(x, y)
    quantile: dict[str, Any] = {"loss": "quantile", "quantile": QUANTILE, "min_samples_leaf": LEAST}
    high = model(alone(x), error, learning_rate=0.5, max_iter=ERROR_TREES, **quantile)
    return [losses, [high], [time_model]]


def grow(rows: Rows, seed: int) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The forest, and the states [n, F] of its requests, what fills unknown values [F], the requests' losses [n, P] and
    the features [P, PF] of the plans: those that half of the requests were replayed through, and these requests.

    It looks for requests alike in the losses of all plans at once; the SLO is none of their features.
    """
    from sklearn.ensemble import ExtraTreesRegressor

    requests = scoring.requests(rows)
    times = Counter(plan for request in requests for plan in request.rows.plan.tolist())
    shared = {plan for plan, count in times.items() if 2 * count >= len(requests)}
    requests = [request for request in requests if shared <= set(request.rows.plan.tolist())]
    if not shared or not requests:
        raise AdaptiveKVError("train: no plan was replayed for half of the requests; collect all with the same plans")
    picks = [[i for i, plan in enumerate(request.rows.plan.tolist()) if plan in shared] for request in requests]
    loss = np.stack([request.rows.loss[pick] for request, pick in zip(requests, picks, strict=True)])
    x = np.stack([request.rows.state[0] for request in requests])
    x[:, scoring.QUALITY] = np.nan
    known = np.isfinite(x).any(axis=0)
    fill = np.zeros(x.shape[1])
    fill[known] = np.nanmedian(x[:, known], axis=0)
    x = np.where(np.isnan(x), fill, x)
    settings = {"min_samples_leaf": 4, "max_features": 0.6, "max_leaf_nodes": LEAVES, "random_state": seed}
    plans = requests[0].rows.plan_features[picks[0]]
    loss[:, is_lossless(plans)] = 0.0  # what was measured of these is rounding
    grown = ExtraTreesRegressor(FOREST_TREES, **settings).fit(x, np.log10(loss + LOSS_FLOOR))
    return grown, x, fill, loss, plans


def learned(rows: Rows, seed: int) -> dict[str, np.ndarray]:
    """The arrays of a policy."""
    return export.flatten(fit(rows, seed)) | export.flatten_forest(*grow(rows, seed))


def predict_rows(policy: TreeSelector, rows: Rows) -> Prediction:
    """One prediction per row, each with its own state."""
    found = [policy.predict(s, p[None]) for s, p in zip(rows.state, rows.plan_features, strict=True)]
    return Prediction(*(np.concatenate(part) for part in zip(*found, strict=True)))


def accuracy(rows: Rows, predicted: Prediction) -> dict[str, float]:
    """Of the lossy plans: mean absolute error and bias of log10 loss, and the share within the high quantile (0.9)."""
    lossy = ~is_lossless(rows.plan_features)
    error = np.log10(predicted.loss + LOSS_FLOOR)[lossy] - np.log10(rows.loss + LOSS_FLOOR)[lossy]
    time_error = np.log10(predicted.step_ms) - np.log10(rows.step_ms)
    return {
        "mae_log10_loss": float(np.abs(error).mean()) if lossy.any() else 0.0,
        "bias_log10_loss": float(error.mean()) if lossy.any() else 0.0,
        "coverage_high": float((rows.loss <= predicted.loss_high)[lossy].mean()) if lossy.any() else 1.0,
        "mae_log10_step_ms": float(np.abs(time_error).mean()),
    }


def draw(
    folder: Path,
    rows: Rows,
    requests: list[scoring.Request],
    policy: TreeSelector,
    predicted: Prediction,
    losses: list[Any],
    seed: int,
) -> list[Path]:
    """The plots, as PNG files beside the policy."""
    from sklearn.inspection import permutation_importance

    from adaptivekv.trainer import plots

    lossy = ~is_lossless(rows.plan_features)
    x, y = inputs(rows)[lossy], np.log10(rows.loss + LOSS_FLOOR)[lossy]
    made = [
        plots.frontier(requests, folder / "frontier.png"),
        plots.calibration(rows, predicted, folder / "calibration.png"),
        plots.decisions(requests, scoring.trusting(policy), folder / "decisions.png"),
    ]
    if len(y) > 1:
        plan, rest = losses
        some = {"n_repeats": 3, "random_state": seed, "max_samples": min(1.0, 2000 / len(y))}
        shuffled = permutation_importance(rest, x, y - plan.predict(x), scoring="neg_mean_squared_error", **some)
        names = [*schema.NAMES, *schema.PLAN_NAMES, schema.LINK_TIME]
        made.append(plots.importance(names, shuffled.importances_mean, folder / "importance.png"))
    return made
