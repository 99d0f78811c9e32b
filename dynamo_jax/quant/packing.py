"""Codes of 1, 2 or 4 bits into bytes, on the host; ``kernels.layout.unpack`` reads them back."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8


def pack(codes: UInt8[np.ndarray, "*S D"], bits: int) -> UInt8[np.ndarray, "*S Dp"]:
    """Pack along the last axis, first code in the lowest bits; its size must fill whole bytes."""
    per_byte = 8 // bits
    if codes.shape[-1] % per_byte:
        raise ValueError(f"last axis {codes.shape[-1]} is not a multiple of {per_byte}, the {bits}-bit codes in a byte")
    if codes.size and int(codes.max()) >= 2**bits:
        raise ValueError(f"code {int(codes.max())} does not fit {bits} bits")
    parts = codes.reshape(*codes.shape[:-1], codes.shape[-1] // per_byte, per_byte)
    packed = np.zeros(parts.shape[:-1], np.uint8)
    for i in range(per_byte):
        packed |= (parts[..., i] << (i * bits)).astype(np.uint8)
    return packed
