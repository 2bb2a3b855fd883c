"""Changes of stored pages: the torch functions against the codecs, the Triton kernels against the torch functions."""

import pytest
import torch
from interpreter import SEED, run_in_interpreter

from adaptivekv.kernels import CODECS, DECODED, PAGE, UNIT, hadamard, pageops

ALL = CODECS | DECODED
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parts_of(n, codec, dim, dtype, rotate, count, gen):
    """Random encoded parts [n, bytes]; what lies beyond `count` is NaN in every float type."""
    x = torch.randn(n, PAGE, dim, generator=gen) * 2 + torch.randn(dim, generator=gen)
    x[:, :3, 1:] = x[:, :3, :1]  # constant rows
    raw = codec.encode(hadamard(x) if rotate else x, dtype, count)
    unused = torch.arange(PAGE) >= count[:, None]
    for at, width in codec.fields(dim, dtype) or [(0, codec.payload_bytes(dim, dtype) // PAGE)]:
        raw[:, at : at + PAGE * width].view(n, PAGE, width)[unused] = 255
    return raw


def scattered(raw, gen, extra=2):
    """The parts in an arena of 0xff, in random order, 256 bytes apart: arena and offsets."""
    n, size = raw.shape
    slots = torch.randperm(n + extra, generator=gen)[:n]
    off = slots * (size + UNIT)
    arena = torch.full(((n + extra) * (size + UNIT),), 255, dtype=torch.uint8)
    pageops.store(arena, off, raw)
    return arena, off


def recode_case(codecs, dim, dtype, rotate, seed, n=5):
    """Arguments of a recode, in the order of the function, on the CPU."""
    gen = generator(seed)
    count = torch.randint(0, PAGE + 1, (n,), generator=gen)
    count[0], count[-1] = PAGE, 0
    old, new = (ALL[name] for name in codecs)
    src, src_off = scattered(parts_of(n, old, dim, dtype, seed % 2 == 0, count, gen), gen)
    dst, dst_off = scattered(torch.full((n, new.part_bytes(dim, dtype)), 255, dtype=torch.uint8), gen)
    return src, dst, src_off, dst_off, count, old, new, dim, dtype, rotate


def pack_case(name, dim, dtype, seed, n=9):
    """Arguments of a pack of two heads' survivors, and the decoded parts that should come out."""
    gen, codec = generator(seed), ALL[name]
    count = torch.randint(1, PAGE + 1, (n,), generator=gen)
    raw = parts_of(n, codec, dim, dtype, False, count, gen)
    src, src_off = scattered(raw, gen)
    taken = (torch.rand(n, PAGE, generator=gen) < torch.rand(n, 1, generator=gen)) & (
        torch.arange(PAGE) < count[:, None]
    )
    taken[:, 0] = True
    number, heads = taken.sum(1), torch.arange(n) >= n // 2
    start, new_count = torch.zeros(n, dtype=torch.int64), []
    for head in (False, True):
        mine = number[heads == head]
        start[heads == head] = len(new_count) * PAGE + mine.cumsum(0) - mine
        total = int(mine.sum())
        new_count += [min(PAGE, total - i) for i in range(0, total, PAGE)]
    m = len(new_count)
    dst, dst_off = scattered(torch.full((m, raw.shape[1]), 255, dtype=torch.uint8), gen)
    mask = (taken.long() << torch.arange(PAGE)).sum(1)
    x = codec.decode(raw, dim, dtype)
    expected = torch.zeros(m, PAGE, dim)
    for head in (False, True):
        rows = x[heads == head][taken[heads == head]]
        first = int(start[heads == head][0])
        expected.view(m * PAGE, dim)[first : first + len(rows)] = rows
    return (src, dst, src_off, mask, start, dst_off, torch.tensor(new_count), codec, dim, dtype), expected


def copies(device, args):
    return [a.to(device, copy=True) if isinstance(a, torch.Tensor) else a for a in args]


def close_parts(got, want, codec, dim, dtype):
    """Equal levels, scales and means up to ties of rounding, and nothing beyond them."""
    a, b = codec.unpack(got, dim, dtype), codec.unpack(want, dim, dtype)
    if codec.native:
        # a float32 sum of `dim` products in another order may be off by dim last bits of the whole row's norm
        row = b[0].float().norm(dim=-1, keepdim=True) * dim * torch.finfo(torch.float32).eps
        allowed = row + 4 * torch.finfo(dtype).eps * (b[0].float().abs() + 1)
        assert bool(((a[0].float() - b[0].float()).abs() <= allowed).all())
        return
    torch.testing.assert_close(a[1][0], b[1][0], rtol=0.02, atol=2e-3)
    torch.testing.assert_close(a[1][1], b[1][1], rtol=0.26, atol=1e-3)  # a tie of three significant bits
    off = (a[0] - b[0]).abs()
    # a row whose range is no more than rounding (a rotated constant row) may have any levels: its values must agree
    values = (codec.decode(got, dim, dtype) - codec.decode(want, dim, dtype)).abs()
    assert bool(((off <= 1) | (values < 1e-2)).all()), off.max()
    assert float(((off > 0) & (values > 1e-2)).float().mean()) < 0.02
    assert not got[:, codec.stored_bytes(dim, dtype) :].any()


# --- the torch functions


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize(
    "codecs",
    [
        ("native", "int4"), ("int8", "int2"), ("int4", "int4"), ("int2", "native"), ("native", "fp8"),
        ("fp8", "kivi4k"), ("int8", "kivi2v"), ("kivi4k", "int2"), ("native", "nuq4k"), ("nuq4v", "kivi2k"),
    ],
)  # fmt: skip
def test_recode_is_decode_then_encode(codecs, rotate):
    args = recode_case(codecs, 24, torch.float32, rotate, 3)
    src, dst, src_off, dst_off, count, old, new, dim, dtype, _ = args
    before = dst.clone()
    pageops.recode(*args)
    x = old.decode(pageops.fetch(src, src_off, old.part_bytes(dim, dtype)), dim, dtype)
    x[torch.arange(PAGE) >= count[:, None]] = 0
    size = new.part_bytes(dim, dtype)
    assert torch.equal(pageops.fetch(dst, dst_off, size), new.encode(hadamard(x) if rotate else x, dtype, count))
    pageops.store(dst, dst_off, pageops.fetch(before, dst_off, size))
    assert torch.equal(dst, before), "bytes outside of the parts changed"


@pytest.mark.parametrize("name", ALL)
def test_packing_moves_slots_without_loss(name):
    args, expected = pack_case(name, 24, torch.bfloat16, 5)
    before, codec = args[1].clone(), args[7]
    pageops.pack_slots(*args)
    size = codec.part_bytes(24, torch.bfloat16)
    got = pageops.fetch(args[1], args[5], size)
    back = codec.decode(got, 24, torch.bfloat16)
    if codec.kernel and not codec.native:  # they share a mean: those whose mean it stays are the same, others near
        end = codec.payload_bytes(24, torch.bfloat16)
        used, middle = torch.arange(PAGE) < args[6][:, None], back[torch.arange(len(back)), args[6] // 2]
        assert torch.equal(middle, expected[torch.arange(len(back)), args[6] // 2])
        step = got[:, end : end + 2 * PAGE].view(torch.float16).float()[..., None]
        assert ((back - expected).abs() <= step * 1.01 + 1e-6)[used].all()
        assert (back == expected)[used].float().mean() > 0.3
        assert not got[:, :end].view(len(got), PAGE, -1)[~used].any() and not step[~used].any()
    elif codec.fields(24, torch.bfloat16) is None:  # slots share scales: encoded again with their new neighbours
        assert torch.equal(got, codec.encode(expected, torch.bfloat16, args[6]))
    else:
        assert torch.equal(back, expected)
    assert not got[:, args[7].payload_bytes(24, torch.bfloat16) :][args[6] == 0].any()
    pageops.store(args[1], args[5], pageops.fetch(before, args[5], size))
    assert torch.equal(args[1], before), "bytes outside of the parts changed"


# --- Triton


def check_triton(device, cases):
    """Random shapes and formats through the Triton kernels and the torch functions, outputs poisoned."""
    from adaptivekv.kernels import pagekernels

    seed, gen = SEED, generator(SEED)

    def pick(options):
        return options[int(torch.randint(len(options), (1,), generator=gen))]

    pairs = [(a, b) for a in CODECS for b in CODECS]
    for i in range(cases):
        codecs, dim, dtype, rotate = pairs[i % 16], pick([64, 96, 128, 256, 20]), pick(DTYPES), pick([False, True])
        case = (seed, i, codecs, dim, dtype, rotate)
        try:
            args = recode_case(codecs, dim, dtype, rotate, seed + i)
            mine = copies(device, args)
            pageops.recode.__wrapped__(*args)
            pagekernels.recode(*mine)
            size = args[6].part_bytes(dim, dtype)
            at, new = args[3], args[6]
            got, want = (pageops.fetch(x, at, size) for x in (mine[1].cpu(), args[1]))
            close_parts(got, want, new, dim, dtype)
            whole = mine[1].cpu()
            pageops.store(whole, at, want)
            assert torch.equal(whole, args[1]), "bytes outside of the parts changed"

            args, _ = pack_case(codecs[0], dim, dtype, seed + i)
            mine = copies(device, args)
            pageops.pack_slots.__wrapped__(*args)
            pagekernels.pack_slots(*mine)
            codec, whole, at = args[7], mine[1].cpu(), args[5]
            got, want = (pageops.fetch(x, at, codec.part_bytes(dim, dtype)) for x in (whole, args[1]))
            close_parts(got, want, codec, dim, dtype)
            pageops.store(whole, at, want)
            assert torch.equal(whole, args[1]), "bytes outside of the packed parts changed"

            size = pick([128, 256, 256 * 5, 256 * 70])
            src = torch.randint(0, 255, (size * 8,), generator=gen, dtype=torch.uint8)
            near, far = (torch.randperm(8, generator=gen)[:5] * size for _ in range(2))
            out = [torch.full_like(src, 255) for _ in range(2)]
            pageops.copy_parts.__wrapped__(src, out[0], near, far, size)
            there = out[1].to(device)  # on the CPU the same bytes
            pagekernels.copy_parts(src.to(device), there, near.to(device), far.to(device), size)
            assert torch.equal(there.cpu(), out[0]), "copied bytes differ"
        except Exception as error:
            raise AssertionError(f"{case}: {error}") from error


def test_triton_equals_torch_in_the_interpreter():
    run_in_interpreter(__file__)


@pytest.mark.gpu
def test_triton_equals_torch_on_the_gpu():
    check_triton("cuda", 64)


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_triton("cpu", 20)
