"""What `kvzap` foretells: the fit, the file, and that it is near what a second reading finds."""

import json

import numpy as np
import pytest
import torch
from models import tiny
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from test_methods import SHAPES, Tiny
from typer.testing import CliRunner

from adaptivekv import AdaptiveCache, AdaptiveKVError, Plan
from adaptivekv.cli import app
from adaptivekv.controller import CANDIDATES
from adaptivekv.layers import layer_shapes
from adaptivekv.policies.eviction.surrogate import SHIPPED, Surrogate, find, foretell, held
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
    surrogate = find(smol.model, made.cache.shapes)
    assert surrogate
    foretell(sequence, surrogate)
    shares = []
    for found, told in zip(sequence.credits["recall"], sequence.credits["surrogate"], strict=True):
        found = found[:, : told.shape[1]]
        half = found.size // 2
        best = [set(np.argsort(-x.ravel())[:half].tolist()) for x in (found, told)]
        shares.append(len(best[0] & best[1]) / half)
    assert np.mean(shares) > 0.72 and min(shares) > 0.6
    made.free()


def test_what_a_head_has_lost_counts_as_the_mean():
    tiny_sequence = Tiny().sequence
    Plan.parse("snapkv(0.4)").apply(tiny_sequence)
    for layer, shape in enumerate(SHAPES):
        absent = torch.full((shape.heads * (shape.k_dim + shape.v_dim),), 7.0)
        rows = held(tiny_sequence, layer, 64, 192, absent).view(128, shape.heads, -1)
        used, pos = tiny_sequence.slots(layer)
        for head in range(shape.heads):
            here = np.isin(np.arange(64, 192), pos[head][used[head]])
            assert 0 < here.sum() < 128
            assert np.array_equal((rows[:, head] != 7).all(1).numpy(), here)
            keys = tiny_sequence.keys(layer, head)[used[head].ravel()][np.isin(pos[head][used[head]], range(64, 192))]
            assert torch.equal(rows[here, head, : shape.k_dim], keys)


def test_calibrate_writes_what_the_cache_finds(smol, tmp_path, monkeypatch):
    document = tmp_path / "document.txt"
    document.write_text(text("book/01")[:9000])
    out = tmp_path / "root" / "surrogates" / "kvzap-own.npz"
    asked = ["calibrate", "--file", str(document), "--max-tokens", "256", "--out", str(out), "--json"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout)
    assert made["prompts"] >= 5 and len(made["r2_layers"]) == 30 and made["r2"] > 0
    own = Surrogate.load(out)
    monkeypatch.setenv("ADAPTIVEKV_CACHE", str(tmp_path / "root"))
    found = find(smol.model, layer_shapes(smol.model))
    assert found and all(np.array_equal(*pair) for pair in zip(found.weight, own.weight, strict=True))
    assert not own.suits(own.mark + 1, layer_shapes(smol.model))
    out.write_bytes(out.read_bytes()[:2000])
    with pytest.raises(AdaptiveKVError, match=r"kvzap-own.npz: cannot be read .*; run `adaptivekv calibrate`"):
        find(smol.model, layer_shapes(smol.model))


def test_a_model_without_a_map_is_refused_or_chooses_otherwise():
    model = tiny()
    with pytest.raises(AdaptiveKVError, match="adaptivekv calibrate"):
        AdaptiveCache(model, plan=PLAN)
    cache = AdaptiveCache(model, quality=10.0)
    ids = torch.randint(2, 160, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(ids, past_key_values=cache)
    cache.end_prefill()
    (decision,) = [d for d in cache.requests[0].decisions if d.moment == "prefill"]
    assert any(decision.allowed)
    assert not any(ok for plan, ok in zip(decision.plans, decision.allowed, strict=True) if "kvzap" in plan)
    assert any("kvzap" in plan for plan in CANDIDATES) and any(SHIPPED.glob("kvzap-*.npz"))
