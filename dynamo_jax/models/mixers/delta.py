"""The gated delta net: a linear mixer whose memory is one matrix a head (arXiv 2412.06464).

A head's state S (key x value) forgets and is corrected at each token, by its key k, value v, query q:

    S <- exp(decay) S;  S <- S + k (beta (v - k S));  out = q S / sqrt(key size)

decay = -exp(a_log) softplus(a + dt_bias) is not above 0, beta = sigmoid(b) is in (0, 1). Queries, keys and values go
through a short causal convolution and SiLU before, queries and keys are made unit vectors, and the output is normed
and multiplied by SiLU(z). ``chunked`` does many tokens with few products, ``step`` one. A token that is padding has
decay 0 and beta 0, and the convolution does not see it.

The gradient keeps one state a chunk; what is between is computed again.

Axes: B batch, T tokens, D hidden, J key heads, G value heads that share a key head, K key size, V value size, W tokens
that the convolution sees, M = J (2K + GV) channels of the convolution, N chunks, C tokens of a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from dynamo_jax.kernels.products import matmul
from dynamo_jax.models.attention import Places
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.norms import normal, rms_norm
from dynamo_jax.models.specs import DeltaNet

CHUNK = 64  # tokens; more make the products larger, and the share of them that is masked as well
UNIT_EPS = 1e-6  # beside the squares of a query's or key's numbers
_exact = functools.partial(jnp.matmul, precision="highest")  # errors of an inverse add up from level to level
A_RANGE = (0.01, 16.0)  # of exp(a_log) before training


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
    decay: Float[Array, "B T J G"]
    beta: Float[Array, "B T J G"]


class GatedDeltaNet(nnx.Module):
    """The mixer with its projections (in, out); fused ones are ordered key head by key head."""

    def __init__(self, config: ModelConfig, spec: DeltaNet, *, rngs: nnx.Rngs):
        c, s = config, spec
        self.config, self.spec = c, s
        heads, value, mixed = s.linear_num_value_heads, _value_size(s), _channels(s)
        if s.fused_projections:
            self.qkvz = normal(rngs, (c.hidden_size, mixed + value), c)
            self.ba = normal(rngs, (c.hidden_size, 2 * heads), c)
        else:
            self.qkv = normal(rngs, (c.hidden_size, mixed), c)
            self.z = normal(rngs, (c.hidden_size, value), c)
            self.b, self.a = (normal(rngs, (c.hidden_size, heads), c) for _ in range(2))
        self.conv = normal(rngs, (mixed, 1, s.linear_conv_kernel_dim), c)
        low, high = A_RANGE
        self.a_log = nnx.Param(jnp.log(jax.random.uniform(rngs.params(), (heads,), minval=low, maxval=high)))
        self.dt_bias = nnx.Param(jnp.ones(heads))
        self.gated_norm = nnx.Param(jnp.ones(s.linear_value_head_dim))
        self.out = normal(rngs, (value, c.hidden_size), c)

    def __call__(
        self, x: Float[Array, "B T D"], places: Places, cache: DeltaCache | None
    ) -> tuple[Float[Array, "B T D"], DeltaCache | None]:
        before = empty_cache(self.spec, x.shape[0], 0, x.dtype) if cache is None else cache
        mixed, z, b, a = self.projected(x)
        mixed, window = convolved(mixed, self.conv[...][:, 0], before.window, places.mask)
        tokens = self.tokens(mixed, b, a, places.mask)
        out, state = (step if x.shape[1] == 1 else chunked)(tokens, before.state)
        out = rms_norm(out, self.gated_norm[...], self.config.rms_norm_eps) * jax.nn.silu(z.astype(jnp.float32))
        out = out.astype(x.dtype).reshape(-1, _value_size(self.spec))
        out = matmul(out, self.out[...].astype(x.dtype)).reshape(x.shape)
        return out, None if cache is None else DeltaCache(window.astype(cache.window.dtype), state)

    def projected(self, x: Float[Array, "B T D"]) -> tuple[Array, Array, Array, Array]:
        """Inputs of the convolution (B, T, M), z (B, T, J, G, V), b and a (B, T, J, G)."""
        s, flat, of_tokens = self.spec, x.reshape(-1, x.shape[-1]), x.shape[:2]

        def product(weights: nnx.Param, *shape: int) -> Array:
            return matmul(flat, weights[...].astype(x.dtype)).reshape(*of_tokens, *shape)

        heads = (s.linear_num_key_heads, s.linear_num_value_heads // s.linear_num_key_heads)
        z_shape = (*heads, s.linear_value_head_dim)
        if not s.fused_projections:
            return product(self.qkv, -1), product(self.z, *z_shape), product(self.b, *heads), product(self.a, *heads)
        key, value = s.linear_key_head_dim, heads[1] * s.linear_value_head_dim
        parts = jnp.split(product(self.qkvz, heads[0], -1), (key, 2 * key, 2 * key + value), axis=-1)
        mixed = jnp.concatenate([part.reshape(*of_tokens, -1) for part in parts[:3]], axis=-1)
        b, a = jnp.split(product(self.ba, heads[0], -1), 2, axis=-1)
        return mixed, parts[3].reshape(*of_tokens, *z_shape), b, a

    def tokens(self, mixed: Float[Array, "B T M"], b: Array, a: Array, mask: Bool[Array, "B T"] | None) -> Tokens:
        s = self.spec
        size = s.linear_num_key_heads * s.linear_key_head_dim
        q, k, v = jnp.split(mixed.astype(jnp.float32), (size, 2 * size), axis=-1)
        q, k = (unit(part.reshape(*part.shape[:2], s.linear_num_key_heads, -1)) for part in (q, k))
        of_head = (self.a_log[...].astype(jnp.float32), self.dt_bias[...].astype(jnp.float32))
        a_log, dt_bias = (part.reshape(a.shape[2:]) for part in of_head)
        decay = -jnp.exp(a_log) * jax.nn.softplus(a.astype(jnp.float32) + dt_bias)
        beta = jax.nn.sigmoid(b.astype(jnp.float32))
        if mask is not None:
            decay, beta = (jnp.where(mask[..., None, None], part, 0.0) for part in (decay, beta))
        value = v.reshape(*a.shape, s.linear_value_head_dim)
        return Tokens(q * s.linear_key_head_dim**-0.5, k, value, decay, beta)


def empty_cache(spec: DeltaNet, batch: int, capacity: int, dtype: Any) -> DeltaCache:
    """One layer's cache; it is of one size, whatever the ``capacity``."""
    s = spec
    heads = (s.linear_num_key_heads, s.linear_num_value_heads // s.linear_num_key_heads)
    state = (batch, *heads, s.linear_key_head_dim, s.linear_value_head_dim)
    window = (batch, s.linear_conv_kernel_dim - 1, _channels(s))
    return DeltaCache(jnp.zeros(window, dtype), jnp.zeros(state, jnp.float32))


def _value_size(spec: DeltaNet) -> int:
    return spec.linear_num_value_heads * spec.linear_value_head_dim


def _channels(spec: DeltaNet) -> int:
    return 2 * spec.linear_num_key_heads * spec.linear_key_head_dim + _value_size(spec)


def unit(x: Float[Array, "*S K"]) -> Float[Array, "*S K"]:
    """Vectors of length one, or 0 where they are 0."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + UNIT_EPS)


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


def step(tokens: Tokens, state: Float[Array, "B J G K V"]) -> tuple[Float[Array, "B 1 J G V"], Array]:
    """Output and state of one token a sequence."""
    q, k, v, decay, beta = (part[:, 0] for part in tokens)
    state = state * jnp.exp(decay)[..., None, None]
    missing = beta[..., None] * (v - jnp.einsum("bjk,bjgkv->bjgv", k, state))
    state = state + k[:, :, None, :, None] * missing[..., None, :]
    return jnp.einsum("bjk,bjgkv->bjgv", q, state)[:, None], state


def chunked(
    tokens: Tokens, state: Float[Array, "B J G K V"], size: int = CHUNK
) -> tuple[Float[Array, "B T J G V"], Float[Array, "B J G K V"]]:
    """Outputs and state of many tokens, ``size`` at a time (arXiv 2412.06464, section 3.3).

    Within a chunk the corrections of all tokens are the solution of one triangular system; from chunk to chunk the
    state goes on as it does from token to token in ``step``. size: a power of two.
    """
    count = tokens.key.shape[1]
    size = min(size, 1 << (count - 1).bit_length())
    tokens = tokens._replace(query=tokens.query[..., None, :], key=tokens.key[..., None, :])  # the G of values
    q, k, v, decay, beta = (_chunks(part, size) for part in tokens)
    new, read = jax.checkpoint(_corrections)(k, v, decay, beta)
    state, out = jax.lax.scan(jax.checkpoint(_chunk, prevent_cse=False), state, (q, k, new, read, decay))
    out = jnp.moveaxis(out, (0, 4), (1, 2))  # (B, N, C, J, G, V)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :count], state


def _chunks(part: Float[Array, "B T J G *V"], size: int) -> Float[Array, "N B J G C *V"]:
    """Tokens in chunks, the last one filled up with tokens that change nothing."""
    part = jnp.pad(part, ((0, 0), (0, -part.shape[1] % size), *((0, 0) for _ in part.shape[2:])))
    return jnp.moveaxis(part.reshape(part.shape[0], -1, size, *part.shape[2:]), (1, 2), (0, 4))


def _fading(decay: Float[Array, "*S C"]) -> tuple[Float[Array, "*S C"], Float[Array, "*S C C"]]:
    """What is left of the chunk's first state at each token, and at token i of what token j wrote, 0 for j > i."""
    total = jnp.cumsum(decay, axis=-1)
    lower = jnp.tril(jnp.ones((decay.shape[-1],) * 2, bool))
    pairs = jnp.where(lower, total[..., :, None] - total[..., None, :], -jnp.inf)  # before exp, which could overflow
    return jnp.exp(total), jnp.exp(pairs)


def _corrections(
    k: Float[Array, "N B J 1 C K"],
    v: Float[Array, "N B J G C V"],
    decay: Float[Array, "N B J G C"],
    beta: Float[Array, "N B J G C"],
) -> tuple[Float[Array, "N B J G C V"], Float[Array, "N B J G C K"]]:
    """What each token would write into a chunk that begins with a state of zeros, and what it takes off for each row
    of the state that there is.

    With L[i, j] = beta_i k_i k_j times the fading from j to i, below the diagonal, they are the solutions x of
    (1 + L) x = beta v and of (1 + L) x = beta exp(total decay) k.
    """
    total, fading = _fading(decay)
    solved = inverse(beta[..., None] * (k @ k.mT) * fading)
    return solved @ (beta[..., None] * v), solved @ ((beta * total)[..., None] * k)


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
    total, fading = _fading(decay)
    written = new - read @ state
    out = (q * total[..., None]) @ state + ((q @ k.mT) * fading) @ written
    left = fading[..., -1, :]  # at the last token, of what each token wrote
    state = state * total[..., -1, None, None] + (k * left[..., None]).mT @ written
    return state, out
