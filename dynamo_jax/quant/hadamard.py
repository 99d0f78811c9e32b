"""Rotation of an axis by an orthogonal matrix of equal entries, so that no weight stands out (QuIP#, QuaRot).

x^T w = (Q x)^T (Q w): rotated weights take rotated inputs. Sizes that are no power of two take a Hadamard matrix for
the power of two in them and a cosine transform for the rest; signs are drawn at random so that no direction of the
weights is preferred.
"""

from __future__ import annotations

import numpy as np
import scipy.fft
import scipy.linalg
from jaxtyping import Float


def rotation(size: int, seed: int = 0) -> Float[np.ndarray, "size size"]:
    """A random orthogonal matrix whose entries are of about one size, float64."""
    if size < 1:
        raise ValueError(f"size {size} is not positive")
    power = size & -size
    rest = scipy.fft.dct(np.eye(size // power), axis=0, norm="ortho")
    whole = np.kron(scipy.linalg.hadamard(power) / np.sqrt(power), rest)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size)
    return whole * signs


def rotated(w: Float[np.ndarray, "*S D"], seed: int = 0) -> Float[np.ndarray, "*S D"]:
    """The weights with their last axis rotated, float32. ``unrotated`` with the same seed takes it back."""
    return (np.asarray(w, np.float64) @ rotation(w.shape[-1], seed).T).astype(np.float32)


def unrotated(w: Float[np.ndarray, "*S D"], seed: int = 0) -> Float[np.ndarray, "*S D"]:
    """The inverse of ``rotated``."""
    return (np.asarray(w, np.float64) @ rotation(w.shape[-1], seed)).astype(np.float32)
