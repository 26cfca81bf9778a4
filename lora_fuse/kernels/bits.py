"""Bits of words, for kernels that read bitmaps."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def popcount(word):
    """Set bits of 32; LLVM knows the pattern for the instruction."""
    word = word.to(tl.uint32, bitcast=True)
    word -= (word >> 1) & 0x55555555
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)
