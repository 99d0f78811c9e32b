"""MXFP4 weights as bfloat16: 32 four-bit floats a group and a power of two for each (OCP MX v1.0).

Axes: S any lead axes, G groups, D weights of a row.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from jaxtyping import Float, UInt8

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)  # E2M1, by code
FP4_GROUP = 32


def from_mxfp4(blocks: UInt8[np.ndarray, "*S G 16"], scales: UInt8[np.ndarray, "*S G"]) -> Float[np.ndarray, "*S D"]:
    """bfloat16 weights from 32 four-bit floats a group, low nibble first, and a power of two (OCP MX v1.0)."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, FP4_GROUP)
    values = np.ldexp(FP4[codes], scales[..., None].astype(np.int32) - 127)
    return values.reshape(*scales.shape[:-1], -1).astype(ml_dtypes.bfloat16)
