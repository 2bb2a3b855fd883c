"""The verdict on a frozen selector, and the certified copy that carries it."""

import dataclasses
import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.features import schema
from adaptivekv.selector import TreeSelector
from adaptivekv.trainer import ltt, scoring
from adaptivekv.trainer.frozen import Frozen
from adaptivekv.trainer.scoring import QUALITIES, Request

METHOD = "Learn-Then-Test, fixed sequence, exact binomial, every SLO jointly"


@dataclasses.dataclass
class Verdict:
    margin: float  # log10 of what a broken SLO weighs, in full caches
    grid: Sequence[float]
    bound: np.ndarray  # [L] of the worst SLO
    charged: np.ndarray  # [L] mean over requests and SLOs
    table: dict[str, Any]  # the certificate

    def metrics(self) -> dict[str, float]:
        slos = {f"violation/{q}": s["rate"] for q, s in self.table["slos"].items()}
        return slos | {k: float(self.table[k]) for k in ("margin", "n", "violations", "bound", "cost", "charged")}


def judge(
    loss: np.ndarray,
    cost: np.ndarray,
    grid: Sequence[float],
    members: dict[str, dict[str, np.ndarray]],
    alpha: float,
    delta: float,
    group: str | None = None,
    leave_out: bool = False,
) -> Verdict:
    """loss, cost [n, Q, L] of certify.outcomes, members of certify.groups. AdaptiveKVError if no margin passes."""
    broken = loss > np.array(QUALITIES)[:, None]
    walked = ltt.walk(broken, alpha, delta)
    table: dict[str, Any] = {"method": METHOD, "alpha": alpha, "delta": delta, "n": len(broken)}
    if group is None:
        last = certified(walked, grid, alpha, "")
    else:
        last, table["certified_groups"] = by_group(broken, grid, members[group], alpha, delta)
    counts = broken[:, :, last].sum(axis=0)
    worst = int(counts.argmax())
    bounds = ltt.upper(counts, len(broken), delta)
    charged = (cost + broken).mean(axis=(0, 1))
    table |= {
        "margin": grid[last],
        "grid": list(grid),
        "slos": {str(q): _rate(broken[:, j, last], delta) for j, q in enumerate(QUALITIES)},
        "promised": {str(q): float(np.isfinite(loss[:, j, last]).mean()) for j, q in enumerate(QUALITIES)},
        "violations": int(counts[worst]),  # of the SLO that is broken most
        "bound": float(bounds[worst]),
        "confidence": 1 - delta,
        "cost": float(cost[:, :, last].mean()),
        "charged": float(charged[last]),
        "groups": {  # observed, no claim
            kind: {name: _worst(broken[pick, :, last], delta) for name, pick in named.items()}
            for kind, named in members.items()
        },
    }
    if leave_out:
        table["leave_out"] = left_out(broken, grid, members["scenario"], alpha, delta)
    return Verdict(grid[last], grid, walked.bound, charged, table)


def certified(walked: ltt.Walk, grid: Sequence[float], alpha: float, where: str) -> int:
    """Index of the certified margin, or an AdaptiveKVError with the best bound there is."""
    if walked.last < 0:
        best = int(walked.bound.argmin())
        raise AdaptiveKVError(
            f"certify: no margin passes{where}, nothing is certified: the first, {grid[0]:g}, has bound "
            f"{walked.bound[0]:.4f} and the best bound found is {walked.bound[best]:.4f} at margin {grid[best]:g}, "
            f"alpha {alpha:g}; collect more requests or train again"
        )
    return walked.last


def by_group(
    broken: np.ndarray, grid: Sequence[float], members: dict[str, np.ndarray], alpha: float, delta: float
) -> tuple[int, dict[str, Any]]:
    """Each group walked at delta / groups: the index safe for all of them, and what each certifies for itself."""
    share = delta / len(members)
    least = ltt.least(alpha, share)
    found: dict[str, Any] = {}
    indices = []
    for name, pick in members.items():
        if pick.sum() < least:
            raise AdaptiveKVError(
                f"certify: group {name!r} has {int(pick.sum())} requests; at alpha {alpha:g} and delta {share:.4g} "
                f"({delta:g} over {len(members)} groups) at least {least} are needed; collect more"
            )
        last = certified(ltt.walk(broken[pick], alpha, share), grid, alpha, f" for group {name!r}")
        indices.append(last)
        found[name] = {"margin": grid[last], "delta": share} | _worst(broken[pick][:, :, last], share)
    return min(indices), found


def left_out(
    broken: np.ndarray, grid: Sequence[float], scenarios: dict[str, np.ndarray], alpha: float, delta: float
) -> dict[str, Any]:
    """Per scenario, what it sees under the margin that the others certify. A report: nothing is claimed of it."""
    found: dict[str, Any] = {}
    for name, pick in scenarios.items():
        last = ltt.walk(broken[~pick], alpha, delta).last if (~pick).any() else -1
        seen = {"margin": None} if last < 0 else {"margin": grid[last]} | _worst(broken[pick][:, :, last], delta)
        found[name] = seen | {"n": int(pick.sum())}
    return found


def _rate(broken: np.ndarray, delta: float) -> dict[str, Any]:
    """broken bool [n]."""
    n, k = len(broken), int(broken.sum())
    return {"violations": k, "rate": k / max(n, 1), "bound": float(ltt.upper(k, n, delta))}


def _worst(broken: np.ndarray, delta: float) -> dict[str, Any]:
    """broken bool [n, Q]: the SLO that is broken most."""
    worst = int(broken.sum(axis=0).argmax())
    return {"n": len(broken), "slo": QUALITIES[worst]} | _rate(broken[:, worst], delta)


def write(
    out_dir: str | Path, label: str, judged: Frozen, verdict: Verdict, facts: dict[str, Any], select: list[Request]
) -> tuple[Path, Path]:
    """The folder of the certified copy, and the plot in it. policy.npz is the judged one, byte for byte.

    facts go into the certificate. The manifest's costs are of the policy as it runs, so they are computed again under
    the new margin where the requests of the select split are at hand.
    """
    from adaptivekv.trainer import plots

    old = judged.selector.manifest
    judged.selector.margin = verdict.margin
    metrics = dict(old["metrics"])
    if select:
        metrics |= scoring.compare(judged.selector, old["best_static"], select)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    verdict.table |= facts | {"schema": schema.VERSION, "label_kind": "replay", "created": now}
    new = {"label": label, "margin": verdict.margin, "metrics": metrics, "certificate": verdict.table}
    folder = Path(out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in (("policy.npz", judged.data), ("policy.json", json.dumps(old | new, indent=1).encode())):
            temporary = folder / f".{name}.{os.getpid()}.tmp"
            temporary.write_bytes(data)
            os.replace(temporary, folder / name)
    except OSError as error:
        raise AdaptiveKVError(f"certify: folder {folder}: {error.strerror or error}; name another with --out") from None
    TreeSelector.load(folder)  # a certificate for files that do not load would be none
    axes = verdict.grid, verdict.bound, verdict.charged, verdict.table["alpha"], verdict.margin
    return folder, plots.certificate(*axes, folder / "certificate.png")
