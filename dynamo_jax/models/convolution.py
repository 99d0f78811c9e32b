"""A short causal convolution of each channel, with padding anywhere.

Axes: B batch, T tokens, M channels, W tokens that the convolution sees, the newest one too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def convolved(
    x: Float[Array, "B T M"],
    weights: Float[Array, "M W"],
    window: Float[Array, "B W-1 M"],
    mask: Bool[Array, "B T"] | None = None,
    after: Callable[[Array], Array] = jax.nn.silu,
) -> tuple[Float[Array, "B T M"], Float[Array, "B W-1 M"]]:
    """SiLU, or what ``after`` makes, of each channel's causal convolution, and the window of the next step.

    window: inputs of the tokens before. mask: False where a token is padding, which no other token sees; its own output
    means nothing.
    """
    tokens, taps = x.shape[1], weights.shape[1]
    if mask is not None:  # tokens before padding, in their order
        x = jnp.take_along_axis(x, jnp.argsort(~mask, axis=1, stable=True)[..., None], axis=1)
    seen = jnp.concatenate([window.astype(x.dtype), x], axis=1)
    weights = weights.astype(jnp.float32)
    terms = (seen[:, tap : tap + tokens].astype(jnp.float32) * weights[:, tap] for tap in range(taps))
    out = after(functools.reduce(jnp.add, terms)).astype(x.dtype)
    if mask is None:
        return out, seen[:, tokens:]
    place = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    newest = mask.sum(axis=1, keepdims=True) + jnp.arange(taps - 1)
    out, left = (jnp.take_along_axis(a, at[..., None], axis=1) for a, at in ((out, place), (seen, newest)))
    return out, left
