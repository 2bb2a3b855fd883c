"""Codecs, rotation, and attention over pages: the torch reference against a naive softmax, Triton against both."""

import itertools
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import SEED, run_in_interpreter

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.kernels import (
    CODECS,
    DECODED,
    UNIT,
    PageBatch,
    attend_dense,
    attend_pages,
    hadamard,
    merge,
    page_attention,
)
from adaptivekv.kernels.codec import REACH


def make(heads, pages, k, v, k_dim, v_dim, dtype, rotate=False, full=False, seed=0):
    """A batch of random pages in random order, and its decoded, un-rotated keys and values [H, P, 64, d].

    Unused slots hold NaN and the bytes that absent pages point at are NaN in every float type.
    """
    gen = torch.Generator().manual_seed(seed)
    codecs = [(CODECS | DECODED)[name] for name in (k, v)]
    count = torch.full((heads, pages), 64, dtype=torch.int32)
    if not full:
        count = torch.randint(0, 65, (heads, pages), generator=gen, dtype=torch.int32)
        count[torch.rand(heads, pages, generator=gen) < 0.3] = 0
        count[0, 0], count[-1, -1] = 64, 0
    unused = torch.arange(64) >= count[..., None]
    parts, sizes, decoded = [], [], []
    for codec, dim in zip(codecs, (k_dim, v_dim), strict=True):
        x = torch.randn(heads, pages, 64, dim, generator=gen) + torch.randn(dim, generator=gen)
        x = hadamard(x) if rotate else x
        x[unused] = torch.nan
        raw = codec.encode(x.view(-1, 64, dim), dtype, count.view(-1))
        assert raw.shape[1] == codec.part_bytes(dim, dtype) and raw.shape[1] % UNIT == 0
        back = codec.decode(raw, dim, dtype).view(x.shape)
        decoded.append(hadamard(back) if rotate else back)
        parts.append(raw)
        sizes.append(raw.shape[1])
    arena = torch.full((UNIT + heads * pages * sum(sizes),), 255, dtype=torch.uint8)
    k_off = UNIT + torch.randperm(heads * pages, generator=gen) * sum(sizes)
    for i, at in enumerate(k_off.tolist()):
        arena[at : at + sizes[0]] = parts[0][i]
        arena[at + sizes[0] : at + sum(sizes)] = parts[1][i]
    k_off = k_off.view(heads, pages)
    offsets = [torch.where(count > 0, o, 0) for o in (k_off, k_off + sizes[0])]
    return PageBatch(arena, *offsets, count, *codecs, dtype, k_dim, v_dim, rotate, full), *decoded


def naive(q, batch, k, v, scale, softcap=None):
    """float64 softmax over the used slots, one head at a time; page_lse from its definition."""
    heads, pages = batch.count.shape
    out = torch.zeros(heads, q.shape[1], batch.v_dim, dtype=torch.float64)
    page_lse = torch.full((heads, pages, q.shape[1]), -torch.inf, dtype=torch.float64)
    for h in range(heads):
        used = torch.arange(64) < batch.count[h][:, None]
        scores = q[h].double() @ k[h][used].double().T * scale
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        out[h] = torch.softmax(scores, -1) @ v[h][used].double()
        for p, s in enumerate(scores.split(batch.count[h].tolist(), -1)):
            page_lse[h, p] = torch.logsumexp(s, -1)
    return out, torch.logsumexp(page_lse, 1), page_lse


def close(result, expected, tolerance):
    """Compare outputs and log-sum-exps; -inf must match exactly and nothing may be NaN."""
    for got, want in zip(result, expected, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double().cpu(), want.double().cpu(), atol=tolerance, rtol=tolerance)


@contextmanager
def poisoned():
    """torch.empty returns NaN, so that whatever a kernel forgets to write shows."""
    empty = torch.empty
    torch.empty = lambda *a, **kw: empty(*a, **kw).fill_(float("nan"))
    try:
        yield
    finally:
        torch.empty = empty


FORMATS = [("native", "native"), ("int8", "int8"), ("int4", "int4"), ("int4", "int2"), ("int2", "native")]


# --- codecs and rotation


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["int8", "int4", "int2"]),
    dim=st.sampled_from([4, 64, 96]),
    spread=st.floats(-9, 4),
    offset=st.floats(-3, 3),
    seed=st.integers(0, 1000),
)
def test_codec_error_is_half_a_step_within_reach(name, dim, spread, offset, seed):
    codec, gen = CODECS[name], torch.Generator().manual_seed(seed)
    x = torch.randn(2, 64, dim, generator=gen) * 10**spread + offset * torch.randn(2, 1, dim, generator=gen)
    raw = codec.encode(x, torch.float32)
    back, (scale, mean) = codec.decode(raw, dim, torch.float32), codec.unpack(raw, dim, torch.float32)[1]
    assert ((mean - x.mean(1)).abs() <= x.mean(1).abs() / 8 + 2**-17).all(), "three significant bits"
    far, step = (x - mean[:, None]).abs(), scale[..., None]
    slack = far.amax(-1, keepdim=True) * 2**-11 + (codec.offset + 1) * 2**-24  # of rounding the scale to float16
    torch.testing.assert_close(
        step * codec.offset, far.amax(-1, keepdim=True) * REACH[codec.bits], rtol=1e-3, atol=1e-5
    )
    error, beyond = (back - x).abs(), far - step * codec.offset
    assert (error <= torch.maximum(step / 2, beyond) + slack + mean[:, None].abs() * 2**-20).all()


def test_what_all_slots_share_costs_no_levels():
    x, common = torch.randn(4, 64, 64), 8.0 * torch.randint(-7, 8, (4, 1, 64))  # which a mean represents exactly
    for codec in (CODECS["int4"], CODECS["int2"]):
        plain = codec.decode(codec.encode(x, torch.float32), 64, torch.float32) - x
        moved = codec.decode(codec.encode(x + common, torch.float32), 64, torch.float32) - x - common
        assert moved.square().mean() < 1.5 * plain.square().mean()
    raw = CODECS["int2"].encode(x, torch.float32)
    error = (CODECS["int2"].decode(raw, 64, torch.float32) - x).square().mean()
    assert error < 0.14, "of normal values the best four even levels leave 0.119, those over the whole range 0.2"


@pytest.mark.parametrize("name", CODECS | DECODED)
def test_codec_edge_rows(name):
    codec, dtype = (CODECS | DECODED)[name], torch.bfloat16
    x = torch.randn(1, 64, 8)
    x[0, 0], x[0, 1], x[0, 2] = 0.0, 2.5, -3.0  # constant rows
    x[0, 3] = torch.linspace(0, 1e-9, 8)  # a range that float16 cannot hold
    x[0, 4], x[0, 5] = torch.tensor([-3e38, 3e38]).repeat(4), 1e30  # bfloat16 reaches further than float16
    back = codec.decode(codec.encode(x, dtype), 8, dtype)
    assert back.isfinite().all()
    if codec.fields(8, dtype) and name != "fp8":  # slots stand alone, and with a scale a constant is its zero
        assert torch.equal(back[0, :3], x[0, :3])
        assert back[0, 3].abs().max() < 1e-6
    wide = codec.encode(x.repeat(3, 1, 1), dtype)
    assert torch.equal(wide[2], wide[0])
    assert torch.equal(codec.decode(wide[1:2], 8, dtype), back)


def test_codec_layout_and_sizes():
    levels = torch.arange(64).remainder(4)
    values = torch.stack([levels - 1.5, 1.5 - levels]).repeat(32, 1)[None] / 0.7  # of mean 0, and reaching 1.5
    raw = CODECS["int2"].encode(values, torch.float32)[0]
    for j in range(16):
        assert raw[j] == sum(int(levels[j + 16 * g]) << (2 * g) for g in range(4))
    assert torch.equal(raw[1024:1152].view(torch.float16), torch.ones(64, dtype=torch.float16))
    assert not raw[1152:].any()
    means = torch.arange(64.0).remainder(8)  # byte j of a slot holds dims j, j + 16, j + 32 and j + 48, and so do means
    raw = CODECS["int2"].encode(means.expand(1, 64, 64), torch.float32)[0]
    assert torch.equal(raw[1152:1216].view(torch.float8_e5m2).float(), means.view(4, 16).T.flatten())
    sizes = {name: CODECS[name].part_bytes(96, torch.bfloat16) for name in CODECS}
    assert sizes == {"native": 12288, "int8": 6400, "int4": 3328, "int2": 1792}
    for name, dim in (("int4", 63), ("int2", 66), ("native", 0)):
        with pytest.raises(AdaptiveKVError, match="head dimension"):
            CODECS[name].part_bytes(dim, torch.float32)
    with pytest.raises(AdaptiveKVError, match="page part"):
        CODECS["int4"].encode(torch.zeros(1, 63, 64))


@pytest.mark.parametrize("dim", [1, 64, 80, 96, 256])
def test_hadamard_is_its_own_inverse_and_keeps_products(dim):
    a, b = torch.randn(3, 5, dim), torch.randn(3, 5, dim)
    torch.testing.assert_close(hadamard(hadamard(a)), a)
    torch.testing.assert_close((hadamard(a) * hadamard(b)).sum(-1), (a * b).sum(-1), atol=1e-4, rtol=1e-4)
    if dim == 96:  # three blocks of 32, none of which leaks into another
        one = torch.zeros(96)
        one[40] = 1
        assert torch.equal(hadamard(one) != 0, torch.arange(96).div(32, rounding_mode="floor") == 1)


# --- the torch reference


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("case", range(4))
def test_attend_pages_equals_naive_softmax(formats, case):
    dtype = (torch.float32, torch.float16, torch.bfloat16, torch.float32)[case]
    v_dim, softcap, block = (64, 32, 64, 64)[case], (None, 5.0, None, None)[case], (None, 2, 1, 3)[case]
    rows = (3, 1, 7, 80)[case]  # 80 rows take the fused path
    batch, k, v = make(3, 7, *formats, 64, v_dim, dtype, rotate=case % 2 == 1, full=case == 0, seed=case)
    if case == 2:
        batch.count[1] = batch.k_off[1] = batch.v_off[1] = 0  # a head with no slots at all
    q = torch.randn(3, rows, 64) * 2
    want = naive(q, batch, k, v, 0.125, softcap)
    stats = rows < 80
    out, lse, page_lse = attend_pages(q, batch, 0.125, softcap, stats, block)
    close((out, lse), want[:2], 1e-4)
    if stats:
        close((page_lse, torch.logsumexp(page_lse, 1)), (want[2], lse), 1e-4)
    if case == 2:
        assert (out[1] == 0).all() and (lse[1] == -torch.inf).all()
    close(page_attention(q, batch, 0.125, softcap, False, block)[:2], (out, lse), 1e-5)


def test_attend_pages_without_pages():
    batch, *_ = make(2, 3, "int4", "int2", 64, 64, torch.float32)
    batch.count.zero_()
    nothing = batch.slice(0, 0)
    tiny = PageBatch(
        batch.arena[:UNIT], batch.k_off * 0, batch.v_off * 0, batch.count, *(batch.k, batch.v), torch.float32, 64, 64
    )
    for empty in (nothing, tiny, batch):
        out, lse, page_lse = attend_pages(torch.randn(2, 70, 64), empty, 1.0, stats=True)
        assert (out == 0).all() and (lse == -torch.inf).all() and (page_lse == -torch.inf).all()


@pytest.mark.parametrize("rows", [5, 96])
def test_dense_and_merge(rows):
    q, k, v = torch.randn(2, rows, 64), torch.randn(2, 700, 64), torch.randn(2, 700, 64)
    mask = torch.rand(2, rows, 700) > 0.4
    mask[:, 1] = False  # a row that may attend nowhere
    mask[:, 2:4, :600] = False  # and rows whose first keys are all masked
    scores = (q @ k.transpose(1, 2) * 0.2).masked_fill(~mask, -torch.inf)
    want = torch.softmax(scores, -1).nan_to_num() @ v, torch.logsumexp(scores, -1)
    close(attend_dense(q, k, v, 0.2, mask), want, 1e-5)
    close(attend_dense(q, k, v, 0.2, mask[0, 4:5].expand(rows, -1)), attend_dense(q, k, v, 0.2, mask[:1, 4:5]), 1e-5)
    pieces = [
        attend_dense(q, k[:, a:b], v[:, a:b], 0.2, mask[..., a:b]) for a, b in itertools.pairwise((0, 0, 9, 400, 700))
    ]
    close(merge(pieces), want, 1e-5)
    capped = (3.0 * torch.tanh(q @ k.transpose(1, 2) * 0.2 / 3.0)).softmax(-1) @ v
    close(attend_dense(q, k, v, 0.2, softcap=3.0)[:1], (capped,), 1e-5)


# --- Triton


def check_triton(device, cases):
    """Random shapes, formats and ragged counts through the Triton kernel and the reference, outputs poisoned."""
    from adaptivekv.kernels.decode import attend_pages_triton

    gen = torch.Generator().manual_seed(SEED)

    def pick(options):
        return options[int(torch.randint(len(options), (1,), generator=gen))]

    for i in range(cases):
        k, v = pick(list(CODECS)), pick(list(CODECS))
        dtype = pick([torch.float16, torch.bfloat16, torch.float32])
        dims = pick([64, 96, 128, 256]), pick([64, 96, 128, 256])
        heads, pages, rows = (
            pick([1, 2, 3]),
            pick([1, 4, 7, 33] if device == "cuda" else [1, 4, 5]),
            pick([1, 3, 12, 16]),
        )
        if i < 4:  # the widest tiles, where shared memory is tightest
            dims, dtype, (k, v) = (256, 256), (torch.float32, torch.bfloat16)[i % 2], FORMATS[0 if i < 2 else 3]
        softcap, rotate, full = pick([None, 6.0]), pick([False, True]), pick([False, True])
        case = (i, k, v, dtype, dims, heads, pages, rows, softcap, rotate, full, gen.initial_seed())
        batch, *_ = make(heads, pages, k, v, *dims, dtype, rotate, full, seed=pick(range(1000)))
        q = torch.randn(heads, rows, dims[0], generator=gen).to(dtype)
        want = attend_pages(q, batch, dims[0] ** -0.5, softcap, stats=True)
        batch.arena, batch.count = batch.arena.to(device), batch.count.to(device)
        batch.k_off, batch.v_off = batch.k_off.to(device), batch.v_off.to(device)
        with poisoned():
            got = attend_pages_triton(q.to(device), batch, dims[0] ** -0.5, softcap, stats=True)
        try:
            close(got, want, {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype])
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


def test_triton_equals_reference_in_the_interpreter():
    run_in_interpreter(__file__)


@pytest.mark.gpu
def test_triton_equals_reference_on_the_gpu():
    check_triton("cuda", 24)


@pytest.mark.gpu
def test_page_attention_replays_in_a_cuda_graph():
    batch, *_ = make(4, 9, "int4", "int2", 128, 128, torch.bfloat16, rotate=True)
    batch.arena, batch.count, batch.k_off, batch.v_off = (
        t.cuda() for t in (batch.arena, batch.count, batch.k_off, batch.v_off)
    )
    q = torch.randn(4, 4, 128, device="cuda")
    page_attention(q, batch, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse, _ = page_attention(q, batch, 0.1)
    q.copy_(torch.randn_like(q))
    batch.count[1:, 3:] = 0  # lengths live on the device
    graph.replay()
    close((out, lse), attend_pages(q, batch, 0.1)[:2], 5e-3)


def check_mixture(device, launches=2):
    """All formats in one launch, whose shares are claimed; a launch leaves the claims as it found them."""
    from adaptivekv.bench.pages import make_table, reference
    from adaptivekv.kernels.decode import attend_table
    from adaptivekv.memory.tables import PAIRS

    mix = {"native": 0.2, "int8": 0.2, "int4r": 0.2, "k4v2": 0.2, "int2r": 0.2}
    table, k, v = make_table(2, 2, 64 * 10, 64, mix, PAIRS, dtype=torch.float32, device=device)
    q = torch.randn(4, 3, 64, device=device)
    assert table.work.claims.tolist()[-1] == 1
    for _ in range(launches):
        with poisoned():
            out, _ = attend_table(q, table, 0.125)
        torch.testing.assert_close(out, reference(q, k, v, 0.125), atol=2e-3, rtol=2e-3)  # decoded to float16
        assert not table.work.claims[:-1].any()


@pytest.mark.gpu
def test_a_mixture_equals_the_reference_on_the_gpu():
    check_mixture("cuda")


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_triton("cpu", 14)
    check_mixture("cpu")
