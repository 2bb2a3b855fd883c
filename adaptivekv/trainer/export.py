"""From scikit-learn's boosted trees to the flat policy files, and the proof that both say the same."""

import hashlib
import io
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from adaptivekv import forest, selector
from adaptivekv.errors import AdaptiveKVError
from adaptivekv.features import schema

Models = list[list[Any]]  # per target of selector.TARGETS, fitted HistGradientBoostingRegressors whose sum it is


def total(summands: list[Any], x: np.ndarray) -> np.ndarray:
    """What fitted models predict together: [n] of x [n, INPUTS]."""
    return np.sum([model.predict(x) for model in summands], axis=0)


def flatten(models: Models) -> dict[str, np.ndarray]:
    """The arrays of selector.ARRAYS."""
    parts: dict[str, list[Any]] = {key: [] for key in selector.ARRAYS}
    size = 0
    for target, summands in enumerate(models):
        parts["baseline"].append([sum(model._baseline_prediction.item() for model in summands)])
        for (tree,) in (trees for model in summands for trees in model._predictors):
            nodes = tree.nodes
            if nodes["is_categorical"].any():
                raise AdaptiveKVError("policy: categorical splits cannot be exported; use number features")
            leaf = nodes["is_leaf"].astype(bool)
            parts["roots"].append([size])
            parts["target"].append([target])
            for side in ("left", "right"):
                parts[side].append(np.where(leaf, -1, nodes[side].astype(np.int64) + size))
            parts["feature"].append(np.where(leaf, 0, nodes["feature_idx"]))
            parts["threshold"].append(np.where(leaf, 0.0, nodes["num_threshold"]))
            parts["missing_left"].append(nodes["missing_go_to_left"])
            parts["value"].append(nodes["value"])
            size += len(nodes)
    return {key: np.concatenate(value).astype(selector.ARRAYS[key]) for key, value in parts.items()}


def flatten_forest(
    grown: Any, x: np.ndarray, fill: np.ndarray, loss: np.ndarray, plans: np.ndarray
) -> dict[str, np.ndarray]:
    """The arrays of forest.ARRAYS. grown: a scikit-learn forest of the states x [n, F], unknown values filled with fill
    [F]; loss [n, P]: of the same requests; plans [P, PF]: the features of the plans."""
    parts: dict[str, list[Any]] = {name: [] for name in ("feature", "threshold", "left", "right", "roots", "member")}
    size = 0
    for tree in (estimator.tree_ for estimator in grown.estimators_):
        parts["roots"].append([size])
        for name, children in (("left", tree.children_left), ("right", tree.children_right)):
            parts[name].append(np.where(children < 0, -1, children + size))
        parts["feature"].append(np.maximum(tree.feature, 0))
        parts["threshold"].append(tree.threshold)
        parts["member"].append(tree.apply(x.astype(np.float32))[None] + size)
        size += tree.node_count
    arrays = {name: np.concatenate(value) for name, value in parts.items()}
    arrays |= {"loss": loss, "plans": plans, "fill": fill}
    return {f"forest_{name}": value.astype(forest.ARRAYS[f"forest_{name}"][0]) for name, value in arrays.items()}


def save(
    folder: str | Path,
    arrays: dict[str, np.ndarray],
    label: str,
    best_static: dict[str, str] | None = None,
    metrics: dict[str, float] | None = None,
    margin: float = 0.0,
    model: str = "",
) -> Path:
    """Writes policy.npz, then policy.json; a crash between them leaves a mismatch that loading refuses."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    manifest = {
        "format": selector.FORMAT,
        "schema": schema.VERSION,
        "names": schema.NAMES,
        "plan_names": schema.PLAN_NAMES,
        "targets": selector.TARGETS,
        "sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
        "label": label,
        "model": model,
        "best_static": best_static or {},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "metrics": metrics or {},
        "margin": margin,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in (("policy.npz", buffer.getvalue()), ("policy.json", json.dumps(manifest, indent=1).encode())):
        temporary = folder / f".{name}.{os.getpid()}.tmp"
        temporary.write_bytes(data)
        os.replace(temporary, folder / name)
    return folder


def parity(policy: selector.TreeSelector, models: Models, x: np.ndarray, seed: int = 0, rows: int = 2000) -> float:
    """The largest difference on `rows` fresh rows around x [n, INPUTS], a fifth of their entries NaN; > 1e-9 raises."""
    fresh = _around(x, seed, rows)
    want = np.stack([total(summands, fresh) for summands in models], axis=1)
    return _same(float(np.abs(policy.raw(fresh) - want).max()))


def forest_parity(flat: forest.Forest, grown: Any, x: np.ndarray, seed: int = 0, rows: int = 40) -> float:
    """The same of the weights of the requests x [n, F], unknown values filled, that `grown` was grown on."""
    fresh = _around(x, seed, rows)
    leaf = grown.apply(flat.filled(fresh))[:, None]  # [rows, 1, T]
    same = leaf == grown.apply(x.astype(np.float32))  # [rows, n, T]
    want = (same / same.sum(1, keepdims=True)).mean(2)
    return _same(float(np.abs(np.stack([flat.weights(state) for state in fresh]) - want).max()))


def _around(x: np.ndarray, seed: int, rows: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    fresh = x[rng.integers(len(x), size=rows)] * rng.choice([1.0, 0.9, 1.1], size=(rows, 1))
    fresh[rng.random(fresh.shape) < 0.2] = np.nan
    return fresh


def _same(worst: float) -> float:
    if not worst <= 1e-9:
        raise AdaptiveKVError(f"policy: differs from scikit-learn by {worst:.3g}; install another scikit-learn")
    return worst
