"""Step times of a large model in place of the replayed ones."""

import json

import numpy as np
import pytest

from adaptivekv.errors import AdaptiveKVError
from experiments import steptimes


def written(path, host):
    """Steps of 8 ms, 2,000 GB/s on the device and 50 over the link."""
    device = np.array([1e9, 4e9, 2e8, 1e8])
    ms = 8 + device / 2e9 + np.array(host) / 5e7
    rows = [{"shape": "8b", "ms": m, "kv_bytes": d, "host_bytes": h} for m, d, h in zip(ms, device, host, strict=True)]
    path.write_text(json.dumps({"rows": rows}))
    return path


def test_a_fit_finds_the_times_that_made_the_steps(tmp_path):
    steps = steptimes.fit(written(tmp_path / "a.json", [0.0, 0.0, 1e9, 2e9]))
    assert steps.of(np.array(2e9), np.array(1e9), 25.0) == pytest.approx(8 + 1 + 40)
    assert (steps.base_ms, steps.device_gbps, steps.link_gbps) == pytest.approx((8, 2000, 50))
    assert steps.worst < 1e-6


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": [{"ms": 1}]}', '{"rows": []}'])
def test_what_are_no_steps_is_refused(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(AdaptiveKVError, match="times"):
        steptimes.fit(path)
    with pytest.raises(AdaptiveKVError, match="offload"):
        steptimes.fit(written(path, [0.0] * 4))
    with pytest.raises(AdaptiveKVError, match="timed"):
        steptimes.fit(written(path, [0.0, 0.0, 1e9, float("nan")]))
    rows = json.loads(written(path, [0.0, 0.0, 1e9, 2e9]).read_text())["rows"]
    path.write_text(json.dumps({"rows": rows[2:]}))
    with pytest.raises(AdaptiveKVError, match="longer contexts"):  # two steps for three unknowns
        steptimes.fit(path)
    with pytest.raises(AdaptiveKVError, match="times"):
        steptimes.fit(tmp_path / "missing.json")
