"""Random planes and rows for the tests of the kernels of TPUs and GPUs, in each arrangement."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynamo_jax.kernels.arrangements import ARRANGEMENTS, BLOCK
from dynamo_jax.kernels.layout import LEVELS, PLANE_BITS, BasePlanes, Pages, Resident
from dynamo_jax.kernels.quantized_xla import quantized_experts_xla
from dynamo_jax.models.experts import bounded_gated, clamped_gated, gelu_gated, silu_gated


@dataclasses.dataclass
class Case:
    """Random planes of two layers, whole and as ``arrangement`` has them, and a page table for each of the given widths
    (L, E, M)."""

    resident: Resident
    arranged: Any
    tables: tuple[dict[int, jax.Array], ...]

    @classmethod
    def of(cls, arrangement, seed, experts, channels, hidden, apart, widths, group_size=BLOCK, shuffled=False):
        kind = ARRANGEMENTS[arrangement]
        rng = np.random.default_rng(seed)
        blocks, together = channels // BLOCK, 1 if apart else 3
        codes = rng.integers(0, 256, (2, experts, 3, channels, hidden // 4)).astype(np.uint8)
        scales = rng.uniform(0.01, 0.03, (2, experts, 3, channels, hidden // group_size)).astype(jnp.bfloat16)
        base = BasePlanes(codes, scales)
        count = 2 * experts * blocks * (3 // together)
        slots = rng.permutation(count) if shuffled else np.arange(count)
        slot = slots.reshape(2, experts, -1)
        projection = np.zeros((count, together), int)
        of_block = np.repeat(np.arange(3 // together), blocks)[:, None] + np.arange(together)
        projection[slots] = np.tile(of_block, (2 * experts, 1))
        pages, arranged = {}, {}
        for level in LEVELS:
            shape = (count, together, BLOCK)
            own = rng.integers(0, 256, (*shape, hidden * PLANE_BITS[level] // 8)).astype(np.uint8)
            ratios = rng.integers(1, 255, (*shape, hidden // group_size)).astype(np.uint8) if level == 8 else None
            pages[level] = Pages(own, ratios)
            arranged[level] = kind.pages(pages[level], level, projection)
        tables = []
        for w in widths:
            each = w.reshape(2, experts, -1, blocks)
            each = each[:, :, [0, 0, 1]] if apart else each
            each = each.reshape(2, experts, -1)
            tables.append({level: jnp.asarray(np.where(each >= level, slot, -1), jnp.int32) for level in LEVELS})
        put = functools.partial(jax.tree.map, jnp.asarray)
        return cls(put(Resident(base, pages)), put(kind.resident(kind.base(base), arranged)), tuple(tables))


ACTIVATIONS = {"clamped": clamped_gated(0.5, 1.702), "gelu": gelu_gated, "bounded": bounded_gated(0.3)}


def widths_of(seed, experts, channels, apart, choices=(2, 3, 4, 8)):
    shape = (2, experts, (2 if apart else 1) * channels // BLOCK)
    return np.random.default_rng(seed).choice(choices, shape)


def rows_and_sizes(seed, sizes, hidden, dtype=jnp.float32):
    rows = np.random.default_rng(seed).normal(size=(int(np.sum(sizes)), hidden))
    return jnp.asarray(rows, jnp.bfloat16).astype(dtype), jnp.asarray(sizes, jnp.int32)


def biases_of(seed, experts, channels, hidden):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(experts, n)), jnp.float32) for n in (channels, channels, hidden))


def compared(case, kernel, rows, sizes, tolerance, biases=None, layer=1, activation=silu_gated):
    """What ``kernel`` finds: its largest error over the largest output of the XLA path stays within ``tolerance``."""
    with jax.default_matmul_precision("highest"):
        wide = rows.astype(jnp.float32)
        expected = quantized_experts_xla(wide, sizes, case.resident, case.tables, layer, activation, biases)
    found = kernel(rows, sizes, case.arranged, case.tables, layer, activation, biases)
    assert found.dtype == rows.dtype and found.shape == rows.shape
    error = np.abs(np.asarray(found, np.float32) - np.asarray(expected, np.float32)).max()
    assert error <= tolerance * np.abs(np.asarray(expected, np.float32)).max()
    return found
