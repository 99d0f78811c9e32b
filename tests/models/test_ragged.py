"""A batch of ragged requests behind caches that attend themselves equals each request alone."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_decoders import SIZES, decoder_config

from dynamo_jax.models.decoder import Decoder, parameters, with_parameters

pytestmark = pytest.mark.usefixtures("quick_compilation")

GROUPED = decoder_config(**SIZES, windows=(3, 0), attention_sinks=True)
LATENT = decoder_config(
    **{k: v for k, v in SIZES.items() if k != "num_key_value_heads"},
    **dict(kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6),
)
MIXED = decoder_config(
    **SIZES,
    **dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8),
    delta_layers=(1,),
)


@dataclasses.dataclass
class Remembering:
    """What a request's tokens see, in plain formulas: all keys and values that came, and whose they are."""

    keys: jax.Array | None = None
    values: jax.Array | None = None
    request_of: np.ndarray | None = None
    positions: np.ndarray | None = None

    def of(self, request_of, positions):
        def attend(q, k, v, scale, window, sinks):
            owner = request_of if self.keys is None else np.concatenate([self.request_of, request_of])
            at = positions if self.keys is None else np.concatenate([self.positions, positions])
            keys, values = (
                new[0] if old is None else jnp.concatenate([old, new[0]])
                for old, new in ((self.keys, k), (self.values, v))
            )
            seen = (owner[None] == request_of[:, None]) & (at[None] <= positions[:, None])
            if window:
                seen &= at[None] > positions[:, None] - window
            group = q.shape[2] // k.shape[2]
            scores = jnp.einsum("qhc,khc->hqk", q[0], jnp.repeat(keys, group, axis=1)) * scale
            weights = jnp.exp(jnp.where(seen, scores, -jnp.inf))
            total = weights.sum(axis=-1) + (0 if sinks is None else jnp.exp(sinks)[:, None])
            out = jnp.einsum("hqk,khv->qhv", weights / total[..., None], jnp.repeat(values, group, axis=1))
            return out[None], Remembering(keys, values, owner, at)

        return attend


@pytest.mark.parametrize("config", [GROUPED, LATENT], ids=["grouped", "latent"])
def test_ragged_requests_have_the_states_of_each_alone(config):
    model = Decoder(config, rngs=nnx.Rngs(0))
    if config is GROUPED:
        for layer in model.layers:
            layer.attention.sinks[...] = jax.random.normal(jax.random.key(3), (4,))
    tokens = [np.random.default_rng(i).integers(0, 50, n) for i, n in enumerate((7, 1, 4))]
    steps = [(0, 0, 5), (2, 0, 4)], [(1, 0, 1), (0, 5, 7)]  # requests, from where on, and up to where

    @jax.jit
    def ragged(arrays):
        decoder, caches, found = with_parameters(config, arrays), [Remembering()] * 2, []
        for step in steps:
            request_of = np.concatenate([np.full(end - begin, r) for r, begin, end in step])
            positions = np.concatenate([np.arange(begin, end) for _, begin, end in step])
            given = jnp.asarray(np.concatenate([tokens[r][begin:end] for r, begin, end in step]))
            run = [cache.of(request_of, positions) for cache in caches]
            hidden, routings, caches = decoder.ragged_states(given, jnp.asarray(positions), run)
            found.append((hidden, [routing.experts for routing in routings]))
        return found

    @jax.jit
    def alone(arrays):
        decoder = with_parameters(config, arrays)
        return [decoder.hidden_states(jnp.asarray(t)[None])[0][0] for t in tokens]

    arrays = parameters(model)
    want = [np.asarray(one) for one in alone(arrays)]
    for step, (hidden, chosen) in zip(steps, ragged(arrays)):
        rows = np.concatenate([want[r][begin:end] for r, begin, end in step])
        np.testing.assert_allclose(hidden, rows, atol=1e-5)
        assert [one.shape for one in chosen] == [(len(rows), 2)] * 2


def test_a_mixer_that_keeps_a_state_of_its_own_is_named():
    model = Decoder(MIXED, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="layer 1 is DeltaNet: of ragged requests only softmax attention"):
        model.ragged_states(jnp.zeros(3, int), jnp.arange(3), [None, None])
    with pytest.raises(ValueError, match="1 caches for 2 layers"):
        model.ragged_states(jnp.zeros(3, int), jnp.arange(3), [None])
