"""Next-token negative log-likelihood without holding the logits of all tokens at once.

Axes: B batch, T tokens, D hidden, V vocabulary, C rows a chunk.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dynamo_jax.kernels.products import matmul

CHUNK_ROWS = 1024
CHUNK_LOGITS = 2**23  # of a large vocabulary fewer rows at a time


def next_token_nll(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    bias: Float[Array, " V"] | None = None,
) -> Float[Array, "B T"]:
    """-log p(target) in nats, float32, from the hidden states that the head takes."""
    head_t = head.astype(hidden.dtype).T
    rows = hidden.reshape(-1, hidden.shape[-1])
    count = rows.shape[0]
    chunk = min(CHUNK_ROWS, count, max(1, CHUNK_LOGITS // head.shape[0]))
    pad = -count % chunk
    rows = jnp.pad(rows, ((0, pad), (0, 0))).reshape(-1, chunk, hidden.shape[-1])
    labels = jnp.pad(targets.reshape(-1), (0, pad)).reshape(-1, chunk)

    @jax.checkpoint
    def chunk_nll(row, label):
        logits = matmul(row, head_t).astype(jnp.float32)
        logits = logits if bias is None else logits + bias.astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, label[:, None], axis=1)[:, 0]
        return jax.nn.logsumexp(logits, axis=1) - chosen

    nll = jax.lax.map(lambda part: chunk_nll(*part), (rows, labels))
    return nll.reshape(-1)[:count].reshape(targets.shape)
