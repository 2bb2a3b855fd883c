"""AdaptiveCache behind unmodified transformers models."""

import numpy as np
import pytest
import torch
from models import CONFIGS, calibrated, tiny, twins
from sequences import as_bits
from transformers import DynamicCache

from adaptivekv import AdaptiveCache, AdaptiveKVError, BudgetError, Plan
from adaptivekv.memory import store
from adaptivekv.memory.evict import evict
from adaptivekv.memory.formats import FORMATS
from adaptivekv.policies import STAGES
from adaptivekv.policies.base import parameters
from adaptivekv.policies.named import NAMED
from adaptivekv.recall import recall

PIPELINES = [
    "int4(rotate=false)", "snapkv(0.5, heads=adaptive, layers=pyramid)", "snapkv(0.5) | k4v2", "kvzip(0.4) | k4v2",
    "int4 | offload(0.5) | retrieve(0.5)", "streaming(0.25) | int8 | offload(0.25)", "keydiff(0.5) | kivi42",
    "int8 | offload(0.5, by=layers)",
]  # fmt: skip
ALONE = [name + "(0.5)" * (next(iter(parameters(kind).values())) is None) for name, kind in STAGES.items()]
PLANS = ["full", *ALONE, *PIPELINES, *NAMED]  # every stage by itself, pipelines, the named plans


def left_padded(rows: int, length: int, pads: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(2, 160, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, n in enumerate(pads):
        mask[row, :n] = 0
    return ids, mask


def run(model, cache, turns, answers, chunk=1000):
    """Logits of prompts in chunks and of forced answers, over turns; pads on the left of the first prompt only."""
    out, mask = [], torch.zeros(len(turns[0][0]), 0, dtype=torch.long)
    for (ids, real), forced in zip(turns, answers, strict=True):
        pieces = [*zip(ids.split(chunk, 1), real.split(chunk, 1), strict=True)]
        pieces += [(token, torch.ones_like(token)) for token in forced.split(1, 1) if token.numel()]
        for i, (piece, bits) in enumerate(pieces):
            if i == len(pieces) - forced.shape[1] and isinstance(cache, AdaptiveCache) and cache.controller.recalls:
                recall(model, cache, ids, real)
            mask = torch.cat([mask, bits], 1)
            pos = (mask.cumsum(1) - 1).clamp(min=0)[:, -piece.shape[1] :]
            logits = model(piece, attention_mask=mask, position_ids=pos, past_key_values=cache).logits
            out.append(logits[bits.bool()])
    return torch.cat(out)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_full_plan_equals_dynamic_cache(name):
    ours, theirs = twins(name)
    turns = [left_padded(2, 150, [37, 0]), left_padded(2, 70, [0, 0], seed=1)]
    answers = [left_padded(2, 66, [], seed=s)[0] for s in (2, 3)]
    cache = AdaptiveCache(ours, plan="full")
    got = run(ours, cache, turns, answers, chunk=64)
    want = run(theirs, DynamicCache(config=theirs.config), turns, answers, chunk=64)
    assert (got - want).abs().max() <= 1e-4
    cache.pool.check_integrity()


@pytest.fixture(autouse=True)
def _calibrated(tmp_path, monkeypatch):
    calibrated(tiny(), tmp_path, monkeypatch)


@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_every_plan(plan):
    """Integrity, protected tokens, estimated bytes, batch equals one by one, determinism: one matrix for all."""
    model = tiny()
    ids, mask = left_padded(2, 400, [90, 0])
    answer = left_padded(2, 70, [], seed=5)[0]
    cache = AdaptiveCache(model, plan=plan)
    got = run(model, cache, [(ids, mask)], [answer[:, :1]], chunk=128)
    cache.pool.check_integrity()
    fixed = cache.controller.fixed
    evict = fixed.stage("evict")
    for row, sequence in enumerate(cache.sequences):
        size = fixed.estimate(cache.shapes, cache.dtype, int(mask[row].sum()))
        # the decode step added one token to the tail, which no page felt
        held, promised = sequence.bytes(0) + sequence.bytes(1), size["device"] + size["host"]
        # where survivors lie decides whether one page counts as recent; ragged heads end in pages of their own, where
        # layers compete most of them possibly just in time
        ragged = evict is not None and (evict.heads, evict.layers) != ("uniform", "uniform")
        ragged += evict is not None and evict.layers == "adaptive"
        slack = sequence.pool.column_bytes(FORMATS["native"]) * ((evict is not None and "|" in str(fixed)) + ragged)
        assert promised - slack <= held <= promised
        tier_slack = slack or sequence.pool.column_bytes(FORMATS["native"]) * ("|" in str(fixed))
        assert abs(sequence.bytes(1) - size["host"]) <= tier_slack
        for layer in range(len(cache.shapes)):
            used, pos = sequence.slots(layer)
            for head in range(len(used)):
                assert set(range(4)) <= set(pos[head][used[head]])
    more = run_on(model, cache, answer[:, 1:])
    cache.pool.check_integrity()
    assert torch.isfinite(more).all()
    # chunks end at the same tokens only where there is no padding: the padded row is compared in one piece
    whole = run(model, AdaptiveCache(model, plan=plan), [(ids, mask)], [answer[:, :1]])
    for row, (batch, chunk) in enumerate([(whole, 1000), (got, 128)]):
        n = int(mask[row].sum())
        one = (ids[row : row + 1, -n:], torch.ones(1, n, dtype=torch.long))
        lone = run(model, AdaptiveCache(model, plan=plan), [one], [answer[row : row + 1, :1]], chunk=chunk)
        assert (lone[-1] - batch[-2 + row]).abs().max() < 1e-4


@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_saved_and_restored_it_goes_on_the_same(plan, tmp_path):
    model = tiny()
    ids, mask = left_padded(1, 300, [])
    answer = left_padded(1, 40, [], seed=5)[0]
    cache = AdaptiveCache(model, plan=plan)
    run(model, cache, [(ids, mask)], [answer[:, :3]], chunk=128)
    store.save(cache.sequences[0], tmp_path / "cache.safetensors")
    other = AdaptiveCache(model, plan=plan)
    other.adopt(lambda pool: store.load(pool, tmp_path / "cache.safetensors"), 303, 100)
    for request, old in zip(other.requests, cache.requests, strict=True):
        request.prefilling, request.generated, request.sequence.scaling = False, old.generated, old.sequence.scaling
        request.sequence.retrieve = request.plan.stage("retrieve")
    assert torch.equal(run_on(model, cache, answer[:, 3:]), run_on(model, other, answer[:, 3:]))
    other.pool.check_integrity()
    assert [s.bytes(tier) for s in other.sequences for tier in (0, 1)] == [
        s.bytes(tier) for s in cache.sequences for tier in (0, 1)
    ]


def run_on(model, cache, tokens):
    out = []
    for token in tokens.split(1, 1):
        pos = torch.tensor([[s.length] for s in cache.sequences])
        out.append(model(token, position_ids=pos, past_key_values=cache).logits)
    return torch.cat(out, 1)


@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_budget_holds_at_every_step(plan):
    model = tiny()
    ids, mask = left_padded(1, 956, [])  # the fourth token of the answer seals a page
    full = AdaptiveCache.estimate(model, 1000, "full")["full"]
    for host in (None,) if Plan.parse(plan).stage("offload") else (None, 0):
        cache = AdaptiveCache(model, plan=plan, budget=int(full * 0.4), host=host)
        cache.expect(956, 44)
        run(model, cache, [(ids, mask)], [left_padded(1, 10, [], seed=1)[0]], chunk=cache.chunk)
        assert cache.report()["device_peak"] <= int(full * 0.4)
        cache.pool.check_integrity()


@torch.no_grad()
def test_generate_greedy_sampling_and_second_turn():
    ours, theirs = twins()
    ids, mask = left_padded(2, 130, [17, 0])
    cache, reference = AdaptiveCache(ours, plan="full"), DynamicCache(config=theirs.config)
    for turn in range(2):
        kwargs = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": turn == 1}
        torch.manual_seed(turn)
        got = ours.generate(ids, past_key_values=cache, **kwargs, **cache.generate_kwargs)
        torch.manual_seed(turn)
        want = theirs.generate(ids, past_key_values=reference, **kwargs)
        assert torch.equal(got, want)
        ids = torch.cat([got, left_padded(2, 9, [], seed=turn)[0]], 1)
        mask = torch.cat([mask, torch.ones(2, ids.shape[1] - mask.shape[1], dtype=torch.long)], 1)
    assert [r.turn for r in cache.requests] == [1, 1]


@torch.no_grad()
def test_generate_resolves_a_share_of_the_budget():
    model = tiny()
    ids, mask = left_padded(1, 1500, [])
    cache = AdaptiveCache(model, budget=0.5, plan="int4", kv_dtype=torch.float16)
    model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=40, do_sample=False, **cache.generate_kwargs
    )
    assert cache.requests[0].budget == AdaptiveCache.estimate(model, 1540, "full", torch.float16)["full"] // 2
    assert cache.report()["device_peak"] <= cache.requests[0].budget
    assert cache.report()["requests"][0]["plan"] == "int4"


@torch.no_grad()
def test_frozen_step_and_truncate_leave_no_trace():
    model = tiny()
    ids, mask = left_padded(1, 300, [])
    probe = left_padded(1, 90, [], seed=3)[0]
    cache = AdaptiveCache(model, plan="full")
    run(model, cache, [(ids, mask)], [probe[:, :0]])
    with cache.frozen_step():
        pos = 300 + torch.arange(90)[None]
        first = model(probe, position_ids=pos, past_key_values=cache).logits
    assert cache.get_seq_length() == 300
    second = model(probe, position_ids=pos, past_key_values=cache).logits
    assert (first - second).abs().max() < 1e-5
    cache.truncate(300)
    third = model(probe, position_ids=pos, past_key_values=cache).logits
    assert (first - third).abs().max() < 1e-5
    cache.pool.check_integrity()


@torch.no_grad()
def test_adaptive_controller_explains_and_explores():
    from adaptivekv.controller import Controller
    from adaptivekv.selector import RuleTable

    model = tiny()
    ids, mask = left_padded(1, 1200, [])
    seen = set()
    for seed in range(6):
        controller = Controller(selector=RuleTable(), quality=0.05, epsilon=0.9, seed=seed, epoch=16)
        cache = AdaptiveCache(model, budget=0.5, kv_dtype=torch.float16, controller=controller)
        cache.expect(1200, 60)
        run(model, cache, [(ids, mask)], [left_padded(1, 50, [], seed=1)[0]], chunk=cache.chunk)
        decisions = cache.requests[0].decisions
        assert [d.moment for d in decisions if not d.pressure][:3] == ["admission", "prefill", "epoch"]
        for d in decisions:
            assert d.reason and d.selector
            if d.probs:
                chosen = d.plans.index(d.plan)
                assert abs(sum(d.probs) - 1) < 1e-9 and d.probs[chosen] > 0
                assert not any(p for p, ok in zip(d.probs, d.allowed, strict=True) if not ok) or not any(d.allowed)
        seen |= {d.plan for d in decisions}
        assert cache.report()["device_peak"] <= cache.requests[0].budget
        cache.pool.check_integrity()
    assert len(seen) > 1


def test_refusals_name_the_fix():
    model = tiny()
    ids = torch.randint(2, 160, (1, 40))
    cache = AdaptiveCache(model, budget=4096)
    with pytest.raises(BudgetError, match="too small"):
        model(ids, past_key_values=cache)
    cache = AdaptiveCache(model)
    with pytest.raises(AdaptiveKVError, match="beams"):
        model.generate(ids, past_key_values=cache, num_beams=2, max_new_tokens=3, **cache.generate_kwargs)
    cache = AdaptiveCache(model)
    with pytest.raises(AdaptiveKVError, match="4096 positions"):
        model(torch.randint(2, 160, (1, 4097)), past_key_values=cache)
    for bad in ("-1", "0", "12 parsecs", 0, -3, float("nan")):
        with pytest.raises(AdaptiveKVError, match="budget"):
            AdaptiveCache(model, budget=bad)


@torch.no_grad()
def test_ragged_heads_from_per_head_eviction():
    """Heads that keep different numbers of slots: attention equals softmax over exactly those slots."""
    model = tiny()
    ids, mask = left_padded(1, 400, [])
    cache = AdaptiveCache(model, plan="full")
    run(model, cache, [(ids, mask)], [ids[:, :0]])
    sequence, rng = cache.sequences[0], np.random.default_rng(0)
    for layer in range(len(cache.shapes)):
        used, _ = sequence.slots(layer)
        keep = rng.random(used.shape) < np.array([0.2, 0.7])[:, None, None]
        before = sequence.bytes()
        keys = [
            sequence.keys(layer, h).view(used.shape[1], -1, 16)[torch.from_numpy(keep[h] & used[h])] for h in (0, 1)
        ]
        masks = [keep if i == layer else np.ones((*x.shape, 64), bool) for i, x in enumerate(sequence.ids)]
        evict(sequence, as_bits(masks))
        assert sequence.bytes() < before
        for h in (0, 1):
            now, _ = sequence.slots(layer)
            left = sequence.keys(layer, h).view(now.shape[1], -1, 16)[torch.from_numpy(now[h])]
            assert torch.equal(left, keys[h])
    cache.pool.check_integrity()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_the_first():
    """Triton launches on the current one."""
    model = tiny().to("cuda:1")
    with pytest.raises(AdaptiveKVError, match=r"on cuda:1: call torch.cuda.set_device\('cuda:1'\) first"):
        AdaptiveCache(model)
    try:
        torch.cuda.set_device("cuda:1")
        cache = AdaptiveCache(model, plan="streaming(0.5) | int4")
        ids, mask = left_padded(2, 150, [0, 9])
        out = model.generate(
            ids.to("cuda:1"), attention_mask=mask.to("cuda:1"), past_key_values=cache, max_new_tokens=5, do_sample=False
        )
        assert out.shape == (2, 155)
        assert all(sequence.bytes() for sequence in cache.sequences)
    finally:
        torch.cuda.set_device(0)


@torch.no_grad()
def test_embedded_model_with_full_plan_equals_dynamic_cache(smol):
    """float32, a prompt in chunks, a second turn and single tokens, over several sealed pages."""
    model = smol.model
    ids = smol.tokenizer(
        "Call me Ishmael. Some years ago, never mind how long precisely, I went to sea. " * 20
    ).input_ids
    ids = torch.tensor([ids[:300]])
    logits = []
    for name in ("sdpa", "adaptivekv"):
        cache = AdaptiveCache(model, plan="full") if name == "adaptivekv" else DynamicCache(config=model.config)
        model.set_attn_implementation(name)
        parts, at = [], 0
        for n in (128, 100, 1, 1, 69, 1):
            pos = torch.arange(at, at + n)[None]
            parts.append(model(ids[:, at : at + n], position_ids=pos, past_key_values=cache).logits)
            at += n
        logits.append(torch.cat(parts, 1))
    assert (logits[0] - logits[1]).abs().max() <= 1e-4
