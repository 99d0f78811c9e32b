"""Weights for inputs other than those they were trained on, against least squares over the rows themselves."""

import numpy as np
import pytest

from dynamo_jax.quant import asymmetric
from dynamo_jax.quant.asymmetric import channel_factors, corrected

ROWS, C, R = 60, 6, 9
RNG = np.random.default_rng(0)
EXACT = RNG.standard_normal((ROWS, C))
GIVEN = EXACT * RNG.uniform(0.6, 1.1, C) + 0.2 * RNG.standard_normal((ROWS, C))
W = RNG.standard_normal((C, R))
QUANTIZED = W + np.array([0.4, 0.2])[:, None, None] * RNG.standard_normal((2, C, R))
SHARES = np.array([0.75, 0.25])
OWN, CROSS = GIVEN.T @ GIVEN, GIVEN.T @ EXACT


def stacked(system, right, pull, towards):
    """The solution of least squares with a pull on its entries, by rows added to the system."""
    more = np.sqrt(pull) * np.eye(system.shape[1])
    whole = np.concatenate([system, more]), np.concatenate([right, more @ towards])
    return np.linalg.lstsq(*whole, rcond=None)[0]


def test_corrected_weights_are_those_of_least_squares():
    prior = 3.0
    pull = prior + asymmetric.PULL * np.trace(OWN) / C
    np.testing.assert_allclose(corrected(W, OWN, CROSS, prior), stacked(GIVEN, EXACT @ W, pull, W), rtol=1e-4)


def test_factors_are_those_of_least_squares():
    each = [[np.outer(GIVEN[:, c], q[c]).reshape(-1) for c in range(C)] for q in QUANTIZED]
    columns = np.concatenate([np.sqrt(share) * np.stack(own, axis=1) for share, own in zip(SHARES, each)])
    right = np.concatenate([np.sqrt(share) * (EXACT @ W).reshape(-1) for share in SHARES])
    pull = asymmetric.FACTOR_PULL * np.trace(columns.T @ columns) / C
    want = stacked(columns, right, pull, np.ones(C))
    assert np.abs(want - 1).max() > 0.1
    np.testing.assert_allclose(channel_factors(W, QUANTIZED, SHARES, OWN, CROSS), want, rtol=1e-4)


def test_both_bring_the_outputs_nearer():
    def error(w):
        return np.square(GIVEN @ w - EXACT @ W).sum()

    assert error(corrected(W, OWN, CROSS, 0.0)) < 0.9 * error(W)
    factors = channel_factors(W, QUANTIZED, SHARES, OWN, CROSS)
    assert error(factors[:, None] * QUANTIZED[0]) < 0.9 * error(QUANTIZED[0])


def test_inputs_that_are_the_trained_ones_change_nothing():
    own = EXACT.T @ EXACT
    np.testing.assert_array_equal(corrected(W, own, own, 1.0), W.astype(np.float32))
    np.testing.assert_allclose(channel_factors(W, np.stack([W, W]), SHARES, own, own), 1.0, rtol=1e-6)


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows_leave_the_weights_finite(rows):
    """Without rows they stay what they are; a single one, of rank one, is no reason for large weights."""
    own, cross = GIVEN[:rows].T @ GIVEN[:rows], GIVEN[:rows].T @ EXACT[:rows]
    found, factors = corrected(W, own, cross, 0.0), channel_factors(W, QUANTIZED, SHARES, own, cross)
    assert np.abs(found - W.astype(np.float32)).max() <= (3 * np.abs(W).max() if rows else 0)
    assert (1 / asymmetric.FURTHEST <= factors).all() and (factors <= asymmetric.FURTHEST).all()
    assert rows or (factors == 1).all()


def test_a_channel_that_never_fires_keeps_its_weights():
    dead = GIVEN * (np.arange(C) != 2)
    own, cross = dead.T @ dead, dead.T @ (EXACT * (np.arange(C) != 2))
    np.testing.assert_allclose(corrected(W, own, cross, 0.0)[2], W[2], rtol=1e-6)
    assert channel_factors(W, QUANTIZED, SHARES, own, cross)[2] == 1
