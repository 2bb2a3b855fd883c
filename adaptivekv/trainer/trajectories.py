"""Trajectories as zstd Parquet: one row per decision, parts of a folder, written whole or not at all."""

import atexit
import os
import queue
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.features import schema

SPLITS = ("train", "select", "certify", "gate", "test")
KINDS = ("replay", "online", None)

SCHEMA = pa.schema(
    [
        ("request_id", pa.string()),
        ("session_id", pa.string()),
        ("step", pa.int64()),  # generated tokens at the decision
        ("moment", pa.string()),  # of the decision: "admission", "prefill", "epoch" or "pressure"
        ("schema_version", pa.int64()),  # of the features
        ("features", pa.list_(pa.float64())),  # [F], NaN = not known
        ("plans", pa.list_(pa.string())),  # the candidates; `allowed` and `probs` are theirs
        ("allowed", pa.list_(pa.bool_())),
        ("probs", pa.list_(pa.float64())),  # after mask and hysteresis
        ("plan", pa.string()),  # the one chosen
        ("plan_features", pa.list_(pa.float64())),  # [PF] of the one chosen
        ("pressure_override", pa.bool_()),
        ("policy_version", pa.string()),
        ("model", pa.string()),  # layers.model_mark, null = not known
        ("seed", pa.int64()),
        ("scenario", pa.string()),  # name of the workload; "serve": live traffic
        ("kind", pa.string()),  # of the text
        ("split", pa.string()),
        ("document", pa.string()),
        ("device_byte_s", pa.float64()),
        ("host_byte_s", pa.float64()),
        ("link_bytes", pa.float64()),
        ("switch_ms", pa.float64()),
        ("step_ms", pa.float64()),  # mean decode step under the plan
        ("device_bytes", pa.int64()),
        ("host_bytes", pa.int64()),
        ("tokens", pa.int64()),  # generated under the plan
        ("device_room", pa.float64()),  # bytes that budget and company leave the request, null = not known
        ("host_room", pa.float64()),
        ("shadow", pa.string()),  # the plan that a challenger would have chosen, null without one
        ("label_loss", pa.float64()),  # mean nats per token, null = not labelled
        ("label_worst", pa.float64()),
        ("label_flip", pa.float64()),
        ("label_kl", pa.list_(pa.float32())),  # nats of each token, whose mean is label_loss
        ("label_right", pa.float64()),  # share of the expected answers in its own answer, null = not known
        ("label_kind", pa.string()),  # "replay" (offline reference), "online" (sample) or null
        ("label_prob", pa.float64()),  # chance that the label was taken
    ],
    metadata={"adaptivekv.trajectories": "4"},
)
LABELS = {"label_loss", "label_worst", "label_flip", "label_kl", "label_right", "label_kind", "label_prob"}
OPTIONAL = {"model", "device_room", "host_room", "shadow"} | LABELS
REQUIRED = set(SCHEMA.names) - OPTIONAL


def check(row: Mapping[str, Any]) -> None:
    """An AdaptiveKVError names the first column at fault. Labels may be absent; nothing else may."""
    for name in sorted(REQUIRED - row.keys()) + sorted(row.keys() - REQUIRED - OPTIONAL):
        raise AdaptiveKVError(f"trajectory row: {'unknown' if name in row else 'missing'} column {name!r}")
    for name in REQUIRED:
        if row[name] is None:
            raise AdaptiveKVError(f"trajectory row: column {name!r} is None; only labels may be")
    lengths = {"features": len(schema.NAMES), "plan_features": len(schema.PLAN_NAMES)}
    for name, length in (lengths | dict.fromkeys(("allowed", "probs"), len(row["plans"]))).items():
        if len(row[name]) != length:
            raise AdaptiveKVError(f"trajectory row: {name!r} has {len(row[name])} entries, not {length}")
    if row["schema_version"] != schema.VERSION:
        raise AdaptiveKVError(f"trajectory row: schema_version is {row['schema_version']}, not {schema.VERSION}")
    if row["plan"] not in row["plans"]:
        raise AdaptiveKVError(f"trajectory row: plan {row['plan']!r} is not one of its plans")
    if row["split"] not in SPLITS:
        raise AdaptiveKVError(f"trajectory row: split {row['split']!r} is not one of {', '.join(SPLITS)}")
    if row.get("label_kind") not in KINDS:
        raise AdaptiveKVError(f"trajectory row: label_kind {row['label_kind']!r} is not replay, online or None")
    if (row.get("label_loss") is None) != (row.get("label_kind") is None):
        raise AdaptiveKVError("trajectory row: label_loss and label_kind come together or not at all")


def write(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Writes one part; the name appears only when the file is complete and on disk."""
    for row in rows:
        check(row)
    try:
        table = pa.Table.from_pylist(list(rows), schema=SCHEMA)
    except (pa.ArrowException, TypeError) as error:
        raise AdaptiveKVError(f"trajectory rows: {' '.join(str(error).split())}") from None
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            pq.write_table(table, file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read(paths: str | Path | Iterable[str | Path]) -> pa.Table:
    """All rows of the files and folders (their *.parquet), columns as in SCHEMA."""
    sources = [Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
    files = [file for path in sources for file in (sorted(path.glob("*.parquet")) if path.is_dir() else [path])]
    if not files:
        where = ", ".join(map(str, sources))
        raise AdaptiveKVError(f"trajectories {where}: no *.parquet there; run `adaptivekv collect`")
    return pa.concat_tables(_part(file) for file in files)


def _part(file: Path) -> pa.Table:
    try:
        table = pq.ParquetFile(file).read()
    except (OSError, pa.ArrowException) as error:
        raise AdaptiveKVError(f"trajectories {file}: not readable ({str(error).splitlines()[0]})") from None
    names, wanted = set(table.column_names), set(SCHEMA.names)
    for name in sorted(wanted - names) + sorted(names - wanted):
        raise AdaptiveKVError(f"trajectories {file}: {'missing' if name in wanted else 'unknown'} column {name!r}")
    try:
        return table.select(SCHEMA.names).cast(SCHEMA)
    except pa.ArrowException as error:
        raise AdaptiveKVError(f"trajectories {file}: {str(error).splitlines()[0]}") from None


class TrajectorySink:
    """Takes rows from a decode loop and writes `part-NNNN.parquet` from a thread of its own.

    `add` never waits for the disk. A part is written every `rows` rows or `seconds` seconds; a crash loses only what
    was not yet written. One sink per folder and prefix. After a failed write rows are dropped and `close` raises.
    """

    def __init__(self, folder: str | Path, rows: int = 2000, seconds: float = 5.0, prefix: str = "part"):
        self.folder, self.rows, self.seconds, self.prefix = Path(folder), rows, seconds, prefix
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob(f".{prefix}-*.tmp"):
            stale.unlink()
        taken = [int(file.stem.rsplit("-", 1)[1]) for file in self.folder.glob(f"{prefix}-[0-9]*.parquet")]
        self._next = max(taken, default=-1) + 1
        self._error: Exception | None = None
        self._queue: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="trajectory-sink", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def add(self, row: Mapping[str, Any]) -> None:
        """Checks the row (an AdaptiveKVError is the caller's mistake) and queues it."""
        check(row)
        if self._error is None:
            self._queue.put(row)

    def close(self) -> None:
        """Writes what is left and ends the thread; a second call does nothing."""
        atexit.unregister(self.close)
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise AdaptiveKVError(f"trajectories {self.folder}: rows were lost ({error})")

    def __enter__(self) -> "TrajectorySink":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _run(self) -> None:
        buffer: list[Mapping[str, Any]] = []
        due = 0.0
        while True:
            try:
                row = self._queue.get(timeout=max(due - time.monotonic(), 0.0) if buffer else None)
            except queue.Empty:
                self._flush(buffer)
                continue
            if row is None:
                self._flush(buffer)
                return
            due = due if buffer else time.monotonic() + self.seconds
            buffer.append(row)
            if len(buffer) >= self.rows or time.monotonic() >= due:
                self._flush(buffer)

    def _flush(self, buffer: list[Mapping[str, Any]]) -> None:
        if buffer and self._error is None:
            try:
                write(buffer, self.folder / f"{self.prefix}-{self._next:04d}.parquet")
                self._next += 1
            except Exception as error:
                self._error = error
        buffer.clear()
