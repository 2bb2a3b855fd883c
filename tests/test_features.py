"""Features of a prompt's attention against plain attention, and of the link."""

import numpy as np
import pytest
import torch
from test_methods import SHAPES, TOKENS, Tiny

from adaptivekv.controller import Controller
from adaptivekv.decisions import Request
from adaptivekv.features import schema
from adaptivekv.features.attention import prompt_features


def test_heads_spread_as_their_attention_beyond_the_best_half_does():
    tiny, sealed = Tiny(), TOKENS // 64 * 64
    found = prompt_features(tiny.sequence)
    for layer, group in enumerate(schema.GROUPS):  # three layers: one each
        lost = []
        for weights in tiny.weights(layer):  # of a KV head, [G, W, n]
            votes = weights.mean((0, 1))[:sealed]
            pooled = torch.stack([votes[max(0, i - 16) : i + 16].mean() for i in range(sealed)])
            pooled[:4] = pooled[TOKENS - 64 :] = torch.inf
            lost.append(float(votes[pooled.argsort(descending=True)[TOKENS // 2 - TOKENS % 64 :]].sum()))
        assert found[f"spread_{group}"] == pytest.approx(np.std(lost), rel=1e-3) and min(lost) > 0


def test_page_mass_is_where_the_last_queries_look_until_the_next_prompt_ends():
    tiny, sealed = Tiny(), TOKENS // 64 * 64
    found = prompt_features(tiny.sequence)
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


def test_link_time_is_that_of_what_the_host_has_room_for():
    state = np.full(len(schema.NAMES), np.nan)
    state[[schema.NAMES.index(name) for name in ("log2_prompt", "log10_link")]] = 10, 1  # 1024 tokens, 10 GB/s
    rows = Controller(candidates=("int8", "int8 | offload(0.25)", "kvzap(0.5) | int4 | offload(0.25)")).rows
    assert 10 ** schema.link_time(state, rows) - 1 == pytest.approx([0, 102.4 * 0.5 * 0.75, 102.4 * 0.125 * 0.75])
    state[schema.NAMES.index("host_room")] = 0.2
    assert 10 ** schema.link_time(state, rows) - 1 == pytest.approx([0, 102.4 * 0.2, 102.4 * 0.125 * 0.75])


def test_nothing_to_ask_is_nothing_said():
    tiny = Tiny()
    tiny.sequence.truncate(100)  # one page, which no plan touches
    assert set(prompt_features(tiny.sequence)) == set(schema.KEYS)
    tiny.sequence.drop_ring()
    assert prompt_features(tiny.sequence) == {} and len(SHAPES) == len(schema.GROUPS)
