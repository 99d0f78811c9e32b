"""Nested planes with error feedback: what they store, what feedback buys, and inputs at their limits."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamo_jax.kernels.layout import WIDTHS
from dynamo_jax.quant import nested_gptq
from dynamo_jax.quant.gptq import DAMPING, damped, feedback_factor
from dynamo_jax.quant.nested_gptq import quantize_nested, shrunk
from dynamo_jax.quant.planes import VALUES, dequantize, quantize

pytestmark = pytest.mark.usefixtures("quick_compilation")

EXPERTS, ROWS, COLUMNS, GROUP = 2, 48, 64, 16
RNG = np.random.default_rng(0)
W = RNG.standard_normal((EXPERTS, ROWS, COLUMNS)).astype(np.float32)


def correlated(size: int, samples: int = 400) -> np.ndarray:
    """Hessians of inputs with a few strong common directions."""
    mixed = RNG.standard_normal((EXPERTS, samples, size)) @ (
        np.eye(size) + 0.5 * RNG.standard_normal((EXPERTS, size, size))
    )
    return np.einsum("xsc,xsd->xcd", mixed, mixed).astype(np.float32) / samples


H = {2: correlated(COLUMNS), 1: correlated(ROWS)}


def output_error(w, planes, hessian, width, input_axis):
    """Mean squared output error: the trace of delta H delta^T."""
    delta = np.asarray(dequantize(planes, width)) - w
    if input_axis == 1:
        delta = delta.swapaxes(1, 2)
    return float(np.einsum("xrc,xcd,xrd->", delta, hessian, delta))


def by_hand(w, hessian, group_size, sweeps):
    """The same algorithm for inputs on the last axis, in float64 loops without blocks or batches."""
    values, emphasis = VALUES.astype(np.float64), np.array(nested_gptq.EMPHASIS)
    found = nested_gptq._scales(jnp.asarray(w[None]), jnp.array([nested_gptq.EMPHASIS]), group_size)[0]
    scales = np.repeat(np.asarray(found, np.float64), group_size, axis=1)
    order = np.argsort(-np.diag(hessian), kind="stable")
    factor, damped_hessian = np.zeros(hessian.shape), np.zeros(hessian.shape)
    at = np.ix_(order, order)
    factor[at], damped_hessian[at] = feedback_factor(hessian[at]), damped(hessian[at])
    targets, out = np.repeat(w[None].astype(np.float64), 3, axis=0), np.zeros((3, *w.shape))

    def choose(c, target):  # (3, R)
        t = target / scales[:, c]
        code = np.argmin((emphasis[:, None, None] * (t[..., None] - values[:, None]) ** 2).sum(axis=0), axis=1)
        out[:, :, c] = scales[:, c] * values[:, code]

    for i, c in enumerate(order):
        choose(c, targets[:, :, c])
        error = (targets[:, :, c] - out[:, :, c]) / factor[c, c]
        later = order[i + 1 :]
        targets[:, :, later] -= error[:, :, None] * factor[c, later]
    for c in [*order] * sweeps:
        slope = (w - out) @ damped_hessian[:, c]
        choose(c, out[:, :, c] + slope / damped_hessian[c, c])
    return dict(zip(WIDTHS, out))


def test_the_factor_is_that_of_the_damped_inverse():
    h = H[2][0]
    factor = feedback_factor(h).astype(np.float64)
    assert (np.tril(factor, -1) == 0).all()
    scale = np.trace(h) / len(h)
    with_damping = h / scale + DAMPING * np.eye(len(h))
    np.testing.assert_allclose(factor.T @ factor @ with_damping, np.eye(len(h)), atol=1e-3)
    np.testing.assert_allclose(damped(h), with_damping, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sweeps", [0, 2])
def test_blocks_and_batches_change_nothing(monkeypatch, sweeps):
    """Against loops in float64. A tie may round the other way, and its feedback then spreads: few weights may."""
    monkeypatch.setattr(nested_gptq, "BLOCK_COLUMNS", 16)
    monkeypatch.setattr(nested_gptq, "CHUNK_WEIGHTS", 16 * COLUMNS)
    planes = quantize_nested(W, H[2], GROUP, 2, sweeps=sweeps)
    for expert in range(EXPERTS):
        want = by_hand(W[expert], H[2][expert], GROUP, sweeps)
        for width in (2, 3, 4):
            found = np.asarray(dequantize(planes, width))[expert]
            assert np.mean(np.abs(found - want[width]) > 1e-4) < 0.02, (expert, width)


@pytest.mark.parametrize("input_axis", [1, 2])
def test_slabs_of_rows_and_experts_change_nothing(monkeypatch, input_axis):
    """Nor that each expert has an emphasis of its own. Few weights may differ, as above."""
    emphasis = np.array([[1.0, 50.0, 1.0], [8.0, 1.0, 1.0]], np.float32)
    whole = quantize_nested(W, H[input_axis], GROUP, input_axis, emphasis)
    columns = W.shape[input_axis]
    monkeypatch.setattr(nested_gptq, "CHUNK_WEIGHTS", 2 * GROUP * columns)  # 1 expert, at most 32 rows at a time
    parts = quantize_nested(W, H[input_axis], GROUP, input_axis, emphasis)
    for expert in range(EXPERTS):
        alone = quantize_nested(
            W[expert : expert + 1], H[input_axis][expert : expert + 1], GROUP, input_axis, emphasis[expert : expert + 1]
        )
        for width in (2, 3, 4):
            want = np.asarray(dequantize(whole, width))[expert]
            for found in (np.asarray(dequantize(parts, width))[expert], np.asarray(dequantize(alone, width))[0]):
                assert np.mean(np.abs(found - want) > 1e-4) < 0.02, (expert, width)
    np.testing.assert_array_equal(parts.scales, whole.scales)


def test_no_other_fraction_of_a_group_has_a_smaller_weighted_error():
    emphasis = np.array([[1.0, 2.0, 4.0], [9.0, 1.0, 1.0]])
    found = np.asarray(nested_gptq._scales(jnp.asarray(W), jnp.asarray(emphasis, jnp.float32), GROUP), np.float64)
    groups = W.reshape(EXPERTS, ROWS, -1, GROUP).astype(np.float64)

    def error(scale):  # (X, R, G)
        left = groups[..., None, None] - VALUES * scale[..., None, None, None]  # (X, R, G, g, 3, 16)
        weighted = (left**2 * emphasis[:, None, None, None, :, None]).sum(axis=-2)
        return weighted.min(axis=-1).sum(axis=-1)

    largest = np.abs(groups).max(axis=-1)
    for fraction in nested_gptq.BASE_FRACTIONS:
        other = np.asarray(jnp.asarray(largest * fraction).astype(jnp.bfloat16), np.float64)
        assert (error(found) <= error(other) * (1 + 1e-5)).all()


def test_without_correlations_it_does_not_matter_which_axis_holds_the_inputs():
    found = [quantize_nested(W, np.zeros_like(H[axis]), GROUP, axis) for axis in (1, 2)]
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize("input_axis", [1, 2])
def test_no_sweep_makes_the_weighted_errors_larger(input_axis):
    """Of the damped Hessian, which is what the sweeps descend on."""
    h = np.stack([damped(one) * np.trace(one) / len(one) for one in H[input_axis]])
    totals = []
    for sweeps in range(5):
        planes = quantize_nested(W, H[input_axis], GROUP, input_axis, sweeps=sweeps)
        errors = [output_error(W, planes, h, width, input_axis) for width in (2, 3, 4)]
        totals.append(float(np.dot(nested_gptq.EMPHASIS, errors)))
    assert totals[1] < 0.95 * totals[0]
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in itertools.pairwise(totals))


def test_a_column_is_at_its_best_given_the_others():
    """After many sweeps no single code can be changed for the better."""
    emphasis = np.array(nested_gptq.EMPHASIS)
    planes = quantize_nested(W, H[2], GROUP, 2, sweeps=60)
    h, scale = damped(H[2][0]), np.repeat(np.asarray(planes.scales, np.float64)[0], GROUP, axis=1)
    at = np.stack([np.asarray(dequantize(planes, b), np.float64)[0] for b in (2, 3, 4)])
    slope = (W[0] - at) @ h
    change = VALUES[:, None, None, :] * scale[..., None] - at[..., None]  # (3, R, C, 16)
    gain = 2 * change * slope[..., None] - change**2 * np.diag(h)[:, None]
    total = (emphasis[:, None, None, None] * gain).sum(axis=0)
    assert total.max() < 1e-3 * (scale**2).max()


@pytest.mark.parametrize("input_axis", [1, 2])
@pytest.mark.parametrize("width, share", [(2, 0.85), (3, 0.85), (4, 0.97)])
def test_feedback_lowers_the_output_error_of_every_width(input_axis, width, share):
    """Least at 4 bits, whose codes the coarser widths have a say in."""
    h = H[input_axis]
    none = quantize_nested(W, np.zeros_like(h), GROUP, input_axis)
    with_feedback = quantize_nested(W, h, GROUP, input_axis)
    ours, plain = (output_error(W, planes, h, width, input_axis) for planes in (with_feedback, none))
    assert ours < share * plain


@pytest.mark.parametrize("input_axis", [1, 2])
def test_more_planes_are_closer(input_axis):
    planes = quantize_nested(W, H[input_axis], GROUP, input_axis)
    errors = [output_error(W, planes, H[input_axis], width, input_axis) for width in WIDTHS]
    assert all(later < 0.5 * earlier for earlier, later in itertools.pairwise(errors))


@pytest.mark.parametrize("width, share", [(2, 1.5), (3, 1.35), (4, 1.65)])
def test_nesting_costs_little_against_a_weight_made_for_one_width(width, share):
    alone = tuple(1.0 if b == width else 1e-3 for b in (2, 3, 4))
    nested = output_error(W, quantize_nested(W, H[2], GROUP, 2), H[2], width, 2)
    direct = output_error(W, quantize_nested(W, H[2], GROUP, 2, alone), H[2], width, 2)
    assert nested < share * direct


@pytest.mark.parametrize("input_axis", [1, 2])
def test_the_form_is_that_of_the_planes(input_axis):
    ours, plain = quantize_nested(W, H[input_axis], GROUP, input_axis), quantize(W, GROUP)
    shapes = [jax.tree.map(lambda a: (a.shape, str(a.dtype)), p) for p in (ours, plain)]
    assert shapes[0] == shapes[1]


def test_a_hessian_of_zeros_leaves_rounding():
    """An expert that calibration never reached, and no layer to lean on."""
    nothing = np.zeros_like(H[2])
    planes = quantize_nested(W, nothing, GROUP, 2)
    eye = np.stack([np.eye(COLUMNS)] * EXPERTS)
    assert output_error(W, planes, eye, 4, 2) < 0.5 * output_error(W, planes, eye, 3, 2)
    for width in (2, 3):
        assert output_error(W, planes, eye, width, 2) < 1.35 * output_error(W, quantize(W, GROUP), eye, width, 2)


def test_a_singular_hessian_is_damped():
    one = np.zeros_like(H[2])
    one[:, 3, 3] = 5.0  # every other input is always zero
    for width in WIDTHS:
        assert np.isfinite(dequantize(quantize_nested(W, one, GROUP, 2), width)).all()


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_the_size_of_the_hessian_does_not_matter(scale):
    a, b = (quantize_nested(W, h, GROUP, 2) for h in (H[2], H[2] * np.float32(scale)))
    same = np.mean(np.asarray(dequantize(a, 4)) == np.asarray(dequantize(b, 4)))
    assert same > 0.98


def test_rows_of_zeros_stay_zero_and_a_constant_row_is_kept():
    w = W.copy()
    w[0, 5], w[1, 7] = 0.0, 0.25
    planes = quantize_nested(w, H[2], GROUP, 2)
    for width in WIDTHS:
        assert (np.asarray(dequantize(planes, width))[0, 5] == 0).all()
    assert np.abs(np.asarray(dequantize(planes, 4))[1, 7] / 0.25 - 1).mean() < 0.2


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_named(bad):
    w, h = W.copy(), H[2].copy()
    w[1, 2, 3] = bad
    with pytest.raises(ValueError, match="weights to quantize hold NaN"):
        quantize_nested(w, H[2], GROUP, 2)
    h[0, 0, 0] = bad
    with pytest.raises(ValueError, match="Hessian of the inputs holds NaN"):
        quantize_nested(W, h, GROUP, 2)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="multiple of group_size 24"):
        quantize_nested(W, H[2], 24, 2)
    with pytest.raises(ValueError, match="does not fit weights"):
        quantize_nested(W, H[1], GROUP, 2)
    with pytest.raises(ValueError, match="neither 1 nor 2"):
        quantize_nested(W, H[2], GROUP, 0)


def test_an_expert_without_rows_gets_the_layers_hessian():
    prior = H[2][0]
    np.testing.assert_allclose(shrunk(np.zeros_like(prior), 0.0, prior, 3.0), prior, rtol=1e-6)
    much = shrunk(1e6 * H[2][1], 1e6, prior, 3.0)
    np.testing.assert_allclose(much, H[2][1], atol=1e-4)
    assert np.isfinite(shrunk(np.zeros_like(prior), 0.0, np.zeros_like(prior), 0.0)).all()
