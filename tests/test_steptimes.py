"""Step times of a large model, or of one CPU core, in place of the replayed ones."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.features import schema
from experiments import cputimes, steptimes


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
    eight = dataclasses.replace(steps, batch=8)  # the base is paid once, the bytes eight times
    assert eight.of(np.array(2e9), np.array(1e9), 25.0) == pytest.approx(8 + 8 * 41)


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


ROOT = Path(__file__).parents[1] / "experiments"


def test_a_study_gets_the_steps_of_one_core(tmp_path):
    """5 ms and 0.5 ms a MB for `full`, 1 ms for `offload(0.05)`, all of whose bytes are read."""
    rates = {"full": 0.5, "offload(0.05)": 1.0}
    rows = [
        {"plan": plan, "ms": 5 + rate * (mb + away), "device_bytes": 1e6 * mb, "host_bytes": 1e6 * away}
        for (plan, rate) in rates.items()
        for mb, away in ((10, 0), (1, 19))
    ]
    file = tmp_path / "times.json"
    file.write_text(json.dumps({"rows": rows}))
    steps = cputimes.fit(file)
    assert steps.worst < 1e-9 and steps.of("full", 2e6) == pytest.approx(6)

    table = pq.read_table(ROOT / "data/study/edge/trajectories/part-00000.parquet").slice(0, 40)
    table = table.filter(np.isin(table["plan"].to_pylist(), list(rates)))
    at = schema.NAMES.index("log10_link")
    for before, row in zip(table.to_pylist(), cputimes.retimed(table, steps), strict=True):
        read = row["device_bytes"] + row["host_bytes"]
        over = row["host_bytes"] / 10 ** row["features"][at] / 1e6
        assert row["step_ms"] == pytest.approx(5 + rates[row["plan"]] * read / 1e6 + over)
        assert row["device_byte_s"] == pytest.approx(row["device_bytes"] * row["step_ms"] / 1e3 * row["tokens"])
        assert {k for k in row if str(row[k]) != str(before[k])} <= {"step_ms", "device_byte_s", "host_byte_s"}
    with pytest.raises(AdaptiveKVError, match="int2"):
        steps.of("int2", 1.0)


@pytest.mark.parametrize("ms", ["x", 0, -1, float("nan")])
def test_steps_of_a_core_that_are_no_times_are_refused(tmp_path, ms):
    file = tmp_path / "times.json"
    file.write_text(json.dumps({"rows": [{"plan": "full", "ms": ms, "device_bytes": 1, "host_bytes": 0}]}))
    with pytest.raises(AdaptiveKVError, match="times"):
        cputimes.fit(file)
    file.write_text("{}")
    with pytest.raises(AdaptiveKVError, match="times"):
        cputimes.fit(file)


def test_a_study_that_is_none_keeps_what_it_had(tmp_path, monkeypatch):
    times, part = ROOT / "results/step-times-cpu.json", tmp_path / "study/edge/trajectories/part-00000.parquet"

    def apply(study):
        monkeypatch.setattr("sys.argv", ["cputimes", "apply", str(study), str(times)])
        cputimes.main()

    with pytest.raises(AdaptiveKVError, match="no <scenario>/trajectories"):
        apply(tmp_path)
    part.parent.mkdir(parents=True)
    part.write_bytes(b"junk")
    with pytest.raises(AdaptiveKVError, match="part-00000"):
        apply(tmp_path / "study")
    assert part.read_bytes() == b"junk" and len(list(part.parent.iterdir())) == 1
