"""Selectors rank plans from features: a rule table when nothing is trained, else flat gradient-boosted trees.

Run time needs numpy only. A trained policy is two files: `policy.npz`, plain arrays, and `policy.json`, a manifest with
their SHA-256. Nothing in them is code, and every index is checked before use.
"""

import hashlib
import io
import json
import logging
import math
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.features import schema

log = logging.getLogger("adaptivekv")
FORMAT = 2
TARGETS = ("log10_loss", "log10_error", "log10_step_ms")  # the error: what the high loss adds to the mean
LOSS_FLOOR = 1e-4  # nats, added before the logarithm: what is below decides no SLO
MAX_LEAVES = 8  # per tree: one bit each in a byte
INPUTS = len(schema.NAMES) + len(schema.PLAN_NAMES) + len(schema.JOINT)  # a tree sees the state, the plan, and both

KEEP, K_BITS, V_BITS, DEVICE_SHARE, READ_SHARE = range(5)  # columns of a plan row
PROMPT, GENERATED, LINK = (schema.NAMES.index(n) for n in ("log2_prompt", "log2_generated", "log10_link"))


class Prediction(NamedTuple):
    """What a selector expects of each plan; every field is float64 [n_plans]."""

    loss: np.ndarray  # mean KL to the full cache, nats per token
    loss_high: np.ndarray  # upper quantile (0.9) of the same
    step_ms: np.ndarray  # one decode step


class Selector(Protocol):
    """A plan meets the quality SLO when `loss_high * 10**margin <= quality`; `predict` does not apply the margin."""

    name: str  # "rules", "champion@3"
    margin: float  # certified, in log10 nats; 0 until certified
    model: str  # `layers.model_mark` of the one it was trained on; "": any

    def predict(self, state: np.ndarray, plans: np.ndarray) -> Prediction:
        """state [F] and plans [n, PF], both in the order of features.schema."""
        ...


def is_lossless(plans: np.ndarray) -> np.ndarray:
    """bool [n]: every token kept, in the model's own dtype, and read. Known from the plan, so never predicted."""
    return (plans[:, KEEP] >= 1) & (plans[:, [K_BITS, V_BITS]] >= 16).all(1) & (plans[:, READ_SHARE] >= 1)


class RuleTable:
    """Priors measured on the embedded model; the losses of the stages of a plan add."""

    name, model = "rules", ""
    margin = 0.0
    bytes_per_token = 23_040  # 16-bit K and V of the embedded model
    base_ms, device_gbs, link_gbs = 5.0, 100.0, 10.0

    def predict(self, state: np.ndarray, plans: np.ndarray) -> Prediction:
        keep, k_bits, v_bits, device, read = plans.T[:5]
        loss = np.interp(keep, [0, 0.25, 0.5, 1], [1.0, 0.6, 0.3, 0.0])
        loss += np.interp(k_bits, [2, 4, 8, 16], [0.29, 0.0015, 0.0001, 0.0])
        loss += np.interp(v_bits, [2, 4, 8, 16], [0.0085, 0.0015, 0.0001, 0.0])
        loss += np.interp(read, [0, 0.25, 1], [0.1, 0.02, 0.0])
        known = np.where(np.isnan(state), 0.0, state)
        tokens = 2.0 ** known[PROMPT] + 2.0 ** known[GENERATED]
        link = self.link_gbs if np.isnan(state[LINK]) else 10.0 ** state[LINK]
        read_bytes = tokens * self.bytes_per_token * keep * np.minimum(k_bits + v_bits, 32) / 32 * read
        step_ms = self.base_ms + read_bytes / 1e6 * (device / self.device_gbs + (1 - device) / link)
        return Prediction(loss, 2.5 * loss, step_ms)


class TreeSelector:
    """Three boosted-tree models in flat arrays, all plans and trees at once (QuickScorer, Lucchese et al. 2015).

    The leaves of a tree are numbered from the left and start as eight set bits. A node whose test fails sends its row
    to the right, so it clears the bits of its left subtree; the lowest bit still set is the leaf. No walk, no branches.
    """

    def __init__(self, arrays: dict[str, np.ndarray], manifest: dict[str, Any], name: str):
        self.name, self.manifest, self.margin = name, manifest, float(manifest["margin"])
        self.model = str(manifest.get("model", ""))
        self.baseline = arrays["baseline"]
        roots, left, right = arrays["roots"], arrays["left"], arrays["right"]
        trees = len(roots)
        feature = np.zeros((MAX_LEAVES - 1, trees), np.intp)
        threshold = np.full((MAX_LEAVES - 1, trees), np.inf)
        clears = np.full((MAX_LEAVES - 1, trees), 255, np.uint8)
        value = np.zeros((trees, MAX_LEAVES))

        def place(tree: int, node: int, first: int, used: list[int]) -> int:
            """Numbers the leaves below `node` from `first` on; returns how many there are."""
            if left[node] < 0:
                value[tree, first] = arrays["value"][node]
                return 1
            at = len(used)
            used.append(node)
            below = place(tree, left[node], first, used)
            feature[at, tree] = arrays["feature"][node] + INPUTS * arrays["missing_left"][node]
            threshold[at, tree] = arrays["threshold"][node]
            clears[at, tree] = 255 & ~(((1 << below) - 1) << first)
            return below + place(tree, right[node], first + below, used)

        for tree, root in enumerate(roots):
            place(tree, root, 0, [])
        self._feature, self._threshold, self._clears = feature.ravel(), threshold.ravel(), clears.ravel()
        self._value, self._first = value.ravel(), np.arange(trees) * MAX_LEAVES
        self._lowest = np.array([0] + [(bits & -bits).bit_length() - 1 for bits in range(1, 256)])
        self._starts = np.searchsorted(arrays["target"], np.arange(len(TARGETS)))

    def raw(self, x: np.ndarray) -> np.ndarray:
        """x [n, F + PF] to the targets [n, 3]. A node for which NaN goes left reads a copy of x where NaN is -inf."""
        both = np.concatenate([x, np.where(np.isnan(x), -np.inf, x)], axis=1)
        passed = both.take(self._feature, axis=1) <= self._threshold  # [n, 7 * trees]
        kept = (self._clears | -passed.view(np.uint8)).reshape(len(x), MAX_LEAVES - 1, -1)  # -1 is all ones
        alive = np.bitwise_and.reduce(kept, axis=1)  # [n, trees]
        leaf = self._value.take(self._lowest.take(alive) + self._first)  # [n, trees]
        return np.add.reduceat(leaf, self._starts, axis=1) + self.baseline

    def predict(self, state: np.ndarray, plans: np.ndarray) -> Prediction:
        x = np.empty((len(plans), INPUTS))
        at, end = len(state), len(state) + plans.shape[1]
        x[:, :at], x[:, at:end], x[:, end:] = state, plans, schema.joint(state, plans)
        raw = self.raw(x)
        raw[:, 1] += raw[:, 0]
        out = 10.0**raw
        loss = np.where(is_lossless(plans)[:, None], 0.0, np.maximum(out[:, :2] - (LOSS_FLOOR, 0.0), 0.0))
        return Prediction(loss[:, 0], loss.max(axis=1), out[:, 2])

    @classmethod
    def load(cls, path: str | Path, name: str | None = None) -> "TreeSelector":
        """A folder, or either of its files. `name` replaces the manifest's label. Any fault is an AdaptiveKVError."""
        folder = Path(path) if Path(path).suffix not in (".npz", ".json") else Path(path).parent
        manifest, arrays = _read(folder)
        return cls(arrays, manifest, name or manifest["label"])


def foreign(selector: Selector, mark: str) -> str | None:
    """Why it must not choose for the model of this mark, in a line; None: it may."""
    if selector.model in ("", mark):
        return None
    return f"policy {selector.name}: trained on {selector.model}; this model is {mark}: train one for it"


@lru_cache(maxsize=64)
def warn(line: str) -> None:
    """Once a process."""
    log.warning(line)


def load_or_rules(path: str | Path, name: str | None = None) -> tuple[Selector, str | None]:
    """The policy at `path`; or the rule table and one line that says why, for the caller to print once."""
    try:
        return TreeSelector.load(path, name), None
    except AdaptiveKVError as error:
        return RuleTable(), f"{error}; using the rule table instead"


ARRAYS = {
    "feature": np.int32,
    "threshold": np.float64,
    "left": np.int32,
    "right": np.int32,
    "value": np.float64,
    "missing_left": np.bool_,
    "roots": np.int32,
    "target": np.int32,
    "baseline": np.float64,
}


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The checked manifest and arrays."""
    at = folder / "policy.json"
    try:
        manifest = json.loads(at.read_bytes())
        at = folder / "policy.npz"
        data = at.read_bytes()
    except OSError as error:
        raise AdaptiveKVError(f"policy {at}: {error.strerror or error}; train one or use selector 'rules'") from None
    except ValueError:
        raise AdaptiveKVError(f"policy {at}: not JSON; train it again") from None
    fault = _manifest_fault(manifest)
    if fault:
        raise AdaptiveKVError(f"policy {folder / 'policy.json'}: {fault}; train it again")
    if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
        raise AdaptiveKVError(f"policy {at}: SHA-256 differs from policy.json, truncated or changed; train it again")
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = {key: file[key] for key in ARRAYS}
    except Exception as error:  # zipfile, zlib, numpy and KeyError each have their own way to say it
        raise AdaptiveKVError(f"policy {at}: not readable ({' '.join(str(error).split())}); train it again") from None
    fault = _array_fault(arrays)
    if fault:
        raise AdaptiveKVError(f"policy {at}: {fault}; train it again")
    return manifest, arrays


def _manifest_fault(manifest: Any) -> str | None:
    expected = {
        "format": FORMAT,
        "schema": schema.VERSION,
        "names": list(schema.NAMES),
        "plan_names": list(schema.PLAN_NAMES),
        "targets": list(TARGETS),
    }
    if not isinstance(manifest, dict):
        return "not an object"
    for key, want in expected.items():
        got = manifest.get(key)
        if got != want and isinstance(want, int):
            return f"{key} is {got!r}, not {want!r}"
        if got != want:
            return f"{key} differ from schema {schema.VERSION}"
    for key, kind in {"label": str, "sha256": str, "best_static": dict, "metrics": dict, "created": str}.items():
        if not isinstance(manifest.get(key), kind):
            return f"{key} is missing or not a {kind.__name__}"
    margin = manifest.get("margin")
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        return f"margin is {margin!r}, not a finite number"
    return None


def _array_fault(a: dict[str, np.ndarray]) -> str | None:
    """What makes the arrays unfit for `TreeSelector`, or None."""
    for key, dtype in ARRAYS.items():
        if a[key].dtype != dtype or a[key].ndim != 1:
            return f"{key} is {a[key].dtype} {a[key].ndim}-D, not {np.dtype(dtype)} 1-D"
    nodes, roots, target = len(a["feature"]), a["roots"], a["target"]
    if any(len(a[key]) != nodes for key in ("threshold", "left", "right", "value", "missing_left")):
        return "node arrays differ in length"
    if len(roots) == 0 or roots[0] != 0 or (np.diff(roots) <= 0).any() or roots[-1] >= nodes:
        return "roots do not rise from 0 within the nodes"
    if len(target) != len(roots) or (np.diff(target) < 0).any() or set(target) != set(range(len(TARGETS))):
        return "target does not list each of the three targets in order"
    if len(a["baseline"]) != len(TARGETS) or not np.isfinite(a["baseline"]).all():
        return "baseline is not three finite numbers"
    ends = np.append(roots[1:], nodes)
    tree_of = np.repeat(np.arange(len(roots)), ends - roots)
    inner = np.flatnonzero(a["left"] != -1)
    for side in ("left", "right"):
        child = a[side][inner]
        if (child <= inner).any() or (child >= ends[tree_of[inner]]).any():
            return f"a {side} child lies outside its tree or before its parent"
    children = np.concatenate([a["left"][inner], a["right"][inner], roots])
    if (a["right"][a["left"] == -1] != -1).any() or (np.bincount(children, minlength=nodes) != 1).any():
        return "a node has one child, two parents or none"
    if (np.bincount(tree_of[a["left"] == -1]) > MAX_LEAVES).any():
        return f"a tree has more than {MAX_LEAVES} leaves"
    if ((a["feature"][inner] < 0) | (a["feature"][inner] >= INPUTS)).any():
        return f"a feature index lies outside 0..{INPUTS - 1}"
    if not np.isfinite(a["value"]).all() or np.isnan(a["threshold"]).any():
        return "a value is not finite or a threshold is NaN"
    return None
