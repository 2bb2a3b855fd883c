"""Who keeps how much: options that share a budget out, methods that do it themselves, a pot that overflows."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import tiny as tiny_model
from sequences import as_bits
from test_methods import METHODS, SHAPES, TOKENS, WINDOW, Tiny

from adaptivekv import AdaptiveCache, Plan
from adaptivekv.memory.evict import evict
from adaptivekv.memory.integrity import check_sequence
from adaptivekv.memory.sealed import Sealed, groups
from adaptivekv.policies.eviction.budgets import across_layers, dispersion, pyramid, weighted

SEALED = TOKENS // 64 * 64


def test_adaptive_heads_take_the_best_of_the_layer_above_their_floor():
    """Ada-KV as its authors describe it: every head's best 20 % are safe, then the best of all heads together."""
    tiny, stage = Tiny(), Plan.parse("knorm(0.5, heads=adaptive)").stage("evict")
    score, mean = stage.score(tiny.sequence, 0).view(2, -1), stage.keep_slots(tiny.sequence)
    score[:, :4] = score[:, TOKENS - 32 :] = torch.inf  # protected
    stage.apply(tiny.sequence)
    score.scatter_(1, score.topk(int(0.2 * mean), 1).indices, torch.inf)
    best = score.flatten().topk(2 * mean).indices.tolist()
    short, long = tiny.held()[0]  # the first head's keys are four times shorter
    assert {*short, *(i + score.shape[1] for i in long)} == set(best) and len(short) > len(long)


@pytest.mark.parametrize(
    ("mean", "layers", "most"), [(100, 1, 200), (100, 12, 1000), (90, 7, 100), (0, 5, 50), (50, 3, 50)]
)
def test_pyramid_falls_linearly_and_keeps_the_total(mean, layers, most):
    budgets = pyramid(mean, layers, most)
    assert sum(budgets) == mean * layers and min(budgets) >= 0 and max(budgets) <= most
    assert max(np.abs(np.diff(budgets, 2)), default=0) <= 2  # a line, but for rounding
    if layers > 1:
        assert abs(budgets[0] - min(2 * mean - mean / 20, most)) <= 1


def test_dispersion_is_cakes_preference():
    """Entropy of a query's attention to what is older than the window, times its variance over the queries."""
    tiny = Tiny()
    for layer in range(len(SHAPES)):
        weights = tiny.weights(layer)[..., : TOKENS - WINDOW]
        entropy = torch.stack([-(row * row.log()).sum() for row in weights.flatten(0, 2)]).mean()
        mean = weights.mean(2, keepdim=True)
        shift = ((weights - mean) ** 2).mean(2).sum(-1).mean()
        assert dispersion(tiny.sequence, layer, WINDOW) == pytest.approx(float(entropy * shift), rel=1e-4)


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 500)), min_size=1, max_size=40), st.integers(0, 400))
def test_weighted_budgets_keep_the_total(layers, mean):
    weights, most = zip(*layers, strict=True)
    budgets = weighted(mean, weights, most)
    assert sum(budgets) == min(mean * len(most), sum(most))
    assert all(0 <= n <= limit for n, limit in zip(budgets, most, strict=True))
    free = [(n, w) for n, w, limit in zip(budgets, weights, most, strict=True) if n < limit - 1]
    if any(w for _, w in free):  # these share in proportion, but for rounding
        assert all(abs(m * w - n * v) <= v + w + 1e-6 for m, v in free for n, w in free)


def test_weighted_budgets_by_hand():
    assert weighted(10, [1, 2, 3], [100, 100, 100]) == [5, 10, 15]
    assert weighted(10, [1, 2, 3], [100, 100, 12]) == [6, 12, 12]  # what the last cannot hold, in proportion
    assert weighted(10, [0, 0, 0], [100, 4, 100]) == [13, 4, 13]
    assert weighted(1, [1, 1, 1, 1], [2, 2, 2, 2]) == [1, 1, 1, 1]
    assert weighted(10, [1, 2], [5, 6]) == [5, 6]


@pytest.mark.parametrize("method", ["snapkv", "knorm"])
def test_measured_layers_get_what_their_attention_asks_for(method):
    """A layer whose queries all look at one slot keeps little; the others what it does not need. Total as ever."""
    tiny = Tiny()
    key = tiny.k[1][:, 77].repeat_interleave(2, 0)  # [Hq, d]
    tiny.sequence.observe(1, 1000 * key[:, None].expand(-1, WINDOW, -1))
    plan = Plan.parse(f"{method}(0.4, layers=measured)")
    plan.apply(tiny.sequence)
    counts = [len(heads[0]) for heads in tiny.held()]
    assert counts[1] == 4 + WINDOW - tiny.sequence.tail_len  # what is protected
    assert sum(counts) == 3 * plan.stage("evict").keep_slots(tiny.sequence)
    assert counts == plan.stage("evict").budgets(tiny.sequence)


def test_measured_layers_need_queries_even_if_the_method_does_not():
    stage = METHODS["knorm"]
    measured = Plan.parse("knorm(0.5, layers=measured, window=48)")
    assert measured.needs == {"queries"} and measured.window == 48
    assert METHODS["h2o"](0.5, layers="measured").needs == {"mass", "queries"}
    assert not stage.needs and not stage(0.5).needs and not Plan.parse("knorm(0.5)").window


def test_measured_layers_of_a_growing_request_share_as_they_do():
    """The queries are gone: the budget holds, and a layer that had most still has."""
    tiny = Tiny()
    stage = Plan.parse("streaming(0.4, layers=measured)").stage("evict")
    stage.apply(tiny.sequence)
    before = [len(heads[0]) for heads in tiny.held()]
    tiny.feed(64 * 3)
    tiny.sequence.drop_ring()
    tiny.sequence.ring_fill = 0
    stage.apply(tiny.sequence)
    after = [len(heads[0]) for heads in tiny.held()]
    assert sum(after) == 3 * stage.keep_slots(tiny.sequence)
    assert np.array_equal(np.argsort(after), np.argsort(before)) and after != [after[0]] * 3


def test_adaptive_layers_take_the_best_of_all():
    """KVzip as its authors describe it: one ranking of the slots of all layers and heads, but for what is protected."""
    tiny, stage = Tiny(), Plan.parse("knorm(0.4, layers=adaptive)").stage("evict")
    free = [
        stage.score(tiny.sequence, layer).reshape(s.heads, -1)[:, 4 : TOKENS - 32] for layer, s in enumerate(SHAPES)
    ]
    protected = 4 + 32 - tiny.sequence.tail_len
    room = sum((stage.keep_slots(tiny.sequence) - protected) * s.heads for s in SHAPES)
    least = torch.cat([score.ravel() for score in free]).sort().values[-room]
    want = [protected + int((score >= least).sum()) // len(score) for score in free]
    assert stage.budgets(tiny.sequence) == want and len(set(want)) == len(want)


def test_adaptive_layers_by_hand():
    one, other = torch.tensor([5.0, 1, 4, 0]), torch.tensor([2.0, 3, -1, -2])
    less, none = one - torch.tensor([0, 0, 0, 3]), torch.full((3,), -torch.inf)
    assert across_layers(torch.cat([one, other]), [4, 4], [1, 1], [4, 4], 2) == [2, 2]
    assert across_layers(torch.cat([one + 9, other]), [4, 4], [1, 1], [4, 4], 2) == [4, 0]
    assert across_layers(torch.cat([less, other]), [4, 4], [2, 1], [2, 4], 2) == [1, 3]  # three: one and a half a head
    assert across_layers(torch.cat([one, other]), [4, 4], [1, 1], [4, 4], 0) == [0, 0]
    assert across_layers(torch.cat([one, other[:1], none]), [4, 4], [1, 1], [4, 1], 3) == [4, 1]
    assert across_layers(none, [2, 1], [1, 1], [4, 1], 3) == [0, 0]


@pytest.mark.parametrize("text", ["knorm(0.4)", "knorm(0.4, heads=adaptive)", "kvzip(0.4)", "duo(0.4)"])
def test_layers_are_chosen_from_together_as_one_by_one(text):
    """A GPU takes all at once, a CPU one after the other; heads are ragged and pages broken by then."""
    tiny, stage = Tiny(), Plan.parse(text).stage("evict")
    Plan.parse("keydiff(0.7, heads=adaptive)").apply(tiny.sequence)
    tiny.feed(100)
    alone = stage.choose(tiny.sequence)
    together = Sealed.of(tiny.sequence, range(len(SHAPES)))
    tiny.sequence.sealed = together
    assert list(groups(tiny.sequence)) == [together]
    assert np.array_equal(stage.choose(tiny.sequence), alone)


@pytest.mark.parametrize("method", ["nacl", "infinipot"])
def test_a_layer_may_hold_less_than_is_elected(method):
    """An earlier eviction left one layer a page a head; the mean of all is more than that."""
    tiny = Tiny()
    keep = [np.ones((*ids.shape, 64), bool) for ids in tiny.sequence.ids]
    keep[0][:, 1:] = False
    evict(tiny.sequence, as_bits(keep))
    Plan.parse(f"{method}(0.5, layers=adaptive)").apply(tiny.sequence)
    check_sequence(tiny.sequence)
    assert [len(head) for head in tiny.held()[0]] == [64] * SHAPES[0].heads


def test_duo_keeps_whole_heads():
    """By falling attention beyond sinks and window, over all layers: all, all, ..., the newest of one, nothing more."""
    for keep in (0.3, 0.5, 0.8):
        tiny, stage = Tiny(), METHODS["duo"](keep)
        tiny.sequence.protected = [(50, 53)]
        worth = [stage.score(tiny.sequence, layer)[:, 0, 0].tolist() for layer in range(len(SHAPES))]
        stage.apply(tiny.sequence)
        sure = {*range(4), *range(50, 53), *range(TOKENS - WINDOW, SEALED)}
        middle = [i for i in range(SEALED) if i not in sure]
        heads = [
            (w, head) for ws, layer in zip(worth, tiny.held(), strict=True) for w, head in zip(ws, layer, strict=True)
        ]
        rest = stage.keep_slots(tiny.sequence) * len(heads) - len(sure) * len(heads)
        for _, head in sorted(heads, key=lambda pair: -pair[0]):
            n = min(rest, len(middle))
            assert head == sure | set(middle[len(middle) - n :])
            rest -= n
        assert rest == 0


def test_duo_finds_the_head_that_looks_back():
    """All heads look at the first token of the recent window, but one of the second layer: it keeps everything."""
    tiny = Tiny()
    for layer, s in enumerate(SHAPES):
        at = [30 if (layer, head) == (1, 0) else TOKENS - WINDOW for head in range(s.heads)]
        query = 1000 * tiny.k[layer][range(s.heads), at].repeat_interleave(s.q_heads // s.heads, 0)  # [Hq, d]
        tiny.sequence.observe(layer, query[:, None].expand(-1, WINDOW, -1))
    METHODS["duo"](0.35).apply(tiny.sequence)
    held = tiny.held()
    assert held[1][0] == frozenset(range(SEALED)) and sum(len(h) == SEALED for heads in held for h in heads) == 1


@pytest.mark.parametrize("keep", [0.3, 0.5])
def test_duo_is_estimated_with_a_page_a_head_more(keep):
    """Heads of its own lengths end in pages of their own, as with `heads=adaptive`."""
    sizes = [Plan.parse(f"{text}({keep}{more})").estimate(SHAPES, torch.float32, TOKENS)
             for text, more in (("duo", ""), ("snapkv", ", heads=adaptive"))]  # fmt: skip
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    "plan", ["infinipot(0.2)", "infinipot(0.2, heads=adaptive, layers=measured)", "snapkv(0.2)", "duo(0.2)"]
)
@torch.no_grad()
def test_a_pot_overflows(plan):
    """A prompt of three times the room, and a second turn: distilled again and again, never above."""
    model, tokens = tiny_model(), 2000
    budget = int(0.33 * AdaptiveCache.estimate(model, tokens, "full")["full"])
    cache = AdaptiveCache(model, plan=plan, budget=budget, host=0, max_tokens=tokens)
    ids = torch.randint(2, 160, (1, tokens), generator=torch.Generator().manual_seed(0))
    distilled, before = 0, 0.0
    for piece in [*ids[:, :1650].split(128, 1), *ids[:, 1650:1660].split(1, 1), *ids[:, 1660:].split(128, 1)]:
        pos = cache.get_seq_length() + torch.arange(piece.shape[1])[None]
        assert model(piece, position_ids=pos, past_key_values=cache).logits.isfinite().all()
        (sequence,) = cache.sequences
        check_sequence(sequence)
        cache.pool.check_integrity()
        distilled += sequence.held() * sequence.length < before
        before = sequence.held() * sequence.length
    report = cache.report()
    assert report["device_peak"] <= budget and distilled >= 3 and cache.requests[0].turn == 1
    reasons = [d["reason"] for d in report["requests"][0]["decisions"] if d["moment"] == "pressure"]
    assert reasons == ["plan applied early"]


@pytest.mark.parametrize("method", [name for name, stage in METHODS.items() if "queries" in stage.needs])
def test_a_turn_that_has_no_query_yet_evicts_nothing(method):
    """Its first chunk may find no room while the new ring is empty: then something else must give way."""
    tiny = Tiny()
    tiny.sequence.drop_ring()
    tiny.sequence.open_ring(WINDOW)
    before = tiny.held()
    METHODS[method](0.3).apply(tiny.sequence)
    assert tiny.held() == before
