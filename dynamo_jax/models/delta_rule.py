"""The gated delta rule: a memory of one matrix a head (arXiv 2412.06464; a decay for each channel: arXiv 2510.26692).

A head's state S (key x value) forgets and is corrected at each token, by its key k, value v, query q:

    S <- exp(decay) S;  S <- S + k (beta (v - k S));  out = q S

decay is not above 0: one number for all rows of S, or one for each. beta is in (0, 1). A token with decay 0 and beta 0
changes nothing. ``chunked`` does many tokens with few products, ``step`` one.

The gradient keeps one state a chunk; what is between is computed again.

Axes: B batch, T tokens, J key heads, G value heads that share a key head, K key size, V value size, N chunks, C tokens
of a chunk, F 1 or K: rows of the state with a decay of their own.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

CHUNK = 64  # tokens; more make the products larger, and the share of them that is masked as well
CHANNEL_CHUNK = 16  # where each row has a decay, and a pair of tokens takes K numbers
UNIT_EPS = 1e-6  # beside the squares of a query's or key's numbers
_exact = functools.partial(jnp.matmul, precision="highest")  # errors of an inverse add up from level to level


class DeltaCache(NamedTuple):
    """What one layer keeps. window: the convolution's inputs of the newest tokens, zeros before the first one; state:
    float32, whatever the activations are."""

    window: Float[Array, "B W-1 M"]
    state: Float[Array, "B J G K V"]


class Tokens(NamedTuple):
    """What the delta rule takes of each token, float32. decay: logarithm of the factor that the state keeps."""

    query: Float[Array, "B T J K"]
    key: Float[Array, "B T J K"]
    value: Float[Array, "B T J G V"]
    decay: Float[Array, "B T J G F"]
    beta: Float[Array, "B T J G"]


def unit(x: Float[Array, "*S K"]) -> Float[Array, "*S K"]:
    """Vectors of length one, or 0 where they are 0."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + UNIT_EPS)


def tokens_of(
    query: Float[Array, "B T J K"],
    key: Float[Array, "B T J K"],
    value: Float[Array, "B T J G V"],
    decay: Float[Array, "B T J G F"],
    beta: Float[Array, "B T J G"],
    mask: Bool[Array, "B T"] | None,
) -> Tokens:
    """Of any queries, keys and values, with unit vectors, queries divided by sqrt(K). mask: False where a token is
    padding, which then changes nothing."""
    if mask is not None:
        decay, beta = (jnp.where(mask.reshape(*mask.shape, *(1,) * (a.ndim - 2)), a, 0.0) for a in (decay, beta))
    query, key, value = (a.astype(jnp.float32) for a in (query, key, value))
    return Tokens(unit(query) * query.shape[-1] ** -0.5, unit(key), value, decay, beta)


def advance(tokens: Tokens, state: Float[Array, "B J G K V"]) -> tuple[Float[Array, "B T J G V"], Array]:
    """Outputs, and the state after all tokens."""
    return (step if tokens.key.shape[1] == 1 else chunked)(tokens, state)


def step(tokens: Tokens, state: Float[Array, "B J G K V"]) -> tuple[Float[Array, "B 1 J G V"], Array]:
    """Output and state of one token a sequence."""
    q, k, v, decay, beta = (part[:, 0] for part in tokens)
    state = state * jnp.exp(decay)[..., None]
    missing = beta[..., None] * (v - jnp.einsum("bjk,bjgkv->bjgv", k, state))
    state = state + k[:, :, None, :, None] * missing[..., None, :]
    return jnp.einsum("bjk,bjgkv->bjgv", q, state)[:, None], state


def chunked(
    tokens: Tokens, state: Float[Array, "B J G K V"], size: int = 0
) -> tuple[Float[Array, "B T J G V"], Float[Array, "B J G K V"]]:
    """Outputs and state of many tokens, ``size`` at a time (arXiv 2412.06464, section 3.3).

    Within a chunk the corrections of all tokens are the solution of one triangular system; from chunk to chunk the
    state goes on as it does from token to token in ``step``. size: a power of two; 0: what suits the decays.
    """
    count, of_rows = tokens.key.shape[1], tokens.decay.shape[-1] > 1
    size = min(size or (CHANNEL_CHUNK if of_rows else CHUNK), 1 << (count - 1).bit_length())
    tokens = tokens._replace(query=tokens.query[..., None, :], key=tokens.key[..., None, :])  # the G of values
    q, k, v, decay, beta = (_chunks(part, size) for part in tokens)
    corrections = jax.checkpoint(_corrections)
    if of_rows:  # one chunk after the other, for what its pairs of tokens take
        new, read = jax.lax.map(lambda chunk: corrections(*chunk), (k, v, decay, beta))
    else:
        new, read = corrections(k, v, decay, beta)
    state, out = jax.lax.scan(jax.checkpoint(_chunk, prevent_cse=False), state, (q, k, new, read, decay))
    out = jnp.moveaxis(out, (0, 4), (1, 2))  # (B, N, C, J, G, V)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :count], state


def _chunks(part: Float[Array, "B T J G *V"], size: int) -> Float[Array, "N B J G C *V"]:
    """Tokens in chunks, the last one filled up with tokens that change nothing."""
    part = jnp.pad(part, ((0, 0), (0, -part.shape[1] % size), *((0, 0) for _ in part.shape[2:])))
    return jnp.moveaxis(part.reshape(part.shape[0], -1, size, *part.shape[2:]), (1, 2), (0, 4))


def _pairs(
    a: Float[Array, "*S C K"], k: Float[Array, "*S C K"], total: Float[Array, "*S C F"]
) -> Float[Array, "*S C C"]:
    """a_i k_j, each row with what is left of it at token i of what token j wrote; 0 for j > i. total: sum of the
    decays from the chunk's start."""
    lower = jnp.tril(jnp.ones((total.shape[-2],) * 2, bool))[..., None]
    spans = total[..., :, None, :] - total[..., None, :, :]
    fading = jnp.exp(jnp.where(lower, spans, -jnp.inf))  # masked before exp, which could overflow
    if total.shape[-1] == 1:
        return (a @ k.mT) * fading[..., 0]
    return jnp.sum(a[..., :, None, :] * k[..., None, :, :] * fading, axis=-1)


def _corrections(
    k: Float[Array, "*S B J 1 C K"],
    v: Float[Array, "*S B J G C V"],
    decay: Float[Array, "*S B J G C F"],
    beta: Float[Array, "*S B J G C"],
) -> tuple[Float[Array, "*S B J G C V"], Float[Array, "*S B J G C K"]]:
    """What each token would write into a chunk that begins with a state of zeros, and what it takes off for each row
    of the state that there is.

    With L[i, j] = beta_i k_i k_j times the fading from j to i, below the diagonal, they are the solutions x of
    (1 + L) x = beta v and of (1 + L) x = beta exp(total decay) k.
    """
    total = jnp.cumsum(decay, axis=-2)
    solved = inverse(beta[..., None] * _pairs(k, k, total))
    return solved @ (beta[..., None] * v), solved @ (beta[..., None] * jnp.exp(total) * k)


@jax.custom_vjp
def inverse(lower: Float[Array, "*S C C"]) -> Float[Array, "*S C C"]:
    """Of 1 + what is below the diagonal; C is a power of two.

    From blocks of 1 to blocks of C: of two neighbours A and B with X below A and beside B, the inverse has
    -B^-1 X A^-1 in the place of X (Higham, Accuracy and Stability of Numerical Algorithms, section 14.2). All blocks
    of a size take two products of whole matrices, so that there is no loop over rows.
    """
    size = lower.shape[-1]
    row, column = jnp.arange(size)[:, None], jnp.arange(size)
    found = jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), lower.shape)
    for half in (1 << level for level in range(size.bit_length() - 1)):
        below = (row // half == column // half + 1) & (row // half % 2 == 1)
        found = found - _exact(_exact(found, jnp.where(below, lower, 0)), found)
    return found


def _inverse_backward(found: Array, d: Array) -> tuple[Array]:
    return (-jnp.tril(_exact(_exact(found.mT, d), found.mT), -1),)


inverse.defvjp(lambda lower: (inverse(lower),) * 2, _inverse_backward)


def _chunk(
    state: Float[Array, "B J G K V"], part: tuple[Array, ...]
) -> tuple[Float[Array, "B J G K V"], Float[Array, "B J G C V"]]:
    """The state after a chunk, and the chunk's outputs."""
    q, k, new, read, decay = part
    total = jnp.cumsum(decay, axis=-2)
    at_end = total[..., -1:, :]
    written = new - read @ state
    out = (q * jnp.exp(total)) @ state + _pairs(q, k, total) @ written
    state = state * jnp.exp(at_end).mT + (k * jnp.exp(at_end - total)).mT @ written
    return state, out
