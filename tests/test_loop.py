"""The closed loop: samples, shadows, what promote refuses, and the whole circle on a real server."""

import asyncio
import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_trainer import rows as made_up
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from adaptivekv.embedded import converted
from adaptivekv.engine.session import Options
from adaptivekv.errors import AdaptiveKVError
from adaptivekv.model import LoadedModel, load
from adaptivekv.selector import Prediction, RuleTable, TreeSelector
from adaptivekv.trainer import dataset, gate, registry, scoring, tracking, trajectories, workload
from adaptivekv.trainer.train import train

pytest.importorskip("mlflow")
pytest.importorskip("ray.serve")
from adaptivekv.cluster import loop as looping
from adaptivekv.cluster import samples as sampling
from adaptivekv.cluster.api import Job
from adaptivekv.cluster.app import build
from adaptivekv.cluster.conversations import Engine, make_engine
from adaptivekv.cluster.labels import Labeller, label
from adaptivekv.cluster.monitor import WIDEST

PLANS = ("full", "int8", "int4", "k4v2")
WHALE = [{"role": "user", "content": "The whale swam north. " * 20 + "Where did it swim?"}]


# -- samples and shadows, without Ray ----------------------------------------------------------------------------------


async def run(engine: Engine, **more: Any) -> list[dict[str, Any]]:
    asked: dict[str, Any] = {"id": "job", "messages": WHALE, "max_tokens": 4, "temperature": 0.0}
    return [event async for event in engine.generate(Job(**(asked | more)))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Two layers that know nothing, with SmolLM2's tokenizer: what is tested here is not the model."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(str(converted("smollm2")))
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=64, max_position_embeddings=4096, vocab_size=len(tokenizer), tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load(str(folder), "cpu", "float32")


@pytest.fixture
def engine(tiny: LoadedModel, tmp_path: Path) -> Any:
    made = make_engine(tiny, Options(selector=RuleTable()), 2, str(tmp_path), 1.0, PLANS)
    yield made
    made.close()


def test_samples_round_trip(engine: Engine, tiny: LoadedModel, tmp_path: Path) -> None:
    async def ask() -> None:
        await run(engine, id="plain")
        await run(engine, id="fixed", plan="int8")  # no choice, so nothing of the policy's to judge
        talk = [*WHALE, {"role": "assistant", "content": "North."}, {"role": "user", "content": "And then?"}]
        await run(engine, id="first", session="a")
        await run(engine, id="second", session="a", messages=talk)  # not a first turn
        await run(engine, id="small", budget=1000)  # refused: no plan has failed it
        leaver = engine.generate(Job("left", WHALE, max_tokens=2000, seed=1))
        await anext(leaver)
        await leaver.aclose()  # type: ignore[attr-defined]

    asyncio.run(ask())
    engine.close()
    found = {sample.id: sample for sample in sampling.read(tmp_path / "samples")}
    assert list(found) == ["plain", "first", "left"]
    plain = found["plain"]
    assert (plain.state, plain.policy, plain.prob, plain.turns, found["first"].turns) == ("done", "rules", 1.0, 1, 2)
    assert found["left"].state == "gone" and 0 < plain.tokens <= 4 and plain.plan in PLANS
    assert tiny.tokenizer.decode(plain.ids).count("whale") == 20
    served = [r for r in trajectories.read(tmp_path).to_pylist() if r["request_id"] == "plain"]
    assert {(r["split"], r["document"], r["moment"]) for r in served if r["tokens"]} == {
        (plain.split, plain.document, "prefill")
    }
    assert all(r["device_room"] > r["device_bytes"] and r["host_room"] > 0 for r in served)
    assert any(r["features"][4] == 1 for r in trajectories.read(tmp_path).to_pylist() if r["session_id"] == "a")

    worker = Labeller(None, PLANS, 16)
    worker.loaded = tiny
    labels = tmp_path / "labels"
    for sample in (plain, found["first"]):
        made = worker.replay(sample)
        assert isinstance(made, list)
        trajectories.write(made, sampling.labels_of(labels, sample))
    kept = dataset.rows(trajectories.read(labels))
    assert len(kept) == 2 * len(PLANS) and set(kept.scenario) == {"serve"}
    assert (kept.state[:, 4] == 0).all()  # one turn is judged
    every = sampling.read(tmp_path / "samples")
    well, broken = ("rules", True, False), ("rules", True, True)
    assert list(sampling.outcomes(every, labels)) == [well, well, broken]
    strict = [dataclasses.replace(plain, quality=-1.0), dataclasses.replace(plain, state="admitted", id="lost")]
    assert list(sampling.outcomes(strict, labels)) == [broken]  # the second may still end
    assert list(sampling.outcomes(strict, labels, plain.admitted + 700))[1] == broken
    hopeless = dataclasses.replace(strict[0], promised=False)  # no plan was sure, and the decision said so
    assert list(sampling.outcomes([hopeless], labels)) == [("rules", False, False)]
    assert plain.promised


def test_the_coin_is_fair_and_seeded(tmp_path: Path) -> None:
    one, other = (sampling.Samples(tmp_path, 0.2, "smollm2", seed) for seed in (0, 1))
    picked = np.array([[s.picks(f"chatcmpl-{i}") for i in range(4000)] for s in (one, other)])
    assert abs(picked.mean(1) - 0.2).max() < 0.03 and (picked[0] != picked[1]).mean() > 0.25
    assert one.picks("chatcmpl-7") == picked[0, 7]
    disk = {"sample": 0.1, "trajectories": str(tmp_path), "plans": "full;int4 | offload(0.3, host=0.5)"}
    for bad in ({"sample": 0.1}, {"sample": 2, "trajectories": "x"}, {"epsilon": "much"}, disk):
        with pytest.raises(AdaptiveKVError, match=next(iter(bad))):
            build(bad)


class Safe(RuleTable):
    """Fears every risk."""

    name = "safe"

    def predict(self, state: np.ndarray, plans: np.ndarray) -> Prediction:
        return super().predict(state, plans)._replace(chance=1000 * super().predict(state, plans).chance)


class Broken(RuleTable):
    name = "broken"

    def predict(self, state: np.ndarray, plans: np.ndarray) -> Prediction:
        raise IndexError("no such tree")


def test_a_shadow_is_logged_and_never_obeyed(engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def ask() -> None:
        await run(engine, id="alone", quality=0.1)
        engine.shadow = Safe()
        await run(engine, id="shadowed", quality=0.1)
        engine.shadow = Broken()
        for id in ("broken", "after"):
            await run(engine, id=id, quality=0.1)
        assert engine.shadow is None
        await engine.reconfigure("rules", shadow=str(tmp_path / "none"))
        assert engine.shadow is None

    with caplog.at_level(logging.WARNING, "adaptivekv"):
        asyncio.run(ask())
    engine.close()
    seen = {r["request_id"]: r for r in trajectories.read(tmp_path).to_pylist() if r["moment"] == "prefill"}
    assert {r["plan"] for r in seen.values()} == {"int4"}
    assert {id: r["shadow"] for id, r in seen.items()} == {
        "alone": None, "shadowed": "int8", "broken": None, "after": None,
    }  # fmt: skip
    warned = [r.message for r in caplog.records if "shadow" in r.message]
    assert len(warned) == 2 and "no such tree" in warned[0]


def test_exploration_does_not_follow_the_client_s_seed(engine: Engine, tmp_path: Path) -> None:
    async def ask() -> None:
        await engine.reconfigure("rules", epsilon=0.9)
        for i in range(8):
            await run(engine, id=f"job{i}", seed=0, max_tokens=2, quality=0.1, messages=WHALE)

    asyncio.run(ask())
    engine.close()
    seen = [r for r in trajectories.read(tmp_path).to_pylist() if r["moment"] == "prefill"]
    assert len({r["plan"] for r in seen}) > 1
    for row in seen:
        assert sum(row["probs"]) == pytest.approx(1) and min(p for p in row["probs"] if p) >= 0.9 / 8 - 1e-9
        assert row["probs"][row["plans"].index(row["plan"])] > 0


def test_margins_and_reconfiguring(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def change() -> None:
        assert await engine.reconfigure("rules", margin=0.4) is None
        assert engine.selector is not None and engine.selector.name == "rules~0.4"
        assert "below" in str(await engine.reconfigure("rules", margin=-1.0))
        assert engine.selector.name == "rules~0.4"
        await engine.reconfigure(margin=WIDEST)
        (event,) = [e for e in await run(engine, quality=0.1) if "done" in e]
        assert event["done"]["kv"]["plan"] == "full"
        assert "above 10" in str(await engine.reconfigure(margin=400.0))
        await engine.reconfigure()  # a margin does not stay, what was asked for does
        assert engine.selector.name == "rules"
        monkeypatch.setattr(engine, "mark", "another model")
        assert "trained on llama 30x576" in str(await engine.reconfigure("champion"))  # the packaged one
        assert engine.selector.name == "rules"

    asyncio.run(change())


# -- promote -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture(scope="module")
def trained(store: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A policy that knows the made-up requests; `data` is what it was trained on."""
    folder = tmp_path_factory.mktemp("data")
    trajectories.write(made_up(30, "train", 0), folder / "part-0.parquet")
    trajectories.write(made_up(10, "select", 1), folder / "part-1.parquet")
    made = train([folder], out_dir=tmp_path_factory.mktemp("policy"), tracking_uri=store)
    return made | {"data": folder}


def changed(run: dict[str, Any], store: str, folder: Path, fear: float = 0.0, **manifest: Any) -> str:
    """A run with the same policy under another manifest, or one that expects 10**fear times the losses."""
    folder.mkdir()
    policy = Path(run["policy"])
    with np.load(policy / "policy.npz") as file:
        arrays = {name: file[name] for name in file.files}
    arrays["baseline"][0] += fear
    arrays["forest_loss"] *= 10**fear
    np.savez(folder / "policy.npz", **arrays)
    manifest["sha256"] = hashlib.sha256((folder / "policy.npz").read_bytes()).hexdigest()
    (folder / "policy.json").write_text(json.dumps(json.loads((policy / "policy.json").read_text()) | manifest))
    mlflow = tracking.client(store)
    with tracking.run(mlflow, "certify") as run_id:
        mlflow.log_artifacts(run_id, str(folder), "policy")
    return str(run_id)


def test_promote_keeps_certificates(trained: Any, store: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    metrics = {"select_cost": 0.1}
    strict = {"alpha": 0.05, "policy": f"train-{trained['run_id'][:8]}"}
    names: dict[str, Any] = {"name": "certified", "tracking_uri": store}
    first = changed(trained, store, tmp_path / "a", metrics={"select_cost": 0.5}, certificate=strict, margin=0.4)
    assert registry.promote(first, **names)["overridden"] == []
    assert registry.resolve(store, "certified") is not None
    plain = changed(trained, store, tmp_path / "b", metrics=metrics)
    with pytest.raises(AdaptiveKVError, match=r"certified for at most 0.05 violations and this policy is not"):
        registry.promote(plain, **names)
    loose = changed(trained, store, tmp_path / "c", metrics=metrics, certificate=strict | {"alpha": 0.1}, margin=0.2)
    with pytest.raises(AdaptiveKVError, match=r"0\.05 violations, this policy for 0\.1"):
        registry.promote(loose, **names)
    better = changed(trained, store, tmp_path / "d", metrics=metrics, certificate=strict, margin=0.3)
    assert registry.promote(better, **names)["version"] == 2
    forced = registry.promote(loose, force=True, **names)
    assert forced["version"] == 3 and len(forced["overridden"]) == 2  # nor is it cheaper


def test_promote_asks_the_gate(trained: Any, store: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    trajectories.write(made_up(24, "gate", 2), tmp_path / "gate" / "part-0.parquet")
    names: dict[str, Any] = {"name": "gated", "tracking_uri": store}
    cautious = changed(trained, store, tmp_path / "a", metrics={"select_cost": 0.01}, margin=3.0)
    registry.promote(cautious, **names)
    candidate = trained["run_id"]
    with pytest.raises(AdaptiveKVError, match=r"is not below champion@1's 0\.0100"):
        registry.promote(candidate, **names)
    with pytest.raises(AdaptiveKVError, match="gate: split 'gate' has 0 rows"):
        registry.promote(candidate, gate=[trained["data"]], **names)
    seen = made_up(24, "gate", 2)
    for row in seen:
        row["document"] = "train-0"
    trajectories.write(seen, tmp_path / "seen" / "part-0.parquet")
    with pytest.raises(AdaptiveKVError, match="gate: document 'train-0' is in the training data too"):
        registry.promote(candidate, gate=[tmp_path / "seen"], **names)
    trajectories.write(made_up(4, "gate", 2), tmp_path / "few" / "part-0.parquet")
    with pytest.raises(AdaptiveKVError, match="gate: 4 documents"):
        registry.promote(candidate, gate=[tmp_path / "few"], **names)
    done = registry.promote(candidate, gate=[tmp_path / "gate"], **names)
    assert done["version"] == 2 and done["gate"]["upper"] < 0 and done["gate"]["requests"] == 24
    again = changed(trained, store, tmp_path / "b", metrics={"select_cost": 0.01}, margin=2.9)
    with pytest.raises(AdaptiveKVError, match=r"against .* on 24 fresh requests of 24 documents: \+.*not surely"):
        registry.promote(again, gate=[tmp_path / "gate"], seen=[trained["data"]], **names)


def test_a_gate_counts_documents_not_requests(trained: Any) -> None:
    """Equal policies differ by nothing; and copies of one document do not make it surer."""
    few = scoring.requests(dataset.rows(trajectories.read(trained["data"])).of("select"))
    selector = TreeSelector.load(trained["policy"])
    same = gate.compare(selector, selector, few)
    assert same.difference == 0 and not same.better
    one = gate.compare(selector, RuleTable(), few)
    many = gate.compare(selector, RuleTable(), few * 4)
    assert many.upper == pytest.approx(one.upper, abs=0.02) and many.documents == one.documents


# -- the circle --------------------------------------------------------------------------------------------------------


TABLES = workload.Scenario(
    "tables", {"table": 1.0, "json": 1.0, "numbers": 1.0}, (350, 380), (4, 4), (1, 1), [0.1], [1.0], [1.0],
    [16.0], [0.0], {split: 0.2 for split in workload.SPLITS},
)  # fmt: skip


def test_the_whole_circle(tiny: LoadedModel, trained: Any, store: str, tmp_path: Path, monkeypatch: Any) -> None:
    """From a champion that trusts no lossy plan to one that learned from the traffic, on the same running server.

    Everything is real but the model's size and the time of a step, which a busy machine makes up: bytes decide.
    """

    def steady(samples: Path, out: Path, **more: Any) -> dict[str, Any]:
        found = label(samples, out, **more)
        for file in out.glob("*.parquet"):
            trajectories.write([row | {"step_ms": 10.0} for row in trajectories.read(file).to_pylist()], file)
        return found

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(looping, "label", steady)
    registry.promote(changed(trained, store, tmp_path / "a", fear=5.0), tracking_uri=store)
    said: list[str] = []
    found = looping.loop(
        TABLES, 10, 8, ("full", "int8", "k4v2"), 0.3, max_tokens=380, new_tokens=4, out=tmp_path / "loop",
        model=tiny.name, tracking_uri=store, say=said.append,
    )  # fmt: skip
    assert json.dumps(found) and said
    assert found["champion"] == "champion@1" and found["serve"]["requests"] == found["label"]["labelled"] == 18
    assert found["promote"]["version"] == 2, found
    swap = found["swap"]
    assert swap["selector"] == "champion@2" and swap["dropped"] == 0 and 8 <= swap["by_new"] < swap["requests"]
    before, after, saved = found["before"], found["after"], found["saved"]
    assert before["plans"] == {"full": 8} and "full" not in after["plans"] and after["violations"] == 0
    assert after["served_mib"] < before["served_mib"] and after["mib"] < 0.7 * before["mib"]
    assert found["improved"] and saved["bytes"]["saved_low"] > 0.3 and saved["time"]["saved"] == 0
    assert found["monitor"]["advice"] is None and found["monitor"]["labels"] == 8
    kinds = [run.data.tags[tracking.KIND] for run in tracking.client(store).search_runs(["1"])]
    assert {"serve", "train"} <= set(kinds)
