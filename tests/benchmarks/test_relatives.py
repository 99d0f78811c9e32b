"""The quantizers of benchmarks/relatives.py against oracles that are written otherwise, on small random experts."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from dynamo_jax.kernels.layout import WIDTHS
from dynamo_jax.quant.gptq import damped, gptq
from dynamo_jax.quant.grids import GridSpec


@pytest.fixture(scope="module")
def relatives(benchmarks):
    return benchmarks("relatives")


@pytest.fixture(scope="module")
def experts():
    """Weights (2, 5, 16) and the Hessians of correlated inputs."""
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 64, 16)) @ random.normal(size=(2, 16, 16))
    return random.normal(size=(2, 5, 16)).astype(np.float32), np.einsum("xnc,xnd->xcd", x, x).astype(np.float32)


def lost(w, h, made):
    """Squared output error of each expert."""
    h = np.stack([damped(each) for each in h])
    return np.einsum("xrc,xcd,xrd->x", w - made, h, w - made)


def test_a_slice_is_the_first_bits_rounded_by_the_next(relatives):
    codes = np.arange(256)
    for width in WIDTHS:
        wanted = np.minimum(np.floor(codes / 2 ** (8 - width) + 0.5), 2**width - 1) * 2 ** (8 - width)
        assert np.array_equal(relatives.sliced(codes, width), wanted)


def test_matgptq_is_elimination_of_one_column_after_the_other(relatives, experts):
    w, hessians = experts
    found = relatives.matgptq(w, hessians)
    values = np.array(
        [
            [np.minimum((c + 2 ** (7 - b)) // 2 ** (8 - b), 2**b - 1) * 2 ** (8 - b) for b in (2, 3, 4)]
            for c in range(256)
        ]
    )
    values = np.concatenate([values, np.arange(256)[:, None]], axis=1) - 128.0
    for x in range(len(w)):
        inverse = np.linalg.inv(damped(hessians[x]))
        for row in range(w.shape[1]):
            left, own = w[x, row].astype(np.float64), inverse.copy()
            scale = 2 * np.abs(left).max() / 255  # one group: all inputs
            for j in range(w.shape[2]):
                code = ((left[j] / scale - values) ** 2).sum(axis=1).argmin()
                got = [f[x, row, j] for f in found]
                assert np.allclose(got, scale * values[code], rtol=1e-3, atol=1e-5)
                error = left[j] - scale * values[code].mean()
                left = left - error * own[j] / own[j, j]
                own = own - np.outer(own[:, j], own[j]) / own[j, j]


def test_scales_for_each_width_fit_the_outputs_and_more_bits_never_lose(relatives, experts):
    w, hessians = experts
    found = relatives.anybcq(w, hessians)
    errors = np.stack([lost(w, hessians, made) for made in found])
    assert (np.diff(errors, axis=0) < 0).all()
    grouped = jnp.asarray(w)[:, :, None]
    two = relatives.two_bits(grouped)
    three = relatives.with_bit(grouped, two)
    assert np.array_equal(three[..., :2], two)  # codes are shared
    root = np.linalg.cholesky(damped(hessians[1]))  # H = root root^T
    basis = np.asarray(three[1, 3, 0])
    scales = np.linalg.lstsq(root.T @ basis, root.T @ w[1, 3], rcond=None)[0]
    assert np.allclose(found[1][1, 3], basis @ scales, atol=2e-3)
    assert np.all(
        np.square(w - (two * relatives.scales_of(grouped, two)[..., None, :]).sum(-1)[:, :, 0]).sum()
        < np.square(w).sum() / 4
    )


def test_learned_rounding_is_never_worse_than_rounding_and_mostly_better(relatives, experts):
    w, hessians = experts
    for width, made in zip(WIDTHS, relatives.autoround(w, hessians)):
        grouped = jnp.asarray(w)[:, :, None]
        nearest = relatives.rounded(grouped, jnp.zeros_like(grouped), jnp.ones((2, 5, 1, 2)), width)[:, :, 0]
        before, after = lost(w, hessians, np.asarray(nearest)), lost(w, hessians, made)
        assert (after <= before * (1 + 1e-5)).all()
        assert width == 8 or (after < 0.9 * before).all()
        for row in made.reshape(-1, w.shape[2]):
            assert len(np.unique(row)) <= 2**width


@pytest.mark.slow
def test_direct_codes_at_one_width_are_plain_gptq(relatives, benchmarks):
    peers = benchmarks("peers")
    random = np.random.default_rng(1)
    weights = random.normal(size=(1, 2, 3, 16, 32)).astype(np.float32)
    x, h = random.normal(size=(1, 2, 64, 32)), random.normal(size=(1, 2, 64, 16))
    inner, hidden = (np.einsum("lenc,lend->lecd", a, a).astype(np.float32) for a in (x, h))
    sums = peers.Sums(np.full((1, 2), 64.0), np.ones((1, 2)), inner, hidden, np.ones((1, 32)), np.ones((1, 2, 16)))
    options = relatives.options("direct", weights, sums)
    made = peers.mixed(options, np.full((1, 2, 3), WIDTHS.index(3)))
    spec = GridSpec(3, 128, True, True)
    assert np.array_equal(made[0, :, 1], gptq(weights[0, :, 1], inner[0], spec).weights)
    assert np.array_equal(made[0, :, 2].swapaxes(1, 2), gptq(weights[0, :, 2].swapaxes(1, 2), hidden[0], spec).weights)
    both = peers.mixed(options, np.array([[[0, 0, 2], [3, 3, 1]]]))  # a plan of two experts, down apart
    assert np.array_equal(both[0, 0, 2], options[2][0, 0, 2])
    assert np.array_equal(both[0, 1, :2], options[3][0, 1, :2])
    bits = relatives.bits_of("direct", np.array([[[2, 2, 4], [8, 8, 3]]]), weights)
    assert bits == pytest.approx((2 * (10 + 2 * 16 / 32) + 7 + 2 * 16 / 16) / 6)


@pytest.mark.parametrize("name", ["matgptq", pytest.param("anybcq", marks=pytest.mark.slow), "autoround"])
def test_each_gives_every_projection_at_each_width(relatives, benchmarks, name):
    peers = benchmarks("peers")
    random = np.random.default_rng(2)
    weights = random.normal(size=(2, 2, 3, 8, 16)).astype(np.float32)
    eyes = [np.broadcast_to(np.eye(size, dtype=np.float32), (2, 2, size, size)) for size in (16, 8)]
    sums = peers.Sums(np.full((2, 2), 64.0), np.ones((2, 2)), *eyes, np.ones((2, 16)), np.ones((2, 2, 8)))
    options = relatives.options(name, weights, sums)
    errors = [np.square(o - weights).mean(axis=(-1, -2)) for o in options]
    assert [o.shape for o in options] == [weights.shape] * len(WIDTHS)
    assert errors[-1].max() < 1e-3 < 0.01 < errors[0].min()
    assert all((a >= b).all() for a, b in itertools.pairwise(errors)) or name == "matgptq"
