"""The learning loop on made-up trajectories whose structure is known: train, promote, train again, compare, resolve."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.features import schema
from adaptivekv.selector import RuleTable, TreeSelector
from adaptivekv.trainer import dataset, registry, scoring, tracking, trajectories
from adaptivekv.trainer.compare import compare
from adaptivekv.trainer.train import train

pytest.importorskip("mlflow")

ROOT = str(Path(__file__).parents[1])

# plan: (plan features that differ from full, loss of an easy request)
PLANS = {
    "full": ({}, 0.0),
    "int8": ({"k_bits": 8, "v_bits": 8}, 1e-5),
    "int4": ({"k_bits": 4, "v_bits": 4}, 1e-3),
    "k4v2": ({"k_bits": 4, "v_bits": 2}, 4e-3),
    "int2": ({"k_bits": 2, "v_bits": 2}, 0.03),
    "snapkv(0.5)": ({"keep": 0.5, "by_window": 1}, 0.06),
    "offload(0.25)": ({"device_share": 0.25}, 0.0),
}
FULL = dict.fromkeys(schema.PLAN_NAMES, 0) | {"keep": 1, "k_bits": 16, "v_bits": 16, "device_share": 1, "read_share": 1}


def rows(requests: int, split: str, seed: int) -> list[dict]:
    """Requests full of digits lose ten times more under every lossy plan."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(requests):
        digits = rng.random()
        prompt = rng.uniform(9, 13)
        noise = 10 ** rng.normal(0, 0.05)
        state = schema.row({"log2_prompt": prompt, "digit_share": digits, "turn": 0.0})
        for plan, (changes, loss) in PLANS.items():
            f = FULL | changes
            size = int(2**prompt * 23040 * f["keep"] * (f["k_bits"] + f["v_bits"]) / 32)
            device = int(size * f["device_share"])
            made.append(
                {
                    "request_id": f"{split}-{number}", "session_id": f"{split}-{number}", "step": 0,
                    "moment": "prefill", "kind": "table", "schema_version": schema.VERSION, "features": state,
                    "plans": list(PLANS),
                    "allowed": [True] * len(PLANS), "probs": [1 / len(PLANS)] * len(PLANS), "plan": plan,
                    "plan_features": schema.row(f, schema.PLAN_NAMES), "pressure_override": False,
                    "policy_version": "rules", "seed": seed, "scenario": "digits" if digits > 0.5 else "prose",
                    "split": split, "document": f"{split}-{number}", "device_byte_s": 1.0, "host_byte_s": 0.0,
                    "link_bytes": 0.0, "switch_ms": 0.0, "step_ms": 5 + device / 1e8 + (size - device) / 1e7,
                    "device_bytes": device, "host_bytes": size - device, "tokens": 32,
                    "label_loss": loss * noise * (10 if digits > 0.5 else 1), "label_worst": 1.0, "label_flip": 0.1,
                    "label_kind": "replay", "label_prob": 1.0,
                }
            )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trajectories")
    trajectories.write(rows(60, "train", 0), folder / "part-0000.parquet")
    trajectories.write(rows(40, "select", 1), folder / "part-0001.parquet")
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


def test_the_loop(data, store, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert registry.resolve(store) is None

    mlflow = tracking.client(store)
    with tracking.run(mlflow, "collect") as collected:
        mlflow.log_artifacts(collected, str(data), "trajectories")
    lines: list[str] = []
    first = train(None, 0, tmp_path / "one", store, progress=lines.append)  # from the latest collect run
    assert json.dumps(first) and lines and first["requests"] == 60
    m = first["metrics"]
    assert m["parity"] < 1e-9 and m["mae_log10_loss"] < 0.2 and 0.8 < m["coverage_high"] <= 1
    assert first["best_static"]["0.003"] == "int8"
    flat = TreeSelector.load(first["policy"])
    known = [schema.row(FULL | changes, schema.PLAN_NAMES) for changes, _ in PLANS.values()]
    seen = flat.predict(schema.row({"log2_prompt": 10.0, "log10_quality": -5.0}), np.stack(known))
    assert ((seen.loss == 0) == (seen.chance == 0)).all() and (seen.chance == 0).sum() == 2  # full and its offload
    # At 0.003 easy requests can take int4 and hard ones cannot: a fixed plan pays for the hard. The oracle bounds all.
    assert m["cost/selector"] < 0.85 * m["cost/static"] and m["select_cost"] < m["charged/static"]
    assert m["violation/selector"] < 0.15
    assert m["cost/oracle"] <= m["cost/selector"] + 1e-9 and m["violation/oracle"] == 0
    run = mlflow.get_run(first["run_id"])
    assert run.data.tags[tracking.KIND] == "train" and run.data.metrics["select_cost"] == m["select_cost"]
    logged = {artifact.path for artifact in mlflow.list_artifacts(first["run_id"], "policy")}
    assert logged == {"policy/policy.npz", "policy/policy.json"}
    assert len(mlflow.list_artifacts(first["run_id"], "plots")) == 4

    assert registry.promote(first["run_id"], tracking_uri=store)["version"] == 1
    path = registry.resolve(store)
    assert path is not None and path.name == "champion@1"
    found = registry.find_champion(tracking_uri=store)
    assert found.name == "champion@1" and isinstance(found, TreeSelector)
    state = schema.row({"log2_prompt": 11.0, "digit_share": 0.9})
    int4 = schema.row(FULL | PLANS["int4"][0], schema.PLAN_NAMES)[None]
    hard = found.predict(state, int4).loss
    state[schema.NAMES.index("digit_share")] = 0.1
    assert 5 < hard / found.predict(state, int4).loss < 20

    with pytest.raises(AdaptiveKVError, match="is not below champion@1's"):
        registry.promote(first["run_id"], tracking_uri=store)
    second = train([data], seed=1, out_dir=tmp_path / "two", tracking_uri=store)
    done = registry.promote(second["run_id"], force=True, tracking_uri=store)
    assert done["version"] == 2 and done["previous"] == "champion@1"
    assert registry.find_champion("champion", store).name == "champion@2"
    again = registry.find_champion(tracking_uri=store, selector=str(tmp_path / "two"))
    assert again.name == f"train-{second['run_id'][:8]}"

    seen = compare(tracking_uri=store, out_dir=tmp_path / "plots")
    assert [r["run_id"] for r in seen["rows"]] == [first["run_id"], second["run_id"]]
    assert [r["champion"] for r in seen["rows"]] == [False, True]
    assert Path(seen["plot"]).stat().st_size > 5000 and json.dumps(seen)
    assert [r["kind"] for r in compare("all", store)["rows"]] == ["collect", "train", "train"]

    with pytest.raises(AdaptiveKVError, match="run 'nope': not in"):
        registry.promote("nope", tracking_uri=store)
    with pytest.raises(AdaptiveKVError, match="has no artifacts under policy/"):
        registry.promote(collected, tracking_uri=store)
    check_broken_champion(store, done, mlflow, tmp_path)


def check_broken_champion(store, done, mlflow, tmp_path):
    """Damage in the cache is fetched again; damage in the store means rules, never an exception, and no promotion."""
    path = registry.resolve(store)
    (path / "policy.npz").write_bytes(b"damaged")
    with pytest.raises(AdaptiveKVError, match="SHA-256 differs"):
        registry.find_champion(str(path), store)
    assert registry.find_champion(tracking_uri=store).name == "champion@2"
    for file in (path / "policy.npz", tmp_path / "policy.npz"):
        file.write_bytes(b"damaged")
    mlflow.log_artifact(done["run_id"], str(tmp_path / "policy.npz"), "policy")
    assert isinstance(registry.find_champion(tracking_uri=store), RuleTable)
    with pytest.raises(AdaptiveKVError, match="SHA-256 differs"):
        registry.promote(done["run_id"], force=True, tracking_uri=store)
    assert list(tmp_path.glob("mlflow.db")) == list(tmp_path.glob("mlruns")) == []


def test_no_store_means_packaged_or_rules_without_mlflow(tmp_path):
    code = (
        "import sys; from adaptivekv.trainer.registry import find_champion, resolve; assert resolve() is None;"
        "find_champion(); print(find_champion('rules').name, {'mlflow', 'sklearn', 'pyarrow'} & set(sys.modules))"
    )
    env = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"} | {"PYTHONPATH": ROOT}
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
    assert out == "rules set()\n" and not list(tmp_path.iterdir())


def test_a_store_that_does_not_answer_is_skipped(tmp_path, caplog):
    assert registry.resolve("http://127.0.0.1:9") is None
    (tmp_path / "mlflow.db").write_bytes(b"not a database, though long enough to look like one" * 20)
    assert registry.resolve(f"sqlite:///{tmp_path}/mlflow.db") is None
    assert len(caplog.records) == 2 and all("elsewhere" in r.message for r in caplog.records)
    with pytest.raises(AdaptiveKVError, match="takes no folder"):
        registry.resolve("file:./mlruns")


def test_rows_round_trip_and_faults(tmp_path):
    good = rows(1, "train", 0)
    online = good[1] | {"label_kind": "online"}
    unlabelled = {k: v for k, v in good[2].items() if not k.startswith("label")}
    trajectories.write([good[0], online, unlabelled], tmp_path / "part-0000.parquet")
    table = trajectories.read(tmp_path)
    assert table.schema.equals(trajectories.SCHEMA) and table["label_loss"].to_pylist()[2] is None
    assert len(dataset.rows(table)) == 1  # only replay labels train
    assert np.isnan(dataset.rows(table).state).sum() == len(schema.NAMES) - 3
    faults = {
        "missing column 'seed'": {k: v for k, v in good[0].items() if k != "seed"},
        "unknown column 'colour'": good[0] | {"colour": 1},
        "'probs' has 1 entries, not 7": good[0] | {"probs": [1.0]},
        "'features' has 2 entries": good[0] | {"features": [1.0, 2.0]},
        "split 'dev' is not one of": good[0] | {"split": "dev"},
        "plan 'int3' is not one of": good[0] | {"plan": "int3"},
        "column 'document' is None": good[0] | {"document": None},
        "come together": good[0] | {"label_kind": None},
        "trajectory rows: .*seed|trajectory rows: ": good[0] | {"seed": "seven"},
    }
    for message, row in faults.items():
        with pytest.raises(AdaptiveKVError, match=message) as caught:
            trajectories.write([row], tmp_path / "bad.parquet")
        assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["part-0000.parquet"]


def test_foreign_and_damaged_parts(tmp_path):
    part = trajectories.write(rows(1, "train", 0), tmp_path / "part-0000.parquet")
    table = trajectories.read(part)
    trajectories.pq.write_table(table.drop_columns("seed"), tmp_path / "less.parquet")
    trajectories.pq.write_table(table.append_column("x", table["seed"]), tmp_path / "more.parquet")
    (tmp_path / "half.parquet").write_bytes(part.read_bytes()[:2000])
    wanted = dict.fromkeys(("half", "none"), "not readable")
    wanted |= {"less": "missing column 'seed'", "more": "unknown column 'x'"}
    for name, message in wanted.items():
        with pytest.raises(AdaptiveKVError, match=f"{name}.parquet.*{message}") as caught:
            trajectories.read(tmp_path / f"{name}.parquet")
        assert "\n" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdaptiveKVError, match=r"no \*.parquet there"):
        trajectories.read(tmp_path / "empty")


def test_a_request_in_two_splits_is_refused(tmp_path):
    both = rows(1, "train", 0)
    both[0]["split"] = "select"
    trajectories.write(both, tmp_path / "a.parquet")
    with pytest.raises(AdaptiveKVError, match="in two splits"):
        dataset.rows(trajectories.read(tmp_path))


def test_two_models_are_not_mixed(tmp_path, store):
    for model, split in (("llama 30x576", "train"), ("gemma 18x640", "select")):
        some = [row | {"model": model} for row in rows(3, split, 0)]
        trajectories.write(some, tmp_path / f"{split}.parquet")
    with pytest.raises(AdaptiveKVError, match="gemma 18x640 and llama 30x576; take one"):
        train([tmp_path], out_dir=tmp_path / "policy", tracking_uri=store)
    one = trajectories.read(tmp_path / "train.parquet")
    assert dataset.model(one) == dataset.model(one, "llama 30x576") == "llama 30x576"
    with pytest.raises(AdaptiveKVError, match="the policy was trained on qwen"):
        dataset.model(one, "qwen")


def test_train_needs_both_splits(tmp_path, store):
    trajectories.write(rows(3, "train", 0), tmp_path / "a.parquet")
    with pytest.raises(AdaptiveKVError, match="split 'select' has 0"):
        train([tmp_path], out_dir=tmp_path / "policy", tracking_uri=store)
    assert not (tmp_path / "policy").exists()


def test_scoring_by_hand(data):
    made = dataset.rows(trajectories.read(data)).of("select")
    requests = scoring.requests(made)
    assert len(requests) == 40 and all(r.cost[r.full] == 1 for r in requests)
    metrics = scoring.compare(RuleTable(), {str(q): "full" for q in scoring.QUALITIES}, requests)
    assert metrics["cost/static"] == 1 and metrics["violation/static"] == 0
    assert metrics["charged/rules"] == pytest.approx(metrics["cost/rules"] + metrics["violation/rules"])
    twice = dataset.by_plan(made.where(np.tile(np.arange(len(made)), 2)))
    assert len(twice) == len(made) and sorted(twice.loss) == pytest.approx(sorted(made.loss))


def test_sink_parts_and_errors(tmp_path):
    row = rows(1, "train", 0)[0]
    with trajectories.TrajectorySink(tmp_path, rows=4, seconds=60) as sink:
        for _ in range(10):
            sink.add(row)
        with pytest.raises(AdaptiveKVError, match="unknown column"):
            sink.add(row | {"x": 1})
    assert [p.name for p in sorted(tmp_path.iterdir())] == [f"part-000{i}.parquet" for i in range(3)]
    with trajectories.TrajectorySink(tmp_path, seconds=0.05) as sink:  # goes on after the last part, by time
        sink.add(row)
        deadline = time.monotonic() + 10
        while not (tmp_path / "part-0003.parquet").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert trajectories.read(tmp_path).num_rows == 11
    sink = trajectories.TrajectorySink(tmp_path, rows=1)
    sink.add(row | {"seed": "seven"})  # a fault only the writer sees
    with pytest.raises(AdaptiveKVError, match="rows were lost"):
        sink.close()
    sink.close()


def test_sink_survives_kill(tmp_path):
    code = (
        f"import sys, time; sys.path[:0] = [{ROOT!r}, {str(Path(__file__).parent)!r}]\n"
        "from test_trainer import rows, trajectories\n"
        "made = rows(3, 'train', 0)\n"
        f"sink = trajectories.TrajectorySink({str(tmp_path)!r}, rows=7)\n"
        "while True:\n"
        "    for row in made: sink.add(row)\n"
        "    time.sleep(0.002)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("part-*.parquet"))) < 5 and time.monotonic() < deadline:
            time.sleep(0.005)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    whole = list(tmp_path.glob("*.parquet"))
    assert len(whole) >= 5 and trajectories.read(tmp_path).num_rows == 7 * len(whole)
    trajectories.TrajectorySink(tmp_path).close()
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".parquet"]
