"""Quantize stages: bytes as estimated, bits that never return, who gets more of them, eviction from quantized pages."""

import numpy as np
import pytest
import torch
from models import tiny
from sequences import as_bits
from test_formats import NEW, parts

from adaptivekv import AdaptiveCache, AdaptiveKVError, Plan
from adaptivekv.kernels import CODECS, hadamard
from adaptivekv.memory.distortion import distortion
from adaptivekv.memory.evict import evict
from adaptivekv.memory.formats import BY_CODE, FORMATS
from adaptivekv.memory.pages import PagePool
from adaptivekv.memory.sequence import Sequence
from adaptivekv.memory.shapes import LayerShape
from adaptivekv.policies import STAGES
from adaptivekv.policies.quantization.tuned import Tuned

SHAPES = [LayerShape(2, 4, 24, 16), LayerShape(1, 4, 64, 96)]
EQUAL = [LayerShape(2, 4, 32, 16)] * 4
STAGE_TEXTS = [
    *(name for name, stage in STAGES.items() if stage.kind == "quantize" and name not in ("hotcold", "tuned", "palu")),
    "hotcold(0.3)", "hotcold(0.5, high=kivi4, low=kivi2)", "tuned(0.5)", "tuned(0.25, high=fp8, low=kivi42)",
    "palu(0.5)", "palu(0.125, latent=k4v2)", "palu(0.75, latent=int4)",
    "int4(guard=int8)", "k4v2(window=0, guard=int8)", "tuned(0.5, high=int8, low=int4, guard=int8)",
]  # fmt: skip


def filled(tokens, shapes=SHAPES, window=64, seed=0):
    pool = PagePool(shapes, torch.float32, "cpu", 8 << 20, 1 << 20, staging_bytes=60_000)
    sequence = Sequence(pool, window)
    feed(sequence, tokens, seed)
    return sequence


def feed(sequence, n, seed=0):
    gen = torch.Generator().manual_seed(seed)
    pos = sequence.length + np.arange(n)
    for layer, s in enumerate(sequence.pool.layers):
        k, v = (
            parts([64], dim, layer)[0][0, :1] + torch.randn(s.heads, n, dim, generator=gen)
            for dim in (s.k_dim, s.v_dim)
        )
        if sequence.ring:
            sequence.observe(layer, torch.randn(s.q_heads, n, s.k_dim, generator=gen))
        sequence.append(layer, k, v, pos)
    sequence.commit(pos)


def bits(sequence):
    """(layer, head, first position) -> bits of keys and values."""
    pool = sequence.pool
    return {
        (layer, head, int(pool.first[page])): (BY_CODE[pool.code[page]].k.bits, BY_CODE[pool.code[page]].v.bits)
        for layer, ids in enumerate(sequence.ids)
        for head, row in enumerate(ids)
        for page in row[row >= 0]
    }


@pytest.mark.parametrize("text", STAGE_TEXTS)
@pytest.mark.parametrize("shapes", [SHAPES, EQUAL], ids=["unequal", "equal"])
def test_bytes_are_as_estimated_and_bits_never_return(text, shapes):
    plan = Plan.parse(text)
    assert Plan.parse(str(plan)) == plan
    for tokens in (60, 150, 700):
        sequence = filled(tokens, shapes)
        plan.apply(sequence)
        sequence.drop_ring()
        assert sequence.bytes() == plan.estimate(shapes, torch.float32, tokens)["device"]
    for seed in range(1, 4):
        before = bits(sequence)
        for mass in sequence.mass:
            mass[:] = np.random.default_rng(seed).random(mass.shape)
        feed(sequence, 64, seed)
        plan.maintain(sequence)
        assert sequence.bytes() == plan.estimate(shapes, torch.float32, sequence.length)["device"] or "hotcold" in text
        after = bits(sequence)
        assert all(after[page][i] <= old[i] for page, old in before.items() for i in (0, 1))
    now, version = bits(sequence), sequence.pool.clock
    plan.maintain(sequence)
    assert bits(sequence) == now and sequence.pool.clock == version, "pages are encoded again for nothing"
    sequence.pool.check_integrity()
    for narrow in ("int2", "kivi2"):  # another plan's pages stay as they are where they are narrower
        other = filled(400, shapes)
        Plan.parse(narrow).apply(other)
        before = bits(other)
        plan.apply(other)
        assert all(a <= b for page, old in before.items() for a, b in zip(bits(other)[page], old, strict=True))


STEPS = {
    "kivi4k": 1 / 15, "kivi2k": 1 / 3, "nuq4k": 0.15, "nuq4v": 0.15, "int8": 1 / 200, "int4": 0.09, "int2": 0.5
}  # fmt: skip


@pytest.mark.parametrize("name", [*NEW, "int8", "int4", "int2"])
def test_evicting_from_quantized_pages(name):
    """Three times over: what stays is near what it was (the same, where slots stand alone), packed and in order."""
    sequence, rng = filled(640), np.random.default_rng(0)
    sequence.convert([np.ones(ids.shape, bool) for ids in sequence.ids], FORMATS[name])
    for _ in range(3):
        keep = [rng.random((*ids.shape, 64)) < 0.7 for ids in sequence.ids]
        before = [slots(sequence, layer) for layer in range(len(SHAPES))]
        expected = []
        for layer, mask in enumerate(keep):
            used, pos = sequence.slots(layer)
            expected.append([set(pos[h][used[h] & mask[h]].tolist()) for h in range(len(mask))])
        evict(sequence, as_bits(keep))
        sequence.pool.check_integrity()
        for layer, s in enumerate(SHAPES):
            after = slots(sequence, layer)
            for head in range(s.heads):
                assert after[head].keys() == expected[layer][head]
                pages = int((sequence.ids[layer][head] >= 0).sum())
                assert pages <= 1 + -(-len(after[head]) // 64)  # one that was partly filled may stay so
                k, v = (torch.stack([after[head][p][i] for p in sorted(after[head])]) for i in (0, 1))
                k_old, v_old = (torch.stack([before[layer][head][p][i] for p in sorted(after[head])]) for i in (0, 1))
                by_slot = FORMATS[name].v.fields(s.v_dim, torch.float32)
                for new, old, codec in ((k, k_old, FORMATS[name].k), (v, v_old, FORMATS[name].v)):
                    axis = 0 if codec.name.endswith("k") else 1
                    span = old.amax(axis, True) - old.amin(axis, True)
                    step = STEPS.get(codec.name, 0)
                    assert ((new - old).abs() <= span * step / 2 * 1.02 + 0.02 * (step > 0)).all(), codec.name
                    assert bool(step) == (codec.fields(24, torch.float32) is None)
                assert by_slot is None or torch.equal(v, v_old)


def slots(sequence, layer):
    """For each head: position -> key and value."""
    used, pos = sequence.slots(layer)
    out = []
    for head, ids in enumerate(sequence.ids[layer]):
        held = {}
        for column in np.flatnonzero(ids >= 0):
            k, v = sequence.pool.read(ids[column : column + 1])
            held |= {int(pos[head, column, i]): (k[0, i], v[0, i]) for i in np.flatnonzero(used[head, column])}
        out.append(held)
    return out


def test_hot_pages_are_those_with_most_mass_that_still_have_the_bits():
    sequence, plan = filled(64 * 12, EQUAL, window=0), Plan.parse("hotcold(0.25, window=0)")
    rng = np.random.default_rng(1)
    for mass in sequence.mass:
        mass[:] = rng.random(mass.shape)
    plan.apply(sequence)
    for ids, mass in zip(sequence.ids, sequence.mass, strict=True):
        hot = sequence.pool.code[ids[:, 1:]] == list(FORMATS).index("int8")
        assert hot.sum() == round(0.25 * 22) and mass[:, 1:][hot].min() > mass[:, 1:][~hot].max()
        assert (sequence.pool.code[ids[:, 0]] == 0).all()
        mass[:] = 1 - mass
    before = bits(sequence)
    plan.apply(sequence)
    assert bits(sequence) == before, "pages that warmed up have no bits to gain, and the share is not used up"


def test_tuned_gives_bits_to_the_layers_whose_attention_suffers_most():
    sequence, stage = filled(500, EQUAL), Tuned(0.5)
    used, scaling = np.arange(500), 0.2
    sequence.scaling = scaling
    sequence.ring[2].mul_(8)  # sharper attention suffers more from the same steps
    select = stage.settled(sequence)
    want = []
    for layer, s in enumerate(EQUAL):
        wrong = total = 0.0
        for head in range(s.heads):
            k, v = (torch.cat([torch.zeros(448, d), t[layer][head, :52]]) for d, t in
                    ((s.k_dim, sequence.tail_k), (s.v_dim, sequence.tail_v)))  # fmt: skip
            for column, page in enumerate(sequence.ids[layer][head]):
                k[column * 64 :][:64], v[column * 64 :][:64] = (x[0] for x in sequence.pool.read(np.array([page])))
            low = [k.clone(), v.clone()]
            for x, codec in zip(low, (CODECS["int4"], CODECS["int2"]), strict=True):
                for column in np.flatnonzero(select[layer][head]):
                    page = x[column * 64 :][:64]
                    raw = codec.encode(hadamard(page)[None], torch.float32)
                    page[:] = hadamard(codec.decode(raw, page.shape[1], torch.float32)[0])
            mask = torch.from_numpy(used) > torch.arange(500 - 32, 500)[:, None]
            for q in sequence.ring[layer][2 * head : 2 * head + 2, -32:]:
                out, other = (
                    (q @ a.T * scaling).masked_fill(mask, -torch.inf).softmax(-1) @ b for a, b in ((k, v), low)
                )
                wrong, total = wrong + float((out - other).square().sum()), total + float(out.square().sum())
        want.append(wrong / total)
        assert distortion(sequence, layer, select[layer], stage.formats[1], 32) == pytest.approx(want[-1], rel=1e-3)
    stage.apply(sequence)
    worst = sorted(np.argsort(want)[-2:].tolist())
    assert 2 in worst
    wide = [i for i, ids in enumerate(sequence.ids) if (sequence.pool.code[ids] == list(FORMATS).index("int4r")).any()]
    assert wide == worst
    sequence.drop_ring()
    feed(sequence, 128, 9)
    stage.apply(sequence)  # without queries: new pages follow their layer
    names = [{BY_CODE[c].name for c in sequence.pool.code[ids[:, 1:-1]].ravel()} for ids in sequence.ids]
    assert names == [{"int4r"} if i in worst else {"k4v2r"} for i in range(4)]


@pytest.mark.parametrize("text", STAGE_TEXTS)
def test_a_model_generates_with_every_stage(text):
    model = tiny()
    ids = torch.randint(2, 150, (1, 260), generator=torch.Generator().manual_seed(0))
    cache = AdaptiveCache(model, plan=f"keydiff(0.8) | {text} | offload(0.6)")
    out = model.generate(ids, past_key_values=cache, max_new_tokens=70, do_sample=False, **cache.generate_kwargs)
    assert out.shape[1] == 330
    cache.pool.check_integrity()
    codes = set(np.concatenate([cache.pool.code[ids] for ids in cache.sequences[0].pages()]).tolist())
    stage = Plan.parse(text).stage("quantize")
    allowed = {stage.guarded, *stage.formats}
    assert {BY_CODE[code] for code in codes} <= allowed and len(codes) > 1


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("hotcold(1.5)", "hot=1.5"), ("hotcold", "needs hot"), ("hotcold(0.5, high=int9)", "high='int9'"),
        ("hotcold(0.5, high=int4, low=int8)", "low=int8 must have fewer bits than high=int4"),
        ("tuned(0.5, high=k4v2, low=kivi42)", "low=kivi42"), ("tuned(0)", "layers=0"),
        ("int4(guard=int4)", "guard='int4' must be native or int8"), ("int8(guard=int8)", "guard=int8 must have more"),
        ("kivi4(rotate=true)", "'rotate'"), ("kivi4(window=-1)", "window=-1"),
        ("fp8(sinks=0.5)", "sinks=0.5"),
    ],
)  # fmt: skip
def test_errors_name_the_parameter(text, part):
    with pytest.raises(AdaptiveKVError, match="position 1") as error:
        Plan.parse(text)
    assert part in str(error.value)
