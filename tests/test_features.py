"""Probe features against plain attention, and what they say of plans."""

import numpy as np
import pytest
import torch
from test_methods import SHAPES, TOKENS, WINDOW, Tiny

from adaptivekv.controller import Controller
from adaptivekv.decisions import Request
from adaptivekv.features import schema
from adaptivekv.features.probe import probe_features
from adaptivekv.kernels import CODECS, hadamard


def test_lost_attention_is_what_goes_beyond_the_best_slots():
    tiny, sealed = Tiny(), TOKENS // 64 * 64
    found = probe_features(tiny.sequence)
    for layer, group in enumerate(schema.GROUPS):  # three layers: one each
        want = []
        for weights in tiny.weights(layer):  # of a KV head, [G, W, n]
            votes = weights.mean((0, 1))[:sealed]
            pooled = torch.stack([votes[max(0, i - 16) : i + 16].mean() for i in range(sealed)])
            pooled[:4] = pooled[TOKENS - 64 :] = torch.inf
            order = pooled.argsort(descending=True)
            want.append([float(votes[order[round(k * TOKENS) - TOKENS % 64 :]].sum()) for k in schema.KEPT])
        got = [found[f"lost_{100 * k:.0f}_{group}"] for k in schema.KEPT]
        assert got == pytest.approx(np.mean(want, 0), rel=1e-4) and got[0] > got[1] > got[2] > 0


def test_page_mass_is_where_the_last_queries_look_until_the_next_prompt_ends():
    tiny, sealed = Tiny(), TOKENS // 64 * 64
    found = probe_features(tiny.sequence)
    for layer, group in enumerate(schema.GROUPS):
        mass = tiny.weights(layer).mean((1, 2))[:, :sealed].unflatten(1, (-1, 64)).sum(2)
        p = mass / mass.sum(1, keepdim=True)  # [H, 4]
        want = {"sink": p[:, 0], "recent": p[:, 2] + p[:, 3], "entropy": -(p * p.log2()).sum(1) / 2, "top": p.max(1)[0]}
        for name, part in want.items():
            assert found[f"{name}_{group}"] == pytest.approx(float(part.mean()), rel=1e-4)
    assert set(schema.ATTENTION) < set(found)
    request, controller = Request(tiny.sequence, TOKENS, 8, None, 1), Controller(candidates=("full",), epoch=1)
    controller.end_prefill(request)
    controller.step(request)
    prefill, epoch = (decision.features for decision in request.decisions)
    assert found.items() <= prefill.items() and found.items() <= epoch.items()


def test_error_is_that_of_attention_over_rounded_pages():
    tiny = Tiny()
    found = probe_features(tiny.sequence)
    for name, k_codec, v_codec in (("int4", "int4", "int4"), ("k4v2", "int4", "int2"), ("int2", "int2", "int2")):
        for layer, group in enumerate(schema.GROUPS):
            sides = []
            for codecs in ((None, None), (k_codec, v_codec)):
                k, v = (part[layer].clone() for part in (tiny.k, tiny.v))
                for x, codec in zip((k, v), codecs, strict=True):
                    if codec:  # pages 1 and 2 of four; the first holds the sinks, the last the recent tokens
                        pages = hadamard(x[:, 64:192].reshape(-1, 64, x.shape[2]))
                        raw = CODECS[codec].encode(pages)
                        x[:, 64:192] = hadamard(CODECS[codec].decode(raw, x.shape[2], x.dtype)).view(len(x), 128, -1)
                other = Tiny()
                other.k = [k if i == layer else part for i, part in enumerate(tiny.k)]
                sides.append(torch.einsum("hgwn,hnd->hgwd", other.weights(layer, WINDOW), v))
            want = float((sides[1] - sides[0]).square().sum() / sides[0].square().sum())
            assert found[f"error_{name}_{group}"] == pytest.approx(want, rel=1e-3)


def test_joint_columns_follow_the_probe():
    """At the probed shares and formats the probe itself, between them in between, nothing for what loses nothing."""
    state = np.full(len(schema.NAMES), np.nan)
    values = {"lost_25": 0.4, "lost_50": 0.2, "lost_75": 0.1, "error_int4": 0.01, "error_k4v2": 0.04, "error_int2": 0.3}
    values |= {"foretold_25": 0.3, "foretold_50": 0.15, "foretold_75": 0.05}
    for i, group in enumerate(schema.GROUPS):
        for name, value in values.items():
            state[schema.NAMES.index(f"{name}_{group}")] = value * (i + 1)
    plans = ("full", "int8", "int4", "k4v2", "int2", "tuned(0.5)", "snapkv(0.5)", "snapkv(0.375) | k4v2", "snapkv(0.1)")
    plans += ("kvzap(0.5)",)
    controller = Controller(candidates=plans)
    got = dict(zip(plans, schema.joint(state, controller.rows)[:, :4], strict=True))
    assert got["full"] == pytest.approx([0, 0, 0, 0]) and got["int8"][2] == pytest.approx(0.02 / 256)
    for plan, name in (("int4", "error_int4"), ("k4v2", "error_k4v2"), ("int2", "error_int2")):
        assert got[plan] == pytest.approx([0, 0, 2 * values[name], 3 * values[name]])
    assert got["tuned(0.5)"][2] == pytest.approx(0.05) and got["snapkv(0.5)"] == pytest.approx([0.4, 0.6, 0, 0])
    assert got["snapkv(0.375) | k4v2"] == pytest.approx([0.6, 0.9, 0.08, 0.12])
    assert got["snapkv(0.1)"][0] == pytest.approx(0.6 * 1 + 0.4 * 0.8)
    assert got["kvzap(0.5)"][:2] == pytest.approx([0.3, 0.45])  # it keeps what a second reading would
    many = schema.joint(np.stack([state] * len(plans)), controller.rows)
    assert np.allclose(many, schema.joint(state, controller.rows), equal_nan=True)
    unknown = np.full(len(schema.NAMES), np.nan)
    assert np.isnan(schema.joint(unknown, controller.rows)).all()


def test_link_time_is_that_of_what_the_host_has_room_for():
    state = np.full(len(schema.NAMES), np.nan)
    state[[schema.NAMES.index(name) for name in ("log2_prompt", "log10_link")]] = 10, 1  # 1024 tokens, 10 GB/s
    rows = Controller(candidates=("int8", "int8 | offload(0.25)", "kvzap(0.5) | int4 | offload(0.25)")).rows
    assert 10 ** schema.joint(state, rows)[:, 4] - 1 == pytest.approx([0, 102.4 * 0.5 * 0.75, 102.4 * 0.125 * 0.75])
    state[schema.NAMES.index("host_room")] = 0.2
    assert 10 ** schema.joint(state, rows)[:, 4] - 1 == pytest.approx([0, 102.4 * 0.2, 102.4 * 0.125 * 0.75])


def test_nothing_to_ask_is_nothing_said():
    tiny = Tiny()
    tiny.sequence.truncate(100)  # one page, which no plan touches
    short = probe_features(tiny.sequence)
    assert set(short) == {*schema.PROBE, *schema.KEYS}
    assert all(short[name] == 0 for name in short if name.startswith("error"))
    tiny.sequence.drop_ring()
    assert probe_features(tiny.sequence) == {} and len(SHAPES) == len(schema.GROUPS)
