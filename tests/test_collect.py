"""Collecting on a local Ray with the embedded model: the whole loop, a kill in the middle, bad arguments."""

import dataclasses
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.features import schema
from adaptivekv.trainer import dataset, registry, tracking, trajectories, workload
from adaptivekv.trainer.compare import compare
from adaptivekv.trainer.train import train

ray = pytest.importorskip("ray")
pytest.importorskip("mlflow")

from adaptivekv.cluster.collect import collect  # noqa: E402
from adaptivekv.cluster.workers import ReplayWorker, connect  # noqa: E402

PLANS = ["int4", "int2", "streaming(0.25)"]
SMALL = {"plans": PLANS, "max_tokens": 260, "new_tokens": 3, "workers": 1}


@pytest.fixture(scope="module")
def local_ray():
    """One Ray for all tests of this file; `collect` must leave it running."""
    connect(ray, 2)
    yield ray.get_runtime_context().gcs_address
    assert ray.is_initialized()
    ray.shutdown()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A tracking uri; making its database takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


def test_loop(local_ray, store, tmp_path, monkeypatch):
    """collect, train, promote, train again, compare."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("ADAPTIVEKV_CACHE", str(Path.home() / ".cache" / "adaptivekv"))
    seen = []
    mine = {"tracking_uri": store, "splits": ("train", "select"), **SMALL}
    got = collect("serving", 4, progress=lambda done, total: seen.append((done, total)), **mine)
    assert seen == [(i, 4) for i in range(5)]
    assert (got["requests"], got["rows"], got["failed"], got["folder"]) == (4, 16, {}, None)
    assert not list((tmp_path / "cache" / "adaptivekv" / "collect").iterdir())

    table = dataset.load([got["run_id"]], store)
    rows = dataset.rows(table)
    assert Counter(rows.plan) == dict.fromkeys(["full", *PLANS], 4)
    full = rows.plan == "full"
    assert (rows.loss[full] < 1e-6).all() and (rows.loss[~full] > 1e-4).any()
    assert (rows.device_bytes[full] >= rows.device_bytes[rows.plan == "int4"]).all()
    assert (rows.step_ms > 0).all() and Counter(rows.split) == {"train": 12, "select": 4}
    unknown = {name for name, x in zip(schema.NAMES, rows.state.T, strict=True) if np.isnan(x).all()}
    assert unknown <= {"log2_question"} | {n for n in schema.ATTENTION}  # some prompts are too short for page mass
    assert {"kl/int4", "device/int4", "host/int4", "step_ms/int4"} <= got["metrics"].keys()
    assert table["probs"].to_pylist()[0] == [0.25] * 4
    assert np.allclose([np.mean(kl) for kl in table["label_kl"].to_pylist()], rows.loss, atol=1e-6)
    assert np.isfinite(rows.halves).all() and np.isnan(rows.right).all()

    first = train(seed=0, out_dir=tmp_path / "a", tracking_uri=store)
    assert registry.promote(first["run_id"], tracking_uri=store)["version"] == 1
    second = train([got["run_id"]], seed=1, out_dir=tmp_path / "b", tracking_uri=store)
    shown = compare(tracking_uri=store, out_dir=tmp_path)
    assert [row["run_id"] for row in shown["rows"]] == [first["run_id"], second["run_id"]]
    assert [row["champion"] for row in shown["rows"]] == [True, False]
    assert Path(shown["plot"]).stat().st_size > 1000
    assert registry.find_champion(None, store).name == "champion@1"


def test_right_answers():
    """Where answers are known, a request of split test says for every plan what its own answer had of them."""
    needle = dataclasses.replace(workload.load("mixed"), kinds={"needle": 1.0}, tokens=(300, 320), turns=(1, 1))
    (request,) = workload.draw(needle, 1, only=("test",))
    plans = ("full", "streaming(0.1)", "streaming(0.1) | offload(0.5)")
    rows = ReplayWorker(None, plans, 24).replay(dataclasses.replace(request, new=24, host=0.0))
    assert [row["label_right"] for row in rows] == [1.0, 0.0, 0.0]
    assert [row["plan"] for row in rows] == list(plans), "without host memory the last two are one, replayed once"
    assert all(rows[1][name] == rows[2][name] for name in ("label_kl", "device_bytes", "host_bytes", "step_ms"))


COMMAND = """
import sys
from adaptivekv.cluster import collect
collect.BATCH = 1
collect.collect("serving", 5, out=sys.argv[1], tracking_uri=sys.argv[2], plans={plans}, max_tokens=260, new_tokens=3)
"""


def test_kill_interrupt_resume(local_ray, store, tmp_path):
    """SIGKILL leaves whole parts only; Ctrl-C keeps what is done; the end has every request once."""
    out = tmp_path / "work"
    command = [sys.executable, "-c", COMMAND.format(plans=PLANS), str(out), store]
    environment = os.environ | {"RAY_ADDRESS": local_ray}
    child = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 240
        while not list(out.glob("part-*.parquet")):
            assert child.poll() is None, child.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(AdaptiveKVError, match="another collect"):
            collect("serving", 5, out=out, tracking_uri=store, **SMALL)
    finally:
        child.kill()
        child.communicate()
    killed = trajectories.read(out)  # every part is whole
    assert 0 < len(set(killed["request_id"].to_pylist())) < 5 and killed.num_rows % 4 == 0

    kept = len(set(killed["request_id"].to_pylist()))

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(AdaptiveKVError, match=f"stopped with {kept} of 5 .* goes on"):
        collect("serving", 5, out=out, tracking_uri=store, progress=stop, **SMALL)
    with pytest.raises(AdaptiveKVError, match="seed differs"):
        collect("serving", 5, seed=1, out=out, tracking_uri=store, **SMALL)

    got = collect("serving", 5, out=out, tracking_uri=store, **SMALL)
    assert got["requests"] == 5 and got["resumed"] == kept
    table = dataset.load([got["run_id"]], store)
    pairs = Counter(zip(table["request_id"].to_pylist(), table["plan"].to_pylist(), strict=True))
    assert len(pairs) == 20 and set(pairs.values()) == {1}
    assert not [f for f in out.rglob("*") if f.suffix == ".tmp"]
    mlflow = tracking.client(store)
    runs = mlflow.search_runs([tracking.experiment_id(mlflow)], "attributes.run_name = 'serving-5'")
    assert Counter(run.info.status for run in runs) == {"FINISHED": 1, "FAILED": 2}

    again = collect("serving", 5, out=out, tracking_uri=store, **SMALL)  # nothing left to do
    assert again["resumed"] == 5 and again["rows"] == 20


def test_bad_model(tmp_path):
    """A worker says what is wrong, and `collect` says it on."""
    fault = ReplayWorker(str(tmp_path / "nothing-here"), ("full",), 3).load()
    assert fault and "nothing-here" in fault and "\n" not in fault


def test_bad_arguments(tmp_path):
    for wrong, message in (
        ({"scenario": "mixd"}, "by name there are edge, .*, mixed"), ({"requests": 0}, "requests is 0"),
        ({"plans": ["int5"]}, "did you mean"), ({"max_tokens": 5}, "max_tokens is 5"),
        ({"plans": ["offload(0.3, host=0.5)"]}, "offloads to disk, whose time no label knows"),
    ):  # fmt: skip
        with pytest.raises(AdaptiveKVError, match=message):
            collect(**({"requests": 1, "out": tmp_path / "out"} | wrong))
    (tmp_path / "part-00000.parquet").write_bytes(b"")
    with pytest.raises(AdaptiveKVError, match="parts of something else"):
        collect(requests=1, out=tmp_path)


def test_record_is_of_the_champion():
    """The packaged champion loads where there is no registry, and says how it was scored."""
    found = registry.find_champion(None, "sqlite:////nowhere/mlflow.db")
    assert found.name.startswith(("train-", "certify-")) and found.manifest["metrics"]["select_cost"] > 0
