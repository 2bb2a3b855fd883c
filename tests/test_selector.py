"""Selectors: the rule table's order, the flat trees against scikit-learn, every kind of broken file, and the speed."""

import hashlib
import json
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import threadpoolctl
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as np_arrays
from models import tiny

from adaptivekv import forest
from adaptivekv.cache import AdaptiveCache
from adaptivekv.controller import Controller
from adaptivekv.decisions import Request
from adaptivekv.errors import AdaptiveKVError
from adaptivekv.features import schema
from adaptivekv.layers import model_mark
from adaptivekv.plan import Plan
from adaptivekv.selector import INPUTS, LOSS_FLOOR, RuleTable, TreeSelector, load_or_rules

export = pytest.importorskip("adaptivekv.trainer.export")
pytest.importorskip("sklearn")

STATE = schema.row({"log2_prompt": 12.0, "log10_link": 1.0})
FULL = dict.fromkeys(schema.PLAN_NAMES, 0) | {"keep": 1, "k_bits": 16, "v_bits": 16, "device_share": 1, "read_share": 1}


def plans(*changes: dict[str, float]) -> np.ndarray:
    return np.stack([schema.row(FULL | change, schema.PLAN_NAMES) for change in changes])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with threadpoolctl.threadpool_limits(1):
        yield


@pytest.fixture(scope="module")
def models(one_thread) -> list[Any]:
    from sklearn.ensemble import HistGradientBoostingRegressor

    rng = np.random.default_rng(0)
    x = rng.normal(size=(1500, INPUTS))
    x[rng.random(x.shape) < 0.2] = np.nan
    x[:, 3] = 1.0  # a constant
    x[:, 7] = np.where(rng.random(1500) < 0.5, np.nan, 2.0)  # only its absence says anything
    y = np.nansum(x[:, :6] ** 2, axis=1) / 4 + 3.0 * np.isnan(x[:, 7])
    make = {"max_iter": 30, "max_leaf_nodes": 8, "early_stopping": False}
    quantile = {"loss": "quantile", "quantile": 0.9}
    mean, high = (HistGradientBoostingRegressor(**make, **more).fit(x, y) for more in ({}, quantile))
    return [[mean], [mean, high], [high]]


@pytest.fixture(scope="module")
def grown(one_thread) -> tuple[Any, ...]:
    """A forest, its states, what fills unknown values, losses of two lossy plans, and the plans' features."""
    from sklearn.ensemble import ExtraTreesRegressor

    rng = np.random.default_rng(1)
    x, fill = rng.normal(size=(120, len(schema.NAMES))), np.full(len(schema.NAMES), 0.25)
    loss = 10 ** np.stack([np.zeros(120) - 9, np.sign(x[:, 0]) - 2, x[:, 1] - 1], 1) * [0, 1, 1]
    made = ExtraTreesRegressor(20, min_samples_leaf=4, max_leaf_nodes=forest.LEAVES, random_state=0)
    made.fit(x, np.log10(loss + LOSS_FLOOR))
    return made, x, fill, loss, plans({}, {"keep": 0.5}, {"v_bits": 2})


@pytest.fixture
def folder(models, grown, tmp_path):
    arrays = export.flatten(models) | export.flatten_forest(*grown)
    return export.save(tmp_path / "policy", arrays, "synthetic", {"0.01": "int4"}, {"select_cost": 0.5})


@pytest.fixture
def forestless(models, tmp_path):
    return export.save(tmp_path / "policy", export.flatten(models), "synthetic", {"0.01": "int4"}, {"select_cost": 0.5})


def test_a_policy_decides_only_for_the_model_it_was_trained_on(models, tmp_path, caplog):
    own = tiny("llama")
    assert model_mark(own) == model_mark(tiny("llama", seed=1)) != model_mark(tiny("qwen3"))
    folder = export.save(tmp_path / "policy", export.flatten(models), "llamas", model=model_mark(own))
    assert AdaptiveCache(own, selector=TreeSelector.load(folder)).controller.selector.name == "llamas"
    assert not caplog.records
    for _ in range(2):
        other = AdaptiveCache(tiny("qwen3"), selector=TreeSelector.load(folder))
        assert other.controller.selector.name == "rules"
    (warned,) = caplog.records  # once a process
    assert "llamas: trained on llama 3x64, 160 tokens; this model is qwen3 3x64" in warned.message


def test_no_plan_evicts_by_queries_that_are_gone():
    """What was evicted while they were there can be narrowed; more of it would be a plan in name only."""
    request: Any = Request(SimpleNamespace(ring=[]), 0, 0, None, 0, kept=0.5, evictor="snapkv")
    reach = {
        text: Controller._can_become(request, Plan.parse(text), set())
        for text in (
            "snapkv(0.5)",
            "snapkv(0.5) | int4",
            "snapkv(0.25) | int4",
            "tova(0.25)",
            "streaming(0.25)",
            "int4",
        )
    }
    assert [text for text, fine in reach.items() if fine] == ["snapkv(0.5)", "snapkv(0.5) | int4", "streaming(0.25)"]


def test_row_order_and_unknown_name():
    assert len(set(schema.NAMES)) == len(schema.NAMES) == 35
    got = schema.row({"turn": 2, "log2_prompt": 10})
    assert got[schema.NAMES.index("turn")] == 2 and got[0] == 10 and np.isnan(got).sum() == 33
    with pytest.raises(AdaptiveKVError, match=r"sink_erly.*did you mean 'sink_early'"):
        schema.row({"sink_erly": 1.0})


def test_rules_follow_the_measurements():
    seen = RuleTable().predict(
        STATE,
        plans({}, {"k_bits": 8, "v_bits": 8}, {"k_bits": 4, "v_bits": 4}, {"k_bits": 4, "v_bits": 2},
              {"read_share": 0.25}, {"k_bits": 2, "v_bits": 2}, {"keep": 0.5}, {"keep": 0.25}, {"device_share": 0.25}),
    )  # fmt: skip
    np.testing.assert_allclose(seen.loss, [0, 0.0002, 0.003, 0.01, 0.02, 0.3, 0.3, 0.6, 0], rtol=0.01)
    assert (seen.loss_high >= seen.loss).all()
    assert seen.step_ms[2] < seen.step_ms[0] < seen.step_ms[8]  # fewer bytes are faster, the link is slower
    blind = RuleTable().predict(np.full(len(schema.NAMES), np.nan), plans({}, {"device_share": 0}))
    assert np.isfinite(np.stack(blind)).all()


def test_trees_equal_sklearn_with_nan(models, folder):
    policy = TreeSelector.load(folder)
    x = np.random.default_rng(1).normal(size=(1000, INPUTS))
    assert export.parity(policy, models, x, rows=3000) < 1e-12
    assert policy.name == "synthetic" and policy.margin == 0.0
    assert TreeSelector.load(folder / "policy.npz", "champion@3").name == "champion@3"


@settings(max_examples=60, deadline=None)
@given(x=np_arrays(np.float64, (3, INPUTS), elements=st.floats(allow_nan=True, allow_infinity=True, width=32)))
def test_trees_equal_sklearn_anywhere(models, x):
    policy = TreeSelector(export.flatten(models), {"margin": 0.0}, "any")
    want = np.stack([sum(model.predict(x) for model in summands) for summands in models], axis=1)
    np.testing.assert_allclose(policy.raw(x), want, rtol=0, atol=1e-10)


def test_a_forest_gives_what_sklearn_s_leaves_give(folder, grown):
    """Weights by parity; the chance is the weighted share of measured losses above the SLO, and falls with it."""
    made, x, _, loss, known = grown
    policy = TreeSelector.load(folder)
    assert export.forest_parity(policy.forest, made, x) < 1e-12
    state = x[7].copy()
    weight = policy.forest.weights(state)
    assert weight.sum() == pytest.approx(1) and weight.argmax() == 7
    chances = []
    for quality in (0.003, 0.03, 0.3):
        state[schema.NAMES.index("log10_quality")] = np.log10(quality)
        seen = policy.predict(state, known)
        np.testing.assert_allclose(seen.chance, policy.forest.weights(state) @ (loss > quality), atol=1e-12)
        chances.append(seen.chance)
    assert (np.diff(chances, axis=0) <= 1e-9).all() and chances[0][1] > chances[2][1]
    assert seen.loss[0] == seen.loss_high[0] == seen.chance[0] == 0


def test_a_plan_the_forest_does_not_know_is_left_to_the_trees(folder, forestless, grown):
    known, other = grown[4], plans({"keep": 0.75})
    state = STATE.copy()
    state[schema.NAMES.index("log10_quality")] = -2
    both = TreeSelector.load(folder).predict(state, np.concatenate([known, other]))
    for part, alone, trees in zip(
        both, TreeSelector.load(folder).predict(state, known), TreeSelector.load(forestless).predict(state, other),
        strict=True,
    ):  # fmt: skip
        np.testing.assert_allclose(part[-1], trees[0], rtol=1e-12)
        np.testing.assert_allclose(part[:-1], alone, rtol=1e-12)


def test_prediction_is_ordered_and_lossless_is_zero(forestless):
    seen = TreeSelector.load(forestless).predict(STATE, plans({}, {"keep": 0.5}, {"device_share": 0.1}, {"v_bits": 2}))
    assert seen.loss.shape == seen.loss_high.shape == seen.step_ms.shape == (4,)
    assert seen.loss[[0, 2]].tolist() == seen.loss_high[[0, 2]].tolist() == [0, 0]
    assert (seen.loss[[1, 3]] > 0).all() and (seen.loss_high >= seen.loss).all() and (seen.step_ms > 0).all()


def test_one_leaf_trees():
    from sklearn.ensemble import HistGradientBoostingRegressor

    x = np.zeros((10, INPUTS))
    models = [[HistGradientBoostingRegressor(max_iter=2).fit(x, np.full(10, float(k)))] for k in range(3)]
    policy = TreeSelector(export.flatten(models), {"margin": 0.0}, "flat")
    np.testing.assert_allclose(policy.raw(x[:2]), [[0, 1, 2]] * 2)


def test_speed(folder):
    policy = TreeSelector.load(folder)
    for rows, limit in ((16, 300e-6), (32, 500e-6)):
        batch, times = np.tile(plans({"keep": 0.5}), (rows, 1)), []
        for _ in range(300):
            start = time.perf_counter()
            policy.predict(STATE, batch)
            times.append(time.perf_counter() - start)
        assert min(times) < limit, f"{rows} rows took {min(times) * 1e6:.0f} us at best"


def broken_array(key, at, value):
    def change(arrays, manifest):
        arrays[key][at] = value

    return change


def broken_manifest(key, value):
    return lambda arrays, manifest: manifest.__setitem__(key, value)


FAULTS = {
    "value NaN": (broken_array("value", 1, np.nan), "value is not finite"),
    "threshold NaN": (broken_array("threshold", 0, np.nan), "threshold is NaN"),
    "baseline inf": (broken_array("baseline", 0, np.inf), "baseline"),
    "child outside": (broken_array("right", 0, 10**6), "right child lies outside"),
    "child negative": (broken_array("right", 0, -1), "right child lies outside"),
    "cycle": (broken_array("left", 0, 0), "left child lies outside its tree or before its parent"),
    "two parents": (lambda a, m: a["left"].__setitem__(0, a["right"][0]), "two parents"),
    "feature outside": (broken_array("feature", 0, INPUTS), "feature index"),
    "roots": (broken_array("roots", 1, 0), "roots"),
    "target": (broken_array("target", 0, 2), "target"),
    "dtype": (lambda a, m: a.__setitem__("left", a["left"].astype(np.int64)), "left is int64"),
    "object": (lambda a, m: a.__setitem__("value", np.array([{}], dtype=object)), "not readable"),
    "array missing": (lambda a, m: a.pop("roots"), "not readable.*roots"),
    "format": (broken_manifest("format", 99), "format is 99, not 3"),
    "schema": (broken_manifest("schema", 99), f"schema is 99, not {schema.VERSION}"),
    "names": (broken_manifest("names", ["x"]), f"names differ from schema {schema.VERSION}"),
    "margin": (broken_manifest("margin", float("nan")), "margin is nan"),
    "margin huge": (broken_manifest("margin", 10**400), "not a number from -10 to 10"),
    "roots wrap": (lambda a, m: a.__setitem__("roots", np.array([0, 2**31 - 1, -(2**31)], np.int32)), "roots"),
    "label": (broken_manifest("label", None), "label is missing"),
    "forest cycle": (broken_array("forest_left", 0, 0), "forest: a left child lies outside its tree"),
    "forest feature": (broken_array("forest_feature", 0, 999), "forest: a feature index"),
    "forest member": (broken_array("forest_member", (0, 0), 0), "forest: a member is not in a leaf"),
    "forest loss": (broken_array("forest_loss", (0, 1), np.nan), "forest: a loss, plan or fill"),
    "forest plans": (lambda a, m: a.__setitem__("forest_plans", a["forest_plans"][:2]), "forest: .* do not fit"),
    "forest in part": (lambda a, m: a.pop("forest_fill"), "not readable.*forest_fill"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_one_line(fault, folder):
    change, message = FAULTS[fault]
    with np.load(folder / "policy.npz") as file:
        arrays = {key: file[key] for key in file.files}
    manifest = json.loads((folder / "policy.json").read_text())
    change(arrays, manifest)
    np.savez(folder / "policy.npz", **arrays)
    manifest["sha256"] = hashlib.sha256((folder / "policy.npz").read_bytes()).hexdigest()
    (folder / "policy.json").write_text(json.dumps(manifest))
    check_refused(folder, message)


@pytest.mark.parametrize("name", ["policy.npz", "policy.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damaged_files_are_one_line(name, damage, folder):
    file = folder / name
    data = file.read_bytes()
    if damage == "truncate":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        json_flip = data.replace(b'"sha256": "', b'"sha256": "0')
        file.write_bytes(json_flip if name.endswith("json") else data[:-9] + b"?" + data[-8:])
    else:
        file.unlink()
    check_refused(folder, "SHA-256 differs|not JSON|No such file")


def check_refused(folder, message):
    with pytest.raises(AdaptiveKVError, match=message) as caught:
        TreeSelector.load(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    found, note = load_or_rules(folder)
    assert found.name == "rules" and note and "using the rule table" in note
