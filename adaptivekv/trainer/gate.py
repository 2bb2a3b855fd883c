"""Whether a candidate is better than the champion on fresh requests, each judged at every SLO of the ladder."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.selector import Selector
from adaptivekv.trainer import dataset, fresh, scoring
from adaptivekv.trainer.frozen import Frozen

LEVEL = 0.95  # of the one-sided interval
DOCUMENTS = 8  # fewer make a bootstrap's interval too short


@dataclasses.dataclass(frozen=True)
class Gate:
    """Charged costs, relative to the full cache; the difference is candidate less champion, of the same requests."""

    requests: int
    documents: int
    candidate: float
    champion: float
    difference: float
    upper: float  # end of the one-sided interval of the difference, by bootstrap of whole documents

    @property
    def better(self) -> bool:
        return self.upper < 0

    def __str__(self) -> str:
        return (
            f"charged cost {self.candidate:.4f} against {self.champion:.4f} on {self.requests} fresh requests of "
            f"{self.documents} documents: {self.difference:+.4f}, at most {self.upper:+.4f} with 95 % confidence"
        )


def replay(
    candidate: Frozen,
    champion: Selector,
    sources: Sequence[str | Path],
    mlflow: Any,
    seen: Sequence[str | Path] | None = None,
    tracking_uri: str | None = None,
) -> Gate:
    """Split "gate" of the sources, replayed through the plans, none of it in the candidate's training data.

    seen: that data, where neither the sources nor its train run hold it. AdaptiveKVError: no such rows, too few
    documents, seen ones, or training data that nothing shows.
    """
    table = dataset.load(sources, tracking_uri)
    dataset.model(table, candidate.selector.model)
    part = table.filter(pa.array(dataset.column(table, "split") == "gate"))
    if not part.num_rows:
        raise AdaptiveKVError("gate: split 'gate' has 0 rows; collect some with --split gate, or label served samples")
    fresh.check(part, fresh.training(mlflow, candidate, table, seen, tracking_uri, "gate"), "gate")
    found = compare(candidate.selector, champion, scoring.requests(dataset.rows(part)))
    if found.documents < DOCUMENTS:
        raise AdaptiveKVError(
            f"gate: {found.documents} documents in split 'gate'; at least {DOCUMENTS} for an interval, collect more"
        )
    return found


def compare(candidate: Selector, champion: Selector, requests: Sequence[scoring.Request]) -> Gate:
    """The cluster bootstrap of Field and Welsh (2007), doi 10.1111/j.1467-9868.2007.00593.x."""
    ours, theirs = (scoring.play(scoring.trusting(s), requests).charged.mean(1) for s in (candidate, champion))
    documents = np.array([request.document for request in requests])
    upper = np.quantile(scoring.resampled((ours - theirs)[:, None], documents)[:, 0], LEVEL)
    means = float(ours.mean()), float(theirs.mean())
    return Gate(len(requests), len(set(documents)), *means, means[0] - means[1], float(upper))
