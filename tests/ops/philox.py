"""The normal numbers of csrc/normals.h, one at a time, in Python's own integers and doubles."""

from __future__ import annotations

import math

MASK = 2**32 - 1


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox 4x32-10. Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC'11)."""
    a, b, c, d = counter
    low, high = key
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = second >> 32 ^ b ^ low, second & MASK, first >> 32 ^ d ^ high, first & MASK
        low, high = low + 0x9E3779B9 & MASK, high + 0xBB67AE85 & MASK
    return a, b, c, d


def normal(seed: int, draw: int, matrix: int, row: int, column: int) -> float:
    words = philox((32 * (row // 128) + row % 32, column, matrix, draw), (seed & MASK, seed >> 32))
    word = row // 32 % 4
    even, odd = words[word & 2], words[word | 1]
    radius = math.sqrt(-2.0 * math.log(((even >> 9) + 0.5) * 2.0**-23))
    angle = (odd - (odd >> 31 << 32)) * math.pi * 2.0**-31
    return radius * (math.sin(angle) if word & 1 else math.cos(angle))
