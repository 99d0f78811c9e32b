"""The quantizers for one width: GPTQ, AWQ, clipping search, rotation; alone on plain arrays, and beside qwix."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamo_jax.quant import awq as awq_module
from dynamo_jax.quant.awq import awq
from dynamo_jax.quant.gptq import DAMPING, feedback_factor, gptq
from dynamo_jax.quant.grids import GridSpec, grid_of
from dynamo_jax.quant.hadamard import rotated, rotation, unrotated
from dynamo_jax.quant.rtn import round_to_nearest

pytestmark = pytest.mark.usefixtures("quick_compilation")

EXPERTS, ROWS, COLUMNS = 3, 24, 128
RNG = np.random.default_rng(0)
W = RNG.standard_normal((EXPERTS, ROWS, COLUMNS)).astype(np.float32)
MIXING = np.eye(COLUMNS) + 0.3 * RNG.standard_normal((EXPERTS, COLUMNS, COLUMNS))
SIZES = np.exp(RNG.normal(0, 1, COLUMNS))
INPUTS = (RNG.standard_normal((EXPERTS, 600, COLUMNS)) @ MIXING * SIZES).astype(np.float32)
H = np.einsum("xsc,xsd->xcd", INPUTS, INPUTS)
MAGNITUDES = np.abs(INPUTS).mean(axis=1)
SPECS = [
    GridSpec(bits, group, symmetric, clip)
    for bits in (2, 3, 4, 8)
    for group in (32, 64, 128)
    for symmetric in (False, True)
    for clip in (False, True)
]


def named(spec):
    return f"{spec.bits}-{spec.group_size}{'-sym' * spec.symmetric}{'-clip' * spec.clip}"


def spec_case(spec):
    """In the fast suite a quarter of them, in which any two settings meet; each compiles programs of its own."""
    i, j = (2, 3, 4, 8).index(spec.bits), (32, 64, 128).index(spec.group_size)
    often = spec.symmetric == (i + j) % 2 and spec.clip == (i // 2 + j) % 2
    return pytest.param(spec, id=named(spec), marks=[] if often else [pytest.mark.slow])


def output_error(q, w=W, h=H):
    left = np.asarray(q, np.float64) - w
    return np.einsum("xrc,xcd,xrd->x", left, h, left)


# Grids


@pytest.mark.parametrize("spec", [*map(spec_case, SPECS)])
def test_a_group_lies_on_evenly_spaced_values_that_its_codes_can_name(spec):
    q = np.asarray(round_to_nearest(jnp.asarray(W), spec)).reshape(-1, spec.group_size)
    grid = grid_of(jnp.asarray(W).reshape(-1, spec.group_size), spec)
    codes = q / np.asarray(grid.scale)[:, None] + np.asarray(grid.zero)[:, None]
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-3)
    assert codes.min() > -0.5 and codes.max() < 2**spec.bits - 0.5
    assert (np.asarray(grid.zero) == np.rint(grid.zero)).all()
    if spec.symmetric:
        assert (np.asarray(grid.zero) == 2 ** (spec.bits - 1)).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_clipping_search_is_never_worse_and_helps_few_bits(bits, symmetric):
    plain, clipped = (
        np.square(np.asarray(round_to_nearest(jnp.asarray(W), GridSpec(bits, 64, symmetric, clip))) - W)
        .reshape(-1, 64)
        .sum(axis=1)
        for clip in (False, True)
    )
    assert (clipped <= plain * (1 + 1e-5)).all()
    assert clipped.sum() < {2: 0.75, 3: 0.9, 4: 0.97}[bits] * plain.sum()


def test_stored_bits_by_hand():
    assert GridSpec(3, 64).bits_per_weight(128) == (64 * 3 + 16 + 8) / 64
    assert GridSpec(3, 64, symmetric=True).bits_per_weight(128) == (64 * 3 + 16) / 64
    assert GridSpec(3, 512, symmetric=True).bits_per_weight(128) == (128 * 3 + 16) / 128  # one scale a row


@pytest.mark.parametrize("bad", [{"bits": 1}, {"bits": 16}, {"bits": 4, "group_size": 0}])
def test_grids_that_do_not_exist_are_refused(bad):
    with pytest.raises(ValueError, match=r"bits: known are 2 to 8|is not positive"):
        GridSpec(**bad)


# GPTQ


def by_hand(w, h, spec):
    """Column by column with the inverse of what is left of the Hessian, as optimal brain surgery has it, float64."""
    h = h.astype(np.float64) / (np.trace(h) / len(h)) + DAMPING * np.eye(len(h))
    group = spec.group_of(w.shape[1])
    scale, zero = (np.asarray(a, np.float64) for a in grid_of(jnp.asarray(w).reshape(len(w), -1, group), spec))
    left, out, todo = w.astype(np.float64), np.zeros(w.shape), list(np.argsort(-np.diag(h), kind="stable"))
    while todo:
        inverse = np.linalg.inv(h[np.ix_(todo, todo)])
        c = todo[0]
        s, z = scale[:, c // group], zero[:, c // group]
        out[:, c] = (np.clip(np.rint(left[:, c] / s) + z, 0, 2**spec.bits - 1) - z) * s
        left[:, todo] -= ((left[:, c] - out[:, c]) / inverse[0, 0])[:, None] * inverse[0]
        todo = todo[1:]
    return out


@pytest.mark.parametrize("spec", [GridSpec(3, 32), GridSpec(4, 64, symmetric=True)], ids=named)
def test_gptq_is_optimal_brain_surgery(spec):
    """A tie may round the other way in float32, and its feedback then spreads: few weights may differ."""
    found = gptq(W[:1], H[:1], spec).weights[0]
    assert np.mean(np.abs(found - by_hand(W[0], H[0], spec)) > 1e-3) < 0.02


@pytest.mark.parametrize("spec", [*map(spec_case, SPECS)])
def test_gptq_beats_rounding_at_every_width_group_and_grid(spec):
    found = gptq(W, H, spec).weights
    assert (output_error(found) < 0.8 * output_error(round_to_nearest(jnp.asarray(W), spec))).all()


def test_activation_order_helps_where_inputs_differ_in_size():
    ordered, not_ordered = (output_error(gptq(W, H, GridSpec(3, 64), act_order=o).weights).sum() for o in (True, False))
    assert ordered < 0.97 * not_ordered


def test_experts_that_calibration_hardly_reached_take_the_pooled_hessian_and_are_named():
    few = H.copy()
    few[0], few[2] = 0, INPUTS[2, :1].T @ INPUTS[2, :1]
    found = gptq(W, few, GridSpec(4, 64), rows=np.array([0, 600, 1]), least_rows=32)
    assert found.starved == (0, 2)
    alone = gptq(W[:1], few.sum(axis=0)[None], GridSpec(4, 64)).weights
    np.testing.assert_allclose(found.weights[0], alone[0], atol=1e-6)
    np.testing.assert_allclose(found.weights[1], gptq(W[1:2], H[1:2], GridSpec(4, 64)).weights[0], atol=1e-6)
    assert gptq(W, few, GridSpec(4, 64)).starved == (0,)  # a Hessian of zeros always counts as unreached


def test_nobody_was_reached():
    found = gptq(W, np.zeros_like(H), GridSpec(4, 64), act_order=False)
    assert found.starved == (0, 1, 2)
    np.testing.assert_allclose(found.weights, round_to_nearest(jnp.asarray(W), GridSpec(4, 64)), atol=1e-6)


def test_a_singular_hessian_a_constant_row_and_a_row_of_zeros():
    one = np.zeros_like(H)
    one[:, 3, 3] = 5.0
    w = W.copy()
    w[0, 5], w[1, 7] = 0.0, 0.25
    found = gptq(w, one, GridSpec(4, 64)).weights
    assert np.isfinite(found).all() and (found[0, 5] == 0).all()
    assert np.abs(found[1, 7] / 0.25 - 1).max() < 0.01


def test_the_factor_is_that_of_the_damped_inverse():
    factor = feedback_factor(H[0]).astype(np.float64)
    assert (np.tril(factor, -1) == 0).all()
    damped = H[0] / (np.trace(H[0]) / COLUMNS) + DAMPING * np.eye(COLUMNS)
    np.testing.assert_allclose(factor.T @ factor @ damped, np.eye(COLUMNS), atol=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_named(bad):
    w, h, m = W.copy(), H.copy(), MAGNITUDES.copy()
    w[1, 2, 3] = h[0, 0, 0] = m[0, 0] = bad
    for call, message in (
        (lambda: gptq(w, H, GridSpec(4)), "weights to quantize hold NaN"),
        (lambda: gptq(W, h, GridSpec(4)), "Hessian of the inputs holds NaN"),
        (lambda: awq(w, H, MAGNITUDES, GridSpec(4), shared=False), "weights to quantize hold NaN"),
        (lambda: awq(W, h, MAGNITUDES, GridSpec(4), shared=False), "statistics hold NaN"),
        (lambda: awq(W, H, m, GridSpec(4), shared=False), "statistics hold NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="not a multiple of group_size 48"):
        gptq(W, H, GridSpec(4, 48))
    with pytest.raises(ValueError, match=r"hessians \(3, 127, 128\) do not fit"):
        gptq(W, H[:, 1:], GridSpec(4))
    with pytest.raises(ValueError, match=r"magnitudes \(3, 128\) do not fit .* shared=True"):
        awq(W, H, MAGNITUDES, GridSpec(4), shared=True)


# AWQ


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_awq_is_below_rounding_where_inputs_differ_in_size(bits, shared):
    magnitudes = MAGNITUDES.mean(axis=0, keepdims=True) if shared else MAGNITUDES
    found = awq(W, H, magnitudes, GridSpec(bits, 64), shared=shared)
    plain = output_error(round_to_nearest(jnp.asarray(W), GridSpec(bits, 64))).sum()
    assert output_error(found.weights).sum() < 0.85 * plain
    assert (found.scales == found.scales[:1]).all() == shared


@pytest.mark.parametrize("shared", [True, False])
def test_awq_tries_no_scale_first(monkeypatch, shared):
    """With the exponent 0 alone it is rounding, so its choice is never worse than rounding."""
    monkeypatch.setattr(awq_module, "EXPONENTS", (0.0,))
    magnitudes = MAGNITUDES[:1] if shared else MAGNITUDES
    found = awq(W, H, magnitudes, GridSpec(4, 64), shared=shared)
    np.testing.assert_allclose(found.weights, round_to_nearest(jnp.asarray(W), GridSpec(4, 64)), atol=1e-6)


def test_the_folds_are_exact():
    """Scales of down go into the rows of up, those of gate and up into the norm: the expert computes the same."""
    rng = np.random.default_rng(1)
    gate, up = rng.standard_normal((2, 32, COLUMNS))
    down, x = rng.standard_normal((COLUMNS, 32)), rng.standard_normal((5, COLUMNS))
    before, inside = np.exp(rng.normal(0, 1, COLUMNS)), np.exp(rng.normal(0, 1, 32))

    def expert(x, gate, up, down):
        a = x @ gate.T
        return (a / (1 + np.exp(-a)) * (x @ up.T)) @ down.T

    folded = expert(x / before, gate * before, up * before / inside[:, None], down * inside)
    np.testing.assert_allclose(folded, expert(x, gate, up, down), rtol=1e-9)


def test_inputs_that_are_always_zero_are_left_alone():
    m, h = MAGNITUDES.copy(), H.copy()
    m[:, 7] = 0
    h[:, 7] = h[:, :, 7] = 0
    found = awq(W, h, m, GridSpec(4, 64), shared=False)
    assert np.isfinite(found.weights).all() and (found.scales[:, 7] == 1).all()


# Rotation


@pytest.mark.parametrize("size", [1, 2, 7, 64, 96, 576])
def test_a_rotation_is_orthogonal_and_spreads_an_outlier(size):
    q = rotation(size, seed=3)
    np.testing.assert_allclose(q @ q.T, np.eye(size), atol=1e-12)
    power = size & -size
    assert np.abs(q).max() <= np.sqrt(2 / (size // power)) / np.sqrt(power) + 1e-12


def test_rotating_both_sides_changes_no_product():
    w = RNG.standard_normal((5, 96)).astype(np.float32)
    x = RNG.standard_normal((4, 96)).astype(np.float32)
    np.testing.assert_allclose(rotated(x) @ rotated(w).T, x @ w.T, atol=1e-4)
    np.testing.assert_allclose(unrotated(rotated(w, 4), 4), w, atol=1e-5)


def test_rotation_helps_weights_with_outliers():
    w = RNG.standard_normal((64, 128)).astype(np.float32)
    w[:, ::16] *= 12
    spec = GridSpec(3, 64)
    plain = np.square(np.asarray(round_to_nearest(jnp.asarray(w), spec)) - w).sum()
    turned = unrotated(np.asarray(round_to_nearest(jnp.asarray(rotated(w)), spec)))
    assert np.square(turned - w).sum() < 0.6 * plain


# Beside qwix, Google's quantization library for JAX, on the same weights


@pytest.fixture(scope="module")
def qwix():
    return pytest.importorskip("qwix")


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_is_as_good_as_qwix(qwix, bits, group):
    """At the same storage, scales in bfloat16."""
    how = {"channelwise_axes": (0,), "tiled_axes": {1: group}, "scale_dtype": jnp.bfloat16}
    for symmetric in (False, True):
        method = "absmax" if symmetric else "minmax"
        peer = qwix.dequantize(qwix.quantize(jnp.asarray(W[0]), f"int{bits}", calibration_method=method, **how))
        theirs = np.square(np.asarray(peer) - W[0]).sum()
        plain, searched = (
            np.square(
                np.asarray(round_to_nearest(jnp.asarray(W[0]), GridSpec(bits, group, symmetric, clip))) - W[0]
            ).sum()
            for clip in (False, True)
        )
        assert plain <= 1.01 * theirs and searched <= theirs, (symmetric, plain / theirs, searched / theirs)


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_is_as_good_as_qwix(qwix, bits):
    from qwix._src.core import qarray
    from qwix.contrib import gptq_core

    size = 32  # columns; theirs are unrolled, and compiling grows with them
    w, h = W[:1, :, :size], H[:1, :size, :size]
    how = qarray.HowToQuantize(
        qtype=f"int{bits}", channelwise_axes=(0,), tiled_axes={1: 16}, calibration_method="absmax"
    )
    with jax.default_matmul_precision("highest"):
        peer, _ = gptq_core.quantize_weight(jnp.asarray(w[0]), jnp.asarray(h[0]), how)
    theirs = output_error(np.asarray(qarray.dequantize(peer))[None], w, h)[0]
    ours = output_error(gptq(w, h, GridSpec(bits, 16, symmetric=True)).weights, w, h)[0]
    assert ours <= theirs
