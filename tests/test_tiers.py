"""Offload to host and disk, whole or the values alone: where it lies, what it costs, and that no token changes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import tiny, twins

from adaptivekv import AdaptiveCache, AdaptiveKVError, Plan, graph
from adaptivekv.controller import Controller
from adaptivekv.errors import CacheFileError
from adaptivekv.graph import GraphDecoder
from adaptivekv.kernels import page_attention
from adaptivekv.memory.arena import ArenaFull
from adaptivekv.memory.compact import blocks
from adaptivekv.memory.pages import PagePool
from adaptivekv.memory.sequence import Sequence
from adaptivekv.memory.shapes import DEVICE, DISK, HOST, LayerShape
from adaptivekv.pressure import make_room

SHAPES = [LayerShape(2, 4, 16, 24)] * 6
TIERED = ["offload(0.25, host=0.5)", "offload(0.5, host=0)", "offload(0.2, host=0.3, by=layers)", "offload(0.4)"]


def filled(tokens: int, disk: int = 4 << 20, host: int = 4 << 20, shapes=SHAPES) -> Sequence:
    pool = PagePool(shapes, torch.float32, "cpu", 4 << 20, host, 60_000, disk)
    sequence, pos, gen = Sequence(pool), np.arange(tokens), torch.Generator().manual_seed(0)
    for layer, s in enumerate(shapes):
        k, v = (torch.randn(s.heads, tokens, dim, generator=gen) for dim in (s.k_dim, s.v_dim))
        sequence.append(layer, k, v, pos)
    sequence.commit(pos)
    return sequence


def remeasure(sequence: Sequence, seed: int) -> None:
    for mass in sequence.mass:
        mass[:] = np.random.default_rng(seed).random(mass.shape)


VALUES = ["offload(0.75, by=values)", "offload(0.2, by=values)"]  # keys are 40 % of the bytes


@pytest.mark.parametrize(
    "text",
    [*TIERED, *VALUES, "int4 | offload(0.25, host=0.25)", "k4v2 | offload(0.1, by=layers, host=0)",
     "int4 | offload(0.6, by=values)", "palu(0.5) | offload(0.3, host=0.3)"],
)  # fmt: skip
def test_bytes_of_every_tier_are_as_estimated(text):
    plan = Plan.parse(text)
    assert Plan.parse(str(plan)) == plan
    for tokens in (40, 700, 1000):
        sequence = filled(tokens)
        plan.apply(sequence)
        promised = plan.estimate(SHAPES, torch.float32, tokens)
        # the native pages of a quantized plan stand at the ends: which columns fill the device's share varies by one
        slack = sum(s.heads for s in SHAPES) * 64 * (16 + 24) * 4 if plan.stage("quantize") else 0
        for tier, name in enumerate(("device", "host", "disk")):
            assert abs(sequence.bytes(tier) - promised[name]) <= slack
        stored = [sequence.bytes(tier) for tier in (DEVICE, HOST, DISK)]
        stored[DEVICE] -= Sequence.fixed_bytes(SHAPES, torch.float32, 0)
        stored[DEVICE] -= sequence.bases.bytes() if sequence.bases else 0
        stage, total = plan.stage("offload"), sum(stored)
        keys = sum(
            sequence.pool.k_bytes[layer, sequence.pool.code[ids]].sum() for layer, ids in enumerate(sequence.ids)
        )
        least = keys if stage.by == "values" else 0
        assert stored[DEVICE] <= max(stage.device * total, least) and stored[HOST] <= stage.host * total
        assert (stored[DISK] > 0) == (stage.host < 1 and tokens > 64)
        sequence.pool.check_integrity()


@pytest.mark.parametrize("text", TIERED[:2])
def test_the_best_pages_stay_highest_and_come_back(text):
    sequence, stage = filled(1000), Plan.parse(text).stage("offload")
    for seed in (1, 2):
        remeasure(sequence, seed)
        stage.apply(sequence)
        for ids, mass in zip(sequence.ids, sequence.mass, strict=True):
            tier, value = sequence.pool.tier[ids], mass.max(0)
            assert (tier == tier[:1]).all()  # columns move whole
            for upper, lower in ((DEVICE, HOST), (HOST, DISK), (DEVICE, DISK)):
                here, there = (value[tier[0] == t] for t in (upper, lower))
                assert here.min(initial=np.inf) > there.max(initial=-np.inf)
        sequence.pool.check_integrity()
    Plan.parse("offload(1)").apply(sequence)
    assert sequence.bytes(HOST) == sequence.bytes(DISK) == 0 == sequence.pool.disk_used


def test_without_room_on_disk_pages_stay_where_they_are():
    sequence = filled(1000, disk=1000)
    Plan.parse("offload(0.25, host=0.25)").apply(sequence)
    assert sequence.bytes(DISK) == 0 and sequence.bytes(HOST) > 0
    sequence.pool.check_integrity()


@pytest.mark.parametrize("text", VALUES)
def test_keys_stay_while_values_leave(text):
    """And whatever plan follows finds its way from there."""
    sequence = filled(1000)
    pool, stage = sequence.pool, Plan.parse(text).stage("offload")
    for seed in (1, 2):
        remeasure(sequence, seed)
        stage.apply(sequence)
        for layer, (ids, mass) in enumerate(zip(sequence.ids, sequence.mass, strict=True)):
            there, value = pool.split[ids], mass.max(0)
            assert (pool.tier[ids][there] == HOST).all() and (pool.tier[ids][~there] == DEVICE).all()
            assert (there == there[:1]).all() and there.all() == (stage.device < 0.4)
            assert value[~there[0]].min(initial=np.inf) > value[there[0]].max()
            k_size, v_size = (16 * 4 * 64, 24 * 4 * 64)
            assert pool.sizes_on(ids, DEVICE).sum() == ids.size * k_size + (~there).sum() * v_size
            batches = sequence.batches(layer)
            assert sum(batch.v_arena is pool.arena(HOST).data for batch, _ in batches) == 1
        pool.check_integrity()
    version = pool.clock
    stage.apply(sequence)
    assert pool.clock == version
    for other in ("offload(0.5, host=0.2)", text, "offload(0.4, by=layers)", text, "offload(1)"):
        Plan.parse(other).apply(sequence)
        pool.check_integrity()
    assert sequence.bytes(HOST) == sequence.bytes(DISK) == 0


def test_a_page_without_a_place_is_in_no_arena():
    """Between its old bytes and its new ones compaction must not look for it."""
    sequence = filled(1000)
    Plan.parse(VALUES[1]).apply(sequence)
    pool, page = sequence.pool, sequence.ids[0][0, 3:4]
    pool.vacate(page)
    for tier in (DEVICE, HOST, DISK):
        _, _, part, owner = blocks(pool, tier)
        assert not (owner[part < 2] == page).any()


def test_only_the_values_of_pages_that_count_are_read():
    """retrieve(by=keys) ranks pages by the attention they get; what lies elsewhere of the others may be anything."""
    sequence, gen = filled(1000), torch.Generator().manual_seed(1)
    sequence.scaling = 0.5
    Plan.parse("offload(0.1, by=values) | retrieve(0.3, by=keys)").apply(sequence)
    pool, picker = sequence.pool, sequence.retrieve
    assert (pool.b_off[np.concatenate(list(sequence.pages()))] < 0).all()  # no bounds are kept
    for layer, (ids, shape) in enumerate(zip(sequence.ids, SHAPES, strict=True)):
        q = torch.randn(shape.heads, 2, shape.k_dim, generator=gen)
        pick = picker.pick(sequence, layer, q)
        keys = torch.stack([pool.keys(row) for row in ids])  # [H, P, 64, d]
        mass = torch.einsum("hgd,hpsd->hgps", q, keys).mul(0.5).flatten(2).softmax(-1)
        mass = mass.unflatten(2, (-1, 64)).sum(-1).mean(1).numpy()  # [H, P]
        for head in range(shape.heads):
            best = np.argsort(-mass[head])
            always = {0, ids.shape[1] - 1}
            others = [int(page) for page in best if page not in always][: int(np.ceil(0.3 * ids.shape[1])) - 2]
            assert set(np.flatnonzero(pick[head])) == {*others, *always}
        host = pool.arena(HOST).data
        for page in ids[~pick]:
            host[pool.v_off[page] : pool.v_off[page] + 64 * 24 * 4] = 255  # NaN
        for batch, _ in sequence.batches(layer, pick):
            out, lse, _ = page_attention(q, batch, 0.5)
            assert out.isfinite().all() and lse.isfinite().all()


@torch.inference_mode()
def test_reading_every_page_by_its_keys_is_full_attention():
    ours, theirs = twins()
    ids = torch.randint(2, 160, (1, 300), generator=torch.Generator().manual_seed(0))
    cache = AdaptiveCache(ours, plan="offload(0.4, by=values) | retrieve(1, by=keys)")
    for piece in [ids[:, :280], *ids[:, 280:].split(1, 1)]:
        pos = cache.get_seq_length() + torch.arange(piece.shape[1])[None]
        got = ours(piece, position_ids=pos, past_key_values=cache).logits[0, -1]
    want = theirs(ids).logits[0, -1]
    assert (got - want).abs().max() < 2e-3 * want.abs().max()
    assert cache.sequences[0].bytes(HOST) > 0


@pytest.mark.parametrize("text", [*TIERED, "offload(0.7, by=values)"])
@torch.inference_mode()
def test_tokens_are_those_of_the_full_cache(text):
    ours, theirs = twins()
    ids = torch.randint(2, 160, (1, 330), generator=torch.Generator().manual_seed(0))
    cache = AdaptiveCache(ours, plan=text)
    for piece in [*ids[:, :250].split(128, 1), *ids[:, 250:].split(1, 1)]:
        pos = cache.get_seq_length() + torch.arange(piece.shape[1])[None]
        got = ours(piece, position_ids=pos, past_key_values=cache).logits[0, -1]
        want = theirs(ids[:, : cache.get_seq_length()]).logits[0, -1]
        assert (got - want).abs().max() < 2e-3 * want.abs().max()
    report = cache.report()
    assert (report["disk_bytes"] > 0) == ("host" in text)
    assert report["disk_bytes"] == report["requests"][0]["disk_bytes"] == cache.sequences[0].bytes(DISK)
    assert (cache.pool.host_capacity > 0) == ("host=0)" not in text)  # memory is not set aside for what goes to disk
    cache.pool.check_integrity()


@torch.inference_mode()
def test_a_prompt_beyond_the_budget_waits_on_disk():
    """Without host room, what the device cannot hold of a prompt goes to disk and nothing is lost."""
    ours, theirs = twins()
    ids = torch.randint(2, 160, (1, 700), generator=torch.Generator().manual_seed(0))
    cache = AdaptiveCache(ours, budget=300_000, plan="offload(0.25, host=0)")
    cache.expect(700, 20)
    for piece in ids.split(cache.chunk, 1):
        pos = cache.get_seq_length() + torch.arange(piece.shape[1])[None]
        got = ours(piece, position_ids=pos, past_key_values=cache).logits[0, -1]
    want = theirs(ids).logits[0, -1]
    assert (got - want).abs().max() < 2e-3 * want.abs().max()
    report = cache.report()
    assert "spilled to disk" in {d["reason"] for d in report["requests"][0]["decisions"]}
    assert report["host_bytes"] == 0 and report["device_peak"] <= report["budget"]


def test_captured_steps_do_not_read_the_disk():
    model = tiny()
    cache = AdaptiveCache(model, plan="offload(0.5, host=0)")
    with torch.inference_mode():
        model(torch.randint(2, 150, (1, 300)), past_key_values=cache)
    decoder = GraphDecoder(model, cache)
    assert decoder._known()
    cache.end_prefill()
    assert cache.sequences[0].bytes(DISK) and not decoder._known()


@torch.inference_mode()
def test_split_pages_give_way_under_pressure():
    """Keys that a plan keeps on the device leave it too where room is short; without host room the oldest pages go."""
    model = tiny()
    for host in (None, 60_000):
        cache = AdaptiveCache(model, budget=260_000, plan="offload(0.3, by=values)", host=host)
        cache.expect(900, 100)
        ids = torch.randint(2, 160, (1, 1000), generator=torch.Generator().manual_seed(0))
        for piece in [*ids[:, :900].split(cache.chunk, 1), *ids[:, 900:].split(20, 1)]:
            cache.reading = cache.seen < 900
            pos = cache.seen + torch.arange(piece.shape[1])[None]
            assert model(piece, position_ids=pos, past_key_values=cache).logits.isfinite().all()
            cache.pool.check_integrity()
        report, codes = cache.report(), [cache.pool.code[ids] for ids in cache.sequences[0].pages()]
        assert report["device_peak"] <= report["budget"] == 260_000
        assert (np.concatenate(codes) == 0).all() == (host is None)


@pytest.mark.parametrize("text", ["offload(0.6, by=values)", "offload(0.3, host=0.3)"])
@torch.inference_mode()
def test_a_plan_is_reached_from_where_pressure_has_put_pages(text):
    """What waited below while the prompt was read goes where the plan wants it, a part at a time if need be."""
    model, plan = tiny(), Plan.parse(text)
    promised = AdaptiveCache.estimate(model, 1000, plan)
    cache = AdaptiveCache(model, budget=int(promised["device"] * 1.1) + 200_000, plan=plan)
    cache.expect(1000, 50)
    for piece in torch.randint(2, 160, (1, 1000)).split(cache.chunk, 1):
        model(piece, position_ids=cache.seen + torch.arange(piece.shape[1])[None], past_key_values=cache)
    assert cache.report()["host_bytes"] > 0
    cache.end_prefill()
    assert [cache.sequences[0].bytes(tier) for tier in (DEVICE, HOST, DISK)] == [*promised.values()][1:]
    cache.pool.check_integrity()


@pytest.mark.parametrize("room", range(20_000, 200_000, 40_000))
def test_split_pages_take_both_parts_to_disk(room):
    """Pressure counts the values on the host too: where the disk has no room for them, something else gives way."""
    sequence, plan = filled(1000, disk=room), Plan.parse("offload(0.1, by=values)")
    pool = sequence.pool
    plan.apply(sequence)
    pool.host_capacity = pool.host_used
    pool.region(pool.arena(DEVICE).free_bytes // 256 * 256)
    make_room([sequence], [plan], [False], 200_000)
    pool.check_integrity()


@pytest.mark.parametrize("quantize", ["palu(0.5)", "tuned(0.5)"])
def test_layers_of_unequal_bytes_stay_within_what_is_promised(quantize):
    plan = Plan.parse(f"{quantize} | offload(0.5, by=layers)")
    mixed = [LayerShape(2, 4, 96, 80)] * 3 + [LayerShape(1, 4, 64, 128)]
    for shapes in (SHAPES, [LayerShape(2, 4, 80, 80)] * 3, mixed):
        sequence = filled(700, shapes=shapes)
        plan.apply(sequence)
        promised = plan.estimate(shapes, torch.float32, 700)
        assert sequence.bytes(DEVICE) <= promised["device"] and sequence.bytes(HOST) <= promised["host"]


@pytest.mark.parametrize("fault", ["no room", "damaged"])
def test_a_cut_that_fails_half_way_changes_nothing(fault):
    """Shared pages are copied before they are cut: all of them, or none, whatever stops it."""
    sequence = filled(1000)
    pool, other = sequence.pool, sequence.fork()
    if fault == "damaged":  # a page of the second head, in a launch of its own
        sequence.move([(np.arange(len(ids)) > 0)[:, None] & (ids >= 0) for ids in sequence.ids], DISK)
        pool.arena(DISK).data[pool.v_off[sequence.ids[-1][1, 7]]] ^= 255
    else:
        pool.region(pool.arena(DEVICE).free_bytes // 256 * 256 - 60_000)
    before = [ids.copy() for ids in other.ids], pool.device_used, pool.disk_used, pool.ref.copy()
    with pytest.raises(CacheFileError if fault == "damaged" else ArenaFull):
        other.truncate(500)
    assert all(map(np.array_equal, before[0], other.ids)) and other.length == 1000
    assert (pool.device_used, pool.disk_used) == before[1:3] and np.array_equal(pool.ref, before[3])
    assert all((pool.count[ids] == 64).all() for ids in other.ids)


def test_no_plan_is_chosen_whose_disk_there_is_not():
    model, ids = tiny(), torch.randint(2, 160, (1, 300))
    for disk, allowed in ((0, [True, False]), (None, [True, True])):
        controller = Controller(candidates=("full", "offload(0.25, host=0)"))
        cache = AdaptiveCache(model, disk=disk, controller=controller)
        with torch.inference_mode():
            model(ids, past_key_values=cache)
        cache.end_prefill()
        assert [d.allowed for d in cache.requests[0].decisions] == [allowed] * 2


def test_keys_of_split_pages_are_evicted_where_nothing_else_is_left():
    values = sum(s.heads for s in SHAPES) * 15 * 64 * 24 * 4
    sequence = filled(1000, disk=0, host=values)
    pool, plan = sequence.pool, Plan.parse("offload(0.1, by=values)")
    plan.apply(sequence)
    assert pool.host_free == 0 and all(pool.split[ids].all() for ids in sequence.ids)
    need, oldest = pool.arena(DEVICE).free_bytes + 50_000, [ids[:, 1].copy() for ids in sequence.ids]
    assert make_room([sequence], [plan], [False], need) == ["oldest pages evicted"]
    assert pool.arena(DEVICE).free_bytes >= need and pool.host_free > 0
    assert not any(np.isin(gone, ids).any() for gone, ids in zip(oldest, sequence.ids, strict=True))
    pool.check_integrity()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("offload(0.5, host=0.2)", "no kernel reads"), ("offload(0.5, by=values)", "no kernel reads"),
        ("retrieve(0.5, by=keys)", "by their bounds"), ("offload(0.5) | retrieve(0.5)", None),
    ],
)  # fmt: skip
def test_captured_steps_are_refused(monkeypatch, text, why):
    monkeypatch.setattr(graph, "triton_works", lambda: True)
    cache = SimpleNamespace(
        shapes=SHAPES, device=torch.device("cuda"), layers=[], controller=Controller(Plan.parse(text))
    )
    said = graph.refused(cache)
    assert said is None if why is None else why in said


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("offload(0.5, host=2)", "host=2.0 must be a share from 0 to 1"),
        ("offload(0.5, host=-0.1)", "host=-0.1 must be a share from 0 to 1"),
        ("offload(0.5, host=disk)", "offload.host.: 'disk' is not a number"),
        ("offload(0.5, disk=1)", "'disk'"),
        ("offload(0.5, by=keys)", "by='keys' must be pages or layers or values"),
        ("offload(0.5, by=values, host=0.5)", "host=0.5: by=values sends nothing to disk; leave host out"),
        ("retrieve(0.5, by=values)", "by='values' must be bounds or keys"),
    ],
)
def test_bad_shares_are_named(text, says):
    with pytest.raises(AdaptiveKVError, match=f"position 1: .*{says}"):
        Plan.parse(text)


def test_a_plan_for_a_disk_that_there_is_not():
    with pytest.raises(AdaptiveKVError, match="offloads to disk, but disk=0"):
        AdaptiveCache(tiny(), plan="offload(0.5, host=0.2)", disk=0)
    AdaptiveCache(tiny(), plan="offload(0.5, host=0)", host=0)
