"""Served requests kept for labelling: a coin at admission, a JSON file each, and whether they kept their SLO.

The file is written when the request begins and again when it ends. One that never ended is therefore seen, and counts
as a violation: a plan must not look good because its requests got lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adaptivekv.cluster.record import document_of, split_of
from adaptivekv.errors import AdaptiveKVError
from adaptivekv.features import schema
from adaptivekv.trainer import trajectories

if TYPE_CHECKING:
    from adaptivekv.cluster.api import Job
    from adaptivekv.engine.session import Session

PATIENCE = 600.0  # seconds after which a request that has not ended, or has no label, is missing
log = logging.getLogger("adaptivekv")


@dataclasses.dataclass
class Sample:
    """One sampled request. The prompt is stored: who may read the folder can read what was asked."""

    id: str
    model: str
    session: str
    document: str
    split: str
    prob: float  # of the coin
    quality: float  # SLO, nats per token
    budget: float  # share of the full cache, 1.0: no limit
    ids: list[int]  # token ids of the prompt
    turns: int  # 1, or 2 where more turns may follow
    policy: str  # that decides, as it begins
    admitted: float  # seconds since 1970
    state: str = "admitted"  # then "done", or "gone": the client left
    plan: str = ""  # in force at the end; what is lost never comes back, so the lossiest there was
    tokens: int = 0  # of the answer
    promised: bool = True  # at the end of the prompt: with no plan sure to keep the SLO, nothing is
    schema: int = schema.VERSION
    features: list[float | None] = dataclasses.field(default_factory=list)  # [F] at the end of the prompt


class Samples:
    """Decides which requests are sampled and keeps their files. Nothing here fails a request: faults are logged."""

    def __init__(self, folder: Path, prob: float, model: str, seed: int = 0):
        self.folder, self.prob, self.model, self.seed = folder, prob, model, seed
        self.folder.mkdir(parents=True, exist_ok=True)

    def picks(self, id: str) -> bool:
        """The coin. It depends on the seed and the server's own name for the request: on nothing a client can choose,
        nor on how plans are explored; and a request that is tried again lands on the same side."""
        at = int.from_bytes(hashlib.sha256(f"sample {self.seed} {id}".encode()).digest()[:8], "big") / 2**64
        return at < self.prob

    def begin(self, job: Job, session: Session, ids: list[int]) -> Sample | None:
        """Where a conversation begins whose plan the controller chooses, and the coin says so."""
        if session.tokens or session.options.plan is not None or not self.picks(job.id):
            return None
        document = document_of(job.messages[0]["content"])
        made = Sample(
            job.id, self.model, job.session or job.id, document, split_of(job.session or document), self.prob,
            session.options.quality, 1.0, ids, 2 if session.options.goes_on else 1, session.cache.controller.name,
            time.time(),
        )  # fmt: skip
        self._write(made)
        return made

    def done(self, sample: Sample, session: Session) -> None:
        (request,) = session.cache.requests
        assert session.last is not None
        sample.state, sample.plan, sample.tokens = "done", str(request.plan), session.last.new_tokens
        sample.budget = min(1.0, request.budget / request.full) if request.budget else 1.0
        made = next((d for d in request.decisions if d.moment == "prefill" and d.features), None)
        sample.promised = made is None or made.promised
        seen = schema.row(made.features if made else {})
        sample.features = [None if math.isnan(v) else v for v in seen.tolist()]
        self._write(sample)

    def gone(self, sample: Sample) -> None:
        sample.state = "gone"
        self._write(sample)

    def refused(self, sample: Sample) -> None:
        """The request was refused before it was answered: no plan has failed it."""
        with contextlib.suppress(OSError):
            self._file(sample).unlink()

    def _file(self, sample: Sample) -> Path:
        return self.folder / f"{sample.id}.json"

    def _write(self, sample: Sample) -> None:
        temporary = self.folder / f".{sample.id}.{os.getpid()}.tmp"
        try:
            temporary.write_text(json.dumps(dataclasses.asdict(sample), allow_nan=False))
            os.replace(temporary, self._file(sample))
        except (OSError, ValueError) as error:
            log.error(f"sample {sample.id}: not written ({error})")


def read(folder: str | Path) -> list[Sample]:
    """All samples, in the order they were admitted."""
    if not Path(folder).is_dir():
        raise AdaptiveKVError(f"samples {folder}: no such folder; serve with --trajectories and --sample")
    found = []
    for file in sorted(Path(folder).glob("*.json")):
        try:
            found.append(Sample(**json.loads(file.read_text())))
        except FileNotFoundError:  # refused since
            continue
        except (OSError, ValueError, TypeError) as error:
            raise AdaptiveKVError(f"sample {file}: not readable ({error}); delete it") from None
    return sorted(found, key=lambda sample: (sample.admitted, sample.id))


def outcomes(
    samples: Sequence[Sample], labels: str | Path, now: float | None = None
) -> Iterator[tuple[str, bool, bool]]:
    """(policy, whether it promised, whether it broke that) of each sample, by admission, up to the first not yet known.

    Who was promised nothing breaks no promise, whatever became of the SLO: so counts a certificate. A request whose
    client left counts as broken, and so does one without a label PATIENCE seconds after it began.
    """
    now = time.time() if now is None else now
    for sample in samples:
        file = labels_of(labels, sample)
        if sample.state == "done" and file.exists():
            (loss,) = (r["label_loss"] for r in trajectories.read(file).to_pylist() if r["plan"] == sample.plan)
            yield sample.policy, sample.promised, sample.promised and loss > sample.quality
        elif sample.state == "gone" or now - sample.admitted > PATIENCE:
            yield sample.policy, True, True
        else:
            return


def labels_of(folder: str | Path, sample: Sample) -> Path:
    """Where the rows of a sample are, once it is labelled."""
    return Path(folder) / f"{sample.id}.parquet"
