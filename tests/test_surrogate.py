"""What `kvzap` foretells: the fit, the file, and that it is near what a second reading finds."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from models import calibrated, tiny
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from test_methods import SHAPES, SURROGATE, TOKENS, Tiny, with_norms
from typer.testing import CliRunner

from adaptivekv import AdaptiveCache, AdaptiveKVError, Plan
from adaptivekv.candidates import CANDIDATES
from adaptivekv.cli import app
from adaptivekv.controller import Controller
from adaptivekv.engine.session import Options, Session
from adaptivekv.errors import CacheFileError
from adaptivekv.layers import layer_shapes
from adaptivekv.model import LoadedModel
from adaptivekv.policies.eviction import surrogate
from adaptivekv.policies.eviction.surrogate import NAME, PLACE, SHIPPED, Surrogate, find, foretell
from adaptivekv.trainer import calibrate
from adaptivekv.trainer.calibrate import RIDGE, Sums
from adaptivekv.trainer.replay import reference
from adaptivekv.trainer.sources import text

PLAN = "kvzap(0.5)"


def test_the_fit_is_ridge_regression():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 5, generator=generator) * torch.tensor([1, 5, 0.1, 2, 1]) + 3
    y = x @ torch.randn(5, 2, generator=generator) + torch.randn(300, 2, generator=generator)
    sums = Sums.of(x[:100], y[:100]) + Sums.of(x[100:], y[100:])
    scaler = StandardScaler().fit(x.numpy())
    model = Ridge(alpha=RIDGE * len(x)).fit(scaler.transform(x.numpy()), y.numpy())
    got = torch.cat([x, torch.ones(300, 1)], 1).double() @ sums.fit()
    assert np.allclose(got, model.predict(scaler.transform(x.numpy())), atol=1e-3)
    want = 1 - ((got - y) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
    assert sums.explained(sums.fit()) == pytest.approx(float(want), abs=1e-6)


def test_the_shipped_map_foretells_the_second_reading(smol):
    """On a text it was not fitted to, half of the slots of a layer: chance would share a half."""
    ids = smol.tokenizer(text("book/05")).input_ids[:1100]
    made = reference(smol, ids, 1, plans=("kvzip(0.5)", PLAN))
    (sequence,) = made.cache.sequences
    shipped = find(smol.model, made.cache.shapes)
    assert shipped
    foretell(sequence, shipped)
    shares = []
    for found, told in zip(sequence.credits["recall"], sequence.credits["surrogate"], strict=True):
        found = found[:, : told.shape[1]]
        half = found.size // 2
        best = [set(np.argsort(-x.ravel())[:half].tolist()) for x in (found, told)]
        shares.append(len(best[0] & best[1]) / half)
    assert np.mean(shares) > 0.72 and min(shares) > 0.6
    made.free()


@pytest.mark.parametrize("kind", ["gemma3", "llama"])
def test_layers_compare_by_errors_beside_normalised_outputs(kind, monkeypatch, tmp_path):
    """The map is raised by the logarithm of values over outputs, as transformers has them."""
    model = tiny(kind)
    loaded = LoadedModel(model, None, "tiny", torch.device("cpu"))
    ids = torch.randint(2, 160, (140,), generator=torch.Generator().manual_seed(0)).tolist()
    monkeypatch.setattr(calibrate.models, "load", lambda *_: loaded)
    monkeypatch.setattr(calibrate, "_drawn", lambda *_: [ids] * calibrate.HELD_OUT)

    def made(norms):
        monkeypatch.setattr(calibrate, "NORMALISED", norms)
        return Surrogate.load(Path(calibrate.calibrate(max_tokens=140, out=tmp_path / "map.npz")["file"]))

    found, plain = made(calibrate.NORMALISED), made(("none",))
    sizes = {}
    for layer in model.model.layers:
        at = layer.self_attn
        at.v_proj.register_forward_hook(lambda *a, at=at: sizes.setdefault(at, []).append(a[2]))
        at.o_proj.register_forward_hook(lambda *a, at=at: sizes.setdefault(at, []).append(a[1][0]))
    with torch.no_grad():
        model(torch.tensor([ids]))
    for i, (got, before) in enumerate(zip(found.bias, plain.bias, strict=True)):
        at = model.model.layers[2 * i + 1 if kind == "gemma3" else i].self_attn
        v, o = (x[0].unflatten(-1, (-1, at.head_dim)).square().sum(-1).mean(-1).median().log() for x in sizes[at][:2])
        assert np.allclose(got - before, float(v - o) * (kind == "gemma3"), atol=1e-3)


def test_what_a_head_has_lost_counts_as_the_mean():
    """The tokens that some heads no longer hold, credited after an eviction, against the formula written out."""
    small = Tiny()
    Plan.parse("snapkv(0.4)").apply(small.sequence)
    for layer, shape in enumerate(SHAPES):
        mean, weight, bias = (getattr(SURROGATE, name)[layer] for name in ("mean", "weight", "bias"))
        got = SURROGATE.predict(small.sequence, layer, 64, 192).numpy()
        used, pos = small.sequence.slots(layer)
        lost = 0
        for t in range(64, 192):
            row = mean[:-PLACE].copy().reshape(shape.heads, -1)
            for head in range(shape.heads):
                if t in pos[head][used[head]]:
                    row[head] = with_norms(small.k[layer][head, t], small.v[layer][head, t]).numpy()
                else:
                    lost += 1
            row = np.concatenate([row.ravel(), np.log([t + 1, TOKENS - t, TOKENS])])
            assert np.allclose(got[:, t - 64], (row - mean) @ weight + bias, atol=1e-4)
        assert 0 < lost < 128 * shape.heads


def test_calibrate_writes_what_the_cache_finds(smol, tmp_path, monkeypatch):
    document = tmp_path / "document.txt"
    document.write_text(text("book/01")[:9000])
    out = tmp_path / "root" / "surrogates" / "kvzap-own.npz"
    asked = ["calibrate", "--file", str(document), "--max-tokens", "256", "--out", str(out), "--json"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout)
    assert made["prompts"] >= 5 and len(made["r2_layers"]) == 30
    assert 0 < made["r2"] < 0.9  # of prompts held out: on those it was fitted to, 393 inputs explain nearly all
    own = Surrogate.load(out)
    monkeypatch.setenv("ADAPTIVEKV_CACHE", str(tmp_path / "root"))
    found = find(smol.model, layer_shapes(smol.model))
    assert found and all(np.array_equal(*pair) for pair in zip(found.weight, own.weight, strict=True))
    assert not own.suits(own.mark + 1, layer_shapes(smol.model))
    newer = out.with_name("kvzap-a.npz")
    found.weight[0][:] = 1.0
    found.save(newer)
    os.utime(newer, (2e9, 2e9))
    assert (find(smol.model, layer_shapes(smol.model)).weight[0] == 1.0).all()


@pytest.mark.parametrize("told", [True, False])
def test_credits_do_not_depend_on_when_they_are_asked_for(told):
    """Half of a prompt read, or all of it: a token stands where it stands in the whole, if that was told."""
    small = Tiny(140)
    small.sequence.prompt = TOKENS * told
    foretell(small.sequence, SURROGATE)
    early = small.sequence.credits[NAME]
    small.feed(TOKENS - 140)
    late = [SURROGATE.predict(small.sequence, layer, 0, 128).numpy() for layer in range(len(SHAPES))]
    assert all(np.allclose(a, b, atol=1e-4) == told for a, b in zip(early, late, strict=True))


@pytest.mark.parametrize("damage", ["short", "junk", "array", "version", "shape", "nan", "mark"])
def test_a_damaged_map_is_one_warning_and_no_map(damage, tmp_path, monkeypatch, caplog):
    model, path = tiny(), tmp_path / "surrogates" / "kvzap-tiny.npz"
    calibrated(model, tmp_path, monkeypatch)
    assert find(model, layer_shapes(model))
    made = Surrogate.load(path)
    if damage == "short":
        path.write_bytes(path.read_bytes()[:500])
    elif damage == "junk":
        path.write_bytes(b"junk")
    elif damage == "array":
        with path.open("wb") as file:
            np.save(file, np.ones(3))
    elif damage == "version":
        with monkeypatch.context() as older:
            older.setattr(surrogate, "VERSION", surrogate.VERSION - 1)
            made.save(path)
    elif damage == "mark":
        Surrogate(made.mean, made.weight, made.bias, made.mark[:3]).save(path)
    else:
        made.bias[1] = made.bias[1][:1] if damage == "shape" else made.bias[1] * np.nan
        made.save(path)
    os.utime(path, (2e9, 2e9))
    cache = AdaptiveCache(model)  # its candidates ask for the map: it does without
    assert cache.surrogate is None and AdaptiveCache(model).surrogate is None
    said = [record.message for record in caplog.records if str(path) in record.message]
    assert len(said) == (damage != "mark") and all("\n" not in line and "cannot be read" in line for line in said)
    with pytest.raises(AdaptiveKVError, match="adaptivekv calibrate"):
        AdaptiveCache(model, plan=PLAN)


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (["--out", "map"], r"out map: a file that ends in .npz"),
        (["--out", "/proc/none/map.npz"], r"out /proc/none/map.npz: "),
        (["--max-tokens", "999999"], r"max_tokens=999999: the model has 8192 positions"),
        (["--file", "short.txt", "--out", "map.npz"], r"1 prompts: at least 5"),
        (["--file", "none.txt", "--out", "map.npz"], r"file none.txt: no such file"),
    ],
)
def test_what_calibrate_refuses(asked, why, tmp_path, monkeypatch, smol):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("Call me Ishmael. " * 40)
    with pytest.raises(AdaptiveKVError, match=why):
        CliRunner().invoke(app, ["calibrate", *asked], catch_exceptions=False)


def test_a_model_without_a_map_is_refused_or_chooses_otherwise():
    model = tiny()
    with pytest.raises(AdaptiveKVError, match="adaptivekv calibrate"):
        AdaptiveCache(model, plan=PLAN)
    with pytest.raises(AdaptiveKVError, match="adaptivekv calibrate"):
        AdaptiveCache(model, controller=Controller(Plan.parse(PLAN)))
    cache = AdaptiveCache(model, quality=10.0)
    ids = torch.randint(2, 160, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(ids, past_key_values=cache)
    cache.end_prefill()
    (decision,) = [d for d in cache.requests[0].decisions if d.moment == "prefill"]
    assert any(decision.allowed)
    assert not any(ok for plan, ok in zip(decision.plans, decision.allowed, strict=True) if "kvzap" in plan)
    assert any("kvzap" in plan for plan in CANDIDATES) and any(SHIPPED.glob("kvzap-*.npz"))
    assert find(tiny().to("meta"), layer_shapes(model)) is None


def test_a_session_is_restored_with_its_map_or_not_at_all(smol, tmp_path, monkeypatch):
    said = [{"role": "user", "content": text("book/05")[:3000]}]
    session = Session(smol, Options(plan=PLAN))
    list(session.answer(said, 2))
    session.save(tmp_path, said)
    again = Session(smol, Options(plan=PLAN))
    assert again.restore(tmp_path, 8)
    assert again.cache.pool.surrogate and again.cache.sequences[0].credits["surrogate"][0].shape[1] > 64
    monkeypatch.setattr("adaptivekv.cache.find", lambda *_: None)
    with pytest.raises(CacheFileError, match="adaptivekv calibrate"):
        Session(smol, Options()).restore(tmp_path, 8)
