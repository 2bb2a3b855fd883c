"""Low-rank pages: the paper's decomposition, attention over latents, and that bases live as long as their pages."""

import numpy as np
import pytest
import torch
from models import SMALL, llama, tiny
from sequences import as_bits
from transformers import AutoModelForCausalLM

from adaptivekv import AdaptiveCache, AdaptiveKVError, Plan
from adaptivekv.controller import Controller
from adaptivekv.decisions import Request
from adaptivekv.kernels import attend_dense, page_attention
from adaptivekv.memory import store
from adaptivekv.memory.arena import ArenaFull
from adaptivekv.memory.bounds import bounds
from adaptivekv.memory.evict import evict
from adaptivekv.memory.formats import BY_CODE, FORMATS
from adaptivekv.memory.pages import PagePool
from adaptivekv.memory.sequence import Sequence
from adaptivekv.memory.shapes import DISK, HOST, LayerShape

SHAPES = [LayerShape(2, 4, 32, 16)] * 3 + [LayerShape(1, 4, 24, 40)]
EVERY = ["palu(0.5, window=0, sinks=0)", "palu(0.25, latent=int4, window=0, sinks=0)",
         "palu(0.75, latent=k4v2, window=0, sinks=0)"]  # fmt: skip


def filled(tokens: int, inner: int = 48, seed: int = 0, device: int = 4 << 20, shapes=SHAPES) -> tuple[Sequence, list]:
    """A sequence whose keys and values are projections of `inner` inputs, and per layer (inputs, W_k, W_v)."""
    pool = PagePool(shapes, torch.float32, "cpu", device, 4 << 20, 60_000, 4 << 20)
    sequence, made = Sequence(pool), []
    feed(sequence, tokens, made, inner, seed)
    return sequence, made


def feed(sequence: Sequence, tokens: int, made: list, inner: int = 48, seed: int = 0) -> None:
    gen, pos = torch.Generator().manual_seed(seed), sequence.length + np.arange(tokens)
    for layer, s in enumerate(sequence.pool.layers):
        x = torch.randn(tokens, inner, generator=gen) * torch.rand(inner, generator=gen).mul(3).exp()
        w_k, w_v = (torch.randn(s.heads, dim, inner, generator=gen) for dim in (s.k_dim, s.v_dim))
        sequence.append(layer, x @ w_k.transpose(1, 2), x @ w_v.transpose(1, 2), pos)
        made.append((x, w_k, w_v))
    sequence.commit(pos)


def stored(sequence: Sequence, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a layer's full pages as they are read back: [H, n, dim] each."""
    parts = [sequence.pool.read(ids) for ids in sequence.ids[layer]]
    k, v = (torch.stack([part[i].flatten(0, 1) for part in parts]) for i in (0, 1))
    return k, v


def palu(w: torch.Tensor, x: torch.Tensor, rank: int) -> torch.Tensor:
    """The paper's section 3.2 and appendix for one head: w [d, D], x [n, D] -> what is restored from latents [n, d].

    L L^T = X^T X; W L = U S V^T; A = U S^1/2 and B = S^1/2 V^T L^-1 of `rank`; latents B x, restored A (B x).
    """
    w, x = w.double(), x.double()
    whiten = torch.linalg.cholesky(x.T @ x)
    u, s, v = torch.linalg.svd(w @ whiten, full_matrices=False)
    a = u[:, :rank] * s[:rank].sqrt()
    b = s[:rank].sqrt()[:, None] * v[:rank] @ torch.linalg.inv(whiten)
    latents = x @ b.T
    return (latents @ a.T).float()


@pytest.mark.parametrize("rank", [0.125, 0.5, 0.875])
def test_pages_hold_the_papers_low_rank_projection(rank):
    sequence, made = filled(256)
    Plan.parse(f"palu({rank}, window=0, sinks=0)").apply(sequence)
    for layer, (x, *weights) in enumerate(made):
        eighths, s = sequence.bases.ranks[layer], SHAPES[layer]
        for got, w, dim in zip(stored(sequence, layer), weights, (s.k_dim, s.v_dim), strict=True):
            kept = min(dim, -(-dim * eighths // 64) * 8)
            for head in range(s.heads):
                want = palu(w[head], x, kept)
                assert (got[head] - want).norm() < 2e-5 * want.norm()
                full = x @ w[head].T
                assert kept == dim or (full - want).norm() > 1e-3 * full.norm()  # something was lost
    ids = np.random.default_rng(0).permutation(np.concatenate(list(sequence.pages())))
    for at in sequence.pool.kinds(ids):  # pages of several layers and heads in any order
        for part, pages in enumerate(sequence.pool.read(ids[at])):
            alone = torch.cat([sequence.pool.read(ids[at][i : i + 1])[part] for i in range(len(pages))])
            torch.testing.assert_close(pages, alone, rtol=1e-5, atol=1e-4)
    sequence.pool.check_integrity()


def test_forgotten_tokens_have_no_say():
    """Slots of a page that was cut still hold what they held."""
    sequence, made = filled(256)
    sequence.truncate(200)
    Plan.parse(EVERY[0]).apply(sequence)
    for layer, (x, *weights) in enumerate(made):
        s, pool, last = SHAPES[layer], sequence.pool, sequence.ids[layer][:, -1]
        assert (pool.count[last] == 8).all()
        dims = BY_CODE[pool.code[last[0]]].dims(s.k_dim, s.v_dim)
        for part, (got, w, kept) in enumerate(zip(stored(sequence, layer), weights, dims, strict=True)):
            assert not pool.raw(last)[part].view(torch.float32).view(s.heads, 64, kept)[:, 8:].any()
            for head in range(s.heads):
                want = palu(w[head], x[:200], kept)
                assert (got[head, :200] - want).norm() < 2e-5 * want.norm()


@pytest.mark.parametrize("latent", ["native", "int4", "k4v2"])
def test_what_is_of_low_rank_loses_no_more_than_its_latents(latent):
    sequence, made = filled(256, inner=8)
    Plan.parse(f"palu(0.5, latent={latent}, window=0, sinks=0)").apply(sequence)
    for layer, (x, *weights) in enumerate(made):
        bits = 16 if latent == "native" else 4, {"native": 16, "int4": 4, "k4v2": 2}[latent]
        for got, w, n in zip(stored(sequence, layer), weights, bits, strict=True):
            want = x @ w.transpose(1, 2)
            # half a step of a slot's range, which is at most twice its length, in each of at most 24 directions
            bound = 1e-4 if n == 16 else 24**0.5 / (2**n - 1) * 1.05
            assert ((got - want).norm(dim=-1) <= bound * want.norm(dim=-1)).all()


@pytest.mark.parametrize("text", EVERY)
@pytest.mark.parametrize("stats", [False, True])
def test_attention_over_latents_is_attention_over_what_they_restore(text, stats):
    sequence, _ = filled(300)
    Plan.parse(text).apply(sequence)
    gen = torch.Generator().manual_seed(1)
    for layer, s in enumerate(SHAPES):
        q = torch.randn(s.heads, 6, s.k_dim, generator=gen) * 0.02
        ((batch, columns),) = sequence.batches(layer)
        dims = FORMATS[f"rank{sequence.bases.ranks[layer]}"].dims(s.k_dim, s.v_dim)
        assert batch.bases is not None and (batch.k_dim, batch.v_dim) == dims
        out, lse, page_lse = page_attention(q, batch, 0.3, None, stats)
        k, v = stored(sequence, layer)
        want, want_lse = attend_dense(q, k, v, 0.3)
        torch.testing.assert_close(out, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
        torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-3)
        if stats:
            torch.testing.assert_close(page_lse.logsumexp(1), lse, rtol=1e-4, atol=1e-3)
        assert columns.shape == sequence.ids[layer].shape


def test_layers_that_would_lose_more_get_more():
    shapes = [LayerShape(2, 4, 32, 32)] * 6
    pool = PagePool(shapes, torch.float32, "cpu", 4 << 20)
    sequence, gen, pos = Sequence(pool), torch.Generator().manual_seed(0), np.arange(256)
    steep = [2.0, 0.1, 1.0, 3.0, 0.0, 0.5]  # how fast the directions of a layer lose their share
    for layer, s in enumerate(shapes):
        scale = torch.exp(-steep[layer] * torch.arange(32) / 8)
        mix = torch.linalg.qr(torch.randn(2, 32, 32, generator=gen))[0]
        k, v = ((torch.randn(2, 256, 32, generator=gen) * scale) @ mix for _ in range(2))
        sequence.append(layer, k, v, pos)
        assert s.heads == 2
    sequence.commit(pos)
    stage = Plan.parse("palu(0.5)").stage("quantize")
    stage.apply(sequence)
    assert sequence.bases.ranks == [3, 5, 4, 3, 5, 4]
    assert stage._shares(6) == [(4, 2), (5, 2), (3, 2)]
    names = [{BY_CODE[c].name for c in pool.code[ids[:, 1:-1]].ravel()} for ids in sequence.ids]
    assert names == [{f"rank{n}"} for n in sequence.bases.ranks]


@pytest.mark.parametrize("text", EVERY)
def test_later_pages_keep_the_bases_and_evictions_move_latents(text):
    sequence, made = filled(300)
    plan, pool = Plan.parse(text), sequence.pool
    plan.apply(sequence)
    bases = sequence.bases
    before = [x.clone() for layer in range(len(SHAPES)) for x in bases.layer(layer)]
    feed(sequence, 150, made, seed=1)
    plan.maintain(sequence)
    now = [x for layer in range(len(SHAPES)) for x in bases.layer(layer)]
    assert sequence.bases is bases and all(map(torch.equal, before, now))
    assert {BY_CODE[c].rank > 0 for ids in sequence.pages() for c in pool.code[ids]} == {True}
    old, keep, rng = [stored(sequence, i) for i in range(len(SHAPES))], [], np.random.default_rng(0)
    for ids in sequence.ids:
        keep.append(np.tile(rng.random((ids.shape[1], 64)) < 0.6, (len(ids), 1, 1)))
    evict(sequence, as_bits(keep))
    pool.check_integrity()
    for layer, mask in enumerate(keep):
        used, pos = sequence.slots(layer)
        for got, was in zip(stored(sequence, layer), old[layer], strict=True):
            for head in range(len(mask)):
                mine = torch.from_numpy(used[head].ravel())
                assert sorted(pos[head][used[head]]) == np.flatnonzero(mask[head].ravel()).tolist()
                want = was[head][torch.from_numpy(mask[head].ravel())]
                off = (got[head][mine] - want).norm(dim=-1) / want.norm(dim=-1).mean()
                if "latent" in text:  # packed ones share a page's mean: most keep theirs, the others lose a little
                    assert off.max() < 0.5 and (off < 1e-5).float().mean() > 0.4
                else:
                    assert off.max() < 1e-5


def test_bases_live_as_long_as_a_sequence_that_uses_them():
    sequence, made = filled(300)
    pool, plan = sequence.pool, Plan.parse(EVERY[0])
    early = sequence.fork()  # before there are bases: it will have its own
    plan.apply(sequence)
    late = sequence.fork()
    plan.apply(early)
    pool.check_integrity()
    assert late.bases is sequence.bases is not early.bases and len(pool.bases) == 2
    late.truncate(100)  # shared low-rank pages are copied, bases and all
    pool.check_integrity()
    k, v = (torch.stack([pool.read(ids[1:2])[i][0, :36] for ids in late.ids[0]]) for i in (0, 1))
    for got, was in zip((k, v), stored(sequence, 0), strict=True):
        torch.testing.assert_close(got, was[:, 64:100], rtol=1e-5, atol=1e-4)
    sequence.free()
    pool.check_integrity()
    assert len(pool.bases) == 2
    late.truncate(0)
    feed(late, 200, made, seed=3)  # other tokens: the bases of those that are gone are not theirs
    old = late.bases
    plan.apply(late)
    assert late.bases is not old and len(pool.bases) == 2
    early.free()
    late.free()
    pool.check_integrity()
    assert pool.device_used == 0 and not pool.bases


def test_moved_saved_and_bounded_like_other_pages(tmp_path):
    sequence, _ = filled(400)
    pool = sequence.pool
    Plan.parse("palu(0.5, window=0, sinks=0) | offload(0.4, host=0.3)").apply(sequence)
    assert sequence.bytes(HOST) > 0 and sequence.bytes(DISK) > 0
    pool.check_integrity()
    store.save(sequence, tmp_path / "cache")
    other = store.load(PagePool(SHAPES, torch.float32, "cpu", 4 << 20, 4 << 20, 60_000, 4 << 20), tmp_path / "cache")
    other.pool.check_integrity()
    for layer in range(len(SHAPES)):
        for mine, theirs in zip(content(sequence, layer), content(other, layer), strict=True):
            assert torch.equal(mine, theirs)
        ids = sequence.ids[layer].ravel()
        low, high = bounds(pool, ids).unbind(1)
        k = torch.cat([pool.keys(ids[i : i + 1]) for i in range(len(ids))])
        assert (k >= low[:, None] - 1e-3).all() and (k <= high[:, None] + 1e-3).all()
    assert other.bytes() == sequence.bytes() - bound_bytes(sequence)


def content(sequence: Sequence, layer: int) -> list[torch.Tensor]:
    return [torch.cat(sequence.pool.read(ids[i : i + 1]), -1) for ids in sequence.ids[layer] for i in range(len(ids))]


def bound_bytes(sequence: Sequence) -> int:
    return sum(ids.size * -(-2 * s.k_dim * 4 // 256) * 256 for ids, s in zip(sequence.ids, SHAPES, strict=True))


def test_a_head_without_settled_pages_has_bases_of_what_it_holds():
    """Evictions may leave a head its ends alone; what it settles later is stored in bases that fit it."""
    sequence, _ = filled(640)
    keep = [np.ones((*ids.shape, 64), bool) for ids in sequence.ids]
    for mask in keep:
        mask[0, 1:-1] = False
    evict(sequence, as_bits(keep))
    pool = sequence.pool
    Plan.parse("palu(0.5)").apply(sequence)
    for layer, ids in enumerate(sequence.ids):
        for basis, x in zip(sequence.bases.layer(layer), pool.read(ids[0][ids[0] >= 0]), strict=True):
            x = x.flatten(0, 1)
            best = torch.linalg.svdvals(x)[basis.shape[2] :].norm()  # what is lost in the best directions
            lost = (x - x @ basis[0] @ basis[0].T).norm()
            torch.testing.assert_close(lost, best, rtol=1e-3, atol=1e-5 * float(x.norm()))


@torch.inference_mode()
def test_room_is_made_for_bases_larger_than_a_column():
    config = llama.LlamaConfig(**{**SMALL, "num_hidden_layers": 2}, head_dim=128)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    cache = AdaptiveCache(model, budget=2_000_000, plan="palu(0.875)")
    cache.expect(1000, 50)
    for piece in torch.randint(2, 160, (1, 1000)).split(cache.chunk, 1):
        model(piece, position_ids=cache.seen + torch.arange(piece.shape[1])[None], past_key_values=cache)
    cache.end_prefill()
    report, (sequence,) = cache.report(), cache.sequences
    assert sequence.bases.bytes() > sequence.pool.column_bytes(FORMATS["native"])
    assert report["device_peak"] <= report["budget"] and report["host_bytes"] > 0
    cache.pool.check_integrity()


def test_without_room_for_bases_nothing_changes():
    sequence, _ = filled(300)
    used = sequence.pool.device_used
    rest = sequence.pool.region(sequence.pool.arena(0).free_bytes // 256 * 256)[0]
    with pytest.raises(ArenaFull):
        Plan.parse(EVERY[0]).apply(sequence)
    assert sequence.bases is None and not sequence.pool.bases
    sequence.pool.free_region(rest)
    assert sequence.pool.device_used == used
    sequence.pool.check_integrity()


@torch.inference_mode()
def test_a_model_under_pressure_keeps_its_budget():
    """Bases lie between pages and move with them; no page of low rank loses bits, the oldest ones go instead."""
    model = tiny()
    cache = AdaptiveCache(model, budget=300_000, plan="palu(0.5)", host=0)
    ids = torch.randint(2, 160, (1, 900), generator=torch.Generator().manual_seed(0))
    cache.expect(700, 200)
    held = set()
    for piece in [*ids[:, :700].split(cache.chunk, 1), *ids[:, 700:].split(25, 1)]:
        cache.reading = cache.seen < 700
        pos = cache.seen + torch.arange(piece.shape[1])[None]
        assert model(piece, position_ids=pos, past_key_values=cache).logits.isfinite().all()
        cache.pool.check_integrity()
        codes = np.concatenate([cache.pool.code[pages] for pages in cache.sequences[0].pages()])
        held.add(tuple(sorted({BY_CODE[code].name for code in codes})))
    report = cache.report()
    assert report["device_peak"] <= report["budget"] == 300_000
    assert ("int2r", "native", "rank3", "rank4", "rank5") in held


def test_which_plans_low_rank_pages_can_come_under():
    def reach(held: list[str], text: str) -> bool:
        request = Request(None, 0, 0, None, 0)  # type: ignore[arg-type]
        return Controller._can_become(request, Plan.parse(text), {FORMATS[name] for name in held})

    assert reach(["rank3", "rank4", "rank5"], "palu(0.5)") and reach([], "palu(0.5)")
    for other in ("palu(0.25)", "palu(0.5, latent=int4)", "int2", "full", "offload(0.5)"):
        assert not reach(["rank3", "rank4", "rank5"], other)
    assert not reach(["int4r"], "palu(0.5)")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("palu", "needs rank"),
        ("palu(0.4)", "rank=0.4 must be a whole number of eighths from 0.125 to 0.875"),
        ("palu(1)", "rank=1.0 must be"),
        ("palu(0)", "rank=0.0 must be"),
        ("palu(0.5, latent=int2)", "latent='int2' must be native or int4 or k4v2"),
        ("palu(0.5, window=-1)", "window=-1"),
    ],
)
def test_bad_values_are_named(text, says):
    with pytest.raises(AdaptiveKVError, match=f"position 1: .*{says}"):
        Plan.parse(text)
