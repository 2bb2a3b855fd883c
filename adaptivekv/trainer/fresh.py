"""Whether requests may be used to certify a policy: fresh, labelled by replay alone, and enough of them."""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.trainer import dataset, scoring, tracking
from adaptivekv.trainer.frozen import Frozen
from adaptivekv.trainer.scoring import Request

SEEN = ("train", "select")
SAME = {"request_id": "request", "document": "document", "session_id": "session"}


@dataclasses.dataclass(frozen=True)
class Known:
    """What the policy has seen: rows of the splits train and select."""

    tables: list[pa.Table]
    note: str  # how sure we are that this is all of it

    def select(self) -> list[Request]:
        """The requests it was scored on; none if they are not at hand."""
        for table in self.tables:
            part = table.filter(pa.array(dataset.column(table, "split") == "select"))
            if "replay" in part["label_kind"].to_pylist():
                return scoring.requests(dataset.rows(part))
        return []


def of_split(table: pa.Table) -> pa.Table:
    """The rows of split "certify", every one with a replay label."""
    part = table.filter(pa.array(dataset.column(table, "split") == "certify"))
    if not part.num_rows:
        raise AdaptiveKVError("certify: split 'certify' has 0 rows; give the scenario a share for it and collect")
    kinds = Counter(part["label_kind"].to_pylist())
    if kinds["replay"] and kinds["online"]:
        raise AdaptiveKVError(
            f"certify: label_kind is replay in {kinds['replay']} rows and online in {kinds['online']}; never mixed: "
            "give replayed sources only"
        )
    if kinds["replay"] < part.num_rows:
        raise AdaptiveKVError(
            f"certify: {part.num_rows - kinds['replay']} of {part.num_rows} rows have no replay label; the loss of the "
            "plan chosen must be known: give replayed sources only"
        )
    return part


def training(
    mlflow: Any,
    judged: Frozen,
    table: pa.Table,
    seen: Sequence[str | Path] | None,
    tracking_uri: str | None,
    verb: str = "certify",
) -> Known:
    """Training rows of the sources, of `seen` and of the policy's train run, whose digest proves that they are all.

    verb: what an AdaptiveKVError begins with.
    """
    tables = [table, *([dataset.load(seen, tracking_uri)] if seen else [])]
    note = "as given; its train run is not in the store"
    label = judged.trained_as
    for run in tracking.runs(mlflow, "train"):
        if label.startswith("train-") and run.info.run_id.startswith(label.removeprefix("train-")):
            want, sources = run.data.params.get("data_sha256"), run.data.params.get("sources", "").split()
            if want not in map(dataset.digest, tables):
                with contextlib.suppress(AdaptiveKVError):  # moved or deleted since: what is given must do
                    tables.append(dataset.load(sources, tracking_uri))
            proved = want in map(dataset.digest, tables)
            note = f"run {run.info.run_id}, {'same digest' if proved else 'whose data changed or are gone: as given'}"
    parts = [t.filter(pa.array(np.isin(dataset.column(t, "split").astype(str), SEEN))) for t in tables]
    parts = [part for part in parts if part.num_rows]
    if not parts:
        raise AdaptiveKVError(
            f"{verb}: the training data of {judged.selector.name!r} are not at hand, so nothing shows that the "
            "requests are fresh; name them with --seen"
        )
    return Known(parts, note)


def check(part: pa.Table, known: Known, verb: str = "certify") -> None:
    """No request, document or session may have been seen. verb: as for `training`."""
    for column, word in SAME.items():
        ours = set(part[column].to_pylist())
        both = sorted(ours & {value for table in known.tables for value in table[column].to_pylist()})
        if both:
            raise AdaptiveKVError(
                f"{verb}: {word} {both[0]!r} is in the training data too ({len(both)} of {len(ours)}); "
                "split by document and collect fresh requests"
            )


def requests(part: pa.Table, least: int, alpha: float, delta: float) -> list[Request]:
    """Enough requests, all with the same plans."""
    found = scoring.requests(dataset.rows(part))
    if len(found) < least:
        raise AdaptiveKVError(
            f"certify: {len(found)} requests of split 'certify'; at alpha {alpha:g} and delta {delta:g} at least "
            f"{least} are needed, even without a violation; collect more"
        )
    plans = set(found[0].rows.plan)
    for request in found:
        if set(request.rows.plan) != plans:
            odd = sorted(map(str, set(request.rows.plan) ^ plans))[0]
            name = str(request.rows.request[0])
            raise AdaptiveKVError(
                f"certify: plan {odd!r} was replayed for some requests only (see {name!r}); the choice must be the "
                "same for all: collect them with the same plans"
            )
    return found


def earlier(mlflow: Any, settings: dict[str, Any]) -> int:
    """Other tries on the same rows before, certified or not: of other policies, or at other levels or groups."""
    experiments = [e.experiment_id for e in mlflow.search_experiments()]
    wanted = f"tags.`{tracking.KIND}` = 'certify' and params.data_sha256 = '{settings['data_sha256']}'"
    runs = mlflow.search_runs(experiments, wanted, max_results=1000) if experiments else []
    names = ("policy_sha256", "alpha", "delta", "group")
    return len(
        {tuple(run.data.params.get(n) for n in names) for run in runs} - {tuple(str(settings[n]) for n in names)}
    )
