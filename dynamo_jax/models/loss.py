"""Next-token losses without holding the logits of all tokens at once. Heads are floats or stand for them (``Packed``).

Axes: B batch, T tokens, D hidden, V vocabulary, C rows a chunk.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dynamo_jax.kernels.products import matmul
from dynamo_jax.models.rest import Packed

CHUNK_ROWS = 1024
CHUNK_LOGITS = 2**23  # of a large vocabulary fewer rows at a time


def next_token_nll(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"] | Packed,
    targets: Int[Array, "B T"],
    bias: Float[Array, " V"] | None = None,
    cap: float = 0.0,
) -> Float[Array, "B T"]:
    """-log p(target) in nats, float32, from the hidden states that the head takes. cap: as ``capped`` takes it."""
    logits = _logits_of(head, bias, hidden.dtype, cap)

    def nll(row, label):
        own = logits(row)
        return jax.nn.logsumexp(own, axis=1) - _at(own, label)

    return _by_chunk(nll, head.shape[0], hidden, targets)


def next_token_scores(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"] | Packed,
    targets: Int[Array, "B T"],
    bias: Float[Array, " V"] | None = None,
    cap: float = 0.0,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """As ``next_token_nll``, and whether each target is the likeliest token."""
    logits = _logits_of(head, bias, hidden.dtype, cap)

    def scores(row, label):
        own = logits(row)
        return jax.nn.logsumexp(own, axis=1) - _at(own, label), own.argmax(axis=1) == label

    return _by_chunk(scores, head.shape[0], hidden, targets)


def next_token_divergence(
    exact: Float[Array, "B T D"],
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"] | Packed,
    bias: Float[Array, " V"] | None = None,
    cap: float = 0.0,
) -> Float[Array, "B T"]:
    """The Kullback-Leibler divergence in nats, float32, of what ``hidden`` predicts from what ``exact`` does.
    cap: as ``capped`` takes it."""
    both = Head(head, bias, cap)
    return head_divergence(exact, hidden, both, both)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weights", "bias"], meta_fields=["cap"])
@dataclasses.dataclass(frozen=True)
class Head:
    """What turns hidden states into logits, an argument of jitted functions. cap: as ``capped`` takes it."""

    weights: Float[Array, "V D"] | Packed
    bias: Float[Array, " V"] | None = None
    cap: float = 0.0

    def log_probabilities(self, rows: Float[Array, "C D"]) -> Float[Array, "C V"]:
        return jax.nn.log_softmax(_logits_of(self.weights, self.bias, rows.dtype, self.cap)(rows))


def head_divergence(
    exact: Float[Array, "B T D"], hidden: Float[Array, "B T D"], reference: Head, head: Head
) -> Float[Array, "B T"]:
    """``next_token_divergence`` of two heads: what ``head`` predicts from ``hidden``, what ``reference`` does from
    ``exact``."""
    logits = [_logits_of(h.weights, h.bias, hidden.dtype, h.cap) for h in (reference, head)]

    def divergence(row, other):
        p, q = (jax.nn.log_softmax(of(each)) for of, each in zip(logits, (row, other)))
        return jnp.sum(jnp.exp(p) * (p - q), axis=1)

    return _by_chunk(divergence, head.weights.shape[0], exact, hidden)


def next_token_changes(
    exact: Float[Array, "B T D"],
    hidden: Float[Array, "B T D1"],
    reference: Head,
    head: Head,
    targets: Int[Array, "B T"],
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"], Float[Array, "B T"]]:
    """Of what ``head`` predicts from ``hidden``, beside what ``reference`` does from ``exact``: the Kullback-Leibler
    divergence from it, whether the likeliest token is the same, and how many nats more each target costs."""

    def changes(row, other, label):
        p, q = reference.log_probabilities(row), head.log_probabilities(other)
        return jnp.sum(jnp.exp(p) * (p - q), axis=1), p.argmax(axis=1) == q.argmax(axis=1), _at(p - q, label)

    return _by_chunk(changes, head.weights.shape[0], exact, hidden, targets)


def top_tokens(
    hidden: Float[Array, "B T D"], head: Head, count: int
) -> tuple[Int[Array, "B T M"], Float[Array, "B T M"], Float[Array, "B T"]]:
    """The likeliest tokens, their log-probabilities, and that of all others together."""

    def top(row):
        values, tokens = jax.lax.top_k(head.log_probabilities(row), count)
        return tokens, values, _rest(values)

    return _by_chunk(top, head.weights.shape[0], hidden)


def top_token_changes(
    tokens: Int[Array, "B T M"],
    values: Float[Array, "B T M"],
    rest: Float[Array, "B T"],
    nll: Float[Array, "B T"],
    hidden: Float[Array, "B T D"],
    head: Head,
    targets: Int[Array, "B T"],
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"], Float[Array, "B T"]]:
    """``next_token_changes`` from what ``top_tokens`` gave, all other tokens taken as one; nll: of the targets."""

    def changes(tokens, p, p_rest, loss, row, label):
        q = head.log_probabilities(row)
        own = jnp.take_along_axis(q, tokens, axis=1)
        apart = jnp.sum(jnp.exp(p) * (p - own), axis=1) + jnp.exp(p_rest) * (p_rest - _rest(own))
        return jnp.maximum(apart, 0), tokens[:, 0] == q.argmax(axis=1), -_at(q, label) - loss

    return _by_chunk(changes, head.weights.shape[0], tokens, values, rest, nll, hidden, targets)


def _at(rows: Float[Array, "C V"], label: Int[Array, " C"]) -> Float[Array, " C"]:
    """Of each row the number at its label."""
    return jnp.take_along_axis(rows, label[:, None], axis=1)[:, 0]


def _rest(values: Float[Array, "C M"]) -> Float[Array, " C"]:
    """The logarithm of what probabilities leave of 1."""
    return jnp.log(jnp.maximum(1 - jnp.exp(values).sum(axis=1), 1e-9))


def capped(logits: Float[Array, "*N V"], cap: float) -> Float[Array, "*N V"]:
    """Logits within ``cap`` of zero, by tanh; as they are where it is 0."""
    return jnp.tanh(logits / cap) * cap if cap else logits


def _logits_of(
    head: Float[Array, "V D"] | Packed, bias: Float[Array, " V"] | None, dtype: Any, cap: float
) -> Callable[[Array], Array]:
    head_t = head.astype(dtype).T

    def logits(rows: Float[Array, "C D"]) -> Float[Array, "C V"]:
        out = matmul(rows, head_t).astype(jnp.float32)
        return capped(out if bias is None else out + bias.astype(jnp.float32), cap)

    return logits


def _by_chunk(function: Callable[..., Any], vocabulary: int, *arrays: Array) -> Any:
    """``function`` of some rows at a time of arrays (B, T, ..): a number for each row, or several."""
    shape = arrays[0].shape[:2]
    count = shape[0] * shape[1]
    chunk = min(CHUNK_ROWS, count, max(1, CHUNK_LOGITS // vocabulary))

    def cut(array: Array) -> Array:
        flat = array.reshape(count, *array.shape[2:])
        return jnp.pad(flat, ((0, -count % chunk), *[(0, 0)] * (flat.ndim - 1))).reshape(-1, chunk, *flat.shape[1:])

    out = jax.lax.map(lambda part: jax.checkpoint(function)(*part), tuple(map(cut, arrays)))
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:count].reshape(*shape, *a.shape[2:]), out)
