"""Certify one number of a frozen selector, its margin, so that at most a share alpha of requests break their SLO.

The selector takes the plan of least cost + 10**margin x chance of breaking the SLO. Margins are tried from
conservative to liberal (GRID, declared here and never chosen from data) on fresh, replayed requests of split "certify";
what is counted is the measured loss of the plan the selector would have taken, end to end. Learn-Then-Test with a fixed
sequence (ltt.py) stops at the first margin that fails; the one before it is certified.

**One margin, every SLO at once.** The run-time margin does not depend on the SLO, so the claim must hold for each SLO
of the ladder (scoring.QUALITIES). Pooling one drawn SLO a request would let lenient SLOs hide a strict one that is
broken often; a margin for each SLO could not be applied. Each request is therefore judged at every SLO (replay knows
all of them), and a margin passes only if the test of every SLO rejects at delta. That needs no correction: claiming all
is an intersection-union test, and its error is at most delta. SLOs off the ladder are not claimed.

**What is promised.** The budget comes first: where every plan that fits has a tenth of a chance or more to break the
SLO (selector.SURE), nothing was promised, and the decision says so. A violation is a promise that was broken, counted
among all requests; the certificate records the share of requests with a promise, by SLO.

**Groups.** Kind of scenario, and prompts above or not above a length that was known before: the median of the training
requests. Always reported, without a claim. With `group` each group is walked on its own at delta / groups, so that each
group's own margin is a claim and all hold together; the policy carries the most conservative of them.

**What is assumed.** Requests are drawn as those to come will be; requests that share a document are treated as
independent; the replayed plans are those to choose among, masked by the byte limits each request was drawn with;
answers are as long as the replayed ones and the plan is chosen once. The rows are looked at once: earlier tries on
them, of whatever policy, are counted and recorded (`earlier_tries`), not corrected for.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.features import schema
from adaptivekv.selector import SURE, Selector, price
from adaptivekv.trainer import certificate, dataset, fresh, frozen, ltt, scoring, tracking
from adaptivekv.trainer.scoring import QUALITIES, Request

GRID = tuple(round(3.05 - 0.1 * i, 2) for i in range(41))
"""Margins, log10 of full caches: 3.05 (little but lossless plans) to -0.95. Never 0, which says "not certified" at run
time."""
GROUPS = ("scenario", "length")
PROMPT = schema.NAMES.index("log2_prompt")
Progress = Callable[[int, int], None]


def certify(
    sources: Sequence[str | Path] | None = None,
    policy: str = "champion",
    alpha: float = scoring.ALPHA,
    delta: float = 0.05,
    group: str | None = None,
    leave_out: bool = False,
    seen: Sequence[str | Path] | None = None,
    out_dir: str | Path = "certified",
    tracking_uri: str | None = None,
    experiment: str = tracking.EXPERIMENT,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Sources as for `train`; their split "certify" is judged, and must share nothing with what the policy has seen.

    policy: a folder, a run id or "champion". alpha: share of requests; delta: chance that the certificate is wrong.
    group: None, "scenario" or "length". leave_out: also report each scenario under the margin that the others certify.
    seen: the policy's training data where neither the sources nor its run hold it. progress(requests done, of all).

    Writes a certified copy to `out_dir`. Returns run_id, policy (folder), margin, certificate and plot. Nothing
    certified, too few requests, seen ones, mixed or missing labels: AdaptiveKVError.
    """
    for name, value in (("alpha", alpha), ("delta", delta)):
        if not 0 < value < 1:
            raise AdaptiveKVError(f"certify: {name} is {value:g}; a share between 0 and 1")
    if group is not None and group not in GROUPS:
        raise AdaptiveKVError(f"certify: group {group!r} is not {' or '.join(GROUPS)}")
    mlflow = tracking.client(tracking_uri)
    judged = frozen.find(policy, tracking_uri)
    if not sources:
        found = tracking.runs(mlflow, "collect", experiment)
        if not found:
            raise AdaptiveKVError(f"certify: no collect run in experiment {experiment!r}; run `adaptivekv collect`")
        sources = [found[-1].info.run_id]
    table = dataset.load(sources, tracking_uri)
    dataset.model(table, judged.selector.model)
    part = fresh.of_split(table)
    known = fresh.training(mlflow, judged, table, seen, tracking_uri)
    fresh.check(part, known)
    requests = fresh.requests(part, ltt.least(alpha, delta), alpha, delta)

    sha = dataset.digest(part.combine_chunks())
    params = {
        "alpha": alpha, "delta": delta, "group": group, "grid": f"{GRID[0]} to {GRID[-1]}", "requests": len(requests),
        "policy": judged.selector.name, "policy_sha256": judged.selector.manifest["sha256"], "data_sha256": sha,
        "sources": " ".join(map(str, sources))[:6000],
    }  # fmt: skip
    facts = params | {
        "sources": " ".join(map(_name, sources)),
        "documents": len(set(part["document"].to_pylist())),
        "plans": sorted(map(str, requests[0].rows.plan)),
        "policy": judged.trained_as,
        "training": known.note,
        "earlier_tries": fresh.earlier(mlflow, params),
    }
    loss, cost = outcomes(judged.selector, requests, GRID, progress)
    members = groups(requests, known.tables)
    with tracking.run(mlflow, "certify", experiment, f"certify-{judged.selector.name}") as run_id:
        tracking.log(mlflow, run_id, params, {})  # before the verdict: a failed try is a look at the data as well
        made = certificate.judge(loss, cost, GRID, members, alpha, delta, group, leave_out)
        folder, plot = certificate.write(out_dir, f"certify-{run_id[:8]}", judged, made, facts, known.select())
        tracking.log(mlflow, run_id, {}, made.metrics())
        mlflow.set_tag(run_id, "adaptivekv.margin", str(made.margin))
        for name in ("policy.npz", "policy.json"):
            mlflow.log_artifact(run_id, str(folder / name), "policy")
        mlflow.log_artifact(run_id, str(plot), "plots")
        mlflow.log_dict(run_id, made.table, "certificate.json")
    return {
        "run_id": run_id,
        "policy": str(folder),
        "margin": made.margin,
        "certificate": made.table,
        "plot": str(plot),
    }


def _name(source: str | Path) -> str:
    """A run's id, or the end of a path: a certificate travels, and where its data lay here says nothing there."""
    return "/".join(Path(source).parts[-2:])


def outcomes(
    selector: Selector, requests: list[Request], grid: Sequence[float], progress: Progress | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Measured loss (nats per token; NaN where nothing was promised) and cost (of the full cache) of the plan chosen:
    float64 [n, Q, L] each.

    The same choice as scoring.trusting makes under each margin, for all margins at once.
    """
    margins = np.array(grid)[:, None]
    loss = np.empty((len(requests), len(QUALITIES), len(grid)))
    cost = np.empty_like(loss)
    for i, request in enumerate(requests):
        for j, quality in enumerate(QUALITIES):
            predicted, chance = scoring.asked(selector, request, quality)
            if not (np.isfinite(predicted) & np.isfinite(chance)).all():
                raise AdaptiveKVError(f"certify: the policy predicts NaN for request {request.name!r}")
            worth = price(predicted, request.full, chance, margins)
            chosen = np.argmin(np.where(request.fits, worth, np.inf), axis=1)
            loss[i, j] = request.rows.loss[chosen] if chance[request.fits].min() < SURE else np.nan
            cost[i, j] = request.cost[chosen]
        if progress:
            progress(i + 1, len(requests))
    return loss, cost


def groups(requests: list[Request], known: Sequence[pa.Table]) -> dict[str, dict[str, np.ndarray]]:
    """{"scenario" or "length": {group: bool [n]}}. Nothing here depends on an outcome."""
    scenario = np.array([str(r.rows.scenario[0]) for r in requests])
    length = np.array([r.rows.state[0, PROMPT] for r in requests])
    before = np.concatenate([dataset.matrix(t, "features", len(schema.NAMES))[:, PROMPT] for t in known])
    middle = float(np.nanmedian(before)) if np.isfinite(before).any() else 0.0
    limit = round(2.0**middle)
    return {
        "scenario": {str(name): scenario == name for name in sorted(set(scenario))},
        "length": {f"prompt <= {limit} tokens": ~(length > middle), f"prompt > {limit} tokens": length > middle},
    }
