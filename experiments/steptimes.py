"""Times of the decode steps of an 8B model on a GPU, put in place of those that the embedded model takes on a CPU.

    adaptivekv bench decode --no-peers --case "8b 1 4096 int4 | offload(0.05)" ... --out step-times.json
    python -m experiments.selector experiments/data/study --times experiments/results/step-times.json

A step of the small model on a CPU core takes so long that no link to the host is slow beside it. On a GPU a step takes

    base + device bytes / bandwidth + host bytes that are read / link

and the three are fitted to measured steps. Losses stay those of the embedded model, whose bytes stand for as many more
of the 8B model's as a token takes there. Where a step serves several requests, all alike and under the same plan, its
base is paid once and their bytes are all read.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from adaptivekv.bench.decode import SHAPES
from adaptivekv.errors import AdaptiveKVError
from adaptivekv.huggingface import line
from adaptivekv.selector import LINK, READ_SHARE
from adaptivekv.trainer.dataset import Rows


@dataclasses.dataclass(frozen=True)
class Steps:
    base_ms: float  # of a step, whatever it reads
    device_gbps: float
    link_gbps: float  # of the machine the steps were measured on; a request has a link of its own
    worst: float  # relative error of the fit, of the measured step that it misses most
    measured: int
    batch: int = 1  # requests a step

    def of(self, device: np.ndarray, host: np.ndarray, link: np.ndarray | float) -> np.ndarray:
        """Milliseconds of steps whose requests each read so many bytes of device and host, over links of GB/s."""
        return self.base_ms + self.batch * (device / self.device_gbps + host / link) / 1e6


def fit(path: Path) -> Steps:
    """Least squares of relative errors. AdaptiveKVError: not the rows of `bench decode`, or none that offloads."""
    try:
        rows = json.loads(path.read_text())["rows"]
        ms, device, host = (np.array([float(row[key]) for row in rows]) for key in ("ms", "kv_bytes", "host_bytes"))
        shapes = {row["shape"] for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdaptiveKVError(f"times {path}: not rows of `adaptivekv bench decode --out` ({line(error)})") from None
    if shapes != {"8b"} or not host.any() or not (np.isfinite([ms, device, host]).all() and (ms > 0).all()):
        raise AdaptiveKVError(f"times {path}: steps of the shape 8b are needed, some with an offload, all timed")
    parts = np.column_stack([np.ones(len(ms)), device / 1e6, host / 1e6])
    (base, per_device, per_host), _, rank, _ = np.linalg.lstsq(parts / ms[:, None], np.ones(len(ms)), rcond=None)
    if rank < 3 or min(base, per_device, per_host) <= 0:
        raise AdaptiveKVError(f"times {path}: no time a byte can be told from these steps; measure longer contexts")
    found = Steps(float(base), float(1 / per_device), float(1 / per_host), 0.0, len(ms))
    worst = float(np.abs(found.of(device, host, found.link_gbps) / ms - 1).max())
    return dataclasses.replace(found, worst=worst)


def retimed(rows: Rows, steps: Steps) -> Rows:
    """The rows with the steps of the 8B model, over the link that each request was drawn with."""
    scale = token_bytes(SHAPES["8b"]) / token_bytes(SHAPES["embedded"])
    read = rows.host_bytes * rows.plan_features[:, READ_SHARE]
    return dataclasses.replace(
        rows, step_ms=steps.of(scale * rows.device_bytes, scale * read, 10.0 ** rows.state[:, LINK])
    )


def token_bytes(shape: dict[str, Any]) -> int:
    """Of keys and values in 16 bits."""
    return 4 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
