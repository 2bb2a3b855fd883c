"""Eviction methods: each score against its formula written out, and one matrix that every method must pass."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from models import calibrated, random_surrogate
from models import tiny as tiny_model

from adaptivekv import AdaptiveCache, AdaptiveKVError, Plan
from adaptivekv.memory.formats import FORMATS
from adaptivekv.memory.integrity import check_sequence
from adaptivekv.memory.pages import PagePool
from adaptivekv.memory.sequence import Sequence
from adaptivekv.memory.shapes import LayerShape
from adaptivekv.policies import STAGES
from adaptivekv.policies.eviction.base import Eviction
from adaptivekv.recall import recall

SHAPES = [LayerShape(2, 4, 16, 16), LayerShape(2, 4, 16, 16), LayerShape(1, 4, 24, 16)]
METHODS: dict[str, Any] = {name: stage for name, stage in STAGES.items() if stage.kind == "evict"}
TOKENS, WINDOW, SCALE = 276, 32, 0.25  # a tail of 20: the protected window reaches into sealed pages


SURROGATE = random_surrogate(SHAPES)


class Tiny:
    """A sequence of random tokens, and the same keys, values and queries beside it, as plain tensors."""

    def __init__(self, tokens: int = TOKENS):
        pool = PagePool(SHAPES, torch.float32, "cpu", 2_000_000, 0, staging_bytes=30_000)
        self.sequence = Sequence(pool, WINDOW)
        self.sequence.scaling = SCALE
        self.generator = torch.Generator().manual_seed(0)
        pool.surrogate = SURROGATE
        self.feed(tokens)

    def feed(self, n: int) -> None:
        """n tokens more; k, v and q hold these. Later heads are stronger: what adaptive budgets are for."""
        self.k = [self._random(s.heads, n, s.k_dim) for s in SHAPES]
        self.v = [self._random(s.heads, n, s.v_dim) for s in SHAPES]
        self.q = [self._random(s.q_heads, n, s.k_dim) for s in SHAPES]
        sequence, pos = self.sequence, self.sequence.length + np.arange(n)
        for layer in range(len(SHAPES)):
            sequence.observe(layer, self.q[layer])
            sequence.append(layer, self.k[layer], self.v[layer], pos)
        sequence.commit(pos)
        for layer, ids in enumerate(sequence.ids):
            columns = np.where(ids >= 0, np.arange(ids.shape[1]), -1)
            sequence.measure(layer, columns, torch.rand(ids.shape, generator=self.generator).numpy())
        credits = [torch.rand(s.heads, sequence.length, generator=self.generator).numpy() for s in SHAPES]
        sequence.credits["recall"] = credits

    def _random(self, heads: int, n: int, dim: int) -> torch.Tensor:
        return torch.randn(heads, n, dim, generator=self.generator) * torch.linspace(0.5, 2, heads)[:, None, None]

    def weights(self, layer: int, window: int = WINDOW) -> torch.Tensor:
        """Causal attention of the last queries to all tokens, [H, G, W, n]: softmax(q k scale)."""
        k, q = self.k[layer], self.q[layer][:, -window:]
        n = k.shape[1]
        scores = torch.einsum("hgwd,hnd->hgwn", q.view(len(k), -1, window, k.shape[2]), k) * SCALE
        future = torch.arange(n) > torch.arange(n - window, n)[:, None]
        return scores.masked_fill(future, -torch.inf).softmax(-1)

    def held(self) -> list[list[frozenset[int]]]:
        """Positions of the sealed slots, layer by layer and head by head."""
        out = []
        for layer in range(len(SHAPES)):
            used, pos = self.sequence.slots(layer)
            out.append([frozenset(p[u].tolist()) for u, p in zip(used, pos, strict=True)])
        return out


# -- the formulas, one token and one head at a time where that is clearer ----------------------------------------------


def knorm(tiny, layer):
    return -(tiny.k[layer] ** 2).sum(-1).sqrt()


def keydiff(tiny, layer):
    out = []
    for keys in tiny.k[layer]:
        anchor = torch.stack([k / k.norm() for k in keys]).mean(0)
        out.append(torch.stack([-(k @ anchor) / (k.norm() * anchor.norm()) for k in keys]))
    return torch.stack(out)


def tova(tiny, layer):
    last = tiny.weights(layer, 1)[:, :, 0]  # [H, G, n]
    return last.mean((0, 1)).expand(len(tiny.k[layer]), -1)


def expected(tiny, layer):
    k, v, q = tiny.k[layer], tiny.v[layer], tiny.q[layer][:, -WINDOW:]
    groups, out = len(q) // len(k), []
    for h in range(len(k)):
        total = torch.zeros(k.shape[1] - 4)
        for query in q[h * groups : (h + 1) * groups]:
            mean, cov = query.mean(0), torch.cov(query.T, correction=0)
            keys = k[h, 4:]
            log = SCALE * keys @ mean + SCALE**2 / 2 * torch.einsum("ni,ij,nj->n", keys, cov, keys)
            total += log.softmax(0) / groups
        out.append(torch.cat([torch.zeros(4), total]) * v[h].norm(dim=-1))
    return torch.stack(out)


def snapkv(tiny, layer, pool=5, pick=torch.mean):
    votes = tiny.weights(layer).mean((1, 2))[:, : TOKENS // 64 * 64]  # pooled over sealed slots alone
    left, n = pool // 2, votes.shape[1]
    near = [votes[:, max(0, i - left) : min(n, i - left + pool)] for i in range(n)]
    return torch.stack([pick(x, 1) for x in near], 1)


def streaming(tiny, layer):
    return torch.arange(TOKENS).float().expand(len(tiny.k[layer]), -1)


def h2o(tiny, layer):
    return torch.from_numpy(tiny.sequence.mass[layer]).repeat_interleave(64, 1)


def morph(tiny, layer, pick=torch.amax):
    return pick(tiny.weights(layer).mean(1), 1)


def nacl(tiny, layer):
    """What the proxies elect by summed attention; the rest is drawn, which `test_nacl_draws` looks at."""
    votes = tiny.weights(layer).sum((1, 2))[:, : TOKENS // 64 * 64]
    budget = TOKENS // 2 - TOKENS % 64
    elected = round(0.7 * (budget - 4 - (WINDOW - TOKENS % 64)))
    last = votes[:, 4 : TOKENS - WINDOW].sort(descending=True).values[:, elected - 1]
    votes[votes < last[:, None]] = torch.nan
    votes[:, :4] = votes[:, TOKENS - WINDOW :] = torch.nan
    return votes


def hashevict(tiny, layer):
    """Bits that differ between a key's code and a query's, over the last queries of the head's group."""
    k, q = tiny.k[layer], tiny.q[layer][:, -WINDOW:]
    draw = torch.from_numpy(np.random.default_rng([0, layer]).standard_normal((k.shape[2], 16), np.float32))
    k_bits, q_bits = k @ draw > 0, (q @ draw > 0).view(len(k), -1, 16)
    differ = k_bits[:, :, None] ^ q_bits[:, None]  # [H, n, G * W, 16]
    return -differ.sum(-1).float().mean(2)


def infinipot(tiny, layer):
    """Half of what is not protected by novelty, ahead of all others; these by attention."""
    novelty, out = 1 + keydiff(tiny, layer), tiny.weights(layer).mean((1, 2))
    n = round(0.5 * (TOKENS // 2 - TOKENS % 64 - 4 - (WINDOW - TOKENS % 64)))
    best = 4 + novelty[:, 4 : TOKENS - WINDOW].topk(n).indices
    return out.scatter(1, best, 2 + novelty.gather(1, best))


def duo(tiny, layer):
    middle = tiny.weights(layer)[..., 4 : TOKENS - WINDOW].sum(-1)  # [H, G, W]
    return middle.mean((1, 2))[:, None].expand(-1, TOKENS)


def qhitter(tiny, layer):
    """Half the rank by page mass, half the rank by how fine the steps of a slot are against its length."""

    def rank(values):  # the share of the others that are below, ties counted half
        return torch.stack([((v > values).float() + (v == values).float() / 2).sum() - 0.5 for v in values])

    n = TOKENS // 64 * 64
    parts = [part[layer][:, :n] for part in (tiny.k, tiny.v)]
    error = sum((x.amax(-1) - x.amin(-1)) / x.norm(dim=-1) for x in parts)
    mass = h2o(tiny, layer)
    return torch.stack([(rank(m) + rank(-e)) / 2 / (n - 1) for m, e in zip(mass, error, strict=True)])


def kvzip(tiny, layer):
    """What `adaptivekv.recall` credits, which has tests of its own."""
    return torch.from_numpy(tiny.sequence.credits["recall"][layer])


def with_norms(k, v):
    return torch.cat([k, v, k.norm()[None], v.norm()[None]])


def kvzap(tiny, layer):
    """All heads' keys, values and their norms, and where the token stands, less their mean, times the layer's map."""
    mean, weight, bias = (getattr(SURROGATE, name)[layer] for name in ("mean", "weight", "bias"))
    rows = [
        torch.cat(
            [with_norms(k[t], v[t]) for k, v in zip(tiny.k[layer], tiny.v[layer], strict=True)]
            + [torch.tensor([t + 1, TOKENS - t, TOKENS]).log()]
        )
        for t in range(TOKENS)
    ]
    return torch.stack([torch.from_numpy((row.numpy() - mean) @ weight + bias) for row in rows], 1)


FORMULAS = [
    ("streaming(0.5)", streaming), ("h2o(0.5)", h2o), ("snapkv(0.5)", snapkv),
    ("snapkv(0.5, pool=32, pooling=max)", lambda t, i: snapkv(t, i, 32, torch.amax)),
    ("knorm(0.5)", knorm), ("keydiff(0.5)", keydiff), ("tova(0.5)", tova), ("expected(0.5)", expected),
    ("morph(0.5)", morph), ("morph(0.5, fusion=sum)", lambda t, i: morph(t, i, torch.sum)), ("nacl(0.5)", nacl),
    ("hashevict(0.5)", hashevict), ("infinipot(0.5)", infinipot), ("duo(0.5)", duo),
    ("kvzip(0.5)", kvzip), ("kvzap(0.5)", kvzap), ("qhitter(0.5)", qhitter),
]  # fmt: skip


@pytest.mark.parametrize(("text", "formula"), FORMULAS, ids=[text for text, _ in FORMULAS])
def test_score_is_the_papers_formula(text, formula):
    tiny, stage = Tiny(), Plan.parse(text).stage("evict")
    for layer, shape in enumerate(SHAPES):
        got = stage.score(tiny.sequence, layer).float().reshape(shape.heads, -1)
        want = formula(tiny, layer)[:, : got.shape[1]]
        known = ~want.isnan()
        assert torch.allclose(got[known], want[known], rtol=1e-4, atol=1e-6 * float(want[known].abs().max()))
        assert known.all() or got[~known].max() < got[known].min()


def test_every_method_has_its_formula_tested():
    assert {Plan.parse(text).stage("evict").name for text, _ in FORMULAS} == set(METHODS)


# -- what every method must do -----------------------------------------------------------------------------------------

OPTIONS = ["", *(f", layers={x}" for x in ("pyramid", "measured", "adaptive")), ", heads=adaptive"]
OPTIONS += [f", heads=adaptive, layers={x}" for x in ("pyramid", "measured", "adaptive")]
OWN = {name for name, stage in METHODS.items() if stage.HEADS == ("own",)}  # who gets what is theirs to decide
SHARED = [name for name in METHODS if name not in OWN]
MATRIX = [(name, options) for name in METHODS for options in OPTIONS if name in SHARED or not options]


@pytest.mark.parametrize(("method", "options"), MATRIX)
def test_every_method(method, options):
    """Share, protection, real pages, bytes, idempotence, determinism, and the text of the plan."""
    span = (100, 110)
    for keep in (0.1, 0.2, 0.5, 1.0):  # at 0.1 what is protected is more than the budget
        plan = Plan.parse(f"{method}({keep}{options})")
        assert Plan.parse(str(plan)) == plan
        tiny = Tiny()
        sequence, stage = tiny.sequence, plan.stage("evict")
        sequence.protected = [span]
        before, bytes_before = tiny.held(), sequence.bytes()
        sure = {*range(4), *range(*span), *range(TOKENS - 32, TOKENS - sequence.tail_len)}
        plan.apply(sequence)
        sequence.pool.check_integrity()
        check_sequence(sequence)
        held, budgets = tiny.held(), stage.budgets(sequence)
        mean = round(keep * TOKENS) - sequence.tail_len
        if stage.layers == "adaptive":  # slots are what is shared out, in whole numbers a head
            slots, room = sum(n * s.heads for n, s in zip(budgets, SHAPES, strict=True)), sum(s.heads for s in SHAPES)
            assert mean * room - sum(s.heads - 1 for s in SHAPES) <= slots <= mean * room
        else:
            assert sum(budgets) == len(SHAPES) * mean
        for layer, heads in enumerate(held):
            budget = max(budgets[layer], len(sure))
            counts = [len(head) for head in heads]
            if method in OWN:
                pass  # the total is checked below
            elif stage.heads == "adaptive":
                assert sum(counts) == budget * len(heads) and min(counts) >= int(0.2 * budgets[layer])
            else:
                assert counts == [budget] * len(heads)
            assert all(sure <= head <= whole for head, whole in zip(heads, before[layer], strict=True))
        if method in OWN:
            every = [head for heads in held for head in heads]
            assert sum(map(len, every)) == max(stage.keep_slots(sequence), len(sure)) * len(every)
        assert (sequence.bytes() < bytes_before) == (keep < 1)
        assert sequence.bytes() == bytes_of_pages(sequence) + Sequence.fixed_bytes(SHAPES, torch.float32, WINDOW)
        version = sequence.version
        plan.apply(sequence)
        assert tiny.held() == held and sequence.version == version
        again = Tiny()
        again.sequence.protected = [span]
        plan.apply(again.sequence)
        assert again.held() == held


@pytest.mark.parametrize(("method", "options"), MATRIX)
def test_before_a_page_is_full_nothing_goes(method, options):
    sequence = Tiny(40).sequence
    sequence.credits.clear()  # nobody has scored anything yet
    version = sequence.version
    Plan.parse(f"{method}(0.2{options})").apply(sequence)
    assert sequence.version == version and sequence.tail_len == 40
    sequence.pool.check_integrity()


def bytes_of_pages(sequence: Sequence) -> int:
    """One native page for every 64 slots of a head begun."""
    total = 0
    for layer, s in enumerate(SHAPES):
        pages = (-(-sequence.slots(layer)[0].sum((1, 2)) // 64)).sum()
        total += int(pages) * FORMATS["native"].bytes(s.k_dim, s.v_dim, torch.float32)
    return total


@pytest.mark.parametrize("method", METHODS)
def test_survivors_score_best(method):
    tiny, stage = Tiny(), METHODS[method](0.4)
    scores = [stage.score(tiny.sequence, layer).reshape(s.heads, -1).numpy() for layer, s in enumerate(SHAPES)]
    stage.apply(tiny.sequence)
    for layer, heads in enumerate(tiny.held()):
        for head, kept in enumerate(heads):
            gone = [i for i in range(scores[layer].shape[1]) if i not in kept]
            free = [i for i in kept if 4 <= i < TOKENS - 32]
            # a head may keep all or nothing
            assert scores[layer][head][gone].max(initial=-np.inf) <= scores[layer][head][free].min(initial=np.inf)


def hunt() -> tuple[Tiny, list[list[int]]]:
    """Queries that look at one slot of each head and at nothing else: the longest key's, with itself as the query."""
    tiny, hot = Tiny(), []
    for layer, s in enumerate(SHAPES):
        keys = tiny.k[layer][:, : TOKENS - 64]
        hot.append(keys.norm(dim=-1).argmax(-1).tolist())
        query = 1000 * keys[range(s.heads), hot[-1]].repeat_interleave(s.q_heads // s.heads, 0)  # [Hq, d]
        tiny.sequence.observe(layer, query[:, None].expand(-1, WINDOW, -1))
    return tiny, hot


def test_a_wide_max_pool_keeps_a_span_whole():
    tiny, hot = hunt()
    Plan.parse("snapkv(0.4, pool=32, pooling=max)").apply(tiny.sequence)
    for layer, heads in enumerate(tiny.held()):
        for at, held in zip(hot[layer], heads, strict=True):
            assert {*range(max(0, at - 15), at + 16)} <= held


@pytest.mark.parametrize(("method", "options"), MATRIX)
def test_heads_of_any_length_and_format_can_be_evicted_again(method, options):
    """Ragged heads, encoded pages on top, a longer request: the next choice still holds its budget."""
    tiny = Tiny()
    Plan.parse(f"{method}(0.7{', heads=adaptive' * (method in SHARED)}) | k4v2(window=64)").apply(tiny.sequence)
    tiny.sequence.pool.check_integrity()
    tiny.feed(100)
    before, plan = tiny.held(), Plan.parse(f"{method}(0.3{options})")
    plan.apply(tiny.sequence)
    tiny.sequence.pool.check_integrity()
    stage, held = plan.stage("evict"), tiny.held()
    budgets = stage.budgets(tiny.sequence)
    for layer, heads in enumerate(held):
        counts = [len(head) for head in heads]
        assert all(head <= whole for head, whole in zip(heads, before[layer], strict=True))
        if method in SHARED:
            assert sum(counts) <= budgets[layer] * len(heads)
            assert stage.heads == "adaptive" or max(counts) <= budgets[layer]
        assert all({*range(4), *range(376 - 32, 376 - tiny.sequence.tail_len)} <= head for head in heads)
    every = [len(head) for heads in held for head in heads]
    assert sum(every) <= sum(n * len(heads) for n, heads in zip(budgets, held, strict=True))


@pytest.mark.parametrize(("method", "options"), [m for m in MATRIX if m[0] in OWN or m[1] in OPTIONS[4:]])
@torch.no_grad()
def test_a_model_generates_with_every_method(method, options, tmp_path, monkeypatch):
    """Prompt in chunks, then decode past a sealed page: the share holds for the prompt, or for all if it grows."""
    model = tiny_model()
    calibrated(model, tmp_path, monkeypatch)
    plan = Plan.parse(f"{method}(0.4{options})")
    cache = AdaptiveCache(model, plan=str(plan))
    ids = torch.randint(2, 160, (1, 330), generator=torch.Generator().manual_seed(0))
    for piece in [*ids[:, :250].split(128, 1), *ids[:, 250:].split(1, 1)]:
        if "recall" in plan.needs and cache.get_seq_length() == 250:
            recall(model, cache, ids[:, :250])
        pos = cache.get_seq_length() + torch.arange(piece.shape[1])[None]
        assert model(piece, position_ids=pos, past_key_values=cache).logits.isfinite().all()
    sequence, stage = cache.sequences[0], plan.stage("evict")
    sequence.pool.check_integrity()
    kept = sequence.held() * sequence.length
    limit = 0.4 * 330 + 64 if stage.growing else 0.4 * 250 + 80
    assert 0.4 * 250 - 1 <= kept <= limit


def test_nacl_draws():
    """One seed, one draw; what the proxies insist on is drawn by every seed, the rest by some."""
    drawn = []
    for seed in (0, 0, 1, 2):
        tiny, hot = hunt()
        METHODS["nacl"](0.4, random=1.0, seed=seed).apply(tiny.sequence)
        drawn.append(tiny.held())
        for ats, heads in zip(hot, drawn[-1], strict=True):
            assert all(at in head for at, head in zip(ats, heads, strict=True))
    assert drawn[0] == drawn[1] and drawn[1] != drawn[2] != drawn[3]


def test_hash_codes_are_those_of_directions():
    """Equal vectors agree, opposite ones in nothing, and others in the share of bits that their angle leaves."""
    stage = METHODS["hashevict"](0.5, bits=4096)
    a, b = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    ours = stage.codes(a, 1)
    assert torch.equal(ours, stage.codes(3 * a, 1)) and torch.equal(ours, -stage.codes(-a, 1))
    angle = torch.arccos(torch.cosine_similarity(a, b, dim=0)) / torch.pi
    assert abs((ours != stage.codes(b, 1)).float().mean() - angle) < 0.03
    assert not torch.equal(ours, stage.codes(a, 2))  # a layer has its own projections, and so has a seed
    assert not torch.equal(ours, METHODS["hashevict"](0.5, bits=4096, seed=1).codes(a, 1))


def test_hashevict_keeps_what_points_as_the_queries_do():
    tiny, hot = hunt()
    METHODS["hashevict"](0.3).apply(tiny.sequence)
    for ats, heads in zip(hot, tiny.held(), strict=True):
        assert all(at in head for at, head in zip(ats, heads, strict=True))


# -- text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("0.5, heads=foo", ["heads='foo'", "uniform or adaptive|leave heads out"]),
        ("0.5, layers=3", ["layers='3'", "uniform or pyramid or measured|leave layers out"]),
        ("0.5, layers=", ["layers=''", "uniform or pyramid or measured|leave layers out"]),
        ("0", ["keep=0", "above 0 and at most 1"]),
        ("0.5, window=0", ["window=0", "at least 1"]),
        ("0.5, head=adaptive", ["'head'", "did you mean 'heads'"]),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_bad_values_name_field_and_fix(method, arguments, parts):
    with pytest.raises(AdaptiveKVError) as error:
        Plan.parse(f"{method}({arguments})")
    text = str(error.value)
    assert "\n" not in text and "position 1" in text
    assert all(any(choice in text for choice in part.split("|")) for part in parts)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("snapkv(0.5, pooling=median)", "pooling='median' must be mean or max"),
        ("snapkv(0.5, pool=0)", "pool=0.0 must be a whole number of at least 1"),
        ("morph(0.5, fusion=mean)", "fusion='mean' must be sum or max"),
        ("nacl(0.5, random=0)", "random=0.0 must be a share"),
        ("hashevict(0.5, bits=0)", "bits=0.0 must be a whole number of at least 1"),
        ("hashevict(0.5, seed=0.5)", "seed=0.5 must be a whole number of at least 0"),
        ("infinipot(0.5, novelty=1.5)", "novelty=1.5 must be a share"),
        ("duo(0.5, heads=adaptive)", "heads='adaptive': which head .* leave heads out"),
        ("duo(0.5, layers=measured)", "layers='measured': which head .* leave layers out"),
        ("nacl(0.5, seed=-1)", "seed=-1.0 must be a whole number of at least 0"),
    ],
)
def test_bad_values_of_one_method(text, says):
    with pytest.raises(AdaptiveKVError, match=f"position 1: .*{says}"):
        Plan.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "snapkv(0.5, heads=adaptive, layers=pyramid, pool=32, pooling=max) | k4v2 | offload(0.25)",
        "tova(0.25, sinks=8, window=64, layers=pyramid)",
        "morph(0.125, heads=adaptive, fusion=sum)",
        "nacl(0.5, random=0.25, seed=12345678)",
        "hashevict(0.5, layers=measured, bits=8, seed=3)",
        "infinipot(0.25, heads=adaptive, novelty=0.75) | int4",
        "duo(0.5, sinks=8, window=64)",
    ],
)
def test_what_parses_prints_the_same(text):
    assert str(Plan.parse(text)) == text
    assert Plan.parse(text.replace(", ", " ,  ").replace("=", " = ")) == Plan.parse(text)


@pytest.mark.parametrize("method", METHODS)
def test_only_what_differs_from_the_default_is_written(method):
    stage = METHODS[method]
    assert issubclass(stage, Eviction) and str(stage(0.5)) == f"{method}(0.5)"
    if method in OWN:
        return
    other = "uniform" if stage.heads == "adaptive" else "adaptive"
    full = stage(0.5, heads=other, layers="pyramid")
    assert str(full) == f"{method}(0.5, heads={other}, layers=pyramid)"
    assert Plan.parse(str(full)).stage("evict") == full and dataclasses.replace(full, heads=stage.heads) != full
    with pytest.raises(AdaptiveKVError, match="layers=3 must be uniform or pyramid or measured or adaptive"):
        stage(0.5, layers=3)
