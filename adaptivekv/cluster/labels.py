"""Labels of served samples: each finished one is replayed through every plan, on Ray, off the way of any request."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from adaptivekv.cluster.samples import Sample, labels_of, read
from adaptivekv.cluster.workers import Worker, actors, judged, replayed, row
from adaptivekv.errors import AdaptiveKVError
from adaptivekv.features import schema
from adaptivekv.trainer import replay as replaying
from adaptivekv.trainer import trajectories
from adaptivekv.trainer.workload import Request

LINK, SESSION = schema.NAMES.index("log10_link"), schema.NAMES.index("session")
Progress = Callable[[int, int], None]


def label(
    samples: str | Path,
    out: str | Path,
    plans: Sequence[str] | None = None,
    workers: int = 1,
    new_tokens: int = 256,
    model: str | None = None,
    progress: Progress | None = None,
    only: Collection[str] | None = None,
    pool: list[Any] | None = None,
) -> dict[str, Any]:
    """Replays every finished sample through all plans, on Ray, into trajectories that `train` reads.

    plans: default the controller's candidates; `full` and the one that was chosen always come in. new_tokens: most of
    an answer that are judged. A sample that has its rows in `out` is left alone, so the same command goes on where it
    was; other plans want another folder. progress(done, of all) after each. only: ids of those to label. pool:
    `labellers` of these plans that are there already. Returns samples, labelled (now), rows, failed {id: why}, folder.
    """
    every = [s for s in read(samples) if only is None or s.id in only]
    todo = [s for s in every if s.state == "done" and not labels_of(out, s).exists()]
    Path(out).mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    rows = 0
    if old := [s for s in todo if s.schema != schema.VERSION]:
        raise AdaptiveKVError(f"sample {old[0].id}: feature schema {old[0].schema}, not {schema.VERSION}; delete it")
    served = {model or s.model for s in todo}
    if len(served) > 1:
        raise AdaptiveKVError(f"samples {samples}: of several models ({', '.join(sorted(served))}); name one")
    if todo:
        count, name = min(workers, len(todo)), served.pop()
        given = contextlib.nullcontext(pool) if pool else labellers(count, name, plans, new_tokens)
        with given as ready:
            for done, (sample, found) in enumerate(replayed(ready, todo), 1):
                if isinstance(found, str):
                    failed[sample.id] = found
                else:
                    trajectories.write(found, labels_of(out, sample))
                    rows += len(found)
                if progress:
                    progress(done, len(todo))
    return {
        "samples": len(every),
        "labelled": len(todo) - len(failed),
        "rows": rows,
        "failed": failed,
        "folder": str(out),
    }


class Labeller(Worker):
    """Its jobs were served: their tokens and what the controller saw are known."""

    def replay(self, sample: Sample) -> list[dict[str, Any]] | str:
        if fault := self.load():
            return fault
        new = max(2, min(sample.tokens, self.new_tokens))
        try:
            plans = judged([*self.plans, sample.plan], "label")
            reference = replaying.reference(self.loaded, sample.ids, new, stop=True, plans=plans)
            try:
                state = [math.nan if value is None else value for value in sample.features]
                state[SESSION] = 0.0  # one turn is judged: a label that knows of no other says nothing of them
                cpu = self.loaded.device.type == "cpu"
                link = 10 ** state[LINK] if cpu and math.isfinite(state[LINK]) else None
                runs = replaying.replays(reference, plans)
                asked = _asked(sample, new)
                own = {"session_id": sample.session, "label_prob": sample.prob, "model": reference.cache.mark}
                tokens = len(reference.tokens)
                return [row(asked, state, plans, plan, run, tokens, link) | own for plan, run in runs.items()]
            finally:
                reference.free()
        except AdaptiveKVError as error:
            return str(error)


def _asked(sample: Sample, new: int) -> Request:
    """The sample as a drawn request, of which only what a row says matters."""
    return Request(
        sample.id, "serve", "serve", sample.split, sample.document, 0, len(sample.ids), new, sample.turns,
        sample.quality, sample.budget, host=1.0, link=1.0, pressure=0.0,
    )  # fmt: skip


def labellers(
    count: int, model: str | None, plans: Sequence[str] | None, new_tokens: int
) -> contextlib.AbstractContextManager[list[Any]]:
    """`count` Labellers of these plans (default: the controller's candidates)."""
    return actors(count, model, judged(plans, "label"), new_tokens, Labeller, "label")
