"""Weights of four-bit floats (E2M1), two in a byte, the first in the low bits, with a scale for each group of a row.

NVFP4: groups of 16, an FP8 scale each, and one float32 for the tensor that multiplies it (modelopt) or divides it
(compressed-tensors). MXFP4 (OCP MX v1.0): groups of 32 and a power of two each; gpt-oss keeps all experts of a layer in
one tensor of blocks, whose rows are outputs, and DeepSeek-V4 and compressed-tensors a tensor for each weight.

Axes: S any lead axes, G groups, B bytes of a row, C weights of a row.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8

from dynamo_jax.models.formats.packed import POWERS, Module, Packed, scale_values

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)  # by code
_BYTE = np.arange(256)
PAIRS = np.stack([E2M1[_BYTE & 15], E2M1[_BYTE >> 4]], axis=1)  # the two weights of each byte
NV_GROUP, MX_GROUP = 16, 32
BYTES = ("U8", "I8")


def from_fp4(codes: UInt8[np.ndarray, "*S B"], scales: Float[np.ndarray, "*S G"]) -> Float[np.ndarray, "*S C"]:
    """float32 weights from bytes of two E2M1 codes and a scale for each of G equal groups of a row."""
    values = PAIRS[codes].reshape(*scales.shape, -1)
    values *= scales[..., None]
    return values.reshape(*scales.shape[:-1], -1)


def fp4_weight(module: Module) -> Packed:
    """How one matrix of four-bit floats is read: MXFP4 or NVFP4 by the dtype of its scales."""
    packed = module.codes.endswith("_packed")
    leaf = module.found(("weight_scale",) if packed else ("weight_scale", "scale"))
    shape = module.of_codes(*BYTES)
    if module.dtype(leaf) in POWERS:
        shape = _check_groups(module, leaf, shape, MX_GROUP, *POWERS)
        return Packed("MXFP4", shape, (module.codes, module.stem + leaf), _mxfp4)
    shape = _check_groups(module, leaf, shape, NV_GROUP, "F8_E4M3")
    whole = "weight_global_scale" if packed else "weight_scale_2"
    if module.shape(whole, "F32") not in ((), (1,)):
        raise module.wrong(module.stem + whole, "is no single number")
    parts = (module.codes, module.stem + leaf, module.stem + whole)
    return Packed("NVFP4", shape, parts, _nvfp4_divided if packed else _nvfp4)


def mxfp4_experts(module: Module) -> Packed:
    """How gpt-oss's blocks of all experts of a layer are read, as the (E, inputs, outputs) of its bfloat16 files."""
    blocks = module.of_codes("U8")
    if len(blocks) != 4 or blocks[3] != MX_GROUP // 2:
        raise module.wrong(module.codes, f"is {blocks}, expected experts, rows, groups and {MX_GROUP // 2} bytes")
    module.check("scales", blocks[:3], f"as {module.codes} has groups", "U8")
    experts, rows, groups = blocks[:3]
    parts = (module.codes, f"{module.stem}scales")
    return Packed("MXFP4", (experts, groups * MX_GROUP, rows), parts, _gpt_oss)


def _check_groups(module: Module, leaf: str, shape: tuple[int, ...], group: int, *dtypes: str) -> tuple[int, ...]:
    if len(shape) != 2 or 2 * shape[1] % group:
        raise module.wrong(module.codes, f"is {shape}, expected rows of whole groups of {group} codes, two in a byte")
    columns = 2 * shape[1]
    module.check(leaf, (shape[0], columns // group), f"for groups of {group} of {module.codes}", *dtypes)
    return shape[0], columns


def _mxfp4(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return from_fp4(codes.view(np.uint8), scale_values(scales))


def _gpt_oss(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    flat = blocks.reshape(*blocks.shape[:2], -1)
    return _mxfp4(flat, scales).swapaxes(1, 2)


def _nvfp4(codes: np.ndarray, scales: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return from_fp4(codes.view(np.uint8), scale_values(scales) * whole.reshape(()))


def _nvfp4_divided(codes: np.ndarray, scales: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return from_fp4(codes.view(np.uint8), scale_values(scales) / whole.reshape(()))
