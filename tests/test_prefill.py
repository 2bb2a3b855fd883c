"""Prefill attention over pages and the causal piece beside it, against the torch reference and plain softmax."""

import itertools

import pytest
import torch
from interpreter import SEED, run_in_interpreter
from test_kernels import make, poisoned

from adaptivekv.kernels import CODECS, attend_dense, attend_pages
from adaptivekv.kernels.attend import PageBatch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
flashpages = pytest.importorskip("adaptivekv.kernels.flashpages")
prefill = pytest.importorskip("adaptivekv.kernels.prefill")


def check(got, want, tolerance, case):
    """Relative error of the outputs as a whole; log-sum-exps absolutely, -inf where -inf is due.

    got, want: out, lse and, for pages, page_lse or None.
    """
    assert [t is None for t in got] == [t is None for t in want], case
    (out, *lses), (want_out, *want_lses) = ([t.cpu() for t in ts if t is not None] for ts in (got, want))
    assert out.dtype == torch.float32 and out.shape == want_out.shape, case
    error = (out - want_out).norm() / want_out.norm().clamp_min(1e-30)
    assert error <= tolerance, (float(error), case)
    for lse, want_lse in zip(lses, want_lses, strict=True):
        torch.testing.assert_close(lse, want_lse, atol=4 * tolerance, rtol=tolerance, msg=lambda m: f"{case}: {m}")


def moved(batch, device):
    parts = (t.to(device) for t in (batch.arena, batch.k_off, batch.v_off, batch.count))
    rest = batch.k, batch.v, batch.dtype, batch.k_dim, batch.v_dim, batch.rotate, batch.full
    return PageBatch(*parts, *rest)


def check_pages(device, cases, rows_options, tolerance):
    """Every pair of codecs in turn, everything else at random: partial and absent pages, outputs poisoned."""
    gen = torch.Generator().manual_seed(SEED)

    def pick(*options):
        return options[int(torch.randint(len(options), (1,), generator=gen))]

    for i, (k, v) in zip(range(cases), itertools.cycle(itertools.product(CODECS, CODECS))):
        dims = pick(64, 96, 128, 256), pick(64, 96, 128, 256)
        heads, pages, rows = pick(1, 2, 3), pick(1, 4, 5), pick(*rows_options)
        dtype, rotate, full = pick(torch.float16, torch.bfloat16), pick(False, True), pick(False, True)
        softcap, stats = pick(None, 6.0), pick(False, True)
        launch = pick(None, prefill.Launch(32, 4, 2, span=2) if max(dims) <= 128 else None)
        case = (i, k, v, dtype, dims, heads, pages, rows, softcap, stats, launch, rotate, full, gen.initial_seed())
        batch, *_ = make(heads, pages, k, v, *dims, dtype, rotate, full, seed=pick(*range(1000)))
        if heads == 3:
            batch.count[1] = batch.k_off[1] = batch.v_off[1] = 0  # a head with no slots at all
            batch.full = False
        q = torch.randn(heads, rows, dims[0], generator=gen).to(dtype)
        args = dims[0] ** -0.5, softcap, stats
        with poisoned():
            got = prefill.prefill_pages_triton(q.to(device), moved(batch, device), *args, launch)
        check(got, attend_pages(q, batch, *args), tolerance, case)


@triton.jit
def field_kernel(word_ptr, out_ptr, AT: tl.constexpr, BITS: tl.constexpr, N: tl.constexpr, INTERPRET: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    step, zero = tl.full([N], 0.5, tl.float16), tl.full([N], -3.0, tl.float16)
    tl.store(out_ptr + at, flashpages._decode_field(tl.load(word_ptr + at), step, zero, AT, BITS, INTERPRET))


def check_every_word(device):
    """All 2**16 words through the unpacking of every field."""
    words = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    for bits in (2, 4, 8):
        for at in range(0, 16, bits):
            out = torch.empty(2**16, dtype=torch.float16, device=device)
            field_kernel[(64,)](words.to(device, torch.int16), out, at, bits, 1024, device == "cpu")
            level = words >> at & ((1 << bits) - 1)
            assert torch.equal(out.float().cpu(), level.float() * 0.5 - 3.0), (bits, at)


def test_interpreted_kernels_equal_the_reference():
    run_in_interpreter(__file__)


@pytest.mark.gpu
def test_pages_on_the_gpu():
    check_every_word("cuda")
    check_pages("cuda", 20, (16, 17, 64, 80, 300), 4e-3)  # one compilation each, a second or two


def test_float32_and_odd_dims_take_the_reference():
    for k, dim, dtype in (("native", 64, torch.float32), ("int2", 20, torch.bfloat16)):
        batch, *_ = make(2, 3, k, "int8", dim, 64, dtype)
        q = torch.randn(2, 20, dim)
        for stats in (False, True):
            args = q, batch, 0.1, None, stats
            check(prefill.prefill_pages_triton(*args), attend_pages(*args), 1e-6, (k, dim, stats))


@pytest.mark.parametrize(
    ("blocks", "pages", "parts"), [(8, 512, 33), (16, 512, 16), (128, 512, 2), (512, 512, 1), (1, 3, 1)]
)
def test_splits_fill_the_gpu(blocks, pages, parts):
    assert prefill._splits(blocks, pages, 264) == parts


def causal(q, k, v, scale, n, softcap=None):
    """Row by row: token i of each group's n sees the tail and the new tokens up to itself."""
    t = k.shape[1] - n
    rows = [
        attend_dense(q[:, r : r + 1], k[:, : t + r % n + 1], v[:, : t + r % n + 1], scale, None, softcap)
        for r in range(q.shape[1])
    ]
    return torch.cat([out for out, _ in rows], 1), torch.cat([lse for _, lse in rows], 1)


@pytest.mark.parametrize(("n", "t"), [(1, 0), (1, 9), (7, 0), (7, 40)])
@pytest.mark.parametrize("fused", [False, True])
def test_causal(monkeypatch, n, t, fused):
    """`fused`: the pieces are put together as on a GPU, with a stand-in for torch's kernel."""

    def flash(q, k, v, scale, is_causal):
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        m, n = q.shape[1], k.shape[1]
        mask = torch.ones(m, n, dtype=torch.bool).tril() if is_causal else None  # aligned with the first key
        return attend_dense(q, k, v, scale, mask)

    if fused:
        monkeypatch.setattr(prefill, "_fused", lambda *_: True)
        monkeypatch.setattr(prefill, "_flash", flash)
    q, k, v = torch.randn(2, 3 * n, 64), torch.randn(2, t + n, 64), torch.randn(2, t + n, 64)
    for softcap in (None, 4.0):
        check(prefill.prefill_causal(q, k, v, 0.2, n, softcap), causal(q, k, v, 0.2, n, softcap), 1e-5, softcap)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 96, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_causal_on_the_gpu(dim, dtype):
    for n, t in ((1, 0), (2, 63), (70, 0), (70, 33)):
        q, k, v = (torch.randn(2, m, dim).to(dtype) for m in (4 * n, t + n, t + n))
        got = prefill.prefill_causal(q.cuda(), k.cuda(), v.cuda(), dim**-0.5, n)
        check(got, causal(q, k, v, dim**-0.5, n), 4e-3, (n, t))


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_every_word("cpu")
    check_pages("cpu", 16, (17, 33, 80), 4e-3)
