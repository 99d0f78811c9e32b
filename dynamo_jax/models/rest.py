"""The rest of a model at 8 or 4 bits: matrices that are no routed expert's, as integers with scales.

Mixers' projections, shared experts, dense MLPs, embeddings and head are quantized where that is asked for. Norms,
biases, routers, gates of shared experts, convolutions and what the delta rules' decays and steps come from keep their
dtype: they are small, and what they decide is passed on from token to token.

    weight = code * scale,    code in -128 .. 127 or -8 .. 7,    scale = most / 127.5 or most / 7.5

Most is the largest absolute value of the weights that share a scale. So a weight is at most half a scale off, and the
largest one lies on the edge of the last code's cell, as in qwix (github.com/google/qwix). Scales are bfloat16, rounded
up. Of 8 bits there is a scale a column, and a row in embeddings and head, whose rows are looked up. Of 4 bits there is
one for 64 weights of a column; embeddings and head have 8 bits then too, and so has a matrix that groups do not divide.
In these forms the TPU's compiler multiplies codes without writing floats to memory (docs/method.md).

In a dictionary of parameters a quantized matrix is two arrays, ``NAME.codes`` and ``NAME.scales``, which are saved,
stacked and placed like any others. A module holds both as one ``Packed``, which becomes floats where the module asks
for a dtype, as it does for each product: only codes and scales stay on the device. Two codes of 4 bits share a byte;
TPUs, whose int4 arrays do so by themselves, get these (``unpacked``).

Axes: K, N of a matrix, G groups along one of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float

FLOAT = 16  # bits of a rest that keeps its dtype
REST_BITS = (FLOAT, 8, 4)
LARGEST_GROUP, SMALLEST_GROUP = 64, 8  # weights of 4 bits that share a scale
CODES, SCALES = ".codes", ".scales"
_CODES = {8: np.int8, 4: ml_dtypes.int4}
KEPT = ("router", "shared_gate", "a", "b", "ba", "decay", "decay_down", "decay_up")  # names of matrices, and biases
ROWWISE = ("embed", "head")
SOME = 1 << 22  # weights that are quantized at a time


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes", "scales"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Packed:
    """A quantized matrix that stands where a float one does. codes: int8 or int4 (.., K, N), or uint8 with two codes
    of four bits in a byte, (.., K/2, N); scales: (.., G, N), or (.., K, 1) of rows."""

    codes: Array
    scales: Array

    @property
    def axis(self) -> int:
        """Of the groups, counted from the last one."""
        return -1 if self.codes.shape[:-1] == self.scales.shape[:-1] else -2

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weights."""
        shape = list(self.codes.shape)
        shape[self.axis] *= _in_a_byte(self.codes)
        return tuple(shape)

    def __getitem__(self, rows: Any) -> Packed:
        """Some rows, which have scales of their own; all of it for ``...``."""
        if rows is Ellipsis:
            return self
        if self.axis != -1:
            raise TypeError("rows of a matrix whose scales are of columns")
        if np.size(rows) == 1:  # XLA makes a slice of one row, for which a TPU lays the whole table out anew
            two = jnp.repeat(jnp.reshape(rows, -1), 2)
            return Packed(*(a[two][:1].reshape(*np.shape(rows), -1) for a in (self.codes, self.scales)))
        return Packed(self.codes[rows], self.scales[rows])

    def astype(self, dtype: Any) -> Float[Array, "*B K N"]:
        """The weights (.., K, N); for use inside of jit, where the product that takes them is fused with this."""
        scales = self.scales.astype(dtype)
        if scales.shape[self.axis] == 1 and _in_a_byte(self.codes) == 1:
            return self.codes.astype(dtype) * scales
        codes = self.codes.reshape(*scales.shape[:-1], -1, scales.shape[-1])  # (.., G, K/G, N)
        if _in_a_byte(self.codes) == 2:
            low, high = (jax.lax.bitcast_convert_type(part, jnp.int8) >> 4 for part in (codes << 4, codes))
            codes = jnp.concatenate([low, high], axis=-2)
        return (codes.astype(dtype) * scales[..., None, :]).reshape(self.shape)


def _in_a_byte(codes: Any) -> int:
    return 2 if codes.dtype == np.uint8 else 1


def check_rest(bits: int) -> None:
    """ValueError unless the rest can have so many bits."""
    if bits not in REST_BITS:
        raise ValueError(f"rest {bits}: known are {', '.join(map(str, REST_BITS))} bits")


class Form(NamedTuple):
    """How a matrix is quantized: its bits, the axis along which weights share scales, and how many share one."""

    bits: int
    axis: int
    group: int


def form_of(name: str, shape: tuple[int, ...], bits: int) -> Form | None:
    """That of a parameter when the rest has so many bits; None for one that is not quantized. name: dotted, of a whole
    model or of a layer; shape: without the lead axis of stacked layers. ValueError: other bits than ``REST_BITS``."""
    check_rest(bits)
    part = name.rpartition(".")[2]
    if bits == FLOAT or len(shape) != 2 or part in KEPT or part.endswith("_bias"):
        return None
    axis = 1 if part in ROWWISE else 0
    group = min(LARGEST_GROUP, shape[0] & -shape[0])  # the largest power of two that divides it
    if bits == 4 and axis == 0 and group >= SMALLEST_GROUP:
        return Form(4, 0, group)
    return Form(8, axis, shape[axis])


def stored(
    shapes: Mapping[str, tuple[int, ...]], bits: int, dtype: Any = jnp.bfloat16, in_bytes: bool = True
) -> dict[str, jax.ShapeDtypeStruct]:
    """What parameters are when the rest has so many bits, by name. dtype: of the others and of scales; in_bytes: codes
    of 4 bits as two in a byte, else as int4."""
    out = {}
    for name, shape in shapes.items():
        form = form_of(name, shape, bits)
        if form is None:
            out[name] = jax.ShapeDtypeStruct(shape, dtype)
            continue
        rows, columns = shape
        codes = ((rows // 2, columns), np.uint8) if form.bits == 4 and in_bytes else (shape, _CODES[form.bits])
        scales = (rows // form.group, columns) if form.axis == 0 else (rows, 1)
        out[name + CODES] = jax.ShapeDtypeStruct(*codes)
        out[name + SCALES] = jax.ShapeDtypeStruct(scales, dtype)
    return out


def stored_bytes(sizes: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]], bits: int) -> int:
    """Bytes of parameters when the rest has so many bits. sizes: of each as a float, in bytes."""
    after = stored({name: shapes[name] for name in sizes}, bits)
    kept = sum(size for name, size in sizes.items() if name in after)
    return kept + sum(int(np.prod(a.shape)) * a.dtype.itemsize for name, a in after.items() if name not in sizes)


def quantized(arrays: Mapping[str, Any], bits: int) -> dict[str, Any]:
    """Parameters with the rest at so many bits, and in host memory what is quantized. ValueError: NaN or infinity in
    what is to be quantized."""
    out: dict[str, Any] = {}
    for name, array in arrays.items():
        form = form_of(name, array.shape, bits)
        if form is None:
            out[name] = array
            continue
        weights = np.asarray(array) if form.axis else np.asarray(array).T
        step = max(1, SOME // weights.shape[1])
        try:
            parts = [_rounded(weights[at : at + step], form) for at in range(0, len(weights), step)]
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        for ending, pieces in zip((CODES, SCALES), zip(*parts)):
            whole = np.concatenate(pieces)
            out[name + ending] = whole if form.axis else np.ascontiguousarray(whole.T)
    return out


def _rounded(weights: Float[np.ndarray, "N K"], form: Form) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of rows along which weights share scales."""
    parts = weights.astype(np.float32).reshape(len(weights), -1, form.group)
    if not np.isfinite(parts).all():
        raise ValueError("weights to quantize hold NaN or infinity")
    half = 2 ** (form.bits - 1)
    scales = _rounded_up(np.abs(parts).max(axis=-1) / np.float32(half - 0.5))
    divisor = scales.astype(np.float32)[..., None]
    codes = np.rint(parts / np.where(divisor > 0, divisor, 1)).clip(-half, half - 1).astype(np.int8)
    if form.bits == 4:
        low, high = np.split(codes.view(np.uint8), 2, axis=-1)
        codes = low & 15 | high << 4
    return codes.reshape(len(weights), -1), scales


def _rounded_up(numbers: Float[np.ndarray, "N G"]) -> np.ndarray:
    """To bfloat16. No number is negative."""
    near = numbers.astype(ml_dtypes.bfloat16)
    return (near.view(np.uint16) + (near.astype(np.float32) < numbers)).astype(np.uint16).view(ml_dtypes.bfloat16)


def _pairs(names: Mapping[str, Any]) -> list[str]:
    """Of the matrices whose codes and scales are both there."""
    bare = [name.removesuffix(CODES) for name in names if name.endswith(CODES)]
    return [name for name in bare if name + SCALES in names]


def assembled(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as modules hold them: one ``Packed`` for each pair of codes and scales."""
    out = dict(arrays)
    for name in _pairs(arrays):
        out[name] = Packed(out.pop(name + CODES), out.pop(name + SCALES))
    return out


def taken_apart(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """What ``assembled`` undoes."""
    out: dict[str, Any] = {}
    for name, array in arrays.items():
        out |= {name + CODES: array.codes, name + SCALES: array.scales} if isinstance(array, Packed) else {name: array}
    return out


def expanded(arrays: Mapping[str, Any], dtype: Any = jnp.bfloat16) -> dict[str, Any]:
    """Parameters without any that is quantized, these in ``dtype``."""
    return {n: a.astype(dtype) if isinstance(a, Packed) else a for n, a in assembled(arrays).items()}


def unpacked(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters with codes of 4 bits as int4 arrays in host memory, of layers stacked or not."""
    out = dict(arrays)
    for name in _pairs(arrays):
        codes, scales = arrays[name + CODES], arrays[name + SCALES]
        if _in_a_byte(codes) == 2:
            parts = np.asarray(codes).reshape(*scales.shape[:-1], -1, scales.shape[-1])
            both = np.concatenate([(parts << 4).view(np.int8) >> 4, parts.view(np.int8) >> 4], axis=-2)
            out[name + CODES] = both.reshape(Packed(codes, scales).shape).astype(ml_dtypes.int4)
    return out


def bits_of(arrays: Mapping[str, Any]) -> int:
    """Of the rest of a model with these parameters."""
    found = [8 // _in_a_byte(array) for name, array in arrays.items() if is_codes(name)]
    return min(found, default=FLOAT)


def rest_words(bits: int) -> str:
    """What a rest of so many bits keeps of the model's own dtype."""
    if bits == FLOAT:
        return "embeddings, attention, norms, routers, shared experts, dense layers and biases keep their dtype"
    rows = ", embeddings and head 8" if bits == 4 else ""
    return f"rest: {bits} bits{rows}; norms, routers, biases, convolutions and decays keep their dtype"


def is_codes(name: str) -> bool:
    """Whether a parameter of this name is integers, which no dtype of a computation is for."""
    return name.endswith(CODES)
