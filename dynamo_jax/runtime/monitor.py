"""Is a stream of text like a known dataset, and which? Asked of the router's counts, which are there anyway.

Every ``HOP`` tokens: where do the last ``2 * HOP`` lie? Data is of the dataset whose score is least: how far it lies
beyond the dataset's own windows, over what chance allows them (``signatures.py``). It is novel where that is above 1.
The label changes only when two decisions in a row agree, so that mixed text does not flap. State and update are arrays
and a pure function, for a jitted step; each request of a batch has a state of its own.

Axes: A known datasets, L layers, E experts, B requests, K pieces of text.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dynamo_jax.kernels.rows import sort_by_expert
from dynamo_jax.runtime.signatures import SPAN, TINY, Signatures, squared

HOP = SPAN // 2  # tokens between two decisions; each looks at twice as many
UNKNOWN = -1  # label before the first decision; A is the label of novel data


class Watch(NamedTuple):
    """The state of B streams. older, newer: routed tokens of the last whole hop and of the one that goes on. label: a
    dataset's number, A for novel, UNKNOWN; candidate: what the last decision said; score: the least of ``scores``,
    above 1 for novel data; decisions: so far."""

    older: Float[Array, "B L E"]
    newer: Float[Array, "B L E"]
    older_tokens: Float[Array, " B"]
    newer_tokens: Float[Array, " B"]
    label: Int[Array, " B"]
    candidate: Int[Array, " B"]
    score: Float[Array, " B"]
    decisions: Int[Array, " B"]


def start(signatures: Signatures, requests: int = 1) -> Watch:
    """Streams of which nothing has been seen."""
    # Each its own array: a state that holds one twice could not be donated.
    older, newer = (jnp.zeros((requests, *signatures.shares.shape[1:])) for _ in range(2))
    label, candidate = (jnp.full(requests, UNKNOWN, jnp.int32) for _ in range(2))
    older_tokens, newer_tokens, score = (jnp.zeros(requests) for _ in range(3))
    return Watch(older, newer, older_tokens, newer_tokens, label, candidate, score, jnp.zeros(requests, jnp.int32))


def watch(signatures: Signatures, state: Watch, counts: Float[Array, "B K L E"], tokens: Float[Array, "B K"]) -> Watch:
    """The state after K pieces of text of at most HOP tokens each, one after the other; where routed tokens of each
    piece went. A piece of no tokens changes nothing."""

    def piece(state: Watch, one: tuple[Array, Array]) -> tuple[Watch, None]:
        own = state._replace(newer=state.newer + one[0], newer_tokens=state.newer_tokens + one[1])
        ended = own.newer_tokens >= HOP

        def decided(own: Watch) -> Watch:
            after = jax.vmap(lambda one: _hop(signatures, one))(own)
            return jax.tree.map(lambda a, b: jnp.where(ended.reshape(-1, *[1] * (a.ndim - 1)), a, b), after, own)

        return jax.lax.cond(ended.any(), decided, lambda own: own, own), None

    pieces = (jnp.moveaxis(counts, 1, 0).astype(jnp.float32), tokens.T.astype(jnp.float32))
    return jax.lax.scan(piece, state, pieces)[0]


def watch_tokens(
    signatures: Signatures, state: Watch, chosen: Int[Array, "L N k"], request_of: Int[Array, " N"]
) -> Watch:
    """The state after N tokens, each of some stream and those of a stream in their order; chosen: the experts that each
    token went to. A token of no stream, -1, changes nothing."""
    streams, (layers, experts) = state.label.shape[0], signatures.shares.shape[1:]
    real = (request_of >= 0) & (request_of < streams)
    own = jnp.where(real, request_of, streams)
    order = sort_by_expert(own[:, None], streams + 1)  # by stream
    each = order.group_sizes
    place = order.position[:, 0] - (jnp.cumsum(each) - each)[own]  # of a token in its stream's
    flat = jnp.arange(layers)[:, None, None] * experts + chosen

    def piece(now: tuple[Array, Watch]) -> tuple[Array, Watch]:
        number, state = now
        here = jnp.where(real & (place // HOP == number), own, streams)
        where = here[None, :, None] * (layers * experts) + flat
        counts = jnp.bincount(where.reshape(-1), length=streams * layers * experts)  # what lies past the end is dropped
        tokens = jnp.bincount(here, length=streams)
        return number + 1, watch(signatures, state, counts.reshape(streams, 1, layers, experts), tokens[:, None])

    pieces = -(-each[:streams].max() // HOP)
    return jax.lax.while_loop(lambda now: now[0] < pieces, piece, (jnp.zeros((), pieces.dtype), state))[1]


def _hop(signatures: Signatures, state: Watch) -> Watch:
    """The end of one stream's hop: a decision, if two hops have been seen."""
    label, score = decide(signatures, state.older + state.newer)
    seen = state.older_tokens > 0
    agreed = (label == state.candidate) | (state.label == UNKNOWN)
    return Watch(
        older=state.newer,
        newer=jnp.zeros_like(state.newer),
        older_tokens=state.newer_tokens,
        newer_tokens=jnp.zeros_like(state.newer_tokens),
        label=jnp.where(seen & agreed, label, state.label),
        candidate=jnp.where(seen, label, state.candidate),
        score=jnp.where(seen, score, state.score),
        decisions=state.decisions + seen.astype(jnp.int32),
    )


def scores(signatures: Signatures, counts: Float[Array, "L E"]) -> Float[Array, " A"]:
    """How far ``2 * HOP`` tokens with these routing counts lie from each dataset: 0 where its own windows lie on the
    mean, 1 where novel text begins. Where no limit is set, in units of log distance."""
    share = counts / jnp.maximum(counts.sum(axis=-1, keepdims=True), 1)
    away = (share - signatures.shares).reshape(len(signatures.place), -1)
    flat = (signatures.weight.reshape(-1), signatures.directions.reshape(len(signatures.damping), -1))
    distance = jnp.log(jnp.maximum(squared(away, *flat, signatures.damping), TINY))
    return (distance - signatures.place) / jnp.where(jnp.isfinite(signatures.limit), signatures.limit, 1.0)


def decide(signatures: Signatures, counts: Float[Array, "L E"]) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """The dataset that ``2 * HOP`` tokens with these routing counts are of, A for none, and the score, at least 0; 0,
    and never A, where no limit is set."""
    found = scores(signatures, counts)
    nearest = jnp.argmin(found).astype(jnp.int32)
    score = jnp.where(jnp.isfinite(signatures.limit[nearest]), jnp.maximum(found[nearest], 0.0), 0.0)
    return jnp.where(score > 1, jnp.asarray(len(found), jnp.int32), nearest), score
