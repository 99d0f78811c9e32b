"""``gpu_unpack.py`` as the instructions that a thread of a Hopper warpgroup runs on its own words.

Pallas has no operation that takes bits of words to numbers of another size, so what is made here is written in the
compiler's own terms: for each tile a function of arrays whose layouts say which thread holds what.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from dynamo_jax.kernels.fragments import BIT, INNER, ROWS, WORDS
from dynamo_jax.kernels.gpu_unpack import BASE_BITS, ONE_TWENTY_EIGHT_BITS, PAIR, words_shape

AND_OR, SELECT = 0xEA, 0xCA  # (a & b) | c and (a & b) | (~a & c), as the tables of a lop3 instruction


def weights_in_registers(levels: tuple[int, ...], rows: bool | None) -> Any:
    """``weights`` as instructions: a function of the words of base and ``levels``, of their masks and, unless ``rows``
    is None, of ``offset_word(2 z)`` and scales."""

    def run(ctx: Any, base: Any, *rest: Any) -> Any:
        planes = dict(zip(levels, map(_words, rest)))
        masks = dict(zip(levels, (_scalar(a) for a in rest[len(levels) :])))
        out = []
        for i, word in enumerate(_words(base)):  # of two fragments, with each of which it shares half of every nibble
            others = None  # the other halves
            for level in levels:
                plane = planes[level][i // 2]
                if i % 2:
                    plane = _shifted(plane, BIT[level][0] - BIT[level][2])
                others = (
                    arith.andi(plane, masks[level]) if others is None else _lop3(AND_OR, plane, masks[level], others)
                )
            both = ((word, -2), (_shifted(word, 2), 0))
            if others is None:
                out += [arith.andi(own, _constant(BASE_BITS)) for own, _ in both]
            else:
                out += [_lop3(SELECT, _constant(BASE_BITS), own, _shifted(others, left)) for own, left in both]
        return _in_registers(out, rows, *rest[2 * len(levels) :])

    return _inlined(run, (2, *levels), len(levels), rows)


def last_weights_in_registers(rows: bool | None) -> Any:
    """``last_weights`` as instructions: a function of words and, unless ``rows`` is None, of
    ``offset_word(LAST_TWICE)`` and scales."""

    def run(ctx: Any, words: Any, *rest: Any) -> Any:
        return _in_registers(_words(words), rows, *rest)

    return _inlined(run, (8,), 0, rows)


def plane_layout(level: int) -> Any:
    """Of a tile's words, thread by thread."""
    return plgpu.Layout.WG_STRIDED(words_shape(level), vec_size=min(4, WORDS[level]))


def scale_layout(rows: bool) -> Any:
    return plgpu.Layout.WGMMA.reduce(1 if rows else 0)


def _inlined(run: Any, levels: tuple[int, ...], masks: int, rows: bool | None) -> Any:
    types = [plane_layout(level) for level in levels]
    types += [plgpu.Layout.WG_SPLAT(())] * (masks if rows is None else masks + 1)
    types += [] if rows is None else [scale_layout(rows)]
    out = plgpu.ShapeDtypeStruct((ROWS, INNER), jnp.bfloat16, layout=plgpu.Layout.WGMMA)
    return plgpu.inline_mgpu(arg_types=tuple(types), return_type=out)(run)


def _in_registers(words: list[Any], rows: bool | None, *scaling: Any) -> Any:
    two = ir.VectorType.get((2,), ir.BF16Type.get())
    magic = _constant(ONE_TWENTY_EIGHT_BITS * 65537)
    registers = [
        llvm.bitcast(two, _lop3(AND_OR, _shifted(word, 1 - 4 * p), _constant(PAIR), magic))
        for word in words
        for p in range(4)
    ]
    if rows is not None:
        less, scales = llvm.bitcast(two, _scalar(scaling[0])), list(scaling[1].registers.flat)
        if rows:
            scales = [vector.broadcast(two, vector.extract(r, [], [0])) for r in scales]
        of = [scales[index % 2 if rows else index // 2] for index in range(len(registers))]
        registers = [arith.mulf(arith.subf(r, less), scale) for r, scale in zip(registers, of)]
    layout = mgpu.WGMMA_LAYOUT
    array = np.array(registers, dtype=object).reshape(layout.registers_shape((ROWS, INNER)))
    return mgpu.FragmentedArray(_registers=array, _layout=layout, _is_signed=None)


def _words(array: Any) -> list[Any]:
    return [
        vector.extract(register, [], [k])
        for register in array.registers.flat
        for k in range(ir.VectorType(register.type).shape[0])
    ]


def _scalar(array: Any) -> Any:
    value = array.registers.flat[0]
    return vector.extract(value, [], [0]) if isinstance(value.type, ir.VectorType) else value


def _constant(value: int) -> Any:
    word = ir.IntegerType.get_signless(32)
    make: Any = arith.constant
    return make(word, ir.IntegerAttr.get(word, value - 2**32 if value >= 2**31 else value))


def _shifted(value: Any, left: int) -> Any:
    if left == 0:
        return value
    return arith.shli(value, _constant(left)) if left > 0 else arith.shrui(value, _constant(-left))


def _lop3(table: int, a: Any, b: Any, c: Any) -> Any:
    """Any function of three bits in one instruction."""
    word = ir.IntegerType.get_signless(32)
    text = f"lop3.b32 $0, $1, $2, $3, {table};"
    return llvm.inline_asm(word, [a, b, c], text, "=r,r,r,r", has_side_effects=False)
