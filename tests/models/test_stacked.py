"""Layers in loops against the same layers one after the other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_decoders import decoder_config

from dynamo_jax.models.decoder import Decoder, new_cache, parameters, with_parameters
from dynamo_jax.models.experts import float_experts
from dynamo_jax.models.stacked import Loop, loops, stacked, stacked_cache, stacked_decoder

pytestmark = pytest.mark.usefixtures("quick_compilation")

BASE = dict(
    family="olmoe",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=16,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=64,
)
DENSE = {"dense_intermediate_size": 24}
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 6,
}  # fmt: skip
UNTIED = {"tie_word_embeddings": False, "shared_intermediate_size": 8, "logits_scaling": 2.0}
KINDS = {
    "alike": ({}, [Loop(0, 1, 5)]),
    "one": ({"num_hidden_layers": 1}, [Loop(0, 1, 1)]),
    "dense first": ({"dense_layers": (0,), **DENSE}, [Loop(0, 1, 1), Loop(1, 1, 4)]),
    "every second dense": ({"dense_layers": (1, 3), **DENSE}, [Loop(0, 2, 2), Loop(4, 1, 1)]),
    "windows in turns": ({"num_hidden_layers": 4, "windows": (3, 0, 3, 0)}, [Loop(0, 2, 2)]),
    "three and one": ({"num_hidden_layers": 10, "windows": (3, 3, 3, 0) * 2 + (3, 3)}, [Loop(0, 4, 2), Loop(8, 1, 2)]),
    "three delta nets and one": (
        {"num_hidden_layers": 40, "delta_layers": [i for i in range(40) if (i + 1) % 4], **DELTA},
        [Loop(0, 4, 10)],
    ),
    "a delta net in turns": ({"num_hidden_layers": 4, "delta_layers": (0, 2), **DELTA}, [Loop(0, 2, 2)]),
    "two after two": ({"windows": (3, 3, 0, 0, 3), **UNTIED}, [Loop(0, 1, 2), Loop(2, 1, 2), Loop(4, 1, 1)]),
}


def numbered(layer, x, routing, weights, form):
    """Experts that tell which layer they were called for."""
    out, _ = float_experts(layer, x, routing, weights, form)
    return out * (1 + layer), (jnp.asarray(layer), routing)


@pytest.mark.parametrize("kind", KINDS)
def test_alike_layers_are_found(kind):
    changes, wanted = KINDS[kind]
    assert loops(decoder_config(**BASE | changes)) == tuple(wanted)


@pytest.mark.parametrize(
    "kind",
    [
        "every second dense",
        pytest.param("two after two", marks=pytest.mark.slow),
        pytest.param("a delta net in turns", marks=pytest.mark.slow),
    ],
)
def test_loops_do_what_the_layers_do_one_after_the_other(kind):
    config = decoder_config(**BASE | KINDS[kind][0])
    arrays = parameters(Decoder(config, rngs=nnx.Rngs(0)))
    arrays = {n: a + 0.3 * jax.random.normal(jax.random.key(i), a.shape) for i, (n, a) in enumerate(arrays.items())}
    tokens = np.random.default_rng(0).integers(0, 61, (2, 9))
    mask = np.ones((2, 9), bool)
    mask[1, :4] = False  # padding before

    def run(decoder, cache):
        """A prefill and a step: logits, what experts returned, and the cache at the end."""
        found = []
        for part in (slice(0, 8), slice(8, 9)):
            own = jnp.asarray(tokens[:, part]), jnp.asarray(mask[:, part])
            hidden, extras, cache = decoder.cached_states(*own, cache, experts=numbered)
            found.append((decoder.logits(hidden), extras))
        return found, cache

    empty = new_cache(config, 2, 16)
    one, before = jax.jit(lambda a, c: run(with_parameters(config, a), c))(arrays, empty)
    loop, after = jax.jit(lambda a, c: run(stacked_decoder(config, a), c))(
        stacked(config, arrays), stacked_cache(config, empty)
    )
    for (logits, extras), (same, others) in zip(one, loop):
        np.testing.assert_allclose(same, logits, rtol=1e-5, atol=1e-5)
        assert [int(n) for n, _ in others] == [int(n) for n, _ in extras] == list(range(config.num_moe_layers))
        for (_, routing), (_, other) in zip(extras, others):
            np.testing.assert_array_equal(other.experts, routing.experts)
    for a, b in zip(jax.tree.leaves(stacked_cache(config, before)), jax.tree.leaves(after)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_program_does_not_grow_with_the_layers():
    def size(layers):
        config = decoder_config(**BASE | {"num_hidden_layers": layers})
        arrays = stacked(config, parameters(Decoder(config, rngs=nnx.Rngs(0))))
        cache = stacked_cache(config, new_cache(config, 1, 16))
        token = jnp.zeros((1, 1), jnp.int32)

        def step(arrays, cache):
            return stacked_decoder(config, arrays).cached_states(token, token == 0, cache)[0]

        return str(jax.make_jaxpr(step)(arrays, cache)).count("dot_general")

    assert size(3) == size(9) > 0


def test_a_missing_parameter_is_named():
    config = decoder_config(**BASE)
    arrays = stacked(config, parameters(Decoder(config, rngs=nnx.Rngs(0))))
    del arrays["loops.0.0.router"], arrays["embed"]
    with pytest.raises(ValueError, match="embed is missing"):
        stacked_decoder(config, arrays)
    arrays = stacked(config, parameters(Decoder(config, rngs=nnx.Rngs(0))))
    del arrays["loops.0.0.router"]
    decoder, token = stacked_decoder(config, arrays), jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(ValueError, match="router is missing"):
        decoder.cached_states(token, token == 0, stacked_cache(config, new_cache(config, 1, 16)))


def test_a_step_holds_no_second_cache():
    """The loop writes to the cache that it was given: its temporaries are a layer's part of it."""
    config = decoder_config(**BASE | {"num_hidden_layers": 8, "max_position_embeddings": 4096})
    arrays = stacked(config, parameters(Decoder(config, rngs=nnx.Rngs(0))))
    cache, token = stacked_cache(config, new_cache(config, 2, 4096)), jnp.zeros((2, 1), jnp.int32)

    def step(arrays, cache):
        states, _, after = stacked_decoder(config, arrays).cached_states(token, token == 0, cache)
        return states, after

    compiled = jax.jit(step, donate_argnums=1).lower(arrays, cache).compile()
    held = sum(a.nbytes for a in jax.tree.leaves(cache))
    assert compiled.memory_analysis().alias_size_in_bytes >= held
    assert compiled.memory_analysis().temp_size_in_bytes < 0.3 * held
