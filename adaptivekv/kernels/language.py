"""Pieces that several Triton kernels share."""

import triton
import triton.language as tl


@triton.jit
def log2(x, INTERPRET: tl.constexpr):
    """The hardware's logarithm: `tl.log2` corrects its last bits with a dozen instructions."""
    if INTERPRET:
        return tl.log2(x)
    return tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def butterflies(x, BLOCK: tl.constexpr):
    """x [B], each BLOCK elements times the Walsh-Hadamard matrix of signs (hadamard.py): log2(BLOCK) sums, no table.

    A round pairs neighbours and puts sums before differences, which turns the index by one bit: after all rounds each
    bit has had its turn and is back in its place.
    """
    GROUPS: tl.constexpr = x.shape[0] // BLOCK
    y = tl.reshape(x, [GROUPS, BLOCK])
    for _ in tl.static_range(_bits(BLOCK)):
        a, b = tl.split(tl.reshape(y, [GROUPS, BLOCK // 2, 2]))
        y = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), [GROUPS, BLOCK])
    return tl.reshape(y, [x.shape[0]])


@triton.constexpr_function
def _bits(block):
    return block.bit_length() - 1


@triton.jit
def load_means(wide_ptr, off, word, mask, BITS: tl.constexpr):
    """The means of the dims that 16-bit words `word` of a slot hold, packed: for `mean`. off: bytes, where they begin.

    As 32-bit words, for Triton prefetches nothing narrower.
    """
    if BITS == 8:
        return (tl.load(wide_ptr + (off // 4 + word // 2), mask=mask, other=0),)
    elif BITS == 4:
        return (tl.load(wide_ptr + (off // 4 + word), mask=mask, other=0),)
    else:
        return (
            tl.load(wide_ptr + (off // 4 + 2 * word), mask=mask, other=0),
            tl.load(wide_ptr + (off // 4 + 2 * word + 1), mask=mask, other=0),
        )


@triton.jit
def mean(means, word, S: tl.constexpr, BITS: tl.constexpr):
    """Of the S-th level of each word, float16."""
    shift = word % 2 * 16 + 8 * S if BITS == 8 else 8 * (S % 4)
    return ((means[S // 4] >> shift) << 8).to(tl.int16).to(tl.float16, bitcast=True)
