"""Weights for the inputs that they will get, where these are not the inputs that they were trained on.

A down projection is trained on the hidden channels h of float gate and up, and is given h', those of quantized ones.
Quantizing it as if it were given h leaves their error as it is. Both functions here make h' times something near h
times the float weights, from two sums over rows, each counted as its error is: own = h'^T h' and cross = h'^T h.

``corrected`` changes what is to be quantized (asymmetric calibration, GPTAQ, arXiv 2504.02692); ``channel_factors``
changes what was quantized, by a factor for each input channel, which the scales of its weights take in (the affine
correction of KBVQ-MoE, arXiv 2602.11184, without its offset).

Axes: C inputs, R outputs.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
from jaxtyping import Float

PULL = 1.0  # of ``corrected`` towards the float weights, in mean diagonals of ``own``
FACTOR_PULL = 0.03  # of ``channel_factors`` towards 1, in mean diagonals of their system
FURTHEST = 2.0  # a factor, or one over it


def corrected(
    w: Float[np.ndarray, "C R"], own: Float[np.ndarray, "C C"], cross: Float[np.ndarray, "C C"], prior: float
) -> Float[np.ndarray, "C R"]:
    """The T of least |h' T - h w|^2 + r |T - w|^2, r the prior and ``PULL`` mean diagonals: w itself for h' = h, and
    where no row was seen."""
    size = len(own)
    pull = prior + PULL * float(np.trace(own)) / size
    if not pull > 0:
        return np.asarray(w, np.float32)
    change = _solved(own, pull, (cross - own).astype(np.float64) @ w)
    return (w + change).astype(np.float32)


def channel_factors(
    w: Float[np.ndarray, "C R"],
    quantized: Float[np.ndarray, "W C R"],
    shares: Float[np.ndarray, " W"],
    own: Float[np.ndarray, "C C"],
    cross: Float[np.ndarray, "C C"],
) -> Float[np.ndarray, " C"]:
    """The c of least |h' diag(c) quantized - h w|^2, pulled towards 1; within ``FURTHEST`` of it. 1 where no row was
    seen. quantized: the weights at W widths, whose errors count by ``shares``, which sum to 1."""
    exact, at_widths = np.asarray(w, np.float64), np.asarray(quantized, np.float64)
    system = own * np.einsum("wcr,wdr,w->cd", at_widths, at_widths, shares, optimize=True)
    pull = FACTOR_PULL * float(np.trace(system)) / len(own)
    if not pull > 0:
        return np.ones(len(own), np.float32)
    mean = np.tensordot(shares, at_widths, axes=1)
    wanted = np.einsum("cd,dr,cr->c", cross, exact, mean, optimize=True)
    factors = 1 + _solved(system, pull, wanted - system.sum(axis=1))
    return np.clip(factors, 1 / FURTHEST, FURTHEST).astype(np.float32)


def _solved(matrix: Float[np.ndarray, "C C"], pull: float, right: Float[np.ndarray, "C ..."]) -> np.ndarray:
    """(matrix + pull I)^-1 right, of a matrix without negative eigenvalues."""
    whole = np.array(matrix, np.float64)
    whole[np.diag_indices(len(whole))] += pull
    return scipy.linalg.solve(whole, right, assume_a="pos")
