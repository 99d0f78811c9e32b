"""Packing and nested planes: what is stored, what it costs, and how near each width comes."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_jax.kernels.layout import (
    LEVELS,
    PLANE_BITS,
    RATIO_UNIT,
    STEP,
    WIDTHS,
    ZERO_POINT,
    BasePlanes,
    Pages,
    Resident,
    block_bytes,
    dequantize_layer,
    unpack,
)
from dynamo_jax.quant.grids import GridSpec
from dynamo_jax.quant.packing import pack
from dynamo_jax.quant.planes import dequantize, quantize
from dynamo_jax.quant.rtn import round_to_nearest

pytestmark = pytest.mark.usefixtures("quick_compilation")

GROUP = 64
GAUSS = jax.random.normal(jax.random.key(0), (96, 128))
PLANES = quantize(GAUSS, GROUP)


def relative_error(w, q):
    return float(jnp.sum((w - q) ** 2) / jnp.sum(w**2))


def bits_by_hand(packed, bits):
    """Codes read bit by bit with numpy, lowest bit first."""
    stream = np.unpackbits(packed, axis=-1, bitorder="little").reshape(
        *packed.shape[:-1], packed.shape[-1] * 8 // bits, bits
    )
    return (stream * 2 ** np.arange(bits)).sum(axis=-1)


def dequantize_by_hand(planes, width):
    """The formula of kernels.layout in float64."""
    scale = planes.scales.astype(np.float64)
    value = 0
    for level in (b for b in WIDTHS if b <= width):
        step = scale * planes.ratios * RATIO_UNIT if level == 8 else scale * STEP[level]
        q = bits_by_hand(planes.codes[level], PLANE_BITS[level])
        value = value + (q - ZERO_POINT[level]) * np.repeat(step, q.shape[-1] // step.shape[-1], axis=-1)
    return value


# Packing


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([1, 2, 4]), st.lists(st.integers(0, 3), max_size=2), st.integers(1, 11), st.integers(0, 999))
def test_packed_codes_come_back(bits, leading, num_bytes, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (*leading, num_bytes * 8 // bits), np.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == np.uint8 and packed.shape == (*leading, num_bytes)
    np.testing.assert_array_equal(unpack(jnp.asarray(packed), bits), codes)
    np.testing.assert_array_equal(bits_by_hand(packed, bits), codes)


def test_the_first_code_lies_in_the_lowest_bits():
    assert pack(np.array([1, 2, 3, 0], np.uint8), 2) == [0b00_11_10_01]


def test_planes_of_bits_that_do_not_nest_in_a_byte_are_not_used():
    assert set(PLANE_BITS.values()) <= {1, 2, 4} and sum(PLANE_BITS.values()) == max(WIDTHS)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_codes_that_do_not_fill_bytes_are_refused(bits):
    with pytest.raises(ValueError, match=f"last axis 9 is not a multiple of {8 // bits}, the {bits}-bit codes"):
        pack(np.zeros((3, 9), np.uint8), bits)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_codes_that_do_not_fit_are_refused(bits):
    codes = np.zeros(16, np.uint8)
    codes[7] = 2**bits
    with pytest.raises(ValueError, match=f"code {2**bits} does not fit {bits} bits"):
        pack(codes, bits)


# What is stored


@pytest.mark.parametrize(("channel_block", "hidden", "group"), [(32, 128, 64), (3, 24, 8)])
def test_the_bytes_counted_for_a_block_are_those_of_its_arrays(channel_block, hidden, group):
    w = jax.random.normal(jax.random.key(1), (3, channel_block, hidden))  # gate, up and down
    planes = quantize(w, group)
    for width in WIDTHS:
        read = [planes.scales, *(planes.codes[b] for b in WIDTHS if b <= width)]
        read += [planes.ratios] if width == 8 else []
        assert block_bytes(width, channel_block, hidden, group) == sum(a.nbytes for a in read)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_planes_values_are_those_of_the_written_formula(width):
    # four float32 terms, each rounded a few times; the largest is at most twice the result's scale
    bound = 16 * np.finfo(np.float32).eps * float(np.abs(GAUSS).max())
    np.testing.assert_allclose(dequantize(PLANES, width), dequantize_by_hand(PLANES, width), rtol=0, atol=bound)


def test_permuting_channels_permutes_the_planes():
    order = np.random.default_rng(0).permutation(len(GAUSS))
    moved = quantize(GAUSS[order], GROUP)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[order]), moved, PLANES)


def test_leading_axes_are_only_axes():
    moved = quantize(GAUSS.reshape(2, 48, 128), GROUP)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.reshape(b.shape), b), moved, PLANES)


def test_scaling_the_weights_by_a_power_of_two_scales_only_the_scales():
    larger = quantize(8 * GAUSS, GROUP)
    np.testing.assert_array_equal(larger.scales.astype(np.float32), 8 * PLANES.scales.astype(np.float32))
    for width in WIDTHS:
        np.testing.assert_array_equal(larger.codes[width], PLANES.codes[width])


# How near each width comes


def test_coarser_widths_are_the_nearest_values_of_their_own_grids():
    scale = np.repeat(PLANES.scales.astype(np.float32), GROUP, axis=-1)
    for width, step in ((2, 1.0), (3, 0.5), (4, 0.25)):
        top = 2 ** (width - 1) - 0.5
        nearest = (np.clip(np.floor(np.asarray(GAUSS) / scale / step) + 0.5, -top, top)) * step * scale
        np.testing.assert_allclose(dequantize(PLANES, width), nearest, rtol=1e-6)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 999), st.sampled_from(["normal", "laplace", "uniform", "standard_t"]))
def test_every_plane_brings_the_weights_closer(seed, family):
    rng = np.random.default_rng(seed)
    w = jnp.asarray(
        rng.standard_t(4, GAUSS.shape) if family == "standard_t" else getattr(rng, family)(size=GAUSS.shape)
    )
    planes = quantize(w, GROUP)
    errors = [relative_error(w, dequantize(planes, width)) for width in WIDTHS]
    assert all(b < a for a, b in itertools.pairwise(errors))


def test_a_plane_takes_off_more_than_half_a_gaussians_error():
    """Ideally a bit quarters the error; tails and shared base scales cost, but never half of that."""
    two, three, four, eight = (relative_error(GAUSS, dequantize(PLANES, width)) for width in WIDTHS)
    assert three < two / 2 and four < three / 2 and eight < four / 2**4


def test_scales_suit_the_widths_that_are_asked_for():
    of_all = [relative_error(GAUSS, dequantize(PLANES, width)) for width in WIDTHS]
    for width, usual in zip(WIDTHS, of_all):
        assert relative_error(GAUSS, dequantize(quantize(GAUSS, GROUP, (width,)), width)) < usual
    int8 = round_to_nearest(GAUSS, GridSpec(8, GROUP, symmetric=True))
    eight = dequantize(quantize(GAUSS, GROUP, (8,)), 8)
    assert relative_error(GAUSS, eight) < 1.1 * relative_error(GAUSS, int8)
    for bad in ((), (5,)):
        with pytest.raises(ValueError, match="expected some of"):
            quantize(GAUSS, GROUP, bad)


def test_at_two_bits_the_search_is_far_below_round_to_nearest():
    """Min-max of 64 Gaussians spans 4.8 deviations: three steps of 1.6, an error near 1.6^2 / 12 = 0.21. The best
    four-level uniform quantizer (Max 1960) has 0.1188; a quarter more pays for serving 3 and 4 bits as well."""
    ours, plain = (
        relative_error(GAUSS, q) for q in (dequantize(PLANES, 2), round_to_nearest(GAUSS, GridSpec(2, GROUP)))
    )
    assert ours < 1.25 * 0.1188
    assert ours < 0.75 * plain


def test_at_three_bits_the_search_is_below_round_to_nearest():
    assert relative_error(GAUSS, dequantize(PLANES, 3)) < relative_error(
        GAUSS, round_to_nearest(GAUSS, GridSpec(3, GROUP))
    )


@pytest.mark.parametrize(("width", "fewer"), [(4, 3), (8, 6)])
def test_nesting_costs_less_than_one_bit_of_four_and_two_of_eight(width, fewer):
    assert relative_error(GAUSS, dequantize(PLANES, width)) < relative_error(
        GAUSS, round_to_nearest(GAUSS, GridSpec(fewer, GROUP))
    )


# Groups that are not Gaussian


@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-36])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_group_of_zeros_stays_zero_beside_others(width, size):
    planes = quantize(GAUSS.at[1, GROUP:].set(size), GROUP)
    value = np.asarray(dequantize(planes, width))
    assert (value[1, GROUP:] == 0).all()
    np.testing.assert_array_equal(value[:, :GROUP], dequantize(PLANES, width)[:, :GROUP])


@pytest.mark.parametrize("constant", [0.3, -1.7, 1e4, -1e-12])
def test_a_constant_group_is_one_value_and_the_last_plane_reaches_it(constant):
    """Four bits leave one number. The last plane's step is that over 7.5, rounded to 1/1020 of a base scale of at
    most 0.75 |w|: its outermost code is off by at most 7.5 / 1020 / 2 base scales."""
    w = jnp.full(GAUSS.shape, constant)
    planes = quantize(w, GROUP)
    worst = {width: float(jnp.abs(dequantize(planes, width) / constant - 1).max()) for width in WIDTHS}
    assert worst[8] <= 7.5 / 1020 / 2 * 0.75 and max(worst.values()) <= 0.11
    assert all(len(np.unique(dequantize(planes, width))) == 1 for width in WIDTHS)


def test_an_outlier_costs_only_its_own_group():
    planes = quantize(GAUSS.at[0, 5].set(1e4), GROUP)
    for width in WIDTHS:
        value, without = np.asarray(dequantize(planes, width)), np.asarray(dequantize(PLANES, width))
        assert np.isfinite(value).all()
        np.testing.assert_array_equal(value[0, GROUP:], without[0, GROUP:])
        np.testing.assert_array_equal(value[1:], without[1:])
    assert abs(float(dequantize(planes, 8)[0, 5]) / 1e4 - 1) < 0.001  # out of the grid's reach, in the last plane's


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="weights to quantize hold NaN or infinity"):
        quantize(GAUSS.at[1, 3].set(bad), GROUP)


@pytest.mark.parametrize("group", [48, 256, 4])
def test_a_group_size_that_does_not_divide_is_refused(group):
    with pytest.raises(ValueError, match=f"last axis 128 must be a multiple of group_size {group}, and that of 8"):
        quantize(GAUSS, group)


def test_a_width_without_a_plane_is_refused():
    with pytest.raises(ValueError, match=r"width 5 is not one of \(2, 3, 4, 8\)"):
        dequantize(PLANES, 5)


# Page tables

LAYERS, EXPERTS, CHANNELS, HIDDEN, BLOCK = 2, 3, 12, 64, 4
BLOCKS = CHANNELS // BLOCK


@pytest.fixture(scope="module")
def store():
    return quantize(jax.random.normal(jax.random.key(2), (LAYERS, EXPERTS, 3, CHANNELS, HIDDEN)), 32)


def paged(store, widths, spare, seed):
    """Pools whose pages lie in random places among ``spare`` pages that nobody owns, full of rubbish."""
    rng = np.random.default_rng(seed)
    pages, tables = {}, {}
    for level in LEVELS:
        blocks = np.argwhere(widths >= level)
        slots = rng.permutation(len(blocks) + spare)[: len(blocks)]
        table = np.full(widths.shape, -1, np.int32)
        shapes = [(len(blocks) + spare, 3, BLOCK, a.shape[-1]) for a in (store.codes[level], store.ratios)]
        codes, ratios = (rng.integers(0, 256, shape).astype(np.uint8) for shape in shapes)
        for (layer, expert, block), slot in zip(blocks, slots):
            rows = slice(block * BLOCK, (block + 1) * BLOCK)
            table[layer, expert, block] = slot
            codes[slot] = store.codes[level][layer, expert, :, rows]
            ratios[slot] = store.ratios[layer, expert, :, rows]
        kept = jnp.asarray(ratios) if level == 8 else None
        pages[level], tables[level] = Pages(jnp.asarray(codes), kept), jnp.asarray(table)
    return Resident(BasePlanes(jnp.asarray(store.codes[2]), jnp.asarray(store.scales)), pages), tables


def mixed(seed, choices=WIDTHS):
    return np.random.default_rng(seed).choice(choices, (LAYERS, EXPERTS, BLOCKS))


@pytest.mark.parametrize("spare", [0, 2])
@pytest.mark.parametrize(
    "widths",
    [mixed(0), mixed(1), mixed(2, [2, 8]), mixed(3, [2, 3]), *(np.full((LAYERS, EXPERTS, BLOCKS), w) for w in WIDTHS)],
    ids=["mixed", "mixed again", "2 and 8", "no pages of 4 and 8", "all 2", "all 3", "all 4", "all 8"],
)
def test_a_layer_reads_each_block_at_its_own_width(store, widths, spare):
    resident, table = paged(store, widths, spare, 7)
    by_width = {w: dequantize(store, w).astype(jnp.bfloat16) for w in WIDTHS}  # what matrix units multiply
    for layer in range(LAYERS):
        got = dequantize_layer(resident, table, layer)
        assert got.shape == (3, EXPERTS, CHANNELS, HIDDEN)
        for expert, block in itertools.product(range(EXPERTS), range(BLOCKS)):
            rows = slice(block * BLOCK, (block + 1) * BLOCK)
            want = by_width[int(widths[layer, expert, block])][layer, expert, :, rows]
            np.testing.assert_array_equal(got[:, expert, rows], want)
