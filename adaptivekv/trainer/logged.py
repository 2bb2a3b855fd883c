"""Logged decisions as arrays, and how the controller would have decided in their place under another selector."""

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from adaptivekv.controller import Controller
from adaptivekv.errors import AdaptiveKVError
from adaptivekv.features import schema
from adaptivekv.memory.shapes import LayerShape
from adaptivekv.plan import Plan
from adaptivekv.selector import Selector
from adaptivekv.trainer import dataset, scoring

NEEDED = ("log2_prompt", "log2_new", "log10_quality")  # a decision cannot be repeated without; others may be unknown
SHAPE = [LayerShape(3, 9, 64, 64)] * 30  # of the embedded model; plans are only ranked by these bytes


@dataclasses.dataclass(frozen=True)
class Decisions:
    """n logged decisions of N requests, those of a request together and in order; P is the most plans of any."""

    request: np.ndarray  # [n] int, rising from 0
    state: np.ndarray  # [n, F]
    plans: list[tuple[str, ...]]  # n
    allowed: list[np.ndarray]  # n of bool
    probs: list[np.ndarray]  # n
    taken: np.ndarray  # [n] index into plans
    plan_features: np.ndarray  # [n, PF] of the plan taken
    epoch: np.ndarray  # [n] bool: a later decision than the request's first, so its plan may stay
    share: np.ndarray  # [n] of the request's tokens that were generated under the plan
    cost: np.ndarray  # [n] (device + KAPPA host) MiB x ms of a decode step
    loss: np.ndarray  # [n] nats per token, NaN = not labelled
    label_prob: np.ndarray  # [n]

    def __len__(self) -> int:
        return len(self.taken)


def decisions(table: pa.Table) -> tuple[Decisions, int]:
    """The decisions of requests that generated something and in which something was chosen; and how many are left out.

    AdaptiveKVError: another schema, replayed rows, a propensity that is missing or zero, a feature that must be known
    but is NaN, labels of both kinds.
    """
    versions = set(table["schema_version"].to_pylist()) - {schema.VERSION}
    if versions:
        raise AdaptiveKVError(f"ope: schema_version is {sorted(versions)[0]}, not {schema.VERSION}; collect logs again")
    if "replay" in table["policy_version"].to_pylist():
        raise AdaptiveKVError("ope: policy_version 'replay': every plan was run and none chosen; give logs of serving")
    kinds = set(table["label_kind"].to_pylist()) - {None}
    if len(kinds) > 1:
        raise AdaptiveKVError("ope: label_kind is replay in some rows and online in others; never mixed: give one kind")
    order = pa.compute.sort_indices(
        table.append_column("at", pa.array(np.arange(table.num_rows))),
        [("request_id", "ascending"), ("step", "ascending"), ("at", "ascending")],
    )
    table = table.take(order)
    ids, tokens = dataset.column(table, "request_id").astype(str), dataset.column(table, "tokens").astype(np.float64)
    _, request = np.unique(ids, return_inverse=True)
    chose = np.array([len(plans) > 1 for plans in table["plans"].to_pylist()])
    total = np.bincount(request, tokens)
    use = (total > 0) & (np.bincount(request, chose) > 0)
    if not use.any():
        raise AdaptiveKVError("ope: no request generated tokens under a plan that was chosen; give logs of serving")
    keep = use[request]
    table, ids, request, tokens = table.filter(pa.array(keep)), ids[keep], request[keep], tokens[keep]
    share = tokens / total[request]
    _, request = np.unique(request, return_inverse=True)
    step = dataset.column(table, "step")
    first = np.append(True, request[1:] != request[:-1])

    plans = [tuple(names) for names in table["plans"].to_pylist()]
    probs = [np.array(row if row is not None else [], np.float64) for row in table["probs"].to_pylist()]
    allowed = [np.array(row, bool) for row in table["allowed"].to_pylist()]
    taken = np.array([names.index(plan) for names, plan in zip(plans, table["plan"].to_pylist(), strict=True)])
    for i, row in enumerate(probs):
        if len(row) != len(plans[i]) or not np.isfinite(row).all() or (row < 0).any() or abs(row.sum() - 1) > 1e-6:
            raise AdaptiveKVError(
                f"ope: probs of request {str(ids[i])!r} are missing or no probabilities; log them again"
            )
        if row[taken[i]] <= 0:
            raise AdaptiveKVError(
                f"ope: request {str(ids[i])!r} took {plans[i][taken[i]]!r} with probability 0; its probs are not "
                "those of the policy that chose"
            )
    state = dataset.matrix(table, "features", len(schema.NAMES))
    rows = dataset.matrix(table, "plan_features", len(schema.PLAN_NAMES))
    many = np.array([len(names) > 1 for names in plans])
    for name, column, applies in [
        *((n, state[:, schema.NAMES.index(n)], many) for n in NEEDED),
        *((n, rows[:, i], np.full(len(rows), True)) for i, n in enumerate(schema.PLAN_NAMES)),
    ]:
        if (wrong := np.flatnonzero(applies & ~np.isfinite(column))).size:
            raise AdaptiveKVError(
                f"ope: feature {name!r} of request {str(ids[wrong[0]])!r} is {column[wrong[0]]} ({len(wrong)} rows); a "
                "decision cannot be repeated without it: log it"
            )
    if np.isinf(state).any():
        raise AdaptiveKVError(f"ope: feature {schema.NAMES[int(np.argwhere(np.isinf(state))[0, 1])]!r} is infinite")
    price = dataset.column(table, "device_bytes") + scoring.KAPPA * dataset.column(table, "host_bytes")
    loss = dataset.column(table, "label_loss").astype(np.float64)
    label_prob = dataset.column(table, "label_prob").astype(np.float64)
    if (~np.isnan(loss) & ~((label_prob > 0) & (label_prob <= 1))).any():
        raise AdaptiveKVError("ope: label_prob of a labelled row is missing, 0 or above 1; log the chance of its label")
    cost = price / 2**20 * dataset.column(table, "step_ms")
    if not np.isfinite(cost).all():
        raise AdaptiveKVError("ope: step_ms of a row is not finite; leave that request out")
    found = Decisions(
        request, state, plans, allowed, probs, taken, rows, ~first & (step > step[np.flatnonzero(first)][request]),
        share, cost, loss, label_prob,
    )  # fmt: skip
    return found, int(len(use) - use.sum())


class Logged(Controller):
    """The controller itself; only what it would measure comes from a logged row, set before each decision."""

    state: np.ndarray
    mask: np.ndarray

    def features(self, request: Any) -> dict[str, float]:
        return dict(zip(schema.NAMES, self.state.tolist(), strict=True))

    def _sizes(self, request: Any) -> tuple[np.ndarray, ...]:
        sizes = [plan.estimate(SHAPE, torch.bfloat16, self.tokens) for plan in self.plans]
        return tuple(np.array([size[tier] for size in sizes]) for tier in ("device", "host", "disk"))

    def _room(self, request: Any) -> Any:
        """Of the device the mask knows."""
        host = self.state[schema.NAMES.index("host_room")] * Plan().estimate(SHAPE, torch.bfloat16, self.tokens)["full"]
        return math.inf, math.inf if math.isnan(host) else host

    @property
    def tokens(self) -> int:
        return round(sum(2.0 ** self.state[schema.NAMES.index(n)] for n in ("log2_prompt", "log2_new")))

    def _reachable(self, request: Any) -> np.ndarray:
        return self.mask


def target(
    log: Decisions, selector: Selector, epsilon: float, progress: Callable[[int, int], None] | None = None
) -> list[np.ndarray]:
    """Probability of each plan under the controller with this selector: n arrays as long as log.plans.

    The controller's own code decides, with the logged state, mask and SLO; the plan that may stay is the one the log
    took before. Bytes of plans not taken are not logged: they are estimated for the embedded model's shape. A decision
    with one plan, or with none allowed, leaves no choice to any selector and keeps the logged probabilities.
    """
    controllers: dict[tuple[str, ...], Logged] = {}
    found = []
    for i, names in enumerate(log.plans):
        if len(names) == 1 or not log.allowed[i].any():
            found.append(log.probs[i])
        else:
            if names not in controllers:
                controllers[names] = Logged(selector=selector, candidates=names, epsilon=epsilon)
                if tuple(controllers[names].names) != names:
                    raise AdaptiveKVError(f"ope: plans {', '.join(names)} are not as the controller writes them")
            controller = controllers[names]
            controller.state, controller.mask = log.state[i], log.allowed[i]
            controller.quality = 10.0 ** log.state[i, scoring.QUALITY]
            before = Plan.parse(log.plans[i - 1][log.taken[i - 1]]) if log.epoch[i] else Plan()
            request: Any = SimpleNamespace(plan=before, generated=0, decisions=[])
            controller._decide(request, "epoch" if log.epoch[i] else "prefill")
            found.append(np.array(request.decisions[-1].probs))
        if progress:
            progress(i + 1, len(log))
    return found
