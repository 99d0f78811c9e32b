"""What other float parameters change on windows of text, against predictions that are kept in a file.

Axes: S windows, T tokens, V vocabulary.
"""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dynamo_jax.evaluation.divergence import Changed, changed, log_probabilities
from dynamo_jax.models.config import ModelConfig

BATCH = 8


@functools.partial(jax.jit, static_argnames="config")
def _float_against(config: ModelConfig, params: dict[str, Array], tokens: Array, reference: Array) -> Changed:
    return changed(log_probabilities(config, params, tokens), reference.astype(jnp.float32), tokens)


def predictions(config: ModelConfig, params: dict[str, Any], windows: np.ndarray) -> np.ndarray:
    """Log-probabilities (S, T, V), float16, in a temporary file: they are larger than all else together."""
    shape = (len(windows), windows.shape[1] - 1, config.vocab_size)
    with tempfile.TemporaryFile() as file:
        out = np.memmap(file, np.float16, "w+", shape=shape)
    for start in range(0, len(windows), BATCH):
        part = jnp.asarray(windows[start : start + BATCH])
        out[start : start + BATCH] = log_probabilities(config, params, part).astype(jnp.float16)
    return out


def changes(config: ModelConfig, params: dict[str, Any], windows: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Loss, accuracy and divergence of each window, (3, S); ``reference``: ``predictions`` on the same windows."""
    parts = [
        np.stack(_float_against(config, params, *(jnp.asarray(a[i : i + BATCH]) for a in (windows, reference))))
        for i in range(0, len(windows), BATCH)
    ]
    return np.concatenate(parts, axis=1).astype(np.float64)
