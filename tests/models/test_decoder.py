"""The decoder's invariants: causality, permutations that change nothing, edge sizes, exact gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_decoders import SIZES, decoder_config

from dynamo_jax.models.attention import Places, attend
from dynamo_jax.models.decoder import (
    Decoder,
    expert_parameter_names,
    new_cache,
    parameters,
    positions_of,
    with_parameters,
)
from dynamo_jax.models.loss import CHUNK_ROWS, next_token_nll

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = decoder_config(**SIZES)
TOKENS = jax.random.randint(jax.random.key(0), (2, 12), 0, 50)


@pytest.fixture(scope="module")
def model():
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


@jax.jit
def logits(arrays, tokens):
    return with_parameters(CONFIG, arrays)(tokens)[0]


def test_a_later_token_changes_no_earlier_logit(model):
    before = logits(parameters(model), TOKENS)
    after = logits(parameters(model), TOKENS.at[:, 7].add(1) % 50)
    np.testing.assert_allclose(before[:, :7], after[:, :7], atol=1e-5)
    assert not np.allclose(before[:, 7:], after[:, 7:], atol=1e-3)


def test_sequences_of_a_batch_do_not_see_each_other(model):
    both, second = (logits(parameters(model), tokens) for tokens in (TOKENS, TOKENS[1:]))
    np.testing.assert_allclose(both[1:], second, atol=1e-5)


def test_reordering_an_experts_channels_changes_nothing(model):
    arrays, order = parameters(model), np.random.default_rng(0).permutation(16)
    for part in ("gate", "up", "down"):
        name = f"layers.1.{part}"
        arrays[name] = arrays[name].at[3].set(arrays[name][3][order])
    np.testing.assert_allclose(logits(parameters(model), TOKENS), logits(arrays, TOKENS), atol=1e-5)


def test_reordering_experts_with_their_router_columns_changes_nothing(model):
    arrays, order = parameters(model), np.random.default_rng(0).permutation(5)
    for part in ("gate", "up", "down"):
        arrays[f"layers.0.{part}"] = arrays[f"layers.0.{part}"][order]
    arrays["layers.0.router"] = arrays["layers.0.router"][:, order]
    np.testing.assert_allclose(logits(parameters(model), TOKENS), logits(arrays, TOKENS), atol=1e-5)


def test_parameters_and_with_parameters_are_inverse(model):
    arrays = parameters(model)
    again = parameters(with_parameters(CONFIG, arrays))
    assert arrays.keys() == again.keys() and all((arrays[n] == again[n]).all() for n in arrays)


def test_a_wrong_parameter_is_named(model):
    arrays = parameters(model)
    arrays["layers.0.router"] = arrays["layers.0.router"][:, :3]
    with pytest.raises(ValueError, match=r"layers.0.router is \(32, 3\), expected \(32, 5\)"):
        with_parameters(CONFIG, arrays)


def test_a_model_without_experts_says_what_it_needs(model):
    rest = {n: a for n, a in parameters(model).items() if n not in expert_parameter_names(CONFIG)}
    with pytest.raises(ValueError, match="layer 0 has no float experts"):
        with_parameters(CONFIG, rest)(TOKENS)


@pytest.mark.parametrize("change", [{"num_experts": 1, "num_experts_per_tok": 1}, {"num_experts_per_tok": 5}])
def test_one_expert_or_all_experts(change):
    model = Decoder(decoder_config(**SIZES | change), rngs=nnx.Rngs(0))
    assert np.isfinite(jax.jit(model)(TOKENS[:1, :1])[0]).all()  # one token, too


@pytest.mark.parametrize("change", [{"num_experts_per_tok": 6}, {"head_dim": 0}, {"num_key_value_heads": 3}])
def test_sizes_that_cannot_work_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        decoder_config(**SIZES | change)


def test_bfloat16_is_close_to_float32(model):
    full, half = (jax.jit(model, static_argnames="dtype")(TOKENS, dtype=t)[0] for t in (jnp.float32, jnp.bfloat16))
    assert float(jnp.linalg.norm(full - half) / jnp.linalg.norm(full)) < 0.1


@pytest.mark.parametrize(("window", "with_sinks"), [(0, False), (4, False), (0, True), (3, True)])
def test_attention_and_its_gradient_equal_the_plain_formula(window, with_sinks):
    keys = jax.random.split(jax.random.key(1), 3)
    q = jax.random.normal(keys[0], (2, 9, 4, 8))
    k, v = (jax.random.normal(key, (2, 9, 2, 8)) for key in keys[1:])

    sinks = jax.random.normal(keys[0], (4,)) if with_sinks else None
    positions, keep = positions_of((2, 9), jnp.arange(9) >= jnp.array([[0], [3]]))
    places = Places(positions, keep, None)

    def ours(q, k, v, sinks):
        return attend(q, k, v, places, 8**-0.5, window, sinks)

    def plain(q, k, v, sinks):
        scores = jnp.einsum("bqhc,bkhc->bhqk", q, jnp.repeat(k, 2, axis=2)) * 8**-0.5
        near = positions[:, :, None] - keep[:, None, :]
        seen = (near >= 0) & (keep >= 0)[:, None, :] & (near < (window or 99))
        scores = jnp.where(seen[:, None], scores, -1e30)
        if sinks is not None:
            scores = jnp.concatenate([scores, jnp.broadcast_to(sinks[:, None, None], (2, 4, 9, 1))], axis=-1)
        return jnp.einsum("bhqk,bkhc->bqhc", jax.nn.softmax(scores)[..., :9], jnp.repeat(v, 2, axis=2))

    def total(attention):
        return lambda *a: jnp.sum(jnp.sin(attention(*a)), where=(keep >= 0)[:, :, None, None])

    arguments = (q, k, v, sinks)
    values = (jax.jit(attention)(*arguments)[keep >= 0] for attention in (ours, plain))
    np.testing.assert_allclose(*values, atol=1e-5)
    numbers = (0, 1, 2, 3) if with_sinks else (0, 1, 2)
    gradients = (jax.jit(jax.grad(total(attention), numbers))(*arguments) for attention in (ours, plain))
    for g, t in zip(*gradients):
        np.testing.assert_allclose(g, t, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 7, CHUNK_ROWS + 3])
def test_the_chunked_loss_equals_log_softmax(rows):
    hidden = jax.random.normal(jax.random.key(0), (1, rows, 8))
    head = jax.random.normal(jax.random.key(1), (11, 8))
    targets = jax.random.randint(jax.random.key(2), (1, rows), 0, 11)
    want = -jax.nn.log_softmax(hidden @ head.T)[0, jnp.arange(rows), targets[0]]
    np.testing.assert_allclose(next_token_nll(hidden, head, targets)[0], want, rtol=1e-4, atol=1e-5)


def test_a_prompt_in_pieces_has_the_states_of_the_whole(model):
    """The second sequence begins with padding; then one token, then several, through the cache."""
    mask = jnp.ones((2, 12), bool).at[1, :3].set(False)
    whole, _ = jax.jit(model.hidden_states)(TOKENS, mask)
    cache = new_cache(CONFIG, 2, 16)
    for start, stop in ((0, 6), (6, 7), (7, 12)):
        part, _, cache = jax.jit(model.cached_states)(TOKENS[:, start:stop], mask[:, start:stop], cache)
        seen = np.asarray(mask[:, start:stop])
        np.testing.assert_allclose(np.asarray(part)[seen], np.asarray(whole[:, start:stop])[seen], atol=1e-5)
    assert int(cache.used) == 12
