"""The monitor at work: label what a running server sampled, test its promise, widen its margin or have it fall back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adaptivekv.cluster import samples as sampling
from adaptivekv.cluster.labels import label
from adaptivekv.cluster.monitor import ALPHA, DELTA, Monitor
from adaptivekv.cluster.reload import URL, reload
from adaptivekv.errors import AdaptiveKVError

Say = Callable[[str], None]


def watch(
    samples: str | Path,
    labels: str | Path,
    plans: Sequence[str] | None = None,
    workers: int = 1,
    alpha: float = ALPHA,
    delta: float = DELTA,
    every: float = 60.0,
    rounds: int | None = None,
    url: str = URL,
    api_key: str | None = None,
    say: Say | None = None,
) -> dict[str, Any]:
    """Watches the policy that the server takes up now, round after round, `every` seconds apart (rounds: None, until
    Ctrl-C). samples, labels: as for `label`, which runs off the server's way. alpha: share of requests that may break
    their SLO; delta: chance of a false alarm. url, api_key: of the server.

    Returns the monitor's state, the selector in force and all advice, which has been applied.
    """
    for name, value in (("alpha", alpha), ("delta", delta)):
        if not 0 < value < 1:
            raise AdaptiveKVError(f"watch: {name} is {value:g}; a share between 0 and 1")
    tell = say or (lambda line: None)
    now = reload(url, api_key)
    monitor, fed, given = Monitor(now["margin"], alpha, delta), 0, []
    try:
        while rounds is None or rounds > 0:
            label(samples, labels, plans, workers)
            mine = [outcome for policy, *outcome in _outcomes(samples, labels) if policy == now["selector"]]
            for promised, violated in mine[fed:]:
                fed += 1
                if advice := monitor.feed(violated, promised):
                    given.append(advice)
                    now, fed = reload(url, api_key, **advice), 0
                    tell(f"too many violations: now {now['selector']}")
                    break  # the rest were decided under the margin before
            kept = f"{monitor.violations} of {monitor.promises} promises broken, {monitor.labels} labels"
            tell(f"{now['selector']}: {kept}, evidence {monitor.evidence:.2f}")
            rounds = None if rounds is None else rounds - 1
            if rounds != 0:
                time.sleep(every)
    except KeyboardInterrupt:
        pass
    return monitor.state() | {"selector": now["selector"], "advice": given}


def _outcomes(samples: str | Path, labels: str | Path) -> list[tuple[str, bool, bool]]:
    return list(sampling.outcomes(sampling.read(samples), labels))
