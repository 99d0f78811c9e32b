"""Which experts a token goes to, and with which gates, in each family's way.

Sources: softmax and top-k (Mixtral, arXiv 2401.04088; OLMoE, 2409.02060); limited to groups
(DeepSeek-V2, 2405.04434, section 2.1.2); sigmoid with bias correction (DeepSeek-V3, 2412.19437,
section 2.1.2); sparse mixer (GRIN, 2409.12136). All in float32.

Axes: N tokens, D hidden, E experts, k experts a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dynamo_jax.models.specs import Mixture, Router


class Routing(NamedTuple):
    """What the router decided. logits: (N, E) float32; experts, gates: (N, k)."""

    logits: Float[Array, "N E"]
    experts: Int[Array, "N k"]
    gates: Float[Array, "N k"]


def route(
    x: Float[Array, "N D"],
    router: Float[Array, "D E"],
    mixture: Mixture,
    bias: Float[Array, " E"] | None = None,
    correction: Float[Array, " E"] | None = None,
    scale: Float[Array, " E"] | None = None,
) -> Routing:
    """``bias`` is added to the logits; ``correction`` only to the scores by which experts are chosen; ``scale``
    multiplies gates."""
    logits = x.astype(jnp.float32) @ router.astype(jnp.float32)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    spec = mixture.router
    if cap := spec.router_logit_softcapping:
        logits = jnp.tanh(logits / cap) * cap
    experts, gates = CHOICES[spec.routing](logits, spec, mixture.num_experts_per_tok, correction)
    gates = gates * spec.routed_scaling_factor
    return Routing(logits, experts.astype(jnp.int32), gates if scale is None else gates * scale[experts])


Choice = tuple[Int[Array, "N k"], Float[Array, "N k"]]


def _topk_softmax(logits: Float[Array, "N E"], spec: Router, k: int, _: Array | None) -> Choice:
    top, experts = jax.lax.top_k(logits, k)
    return experts, jax.nn.softmax(top, axis=-1)


def _sparsemixer(logits: Float[Array, "N E"], spec: Router, k: int, _: Array | None) -> Choice:
    return sparse_mixer(logits, spec.router_jitter_noise)


def _softmax(logits: Float[Array, "N E"], spec: Router, k: int, correction: Array | None) -> Choice:
    return _best(jax.nn.softmax(logits, axis=-1), spec, k, correction, best=1, least=0.0)


def _sigmoid(logits: Float[Array, "N E"], spec: Router, k: int, correction: Array | None) -> Choice:
    return _best(jax.nn.sigmoid(logits), spec, k, correction, best=2, least=1e-20)


CHOICES: dict[str, Callable[[Array, Router, int, Array | None], Choice]] = {
    "softmax": _softmax,
    "topk_softmax": _topk_softmax,
    "sigmoid": _sigmoid,
    "sparsemixer": _sparsemixer,
}


def _best(
    scores: Float[Array, "N E"], spec: Router, k: int, correction: Float[Array, " E"] | None, best: int, least: float
) -> Choice:
    """The experts of the highest scores; best: as ``limited_to_groups`` takes it; least: added to the gates' sum."""
    choice = scores if correction is None else scores + correction.astype(jnp.float32)
    if spec.n_group:
        choice = limited_to_groups(choice, spec, best)
    _, experts = jax.lax.top_k(choice, k)
    gates = jnp.take_along_axis(scores, experts, axis=-1)
    if spec.norm_topk_prob:
        gates = gates / (gates.sum(axis=-1, keepdims=True) + max(spec.norm_floor, least))
    return experts, gates


def limited_to_groups(scores: Float[Array, "N E"], spec: Router, best: int) -> Float[Array, "N E"]:
    """Scores with the experts outside the ``topk_group`` best groups at -inf; a group is as good as the
    sum of its ``best`` highest scores."""
    groups = scores.reshape(scores.shape[0], spec.n_group, -1)
    of_group = jax.lax.top_k(groups, min(best, groups.shape[-1]))[0].sum(axis=-1)
    _, chosen = jax.lax.top_k(of_group, spec.topk_group)
    kept = jax.nn.one_hot(chosen, spec.n_group, dtype=bool).any(axis=1)
    return jnp.where(kept[:, :, None], groups, -jnp.inf).reshape(scores.shape)


def sparse_mixer(scores: Float[Array, "N E"], noise: float) -> tuple[Int[Array, "N 2"], Float[Array, "N 2"]]:
    """The two best experts; each one's gate is its softmax among the scores within 2*noise of it."""

    def pick(left: Array) -> tuple[Array, Array]:
        best = left.max(axis=-1, keepdims=True)
        far = (best - scores) / jnp.maximum(jnp.abs(scores), best) > 2 * noise
        expert = jnp.argmax(left, axis=-1, keepdims=True)
        gate = jnp.take_along_axis(jax.nn.softmax(jnp.where(far, -jnp.inf, left), axis=-1), expert, axis=-1)
        return expert.astype(jnp.int32), gate

    first, first_gate = pick(scores)
    taken = jax.nn.one_hot(first[:, 0], scores.shape[1], dtype=bool)
    second, second_gate = pick(jnp.where(taken, -jnp.inf, scores))
    return jnp.concatenate([first, second], axis=-1), jnp.concatenate([first_gate, second_gate], axis=-1)
