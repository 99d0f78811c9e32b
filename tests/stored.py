"""Weights as other tools store them: for each format the tensors, and the floats that the format's definition gives.

Quantizers as plain as they can be, for tests alone. Values are computed here from codes that were never packed, number
by number where it matters, so that nothing is shared with the readers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

BFLOAT16 = ml_dtypes.bfloat16
NAMES = {
    **{"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8", "int8": "I8", "int32": "I32"},
    **{"int64": "I64", "float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0", "float8_e5m2": "F8_E5M2"},
}
Tensors = dict[str, np.ndarray]


class Stored(NamedTuple):
    """tensors: by what follows the module's name and a dot (or, of fused ones, the tensor's name). value: bfloat16."""

    tensors: Tensors
    value: np.ndarray


def write_file(path: Path, tensors: Tensors) -> None:
    """A safetensors file, by the format's description: the library's numpy part has no FP8."""
    header: dict[str, Any] = {}
    at = 0
    for name, array in tensors.items():
        header[name] = {"dtype": NAMES[array.dtype.name], "shape": array.shape, "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header).encode()
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def e4m3(code: int) -> float:
    """One sign, four exponent and three mantissa bits; no infinity, and all ones are NaN."""
    sign, exponent, mantissa = -1.0 if code >> 7 else 1.0, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def e2m1(code: int) -> float:
    sign, exponent, mantissa = -1.0 if code >> 3 else 1.0, code >> 1 & 3, code & 1
    return sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


E4M3 = np.array([e4m3(c) for c in range(256)], np.float32)
E2M1 = np.array([e2m1(c) for c in range(16)], np.float32)


def nearest(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    return np.nanargmin(np.abs(values[..., None] - table), axis=-1).astype(np.uint8)


def fp8(weight: np.ndarray, block: tuple[int, int], names=("weight", "weight_scale_inv"), powers: Any = None) -> Stored:
    """Blocks of rows and columns, one after the other. powers: the dtype of scales that are powers of two."""
    rows, columns = weight.shape
    grid = [range(0, size, step) for size, step in zip(weight.shape, block)]
    codes, value = np.zeros((rows, columns), np.uint8), np.zeros((rows, columns), np.float32)
    scales = np.zeros((len(grid[0]), len(grid[1])), np.float32)
    for i, top in enumerate(grid[0]):
        for j, left in enumerate(grid[1]):
            at = slice(top, top + block[0]), slice(left, left + block[1])
            scale = np.float32(np.abs(weight[at]).max() / 448)
            scale = np.float32(2.0 ** np.ceil(np.log2(scale))) if powers is not None else scale
            codes[at] = (weight[at] / scale).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
            value[at] = E4M3[codes[at]] * scale
            scales[i, j] = scale
    if powers is not None:
        scales = (np.log2(scales) + 127).astype(np.uint8).view(powers)
    return Stored({names[0]: codes.view(ml_dtypes.float8_e4m3fn), names[1]: scales}, value.astype(BFLOAT16))


def fp8_tensor(weight: np.ndarray, name: str = "weight_scale", shape: tuple[int, ...] = ()) -> Stored:
    made = fp8(weight, weight.shape, ("weight", name))
    made.tensors[name] = made.tensors[name].reshape(shape)
    return Stored(made.tensors | {"input_scale": np.float32([0.5])[0].reshape(())}, made.value)


def fp8_rows(weight: np.ndarray) -> Stored:
    made = fp8(weight, (1, weight.shape[1]), ("weight", "weight_scale"))
    return Stored(made.tensors, (E4M3[made.tensors["weight"].view(np.uint8)]
                                 * made.tensors["weight_scale"]).astype(BFLOAT16))  # fmt: skip


def halves(codes: np.ndarray) -> np.ndarray:
    """Two four-bit codes a byte, the first in the low bits."""
    return (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)


def fp4_codes(weight: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales that put the largest of a group at 6, and the groups."""
    groups = weight.reshape(*weight.shape[:-1], -1, group)
    return np.abs(groups).max(axis=-1) / 6, groups


def nvfp4(weight: np.ndarray, divided: bool) -> Stored:
    wanted, groups = fp4_codes(weight, 16)
    whole = np.float32(wanted.max() / 448)
    scales = (wanted / whole).astype(ml_dtypes.float8_e4m3fn)
    second = np.float32(1 / whole) if divided else whole
    read = E4M3[scales.view(np.uint8)]
    scale = read / second if divided else read * second
    codes = nearest(groups / scale[..., None], E2M1)
    value = (E2M1[codes] * scale[..., None]).reshape(weight.shape).astype(BFLOAT16)
    packed = halves(codes.reshape(weight.shape))
    if divided:
        more = {"weight_global_scale": np.array([second]), "input_global_scale": np.float32([2.0])}
        return Stored({"weight_packed": packed, "weight_scale": scales, **more}, value)
    more = {"weight_scale_2": np.array(second), "input_scale": np.array(np.float32(0.25))}
    return Stored({"weight": packed, "weight_scale": scales, **more}, value)


def mxfp4(weight: np.ndarray, names: tuple[str, str], dtype: Any, scale_dtype: Any) -> Stored:
    wanted, groups = fp4_codes(weight, 32)
    exponent = np.ceil(np.log2(wanted)).astype(int)
    codes = nearest(groups / 2.0 ** exponent[..., None], E2M1)
    value = (E2M1[codes] * 2.0 ** exponent[..., None]).reshape(weight.shape).astype(BFLOAT16)
    scales = (exponent + 127).astype(np.uint8).view(scale_dtype)
    return Stored({names[0]: halves(codes.reshape(weight.shape)).view(dtype), names[1]: scales}, value)


def words(codes: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Codes along the last axis in words of 32 bits, filled up with zeros; order: which code each place has."""
    each = 32 // bits
    filled = np.zeros((*codes.shape[:-1], -(-codes.shape[-1] // each) * each), np.uint32)
    filled[..., : codes.shape[-1]] = codes
    out = np.zeros((*codes.shape[:-1], filled.shape[-1] // each), np.uint32)
    for word in range(out.shape[-1]):
        for place, code in enumerate(order or range(each)):
            out[..., word] |= filled[..., word * each + code] << np.uint32(place * bits)
    return out.view(np.int32)


def integer_codes(weight: np.ndarray, bits: int, group: np.ndarray, symmetric: bool, scale_dtype: Any):
    """Codes from 0 of a row's groups, their scales and zero points (R, G), and the values."""
    rows, columns = weight.shape
    count, top = int(group.max()) + 1, 2**bits - 1
    scales, zeros = np.zeros((rows, count), scale_dtype), np.zeros((rows, count), np.uint8)
    codes, value = np.zeros((rows, columns), np.uint8), np.zeros((rows, columns), np.float32)
    for row in range(rows):
        for g in range(count):
            at = np.flatnonzero(group == g)
            low, high = min(weight[row, at].min(), 0), max(weight[row, at].max(), 0)
            step = 2 * max(-low, high) / top if symmetric else (high - low) / top
            scales[row, g] = step
            scale = np.float32(scales[row, g])
            zeros[row, g] = 2 ** (bits - 1) if symmetric else np.clip(np.rint(-low / scale), 0, top)
            codes[row, at] = np.clip(np.rint(weight[row, at] / scale) + zeros[row, g], 0, top)
            value[row, at] = (codes[row, at].astype(np.float32) - np.float32(zeros[row, g])) * scale
    return codes, scales, zeros, value.astype(BFLOAT16)


def packed(weight: np.ndarray, bits: int = 4, size: int = 0, symmetric: bool = True, order: bool = False) -> Stored:
    """compressed-tensors' ``pack-quantized``; size: inputs a group, 0: all; order: inputs are dealt out to groups."""
    rows, columns = weight.shape
    group = np.arange(columns) // (size or columns)
    group = np.random.default_rng(1).permutation(group) if order else group
    codes, scales, zeros, value = integer_codes(weight, bits, group, symmetric, BFLOAT16)
    shape = np.array([rows, columns], np.int64)
    tensors = {"weight_packed": words(codes, bits), "weight_scale": scales, "weight_shape": shape}
    if not symmetric:
        tensors["weight_zero_point"] = np.ascontiguousarray(words(zeros.T, bits).T)
    if order:
        tensors["weight_g_idx"] = group.astype(np.int32)
    return Stored(tensors, value)


def int8(weight: np.ndarray) -> Stored:
    """compressed-tensors' ``int-quantized``."""
    codes, scales, _, value = integer_codes(weight, 8, np.zeros(weight.shape[1], int), True, np.float32)
    return Stored({"weight": (codes.astype(int) - 128).astype(np.int8), "weight_scale": scales}, value)


def gptq(weight: np.ndarray, bits: int = 4, size: int = 16, order: bool = False, second: bool = False) -> Stored:
    """second: the version of files that stores zero points as they are."""
    group = np.arange(weight.shape[1]) // size
    group = np.random.default_rng(2).permutation(group) if order else group
    codes, scales, zeros, value = integer_codes(weight, bits, group, False, np.float16)
    stored = zeros if second else (zeros.astype(int) - 1) % 2**bits
    tensors = {
        "qweight": np.ascontiguousarray(words(codes, bits).T),
        "qzeros": words(stored.T, bits),
        "scales": np.ascontiguousarray(scales.T),
        "g_idx": group.astype(np.int32),
    }
    return Stored(tensors, value)


def awq(weight: np.ndarray, size: int = 16) -> Stored:
    codes, scales, zeros, value = integer_codes(weight, 4, np.arange(weight.shape[1]) // size, False, np.float16)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {"qweight": words(codes.T, 4, order), "qzeros": words(zeros.T, 4, order), "scales": scales.T}
    return Stored({name: np.ascontiguousarray(array) for name, array in tensors.items()}, value)


def scheme(**weights: Any) -> dict[str, Any]:
    return {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group", **weights}}


def compressed(**groups: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "config_groups": groups}


class Format(NamedTuple):
    """config: its quantization_config. words: what the reader calls it."""

    make: Callable[[np.ndarray], Stored]
    config: dict[str, Any]
    words: str


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
GROUP = scheme(group_size=32)
ASYMMETRIC = compressed(a=scheme(group_size=16, symmetric=False))
FORMATS = {
    "fp8 in blocks": Format(
        lambda w: fp8(w, (24, 20)), FP8 | {"weight_block_size": [24, 20]}, "FP8 in blocks of 24 x 20"
    ),
    "fp8, scales are bytes": Format(
        lambda w: fp8(w, (1, 32), powers=np.uint8),
        {"quant_method": "mxfp8", "weight_block_size": [1, 32]},
        "FP8 in blocks of 1 x 32",
    ),
    "fp8, scales are E8M0": Format(
        lambda w: fp8(w, (16, 16), ("weight", "scale"), ml_dtypes.float8_e8m0fnu),
        FP8 | {"weight_block_size": [16, 16], "scale_fmt": "ue8m0"},
        "FP8 in blocks of 16 x 16",
    ),
    "mxfp8 of modelopt": Format(
        lambda w: fp8(w, (1, 32), ("weight", "weight_scale"), np.uint8),
        {"quant_method": "modelopt", "quant_algo": "MXFP8"},
        "FP8 in blocks of 1 x 32",
    ),
    "fp8 in blocks of compressed-tensors": Format(
        lambda w: fp8(w, (24, 16), ("weight", "weight_scale")),
        compressed(a=scheme(num_bits=8, type="float", strategy="block", block_structure=[24, 16])),
        "FP8 in blocks of 24 x 16",
    ),
    "fp8, a scale a tensor": Format(fp8_tensor, {"quant_method": "modelopt"}, "FP8 with a scale a tensor"),
    "fp8, an inverse scale a tensor": Format(
        lambda w: fp8_tensor(w, "weight_scale_inv", (1,)), FP8, "FP8 with a scale a tensor"
    ),
    "fp8, a scale a row": Format(
        fp8_rows, compressed(a=scheme(num_bits=8, type="float", strategy="channel")), "FP8 with a scale a row"
    ),
    "nvfp4 of modelopt": Format(lambda w: nvfp4(w, False), MODELOPT, "NVFP4"),
    "nvfp4 of compressed-tensors": Format(
        lambda w: nvfp4(w, True), compressed(a=scheme(type="float", strategy="tensor_group", group_size=16)), "NVFP4"
    ),
    "mxfp4 of DeepSeek-V4": Format(
        lambda w: mxfp4(w, ("weight", "scale"), np.int8, ml_dtypes.float8_e8m0fnu),
        FP8 | {"weight_block_size": [128, 128], "scale_fmt": "ue8m0", "expert_dtype": "fp4"},
        "MXFP4",
    ),
    "mxfp4 of compressed-tensors": Format(
        lambda w: mxfp4(w, ("weight_packed", "weight_scale"), np.uint8, np.uint8),
        compressed(a=scheme(type="float", group_size=32)),
        "MXFP4",
    ),
    "int4 in groups": Format(lambda w: packed(w, size=32), compressed(a=GROUP), "int4 in groups of 32"),
    "int4, a scale a row": Format(
        packed, compressed(a=scheme(strategy="channel", group_size=None)), "int4 with a scale a row"
    ),
    "int4 with zero points": Format(lambda w: packed(w, size=16, symmetric=False), ASYMMETRIC, "int4 in groups of 16"),
    "int4 in another order": Format(
        lambda w: packed(w, size=16, symmetric=False, order=True), ASYMMETRIC, "int4 in groups of 16"
    ),
    "int8 in groups": Format(
        lambda w: packed(w, 8, 32), compressed(a=scheme(num_bits=8, group_size=32)), "int8 in groups of 32"
    ),
    "int8, a scale a row": Format(
        int8, compressed(a=scheme(num_bits=8, strategy="channel", group_size=None)), "int8 with a scale a row"
    ),
    "gptq": Format(gptq, {"quant_method": "gptq", "bits": 4, "group_size": 16}, "GPTQ int4 in groups of 16"),
    "gptq of 8 bits, in another order": Format(
        lambda w: gptq(w, 8, order=True),
        {"quant_method": "gptq", "bits": 8, "group_size": 16, "desc_act": True, "checkpoint_format": "gptq"},
        "GPTQ int8 in groups of 16",
    ),
    "gptq, second version": Format(
        lambda w: gptq(w, second=True),
        {"quant_method": "gptq", "bits": 4, "group_size": 16, "checkpoint_format": "gptq_v2"},
        "GPTQ int4 in groups of 16",
    ),
    "awq": Format(
        awq, {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}, "AWQ int4 in groups of 16"
    ),
}
