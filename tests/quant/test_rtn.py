"""Round to nearest: the grid, its bound, and a float64 loop."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_jax.quant.grids import GridSpec
from dynamo_jax.quant.rtn import round_to_nearest

pytestmark = pytest.mark.usefixtures("quick_compilation")

BF16_ROUNDING = 2.0**-8  # the largest relative error of rounding to eight significant bits
F32 = float(np.finfo(np.float32).eps)


def sample(seed, group, size=1.0, offset=0.0, rows=4):
    return np.random.default_rng(seed).normal(offset, 1, (rows, 2 * group)).astype(np.float32) * np.float32(size)


def ranges(w, group):
    """Smallest and largest weight of each group, zero included, float64."""
    groups = w.reshape(-1, group).astype(np.float64)
    return np.minimum(groups.min(axis=1), 0)[:, None], np.maximum(groups.max(axis=1), 0)[:, None]


weights = st.tuples(
    st.integers(0, 999), st.sampled_from([8, 32, 64]), st.sampled_from([1e-6, 1.0, 300.0]), st.sampled_from([0, 3, -9])
)


@settings(max_examples=30, deadline=None)
@given(weights, st.sampled_from([2, 3, 4, 8]))
def test_no_weight_is_more_than_half_a_step_off(sizes, bits):
    """The step is the range over 2^bits - 1, rounded to bfloat16. A step rounded down makes the whole grid shorter
    than the range, by the rounding error times the range; no weight pays more than that beside its half step."""
    seed, group, size, offset = sizes
    w = sample(seed, group, size, offset)
    low, high = ranges(w, group)
    off = np.abs(
        w.reshape(-1, group) - np.asarray(round_to_nearest(jnp.asarray(w), GridSpec(bits, group))).reshape(-1, group)
    )
    step = (high - low) / (2**bits - 1)
    half = step / 2 * (1 + BF16_ROUNDING)
    # float32: the quotient w / s is rounded, relative to at most 2^bits steps
    assert (off <= half + (high - low) * (BF16_ROUNDING + 4 * F32)).all()


@settings(max_examples=30, deadline=None)
@given(weights, st.sampled_from([2, 3, 4, 8]))
def test_a_group_takes_at_most_two_to_the_bits_values_evenly_spaced(sizes, bits):
    seed, group, size, offset = sizes
    w = sample(seed, group, size, offset)
    low, high = ranges(w, group)
    step = ((high - low) / (2**bits - 1)).astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)
    indices = np.asarray(round_to_nearest(jnp.asarray(w), GridSpec(bits, group)), np.float64).reshape(-1, group) / step
    np.testing.assert_allclose(indices, np.rint(indices), atol=2**bits * 2 * F32 + 1e-9)
    assert (np.rint(indices).max(axis=1) - np.rint(indices).min(axis=1) <= 2**bits - 1).all()


@settings(max_examples=30, deadline=None)
@given(weights, st.sampled_from([2, 3, 4, 8]))
def test_zero_is_exactly_representable(sizes, bits):
    """Also where all weights of a group are positive, or all negative: pruned weights stay pruned."""
    seed, group, size, offset = sizes
    w = sample(seed, group, size, offset)
    w[:, ::5] = 0
    q = np.asarray(round_to_nearest(jnp.asarray(w), GridSpec(bits, group)))
    assert (q[:, ::5] == 0).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_values_equal_a_loop_over_the_weights(bits):
    w, group = sample(5, 8), 8
    got = np.asarray(round_to_nearest(jnp.asarray(w), GridSpec(bits, group)))
    want = np.zeros_like(w, np.float64)
    for row in range(w.shape[0]):
        for start in range(0, w.shape[1], group):
            part = w[row, start : start + group]
            low, high = min(part.min(), np.float32(0)), max(part.max(), np.float32(0))
            step = np.float32(ml_dtypes.bfloat16((high - low) / np.float32(2**bits - 1)))
            zero = round(float(np.float32(-low / step)))
            for i, value in enumerate(part):
                code = min(max(round(float(np.float32(value / step))) + zero, 0), 2**bits - 1)
                want[row, start + i] = (code - zero) * float(step)
    np.testing.assert_allclose(got, want, rtol=2 * F32)


def test_groups_do_not_see_each_other():
    w = jnp.asarray(sample(6, 32))
    alone = round_to_nearest(w[:, :32], GridSpec(3, 32))
    np.testing.assert_array_equal(round_to_nearest(w.at[:, 32:].mul(1e3), GridSpec(3, 32))[:, :32], alone)


def test_weights_on_the_grid_are_exact():
    w = jnp.asarray(np.random.default_rng(0).integers(-3, 13, (4, 64)) * 0.25).at[:, :2].set(jnp.array([-0.75, 3.0]))
    np.testing.assert_array_equal(round_to_nearest(w, GridSpec(4, 64)), w)


@pytest.mark.parametrize("bits", [2, 8])
def test_all_zeros_stay_zeros_and_constants_finite(bits):
    assert (round_to_nearest(jnp.zeros((2, 16)), GridSpec(bits, 16)) == 0).all()
    np.testing.assert_allclose(round_to_nearest(jnp.full((2, 16), 0.7), GridSpec(bits, 16)), 0.7, rtol=BF16_ROUNDING)


def test_each_bit_quarters_the_error():
    """A step is halved, and the error of a uniform quantizer is its step squared over twelve."""
    w = jax.random.normal(jax.random.key(0), (256, 64))
    errors = {b: float(jnp.mean((w - round_to_nearest(w, GridSpec(b, 64))) ** 2)) for b in (3, 4, 5, 6)}
    for bits in (3, 4, 5):
        # steps go as 2^bits - 1: 7, 15, 31, 63
        ratio = ((2 ** (bits + 1) - 1) / (2**bits - 1)) ** 2
        assert errors[bits] / errors[bits + 1] == pytest.approx(ratio, rel=0.1)


def test_a_group_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="last axis 64 is not a multiple of group_size 48"):
        round_to_nearest(jnp.zeros((2, 64)), GridSpec(4, 48))


def test_the_stored_bits_by_hand():
    # 64 codes of 3 bits, 16 bits of scale, 8 of zero point
    assert GridSpec(3, 64).bits_per_weight(128) == (64 * 3 + 16 + 8) / 64
