"""What quantized experts change on windows of text, against the unquantized model: loss, accuracy and divergence.

Axes: S windows, T tokens, V vocabulary.
"""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.decoder import with_parameters

BATCH = 8


@functools.partial(jax.jit, static_argnames="config")
def log_probabilities(config, params, tokens):
    model = with_parameters(config, params)
    hidden, _ = model.hidden_states(tokens[:, :-1])
    return jax.nn.log_softmax(model.logits(hidden).astype(jnp.float32))


@functools.partial(jax.jit, static_argnames="config")
def compared(config, params, tokens, reference):
    """By window: loss and accuracy of the next token, divergence from ``reference`` (float16 log-probabilities)."""
    own = log_probabilities(config, params, tokens)
    targets = tokens[:, 1:]
    loss = -jnp.take_along_axis(own, targets[..., None], axis=-1)[..., 0]
    right = own.argmax(axis=-1) == targets
    reference = reference.astype(jnp.float32)
    divergence = jnp.sum(jnp.exp(reference) * (reference - own), axis=-1)
    return loss.mean(axis=1), right.mean(axis=1), divergence.mean(axis=1)


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
        np.stack(compared(config, params, *(jnp.asarray(a[i : i + BATCH]) for a in (windows, reference))))
        for i in range(0, len(windows), BATCH)
    ]
    return np.concatenate(parts, axis=1).astype(np.float64)
