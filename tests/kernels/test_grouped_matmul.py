"""Every implementation of the grouped matmul against a float64 loop over groups."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_jax.kernels.grouped_matmul import IMPLEMENTATIONS, grouped_matmul
from dynamo_jax.kernels.products import matmul, transpose_by_product
from dynamo_jax.kernels.reference import grouped_matmul_reference
from dynamo_jax.kernels.rows import combine_rows, gather_rows, sort_by_expert
from dynamo_jax.kernels.xla import grouped_matmul_xla

pytestmark = pytest.mark.usefixtures("quick_compilation")


def oracle(x, w, sizes):
    out, start = np.zeros((x.shape[0], w.shape[2])), 0
    for expert, size in enumerate(sizes):
        rows = slice(start, start + size)
        out[rows] = np.asarray(x, np.float64)[rows] @ np.asarray(w, np.float64)[expert]
        start += size
    return out


def tolerance(dtype, contraction):
    """Rounding of inputs and output, and of a sum of that many terms of size one."""
    return 4 * float(jnp.finfo(dtype).eps) * contraction**0.5


def operands(rows, experts, k=16, n=24, dtype=jnp.float32, seed=0):
    a, b = jax.random.split(jax.random.key(seed))
    return jax.random.normal(a, (rows, k), dtype), jax.random.normal(b, (experts, k, n), dtype)


def check(name, sizes, rows=None, dtype=jnp.float32, **shape):
    rows = sum(sizes) if rows is None else rows
    x, w = operands(rows, len(sizes), dtype=dtype, **shape)
    got = grouped_matmul(x, w, jnp.asarray(sizes, jnp.int32), implementation=name)
    assert got.dtype == dtype and got.shape == (rows, w.shape[2])
    want = oracle(x, w, sizes)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=tolerance(dtype, x.shape[1]) * 4, rtol=0)


LAYOUTS = {
    "one expert": [7],
    "one row": [0, 1, 0],
    "no rows": [0, 0, 0],
    "all in the last group": [0, 0, 33],
    "empty groups between": [5, 0, 0, 9, 0, 1],
    "past a block": [129, 300, 1, 8, 9],
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_an_implementation_equals_the_oracle(name, layout, dtype):
    check(name, LAYOUTS[layout], dtype=dtype)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=6, max_size=6), st.sampled_from(list(IMPLEMENTATIONS)))
def test_any_ragged_layout_with_rows_past_the_last_group(sizes, name):
    check(name, sizes, rows=260)  # one program for all; the oracle leaves rows past the last group at zero


@pytest.mark.parametrize("name", ["reference", "xla"])  # jax.lax.ragged_dot multiplies by zero on a CPU
def test_nan_in_the_weights_of_an_expert_without_rows_reaches_nothing(name):
    x, w = operands(12, 4)
    w = w.at[2].set(jnp.nan)
    got = grouped_matmul(x, w, jnp.array([4, 5, 0, 3]), implementation=name)
    assert np.isfinite(got).all()


@functools.partial(jax.jit, static_argnames="multiply")
def gradients(multiply, x, w, sizes):
    return jax.grad(lambda x, w: jnp.sum(jnp.sin(multiply(x, w, sizes))), argnums=(0, 1))(x, w)


@pytest.mark.parametrize(("k", "n"), [(8, 24), (24, 8), (16, 16)])
@pytest.mark.parametrize("sizes", [[5, 0, 17, 19], [0, 40, 0, 1]])
def test_the_gradient_equals_that_of_the_reference(k, n, sizes):
    x, w = operands(sum(sizes), 4, k, n)
    got, want = (gradients(m, x, w, jnp.asarray(sizes)) for m in (grouped_matmul_xla, grouped_matmul_reference))
    for g, t in zip(got, want):
        np.testing.assert_allclose(g, t, atol=1e-4)


@pytest.mark.parametrize(
    ("x", "w", "sizes", "message"),
    [
        ((4,), (2, 3, 5), (2,), "expected x"),
        ((4, 3), (2, 4, 5), (2,), "sizes do not fit"),
        ((4, 3), (2, 3, 5), (3,), "sizes do not fit"),
    ],
)
def test_shapes_that_do_not_fit_are_named(x, w, sizes, message):
    with pytest.raises(ValueError, match=message):
        grouped_matmul(jnp.zeros(x), jnp.zeros(w), jnp.zeros(sizes, jnp.int32))


def test_a_wrong_dtype_or_name_is_an_error():
    x, w = operands(4, 1)
    with pytest.raises(ValueError, match="cast one of them"):
        grouped_matmul(x, w.astype(jnp.bfloat16), jnp.array([4]))
    with pytest.raises(ValueError, match="unknown implementation 'cuda'; known: reference, xla, ragged_dot"):
        grouped_matmul(x, w, jnp.array([4]), implementation="cuda")


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([1, 12]), st.sampled_from([1, 3]), st.sampled_from([3, 7]), st.integers(0, 99))
def test_rows_go_to_their_experts_and_come_back_weighted(tokens, top_k, num_experts, seed):
    rng = np.random.default_rng(seed)
    experts = np.stack([rng.permutation(num_experts)[:top_k] for _ in range(tokens)])
    gates = rng.random((tokens, top_k), np.float32)
    x = rng.standard_normal((tokens, 4), np.float32)
    order = sort_by_expert(jnp.asarray(experts), num_experts)
    sorted_experts = np.repeat(np.arange(num_experts), order.group_sizes)
    np.testing.assert_array_equal(np.sort(experts.reshape(-1)), sorted_experts)
    rows = gather_rows(jnp.asarray(x), order)
    scaled = rows * (sorted_experts[:, None] + 1)  # "expert" e multiplies by e + 1
    want = (x[:, None] * (experts[:, :, None] + 1) * gates[:, :, None]).sum(axis=1)
    np.testing.assert_allclose(combine_rows(scaled, jnp.asarray(gates), order), want, rtol=1e-5, atol=1e-6)


def test_the_gradients_of_gather_and_combine_equal_the_derived_ones():
    experts = jnp.array([[0, 2], [2, 1], [1, 0], [2, 0]])
    order = sort_by_expert(experts, 3)
    x = jax.random.normal(jax.random.key(0), (4, 5))
    gates = jax.random.uniform(jax.random.key(1), (4, 2))

    def ours(x, gates):
        return jnp.sum(jnp.sin(combine_rows(gather_rows(x, order) ** 2, gates, order)))

    def plain(x, gates):
        rows = x[order.token] ** 2
        return jnp.sum(jnp.sin((rows[order.position] * gates[:, :, None]).sum(axis=1)))

    for got, want in zip(jax.grad(ours, argnums=(0, 1))(x, gates), jax.grad(plain, argnums=(0, 1))(x, gates)):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_transpose_by_product_is_exact(dtype):
    a = jax.random.normal(jax.random.key(0), (3, 5, 7), dtype)
    np.testing.assert_array_equal(transpose_by_product(a), a.swapaxes(1, 2))


def test_the_gradient_of_matmul_equals_the_derived_one():
    a = jax.random.normal(jax.random.key(0), (6, 5))
    b = jax.random.normal(jax.random.key(1), (5, 4))
    got = jax.grad(lambda a, b: jnp.sum(jnp.sin(matmul(a, b))), argnums=(0, 1))(a, b)
    want = jax.grad(lambda a, b: jnp.sum(jnp.sin(a @ b)), argnums=(0, 1))(a, b)
    for g, t in zip(got, want):
        np.testing.assert_allclose(g, t, rtol=1e-5, atol=1e-6)
