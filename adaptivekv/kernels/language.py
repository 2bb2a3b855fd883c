"""Pieces that several Triton kernels share."""

import triton
import triton.language as tl


@triton.jit
def log2(x, INTERPRET: tl.constexpr):
    """The hardware's logarithm: `tl.log2` corrects its last bits with a dozen instructions."""
    if INTERPRET:
        return tl.log2(x)
    return tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
