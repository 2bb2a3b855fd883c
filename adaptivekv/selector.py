"""Selectors rank plans from features: a rule table when nothing is trained, else a forest and boosted trees.

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

from adaptivekv import forest, trees
from adaptivekv.errors import AdaptiveKVError
from adaptivekv.features import schema

log = logging.getLogger("adaptivekv")
FORMAT = 3
TARGETS = ("log10_loss", "log10_error", "log10_step_ms")  # the error: what the high loss adds to the mean
STEP_MS = TARGETS.index("log10_step_ms")
LOSS_FLOOR = forest.FLOOR
STRICT = 0.003  # nats: below this, which is the least that is certified, risks are not weighed while a plan is sure
SURE = 0.1  # a plan whose chance of breaking the SLO is below this promises to keep it
MAX_LEAVES = 8  # per tree: one bit each in a byte
INPUTS = len(schema.NAMES) + len(schema.PLAN_NAMES) + 1  # a tree sees the state, the plan, and the link time

KEEP, K_BITS, V_BITS, DEVICE_SHARE, READ_SHARE = range(5)  # columns of a plan row
PROMPT, GENERATED, LINK, QUALITY = (
    schema.NAMES.index(n) for n in ("log2_prompt", "log2_generated", "log10_link", "log10_quality")
)


class Prediction(NamedTuple):
    """What a selector expects of each plan; every field is float64 [n_plans]."""

    loss: np.ndarray  # mean KL to the full cache, nats per token
    loss_high: np.ndarray  # upper quantile (0.9) of the same
    step_ms: np.ndarray  # one decode step
    chance: np.ndarray  # of a loss above the SLO of the state


class Selector(Protocol):
    """The plan of least `price` is taken; `predict` does not apply the margin."""

    name: str  # "rules", "champion@3"
    margin: float  # certified: log10 of what a broken SLO weighs, in full caches; 0 until certified
    model: str  # `layers.model_mark` of the one it was trained on; "": any

    def predict(self, state: np.ndarray, plans: np.ndarray) -> Prediction:
        """state [F] and plans [n, PF], both in the order of features.schema."""
        ...


def price(cost: np.ndarray, full: int, chance: np.ndarray, margin: float | np.ndarray) -> np.ndarray:
    """What plans cost and risk, in costs of the full cache, which is plan `full`: [..., n]. A broken SLO weighs
    10**margin full caches; an SLO is thus kept more surely where that is cheap."""
    return cost / np.maximum(cost[full], 1e-9) + 10.0**margin * chance


def slo(state: np.ndarray) -> float:
    """Nats per token; 0 where the state does not say."""
    return 0.0 if np.isnan(state[QUALITY]) else float(10.0 ** state[QUALITY])


def above(loss: np.ndarray, high: np.ndarray, quality: float) -> np.ndarray:
    """The chance that a loss exceeds `quality`, if its logarithm is normal, with `high` its 0.9 quantile."""
    middle, tenth = np.log10(loss + LOSS_FLOOR), np.log10(high + LOSS_FLOOR)
    deviations = (math.log10(quality + LOSS_FLOOR) - middle) / np.maximum((tenth - middle) / forest.TENTH, 1e-3)
    return np.where(high > 0, 1 / (1 + np.exp(np.clip(1.702 * deviations, -50, 50))), 0.0)  # close to the normal's


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
        return Prediction(loss, 2.5 * loss, step_ms, above(loss, 2.5 * loss, slo(state)))


class TreeSelector:
    """A forest that knows the plans of its training data, and boosted trees, which say the time of a step and the
    losses of plans that the forest does not know. All in flat arrays (trees.py, forest.py)."""

    def __init__(self, arrays: dict[str, np.ndarray], manifest: dict[str, Any], name: str):
        self.name, self.manifest, self.margin = name, manifest, float(manifest["margin"])
        self.model = str(manifest.get("model") or "")
        self.baseline = arrays["baseline"]
        made = trees.lay_out(arrays["left"], arrays["right"], arrays["roots"], MAX_LEAVES, np.uint8)
        feature = np.where(made.empty, 0, (arrays["feature"] + INPUTS * arrays["missing_left"])[made.node])
        threshold = np.where(made.empty, np.inf, arrays["threshold"][made.node])
        parts = feature, threshold, made.clears, arrays["value"][made.leaf].T
        self._starts = np.searchsorted(arrays["target"], np.arange(len(TARGETS)))
        self._trees = [[np.ascontiguousarray(part[:, start:]) for part in parts] for start in self._starts]
        self._lowest = np.array([0] + [(bits & -bits).bit_length() - 1 for bits in range(1, 256)])
        grown = {key: arrays[key] for key in forest.ARRAYS if key in arrays}
        self.forest = forest.Forest(grown) if grown else None

    def raw(self, x: np.ndarray, first: int = 0) -> np.ndarray:
        """x [n, INPUTS] to the targets from `first` on, [n, 3 - first]. A node for which NaN goes left reads a copy of
        x where NaN is -inf."""
        feature, threshold, clears, value = self._trees[first]
        both = np.concatenate([x, np.where(np.isnan(x), -np.inf, x)], axis=1)
        passed = both.take(feature.ravel(), axis=1) <= threshold.ravel()  # [n, 7 * trees]
        kept = (clears.ravel() | -passed.view(np.uint8)).reshape(len(x), *clears.shape)  # -1 is all ones
        leaf = self._lowest.take(np.bitwise_and.reduce(kept, axis=1))  # [n, trees]
        found = value.take(leaf * clears.shape[1] + np.arange(clears.shape[1]))
        return np.add.reduceat(found, self._starts[first:] - self._starts[first], axis=1) + self.baseline[first:]

    def predict(self, state: np.ndarray, plans: np.ndarray) -> Prediction:
        known = self.forest.known(plans.tobytes(), plans.shape[1]) if self.forest else np.full(len(plans), -1)
        seen = known >= 0
        x = np.zeros((len(plans), INPUTS))
        at, end = len(state), len(state) + plans.shape[1]
        x[:, :at], x[:, at:end], x[:, end] = state, plans, schema.link_time(state, plans)
        if self.forest and seen.all():
            loss, high, chance = self.forest.predict(state, known, slo(state))
            return Prediction(loss, high, 10.0 ** self.raw(x, STEP_MS)[:, 0], chance)
        raw = self.raw(x)
        raw[:, 1] += raw[:, 0]
        out = 10.0**raw
        losses = np.where(is_lossless(plans)[:, None], 0.0, np.maximum(out[:, :2] - (LOSS_FLOOR, 0.0), 0.0))
        loss, high = losses[:, 0], losses.max(axis=1)
        chance = above(loss, high, slo(state))
        if self.forest and seen.any():
            loss[seen], high[seen], chance[seen] = self.forest.predict(state, known[seen], slo(state))
        return Prediction(loss, high, out[:, STEP_MS], chance)

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
            arrays = {key: file[key] for key in [*ARRAYS, *(forest.ARRAYS if "forest_loss" in file else ())]}
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
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not -10 <= margin <= 10:
        return f"margin is {margin!r}, not a number from -10 to 10"
    return None


def _array_fault(a: dict[str, np.ndarray]) -> str | None:
    """What makes the arrays unfit for `TreeSelector`, or None."""
    for key, dtype in ARRAYS.items():
        if a[key].dtype != dtype or a[key].ndim != 1:
            return f"{key} is {a[key].dtype} {a[key].ndim}-D, not {np.dtype(dtype)} 1-D"
    target, nodes = a["target"], len(a["feature"])
    if any(len(a[key]) != nodes for key in ("threshold", "left", "value", "missing_left")):
        return "node arrays differ in length"
    if found := trees.fault(a["left"], a["right"], a["roots"], MAX_LEAVES):
        return found
    if len(target) != len(a["roots"]) or (np.diff(target) < 0).any() or set(target) != set(range(len(TARGETS))):
        return "target does not list each of the three targets in order"
    if len(a["baseline"]) != len(TARGETS) or not np.isfinite(a["baseline"]).all():
        return "baseline is not three finite numbers"
    inner = a["left"] != -1
    if ((a["feature"][inner] < 0) | (a["feature"][inner] >= INPUTS)).any():
        return f"a feature index lies outside 0..{INPUTS - 1}"
    if not np.isfinite(a["value"]).all() or np.isnan(a["threshold"]).any():
        return "a value is not finite or a threshold is NaN"
    return forest.fault(a, len(schema.NAMES), len(schema.PLAN_NAMES)) if "forest_loss" in a else None
