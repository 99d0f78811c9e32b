"""FP8 weights (E4M3) with a scale for each tensor, each row, or each block of rows and columns.

A weight is code times scale; that some files call the scale ``weight_scale_inv`` means the inverse of the factor that
made the codes. Sizes of blocks come from config.json, or are 1 x 32 where scales are powers of two (OCP MX v1.0), never
from the ratio of shapes: the last block of a side may be a part of one. Scales of activations are not read.

In a fused ``gate_up_proj`` gate and up may each have blocks of their own, as ``transformers`` stacks them.

Axes: S any lead axes, R outputs, C inputs, r and c blocks along them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import ml_dtypes
import numpy as np
from jaxtyping import Float, UInt8

from dynamo_jax.models.formats.packed import POWERS, SCALES, Module, Packed, scale_values

E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
MX_BLOCK = (1, 32)
Block = tuple[int, int]


def from_fp8(
    codes: UInt8[np.ndarray, "*S R C"], scales: Float[np.ndarray, "*S r c"], block: Block
) -> Float[np.ndarray, "*S R C"]:
    """float32 weights from E4M3 codes and a scale for each block of rows and columns, the last ones of any size."""
    rows, columns = codes.shape[-2:]
    spread = np.repeat(np.repeat(scales, block[1], axis=-1)[..., :columns], block[0], axis=-2)[..., :rows, :]
    values = E4M3[codes]
    values *= spread
    return values


def fp8_weight(module: Module, blocks: Sequence[Block]) -> Packed:
    """How a weight in FP8 is read; blocks: those that config.json names. ValueError: no scales, or of another grid."""
    named = ("scale_inv",) if module.stem.endswith("_") else ("weight_scale_inv", "weight_scale", "scale")
    leaf = module.found(named)
    shape, scales = module.of_codes("F8_E4M3"), module.shape(leaf, *SCALES)
    if len(shape) not in (2, 3):
        raise module.wrong(module.codes, f"is {shape}, expected a matrix, or one for each expert")
    grid = _grid(scales, shape[0] if len(shape) == 3 else None)
    given = (*blocks, *((MX_BLOCK,) if module.dtype(leaf) in POWERS else ()))
    halves, block, words = _blocks_of(module, leaf, shape, grid, given)
    decode = functools.partial(_decode, grid=grid, block=block, halves=halves)
    return Packed(words, shape, (module.codes, module.stem + leaf), decode)


def _grid(scales: tuple[int, ...], experts: int | None) -> tuple[int, int]:
    """Scales along rows and columns, of each expert where there are several; (0, 0) of what is no grid."""
    if all(size == 1 for size in scales):
        return 1, 1
    if experts is not None:
        if scales[0] != experts:
            return 0, 0
        scales = scales[1:]
    scales += (1,) * (2 - len(scales))
    return (scales[0], scales[1]) if len(scales) == 2 else (0, 0)


def _blocks_of(
    module: Module, leaf: str, shape: tuple[int, ...], grid: tuple[int, int], given: tuple[Block, ...]
) -> tuple[int, Block, str]:
    """In how many parts the rows are scaled, the blocks of each, and both in words."""
    rows, columns = shape[-2:]
    fits = _fitting(rows, columns, grid, given, module.codes.endswith("gate_up_proj"))
    if len(fits) == 1:
        (((halves, block), words),) = fits.items()
        return halves, block, words
    found = module.shape(leaf, *SCALES)
    if fits:
        names = " or ".join(f"{b[0]} x {b[1]} in {h} parts" for h, b in fits)
        raise module.wrong(module.stem + leaf, f"is {found}: whether blocks are {names} cannot be told")
    grids = [f"{(-(-rows // b[0]), -(-columns // b[1]))} for blocks of {b[0]} x {b[1]}" for b in given]
    expected = ", ".join(["one scale", "one a row", *grids]) + ("" if given else " (config.json has no block sizes)")
    raise module.wrong(module.stem + leaf, f"is {found}, expected of {module.codes}, {shape}: {expected}")


@functools.lru_cache  # for thousands of experts of one shape
def _fitting(
    rows: int, columns: int, grid: tuple[int, int], given: tuple[Block, ...], may_be_two: bool
) -> dict[tuple[int, Block], str]:
    """By what would be computed, which may have several names: in how many parts, and blocks; and words for it."""
    choices = [(block, f"FP8 in blocks of {block[0]} x {block[1]}") for block in given]
    choices += [((rows, columns), "FP8 with a scale a tensor"), ((1, columns), "FP8 with a scale a row")]
    fits: dict[tuple[int, Block], str] = {}
    for halves in (1, 2) if may_be_two and rows % 2 == 0 else (1,):
        part = rows // halves
        for (high, wide), words in choices:
            block = min(high, part), min(wide, columns)
            if grid == (halves * -(-part // block[0]), -(-columns // block[1])):
                fits.setdefault((halves if part % block[0] else 1, block), words)
    return fits


def _decode(
    codes: np.ndarray, scales: np.ndarray, grid: tuple[int, int], block: Block, halves: int
) -> Float[np.ndarray, "*S R C"]:
    own = scales.size == grid[0] * grid[1] * math.prod(codes.shape[:-2])
    lead = codes.shape[:-2] if own else ()  # or one scale for all experts
    cut = scale_values(scales).reshape(*lead, halves, grid[0] // halves, grid[1])
    parts = codes.view(np.uint8).reshape(*codes.shape[:-2], halves, -1, codes.shape[-1])
    return from_fp8(parts, cut, block).reshape(codes.shape)
