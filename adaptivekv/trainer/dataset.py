"""Labelled rows as arrays, from trajectory files or from the MLflow runs that hold them."""

import dataclasses
import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.features import schema
from adaptivekv.trainer import tracking, trajectories


@dataclasses.dataclass(frozen=True)
class Rows:
    """n labelled decisions."""

    state: np.ndarray  # [n, F]
    plan_features: np.ndarray  # [n, PF]
    request: np.ndarray  # [n] str
    document: np.ndarray  # [n] str
    plan: np.ndarray  # [n] str
    scenario: np.ndarray  # [n] str
    kind: np.ndarray  # [n] str, of the text
    split: np.ndarray  # [n] str
    step: np.ndarray  # [n]
    tokens: np.ndarray  # [n]
    loss: np.ndarray  # [n] nats per token, >= 0
    worst: np.ndarray  # [n] the same, of the worst token; NaN: not known
    flip: np.ndarray  # [n] share of the tokens whose most likely choice differs; NaN: not known
    halves: np.ndarray  # [n, 2] loss of the even and of the odd tokens; NaN: not known
    right: np.ndarray  # [n] share of the expected answers in its own answer; NaN: not known
    step_ms: np.ndarray  # [n]
    device_bytes: np.ndarray  # [n]
    host_bytes: np.ndarray  # [n]
    device_room: np.ndarray  # [n] bytes its limits leave the request; inf: none known
    host_room: np.ndarray  # [n]

    def __len__(self) -> int:
        return len(self.loss)

    def where(self, pick: np.ndarray) -> "Rows":
        """The rows of a mask or of indices."""
        return Rows(**{f.name: getattr(self, f.name)[pick] for f in dataclasses.fields(self)})

    def of(self, split: str) -> "Rows":
        return self.where(self.split == split)


def load(sources: Sequence[str | Path], tracking_uri: str | None = None) -> pa.Table:
    """Each source is a folder or file of trajectories, or the id of a run that has some under trajectories/."""
    with tempfile.TemporaryDirectory() as folder:
        paths: list[str | Path] = []
        for source in sources:
            if not Path(source).exists():
                into = Path(folder) / str(len(paths))
                into.mkdir()
                source = tracking.download(tracking.client(tracking_uri), str(source), "trajectories", into)
            paths.append(source)
        return trajectories.read(paths)


def digest(table: pa.Table) -> str:
    """SHA-256 of the rows in their order."""
    sha = hashlib.sha256()
    for batch in table.to_batches():
        sha.update(batch.serialize())
    return sha.hexdigest()


def rows(table: pa.Table) -> Rows:
    """The rows with a replay label. Online labels are another kind and never mixed in."""
    versions = set(table["schema_version"].to_pylist())
    if versions - {schema.VERSION}:
        raise AdaptiveKVError(f"trajectories: feature schema {versions}, not {schema.VERSION}; collect them again")
    kind = column(table, "label_kind")
    table = table.filter(pa.array(kind == "replay"))
    if not table.num_rows:
        raise AdaptiveKVError("trajectories: no row has a replay label; collect with labels")
    found = Rows(
        state=matrix(table, "features", len(schema.NAMES)),
        plan_features=matrix(table, "plan_features", len(schema.PLAN_NAMES)),
        request=column(table, "request_id"),
        document=column(table, "document"),
        plan=column(table, "plan"),
        scenario=column(table, "scenario"),
        kind=column(table, "kind"),
        split=column(table, "split"),
        step=column(table, "step"),
        tokens=column(table, "tokens"),
        loss=np.maximum(column(table, "label_loss"), 0.0),  # rounding makes tiny negative KL
        worst=column(table, "label_worst"),
        flip=column(table, "label_flip"),
        halves=halves(table["label_kl"].to_pylist()),
        right=column(table, "label_right").astype(np.float64),
        step_ms=np.maximum(column(table, "step_ms"), 1e-3),
        device_bytes=column(table, "device_bytes"),
        host_bytes=column(table, "host_bytes"),
        device_room=np.nan_to_num(column(table, "device_room").astype(np.float64), nan=np.inf),
        host_room=np.nan_to_num(column(table, "host_room").astype(np.float64), nan=np.inf),
    )
    if not (np.isfinite(found.loss) & np.isfinite(found.step_ms)).all():
        raise AdaptiveKVError("trajectories: label_loss or step_ms is not finite; collect them again")
    shared = [set(found.request[found.split == s]) for s in trajectories.SPLITS]
    if sum(map(len, shared)) != len(set(found.request)):
        raise AdaptiveKVError("trajectories: a request_id is in two splits; split by document and session")
    return found


def model(table: pa.Table, policy: str = "") -> str:
    """The mark of the model that the rows are of; "" where they do not say. policy: the mark of the one to be judged.

    AdaptiveKVError: rows of two models, or of another than the policy's.
    """
    marks = sorted({*table["model"].drop_null().to_pylist(), *([policy] if policy else [])})
    if len(marks) > 1:
        whose = f"; the policy was trained on {policy}" if policy else ""
        raise AdaptiveKVError(f"trajectories: of the models {' and '.join(marks)}{whose}; take one model at a time")
    return marks[0] if marks else ""


def by_plan(rows: Rows) -> Rows:
    """One row per request and plan, sorted so: first features, token-weighted mean loss, bytes and time."""
    order = np.lexsort((rows.step, rows.plan, rows.request))
    rows = rows.where(order)
    new = np.append(True, (rows.request[1:] != rows.request[:-1]) | (rows.plan[1:] != rows.plan[:-1]))
    group = np.cumsum(new) - 1
    weight = np.maximum(rows.tokens, 1)
    total = np.bincount(group, weight)
    averaged = ("loss", "flip", "step_ms", "device_bytes", "host_bytes")
    means = {name: np.bincount(group, weight * getattr(rows, name)) / total for name in averaged}
    worst = np.maximum.reduceat(rows.worst, np.flatnonzero(new))
    return dataclasses.replace(rows.where(new), worst=worst, **means)


def halves(losses: Sequence[Sequence[float] | None]) -> np.ndarray:
    """Mean over the even and over the odd tokens of each row's losses: [n, 2], NaN where there are none."""
    return np.array([[np.mean(kl[i::2]) if kl and len(kl) > 1 else np.nan for i in (0, 1)] for kl in losses])


def column(table: pa.Table, name: str) -> np.ndarray:
    return table[name].to_numpy()


def matrix(table: pa.Table, name: str, width: int) -> np.ndarray:
    """A list column as float64 [n, width]."""
    flat = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float64)
    if len(flat) != table.num_rows * width:
        raise AdaptiveKVError(f"trajectories: {name!r} are not all {width} long; collect them again")
    return flat.reshape(-1, width)
