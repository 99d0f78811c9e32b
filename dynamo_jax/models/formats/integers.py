"""Weights of 4 or 8 bits, whole numbers with a scale and a zero point for each group of inputs: w = (q - z) * s.

compressed-tensors keeps (R, C) with codes of a row in words of 32 bits, the first in the lowest bits, and moves them by
half their range; so a weight without a zero point has 8, or 128. GPTQ keeps the turned matrix, packs along inputs, and
says for each input which group it is of (``g_idx``); its first version stores zero points less one, modulo their range.
AWQ keeps the turned matrix, packs along outputs, and shuffles eight of them. ``int-quantized`` has bytes as they are.

Axes: R outputs, C inputs, G groups of inputs, W words, N codes of a row, S any lead axes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Float, Int, Int32, UInt8

from dynamo_jax.models.formats.packed import Module, Packed
from dynamo_jax.models.formats.tensor_files import FLOATS

BITS = (4, 8)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs the k-th four bits of a word hold
Reader = Callable[[str], np.ndarray]


def unpacked(words: Int32[np.ndarray, "*S W"], bits: int) -> UInt8[np.ndarray, "*S N"]:
    """Codes of 4 or 8 bits along the last axis, those in the lowest bits of a word first."""
    octets = np.ascontiguousarray(words.astype("<i4", copy=False)).view(np.uint8)
    if bits == 8:
        return octets
    return np.stack([octets & 15, octets >> 4], axis=-1).reshape(*octets.shape[:-1], -1)


def from_integers(
    codes: UInt8[np.ndarray, "R C"],
    scales: Float[np.ndarray, "R G"],
    zeros: Float[np.ndarray, "R G"] | float,
    group: Int[np.ndarray, " C"],
) -> Float[np.ndarray, "R C"]:
    """float32 weights (q - z) * s; group: which one each input is of."""
    values = codes.astype(np.float32, order="C")
    values -= _spread(zeros, group) if isinstance(zeros, np.ndarray) else np.float32(zeros)
    values *= _spread(scales, group)
    return values


def _spread(grid: Float[np.ndarray, "R G"], group: Int[np.ndarray, " C"]) -> Float[np.ndarray, "R C"]:
    return np.take(np.ascontiguousarray(grid, np.float32), group, axis=1)


def packed_weight(module: Module, groups: Iterable[tuple[int, int]], read: Reader) -> Packed:
    """How compressed-tensors' ``pack-quantized`` is read; groups: bits and inputs a group (0: all) that config.json
    names. Of several, the one that the shapes allow."""
    rows, words = _matrix(module, module.of_codes("I32"))
    scales = _matrix(module, module.shape("weight_scale", *FLOATS), "weight_scale")
    module.check("weight_shape", (2,), "for rows and columns", "I32", "I64")
    fits = set()
    for bits, size in groups:
        columns = words * (32 // bits)
        if size == 0 or size % (32 // bits) or scales[1] * size != columns:  # headers leave the columns open
            columns = int(read(f"{module.stem}weight_shape")[1])
        if -(-columns * bits // 32) == words and scales == (rows, -(-columns // size) if size else 1):
            fits.add((bits, min(size or columns, columns), columns))
    if len(fits) != 1:
        said = ", ".join(f"{b} bits in groups of {g or 'a row'}" for b, g in groups) or "no integers"
        why = "several of these" if fits else "none of these"
        found = f"is {(rows, words)} with weight_scale {scales}, which fits {why} in config.json: {said}"
        raise module.wrong(module.codes, found)
    bits, size, columns = fits.pop()
    leaves = ["weight_packed", "weight_scale", "weight_shape"]
    if asymmetric := "weight_zero_point" in module:
        module.check("weight_zero_point", (-(-rows * bits // 32), scales[1]), f"for {module.codes}", "I32")
        leaves.append("weight_zero_point")
    if "weight_g_idx" in module:
        module.check("weight_g_idx", (columns,), f"for the columns of {module.codes}", "I32")
        leaves.append("weight_g_idx")
    shape, parts = (rows, columns), tuple(module.stem + leaf for leaf in leaves)
    decode = functools.partial(_packed, bits=bits, size=size, shape=shape, asymmetric=asymmetric)
    return Packed(f"int{bits} {_grouped(size, columns)}", shape, parts, decode)


def bytes_weight(module: Module) -> Packed:
    """How compressed-tensors' ``int-quantized`` is read: int8 with a scale a row or a tensor."""
    shape = _matrix(module, module.of_codes("I8"))
    leaves = ["weight_scale", *(["weight_zero_point"] if "weight_zero_point" in module else [])]
    for leaf in leaves:
        if module.shape(leaf, *(FLOATS if leaf == "weight_scale" else ("I8",))) not in ((shape[0], 1), (1,), ()):
            raise module.wrong(module.stem + leaf, f"is {module.shape(leaf, module.dtype(leaf))}, expected one a row")
    return Packed("int8 with a scale a row", shape, (module.codes, *(module.stem + leaf for leaf in leaves)), _bytes)


def gptq_weight(module: Module, size: int, less_one: bool) -> Packed:
    """How GPTQ's codes are read; size: inputs a group (0: all), less_one: zero points are stored less one."""
    words, rows = _matrix(module, module.of_codes("I32"))
    scales, zeros = _grids(module)
    fitting = [bits for bits in BITS if (rows, zeros[1]) == (scales[1], -(-rows * bits // 32))]
    if not fitting:
        found = f"is {(words, rows)} with scales {scales} and qzeros {zeros}, which is neither 4 nor 8 bits"
        raise module.wrong(module.codes, found)
    bits = fitting[0]
    columns, parts = words * 32 // bits, [module.codes, f"{module.stem}qzeros", f"{module.stem}scales"]
    if "g_idx" in module:
        module.check("g_idx", (columns,), f"for the inputs of {module.codes}", "I32")
        parts.append(f"{module.stem}g_idx")
    else:
        _check_groups(module, scales, columns, size)
    decode = functools.partial(_gptq, bits=bits, size=size or columns, less_one=less_one)
    return Packed(f"GPTQ int{bits} {_grouped(size, columns)}", (rows, columns), tuple(parts), decode)


def awq_weight(module: Module, size: int) -> Packed:
    """How AWQ's codes of 4 bits are read; size: inputs a group (0: all)."""
    columns, words = _matrix(module, module.of_codes("I32"))
    scales, zeros = _grids(module)
    if scales[1] != 8 * words or zeros[1] != words:
        found = f"is {(columns, words)} with scales {scales} and qzeros {zeros}, which is not 4 bits"
        raise module.wrong(module.codes, found)
    _check_groups(module, scales, columns, size)
    parts = (module.codes, f"{module.stem}qzeros", f"{module.stem}scales")
    decode = functools.partial(_awq, size=size or columns)
    return Packed(f"AWQ int4 {_grouped(size, columns)}", (8 * words, columns), parts, decode)


def _matrix(module: Module, shape: tuple[int, ...], leaf: str = "") -> tuple[int, int]:
    if len(shape) != 2:
        raise module.wrong(module.stem + leaf if leaf else module.codes, f"is {shape}, expected a matrix")
    return shape[0], shape[1]


def _grids(module: Module) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of scales and zero points, both with a row for each group."""
    scales = _matrix(module, module.shape("scales", *FLOATS), "scales")
    zeros = _matrix(module, module.shape("qzeros", "I32"), "qzeros")
    if scales[0] != zeros[0]:
        raise module.wrong(f"{module.stem}qzeros", f"is {zeros}, expected a row for each of the {scales[0]} groups")
    return scales, zeros


def _check_groups(module: Module, scales: tuple[int, int], columns: int, size: int) -> None:
    wanted = -(-columns // size) if size else 1
    if scales[0] != wanted:
        each = f"of {size} " if size else ""
        found = f"is {scales}, expected {wanted} groups {each}for the {columns} inputs of {module.codes}"
        raise module.wrong(f"{module.stem}scales", found)


def _grouped(size: int, columns: int) -> str:
    return f"in groups of {size}" if 0 < size < columns else "with a scale a row"


def _groups(count: int, columns: int, size: int, given: np.ndarray | None) -> Int[np.ndarray, " C"]:
    """Which group each input is of. ValueError: one that there is not."""
    group = np.arange(columns) // size if given is None else given
    if group.size and not 0 <= group.min() <= group.max() < count:
        raise ValueError(f"places an input in group {group.max()} of {count}")
    return group


def _packed(
    words: np.ndarray,
    scales: np.ndarray,
    said: np.ndarray,
    *more: np.ndarray,
    bits: int,
    size: int,
    shape: tuple[int, int],
    asymmetric: bool,
) -> np.ndarray:
    if tuple(said) != shape:
        raise ValueError(f"is {shape}, but its weight_shape says {tuple(map(int, said))}")
    rows, columns = shape
    zeros: np.ndarray | float = float(2 ** (bits - 1))
    if asymmetric:
        zeros = unpacked(more[0].T, bits).T[:rows].astype(np.float32)
    order = more[-1] if len(more) > asymmetric else None
    group = _groups(scales.shape[1], columns, size, order)
    return from_integers(unpacked(words, bits)[:, :columns], scales, zeros, group)


def _bytes(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None = None) -> np.ndarray:
    moved = codes.astype(np.float32) - (0 if zeros is None else zeros.astype(np.float32))
    return moved * scales.astype(np.float32)


def _gptq(
    words: np.ndarray,
    zeros: np.ndarray,
    scales: np.ndarray,
    order: np.ndarray | None = None,
    *,
    bits: int,
    size: int,
    less_one: bool,
) -> np.ndarray:
    codes = unpacked(words.T, bits)
    zero = (unpacked(zeros, bits)[:, : scales.shape[1]].astype(np.int32) + less_one) % 2**bits
    group = _groups(len(scales), codes.shape[1], size, order)
    return from_integers(codes, scales.T, zero.T.astype(np.float32), group)


def _awq(words: np.ndarray, zeros: np.ndarray, scales: np.ndarray, *, size: int) -> np.ndarray:
    codes, zero = (_unshuffled(unpacked(w, 4)) for w in (words, zeros))
    group = _groups(len(scales), len(codes), size, None)
    return from_integers(codes.T, scales.T, zero.T.astype(np.float32), group)


def _unshuffled(codes: UInt8[np.ndarray, "*S N"]) -> UInt8[np.ndarray, "*S N"]:
    eights = codes.reshape(*codes.shape[:-1], -1, 8)
    out = np.empty_like(eights)
    out[..., AWQ_ORDER] = eights
    return out.reshape(codes.shape)
