"""Places of requests in a state, and what a step is told of them; no engine is needed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from small_decoders import decoder_config

from dynamo_jax.engines.steps import Places, asked, form_of, place_of_tokens, wrap
from dynamo_jax.runtime import serving

LATENT = decoder_config(
    vocab_size=50, hidden_size=32, intermediate_size=16, num_attention_heads=4, num_experts=5, num_experts_per_tok=2,
    max_position_embeddings=32, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6,
)  # fmt: skip


def test_a_request_keeps_its_place_while_the_engine_knows_it():
    places = Places(3)
    assert places.take(["a", "b"], {"a", "b"}) == [(0, True), (1, True)]
    assert places.take(["b"], {"a", "b"}) == [(1, False)]
    assert places.take(["c", "a"], {"a", "b", "c"}) == [(2, True), (0, False)]
    assert places.take(["d"], {"a", "c", "d"}) == [(1, True)]  # that of b, which has ended


def test_a_request_that_waits_gives_its_place_where_they_are_short():
    places = Places(2)
    places.take(["a", "b"], {"a", "b"})
    assert places.take(["b", "c"], {"a", "b", "c"}) == [(1, False), (0, True)]
    assert places.take(["a"], {"a", "c"}) == [(1, True)]


def test_a_token_is_of_the_place_of_its_request():
    starts = jnp.array([0, 3, 4, 4, 4])  # two requests, and two empty rows
    places = jnp.array([2, 0, -1, -1])
    assert place_of_tokens(starts, places, 6).tolist() == [2, 2, 2, 0, -1, -1]
    assert place_of_tokens(jnp.zeros(5, int), places, 3).tolist() == [-1, -1, -1]


def test_a_request_that_comes_gets_its_variant_and_a_new_monitor(quantized):
    _, state = serving.init(quantized, requests=3)
    assert state.watch is not None
    state = serving.switch(state, [1, 1, 0])
    state = state._replace(watch=state.watch._replace(newer_tokens=jnp.array([5.0, 6.0, 7.0])))
    place_of, variant = jnp.array([2, 2, 0, -1]), jnp.array([1, 1, 0, 1])
    comes = jnp.array([True, True, False, True])  # place 2 is taken anew, place 0 goes on, the last one says nothing
    state, taken = jax.jit(asked)(state, place_of, variant, comes)
    assert state.number.tolist() == [0, 1, 1] and taken.tolist() == [False, False, True]
    assert state.watch.newer_tokens.tolist() == [5, 6, 0]


def test_attention_that_a_pool_cannot_hold_is_named():
    with pytest.raises(ValueError, match="layer 0 is Latent: vLLM serves our decoder with grouped attention alone"):
        form_of(LATENT, "vLLM")


def test_a_method_is_wrapped_once():
    class Engine:
        def step(self, number, by=1):
            return number + by

    for _ in range(2):
        wrap(Engine, "step", lambda original, engine, number, **named: 10 * original(engine, number, **named))
    assert Engine().step(3) == 40 and Engine().step(3, by=2) == 50
