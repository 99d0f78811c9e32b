"""Packing, rounding and nested planes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_jax.kernels.layout import PLANE_BITS, WIDTHS, block_bytes, unpack
from dynamo_jax.quant.grids import GridSpec
from dynamo_jax.quant.packing import pack
from dynamo_jax.quant.planes import dequantize, quantize
from dynamo_jax.quant.rtn import round_to_nearest

GAUSS = jax.random.normal(jax.random.key(0), (48, 128))


def error(w, q):
    return float(jnp.sum((w - q) ** 2))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1, 2, 4]), st.integers(0, 5), st.integers(1, 9), st.integers(0, 99))
def test_packed_codes_come_back(bits, rows, per_row, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, per_row * 8 // bits), np.uint8)
    packed = pack(codes, bits)
    assert packed.size * 8 == codes.size * bits
    np.testing.assert_array_equal(unpack(jnp.asarray(packed), bits), codes)


def test_codes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="not a multiple of 4"):
        pack(np.zeros((2, 6), np.uint8), 2)
    with pytest.raises(ValueError, match="code 4 does not fit 2 bits"):
        pack(np.full((1, 4), 4, np.uint8), 2)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_round_to_nearest_is_within_half_a_step_on_a_grid_of_that_many_values(bits):
    q = round_to_nearest(GAUSS, GridSpec(bits, 64))
    groups, rounded = np.asarray(GAUSS).reshape(-1, 64), np.asarray(q).reshape(-1, 64)
    step = (groups.max(axis=1) - groups.min(axis=1)) / (2**bits - 1)
    # bfloat16 scales are off by up to 2^-9 and the zero point is an integer: half a step more at the ends
    assert (np.abs(groups - rounded) <= (1.0 + 2**bits * 2**-9) * step[:, None]).all()
    assert np.median(np.abs(groups - rounded) / step[:, None]) <= 0.5
    assert max(len(np.unique(r)) for r in rounded) <= 2**bits
    assert (round_to_nearest(jnp.zeros((1, 64)), GridSpec(bits, 64)) == 0).all()


def test_every_plane_brings_the_weights_closer():
    planes = quantize(GAUSS, 64)
    errors = [error(GAUSS, dequantize(planes, width)) for width in WIDTHS]
    # ideally a bit quarters the error; tails and shared base scales cost, but never half of that
    assert errors[1] < errors[0] / 2 and errors[2] < errors[1] / 2 and errors[3] < errors[2] / 2**4


@pytest.mark.parametrize("bits", [2, 3])
def test_nested_planes_are_no_worse_than_round_to_nearest_at_few_bits(bits):
    assert error(GAUSS, dequantize(quantize(GAUSS, 64), bits)) < error(
        GAUSS, round_to_nearest(GAUSS, GridSpec(bits, 64))
    )


def test_at_two_bits_the_error_is_near_the_best_uniform_quantizer_of_a_gaussian():
    relative = error(GAUSS, dequantize(quantize(GAUSS, 64), 2)) / error(GAUSS, 0)
    assert 0.1 < relative < 1.25 * 0.1188  # 0.1188: the best 4-level uniform quantizer (Max 1960); groups can do better


@pytest.mark.parametrize(
    "w",
    [jnp.zeros((2, 64)), jnp.full((2, 64), 0.3), jnp.zeros((2, 64)).at[0, 5].set(1e4), 1e-30 * GAUSS[:2, :64]],
    ids=["zeros", "constant", "one outlier", "tiny"],
)
def test_degenerate_groups_stay_finite_and_improve(w):
    planes = quantize(w, 64)
    values = [dequantize(planes, width) for width in WIDTHS]
    assert all(np.isfinite(v).all() for v in values)
    assert error(w, values[-1]) <= error(w, values[0])


def test_bytes_counted_are_bytes_stored():
    planes = quantize(jax.random.normal(jax.random.key(1), (3, 16, 128)), 64)  # gate, up, down of one block
    stored = planes.scales.nbytes
    for width in WIDTHS:
        stored += planes.codes[width].nbytes + (planes.ratios.nbytes if width == 8 else 0)
        assert stored == block_bytes(width, 16, 128, 64)
    assert sum(PLANE_BITS.values()) == 8


def test_channels_are_quantized_one_by_one():
    order = np.random.default_rng(0).permutation(48)
    for width in WIDTHS:
        moved = dequantize(quantize(GAUSS[order], 64), width)
        np.testing.assert_array_equal(moved, dequantize(quantize(GAUSS, 64), width)[order])


def test_weights_that_cannot_be_quantized_are_refused():
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(GAUSS.at[3, 3].set(jnp.inf), 64)
    with pytest.raises(ValueError, match="multiple of group_size 48"):
        quantize(GAUSS, 48)
    with pytest.raises(ValueError, match="width 5"):
        dequantize(quantize(GAUSS, 64), 5)
