"""Formats that only torch knows (float8, KIVI, KVQuant): what they store, and who reads it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import run_in_interpreter
from models import tiny
from test_kernels import close, make, naive
from test_pageops import recode_case

from adaptivekv import AdaptiveCache, Plan, graph
from adaptivekv.controller import Controller
from adaptivekv.kernels import CODECS, DECODED, attend_pages, dispatch, page_attention, pageops
from adaptivekv.memory.formats import BY_CODE, FORMATS, WITH_KERNEL
from adaptivekv.memory.shapes import LayerShape

NEW = [fmt.name for fmt in BY_CODE if not (fmt.k.kernel and fmt.v.kernel)]
dims = st.sampled_from([24, 64, 96, 128])
counts = st.lists(st.integers(1, 64), min_size=1, max_size=3)


def parts(count, dim, seed=0, spread=1.0):
    """x [n, 64, dim] whose channels differ in place and spread, count [n], used [n, 64, 1]."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(len(count), 64, dim, generator=gen) * torch.rand(dim, generator=gen).mul(4).exp() * spread
    count = torch.tensor(count)
    return x + 3 * torch.randn(dim, generator=gen), count, (torch.arange(64) < count[:, None])[..., None]


def half_ulp(x):
    """What rounding to float16 costs at most."""
    return x.abs() * 2**-11 + 2**-25


# --- codecs


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(list(DECODED)), dim=dims, count=counts, seed=st.integers(0, 99))
def test_size_error_and_unused_slots(name, dim, count, seed):
    codec = DECODED[name]
    x, count, used = parts(count, dim, seed)
    raw = codec.encode(x.masked_fill(~used, torch.nan), torch.bfloat16, count)
    assert torch.equal(raw, codec.encode(x.masked_fill(~used, 1e9), torch.bfloat16, count)), "an unused slot matters"
    apart = -(-64 * dim // 100)
    size = {
        "fp8": 64 * dim + 2 * 64, "kivi4k": 32 * dim + 4 * dim, "kivi2k": 16 * dim + 4 * dim,
        "kivi4v": 32 * dim + 256 * -(-dim // 32), "kivi2v": 16 * dim + 256 * -(-dim // 32),
        "nuq4k": 32 * dim + 4 * dim + 4 * apart, "nuq4v": 32 * dim + 4 * 64 + 4 * apart,
    }[name]  # fmt: skip
    assert raw.shape[1] == codec.part_bytes(dim, torch.bfloat16) == -(-size // 256) * 256
    assert not raw[:, size:].any()
    back = codec.decode(raw, dim, torch.bfloat16)
    assert back.isfinite().all()
    axis = 1 if name.endswith("k") else 2
    low, high = x.masked_fill(~used, torch.inf).amin(axis, True), x.masked_fill(~used, -torch.inf).amax(axis, True)
    span = (high - low).where(low <= high, 0)
    if name == "fp8":  # 3 bits of mantissa, and below 2**-6 of the scale even steps
        bound = x.abs() * 2**-4 + x.abs().amax(2, True) / 448 * 2**-10 + half_ulp(x)
    elif name.startswith("kivi"):
        bound = span / (2**codec.bits - 1) * 0.502 + half_ulp(low).where(low <= high, 0) + 2**codec.bits * 2**-24
    else:  # the outermost levels lie furthest apart
        bound = span / 2 * 0.15 + half_ulp(x)
    assert ((back - x).abs() <= bound * 1.01).masked_fill(~used, True).all()


def test_kivi_by_its_formula():
    """A channel of the keys, and 32 channels of a value, by themselves: Q(x) = round((x - z) / s), z = min."""
    x, count, _ = parts([64, 37], 48)
    for bits in (4, 2):
        keys, values = DECODED[f"kivi{bits}k"], DECODED[f"kivi{bits}v"]
        back = [c.decode(c.encode(x, torch.float32, count), 48, torch.float32).numpy() for c in (keys, values)]
        for page, n in enumerate(count.tolist()):
            data = x[page, :n].numpy()
            for got, groups in zip(
                back,
                ([np.s_[:n, c] for c in range(48)], [np.s_[t, g : g + 32] for t in range(n) for g in (0, 32)]),
                strict=True,
            ):
                for at in groups:
                    z = np.float32(np.float16(data[at].min()))
                    s = np.float32(np.float16((data[at].max() - data[at].min()) / np.float32(2**bits - 1)))
                    want = np.clip(np.round((data[at] - z) / s), 0, 2**bits - 1) * s + z
                    np.testing.assert_allclose(got[page][at], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by_channel", [True, False])
def test_kvquant_by_its_formula(by_channel):
    """1 % furthest from their vector's mean in full, the rest to the nearest quantile of a normal distribution."""
    dim = 40
    x, count, _ = parts([64, 23], dim, seed=3)
    codec = DECODED["nuq4k" if by_channel else "nuq4v"]
    back = codec.decode(codec.encode(x, torch.float32, count), dim, torch.float32)
    points = torch.special.ndtri((torch.arange(16) + 0.5).double() / 16)
    points = (points / points.max()).float()
    for page, n in enumerate(count.tolist()):
        data = x[page, :n].T if by_channel else x[page, :n]  # a row is a vector
        got = back[page, :n].T if by_channel else back[page, :n]
        z = ((data - data.mean(1, keepdim=True)) / data.std(1, correction=0, keepdim=True)).abs()
        apart = torch.zeros(data.shape, dtype=torch.bool)
        apart.view(-1)[z.reshape(-1).topk(26).indices] = True  # 0.64 * 40, rounded up
        assert torch.equal(got[apart], data[apart].half().float())
        for row, out, there in zip(data, got, apart, strict=True):
            rest = row[~there]
            centre, scale = ((rest.max() + s * rest.min()).div(2).half().float() for s in (1, -1))
            nearest = ((rest - centre) / scale - points[:, None]).abs().argmin(0)
            torch.testing.assert_close(out[~there], points[nearest] * scale + centre, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("case", range(3))
def test_attention_equals_dense_attention_over_decoded_pages(name, case):
    (k_dim, v_dim), softcap, rows = ((24, 96), (64, 64), (128, 24))[case], (None, None, 5.0)[case], (3, 80, 2)[case]
    fmt = FORMATS[name]
    batch, k, v = make(3, 5, fmt.k.name, fmt.v.name, k_dim, v_dim, torch.bfloat16, seed=case)
    q = torch.randn(3, rows, k_dim)
    want = naive(q, batch, k, v, 0.1, softcap)
    out, lse, page_lse = attend_pages(q, batch, 0.1, softcap, rows < 80, 2)
    close((out, lse), want[:2], 1e-4)
    if rows < 80:
        close((page_lse,), want[2:], 1e-4)


@given(dim=st.integers(2, 64).map(lambda n: 4 * n))
def test_a_demotion_never_takes_more_bytes(dim):
    for old in BY_CODE:
        assert not old.demotes(old)
        for new in BY_CODE:
            if old.demotes(new):
                assert new.k.bits <= old.k.bits and new.v.bits <= old.v.bits
                assert new.bytes(dim, dim, torch.bfloat16) <= old.bytes(dim, dim, torch.bfloat16), (old.name, new.name)


# --- who runs it


class Away(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True


def away(x):
    return torch.Tensor._make_subclass(Away, x)


def test_kernels_are_asked_only_for_what_they_know(monkeypatch):
    assert all(dispatch.has_kernel((codec, 64)) for codec in CODECS.values())
    assert not any(dispatch.has_kernel((CODECS["int8"], 64), (codec, 64)) for codec in DECODED.values())
    monkeypatch.setattr(dispatch, "triton_works", lambda: True)
    off = away(torch.zeros(1))
    for codec in (CODECS | DECODED).values():
        assert dispatch.twin_runs((0, 0, off, 0, CODECS["native"], codec)) == codec.kernel
    assert not dispatch.twin_runs((0, 0, torch.zeros(1), 0, CODECS["int8"]))
    assert [fmt.kernel for fmt in BY_CODE] == [i < len(WITH_KERNEL) for i in range(len(BY_CODE))]


def test_the_interpreter_runs_kernels_beside_what_has_none():
    run_in_interpreter(__file__)


def check_in_interpreter():
    calls = []
    for name in ("decode", "pagekernels"):
        module = dispatch.triton_module(name)
        what = "attend_pages_triton" if name == "decode" else "recode"
        real = getattr(module, what)
        setattr(module, what, lambda *a, real=real: calls.append(real) or real(*a))
    for k, v, kernel in (("int4", "int2", True), ("kivi4k", "kivi2v", False), ("int8", "fp8", False)):
        batch, *_ = make(2, 3, k, v, 64, 64, torch.float32)
        q = torch.randn(2, 3, 64)
        got = page_attention(away(q), batch, 0.1)
        close([x.as_subclass(torch.Tensor) for x in got[:2]], attend_pages(q, batch, 0.1)[:2], 1e-3)
        assert bool(calls) == kernel
        calls.clear()
    for pair, kernel in ((("int8", "int4"), True), (("int8", "kivi4k"), False), (("nuq4v", "int2"), False)):
        args = recode_case(pair, 64, torch.float32, False, 1)
        mine = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
        pageops.recode.__wrapped__(*args)
        mine[2] = away(mine[2])
        pageops.recode(*mine)
        assert bool(calls) == kernel
        calls.clear()
        size = args[6].part_bytes(64, torch.float32)
        got, want = (args[6].decode(pageops.fetch(x, args[3], size), 64, torch.float32) for x in (mine[1], args[1]))
        assert ((got - want).abs() > 0.1).float().mean() < 0.02  # the kernel may settle ties the other way


def test_captured_steps_are_refused_where_pages_may_have_no_kernel(monkeypatch):
    monkeypatch.setattr(graph, "triton_works", lambda: True)
    for plan, name in (
        ("kivi4", "kivi4"),
        ("hotcold(0.5, high=fp8, low=int4)", "hotcold"),
        ("palu(0.5)", "palu"),
        ("k4v2", None),
    ):
        cache = SimpleNamespace(
            shapes=[LayerShape(2, 4, 24, 16)],
            device=torch.device("cuda"),
            layers=[],
            controller=Controller(Plan.parse(plan)),
        )
        why = graph.refused(cache)
        assert why is None if name is None else why == f"{name}: its pages have no Triton kernel"
    model = tiny()
    for plan, known in (("int4", True), ("kivi4", False)):  # whatever the plan, by the pages themselves
        cache = AdaptiveCache(model, plan=plan)
        with torch.inference_mode():
            model(torch.randint(2, 150, (1, 300)), past_key_values=cache)
            cache.end_prefill()
        assert graph.GraphDecoder(model, cache)._known() == known


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_in_interpreter()
