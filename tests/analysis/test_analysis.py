"""Streaming statistics against float64 loops, and significance where theory says what it must be."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_decoders import decoder_config

from dynamo_jax.analysis.significance import (
    channel_significance,
    cost_of_row,
    expert_significance,
    whole_over_blocks,
)
from dynamo_jax.analysis.statistics import merge, observe, observe_experts, token_importance
from dynamo_jax.models.decoder import Decoder
from dynamo_jax.models.experts import ExpertWeights
from dynamo_jax.models.loss import next_token_nll
from dynamo_jax.models.routing import Routing

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOKENS, HIDDEN, EXPERTS, CHANNELS, TOP_K, BLOCK = 40, 32, 5, 16, 2, 4
observed_experts = jax.jit(observe_experts, static_argnames=("channel_block", "form", "apart"))


def layer(seed=0, scale=0.3, tokens=TOKENS):
    keys = jax.random.split(jax.random.key(seed), 6)
    weights = ExpertWeights(*(scale * jax.random.normal(k, (EXPERTS, CHANNELS, HIDDEN)) for k in keys[:3]))
    x = jax.random.normal(keys[3], (tokens, HIDDEN))
    logits = jax.random.normal(keys[4], (tokens, EXPERTS)).at[:, 3].set(-30.0)  # expert 3 gets no token
    gates, experts = jax.lax.top_k(jax.nn.softmax(logits), TOP_K)
    return x, Routing(logits, experts.astype(jnp.int32), gates), weights


def noisy(weights, seed=9, size=0.02):
    keys = jax.random.split(jax.random.key(seed), 3)
    return ExpertWeights(*(w + size * jax.random.normal(k, w.shape) for w, k in zip(weights, keys)))


def loop(x, routing, weights, candidate):
    """Every sum by hand, in float64."""
    x, w, c = (jax.tree.map(lambda a: np.asarray(a, np.float64), t) for t in (x, weights, candidate))
    sums = {
        name: np.zeros((EXPERTS, *shape))
        for name, shape in {
            "counts": (), "gate": (), "gate_sq": (), "output_energy": (), "errors": (1,),
            "hidden_energy": (CHANNELS,),
        }.items()
    }  # fmt: skip

    def silu(a):
        return a / (1 + np.exp(-a))

    for t in range(TOKENS):
        for e, g in zip(np.asarray(routing.experts)[t], np.asarray(routing.gates, np.float64)[t]):
            a, u = w.gate[e] @ x[t], w.up[e] @ x[t]
            h = silu(a) * u
            y = h @ w.down[e]
            other = (silu(c.gate[e] @ x[t]) * (c.up[e] @ x[t])) @ c.down[e]
            values = {
                "counts": 1, "gate": g, "gate_sq": g**2, "output_energy": g**2 * y @ y,
                "errors": g**2 * np.sum((y - other) ** 2),
                "hidden_energy": g**2 * h**2,
            }  # fmt: skip
            for name, value in values.items():
                sums[name][e] += value
    return sums


def test_every_sum_equals_a_loop_over_tokens():
    x, routing, weights = layer()
    candidate = noisy(weights)
    _, stats = observed_experts(x, routing, weights, [candidate], jnp.ones(TOKENS), BLOCK)
    for name, want in loop(x, routing, weights, candidate).items():
        np.testing.assert_allclose(getattr(stats, name), want, rtol=2e-4, atol=1e-6, err_msg=name)
    assert stats.tokens == TOKENS


def test_an_expert_without_tokens_has_zeros_and_nothing_is_nan():
    _, stats = observed_experts(*layer(), [], jnp.ones(TOKENS), BLOCK)
    assert all(np.isfinite(a).all() for a in stats)
    assert stats.counts[3] == 0 and (stats.hidden_energy[3] == 0).all()


CONFIG = decoder_config(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=5,
    num_experts_per_tok=2,
    max_position_embeddings=32,
    norm_topk_prob=True,
    initializer_range=0.25,
)


@pytest.fixture(scope="module")
def model():
    return Decoder(CONFIG, rngs=nnx.Rngs(1))


@pytest.fixture(scope="module")
def run(model):
    """Statistics and counts of tokens; programs stay, so tests share them where shapes are the same."""
    weights = [x.expert_weights() for x in model.layers]
    candidates = [[noisy(w)] for w in weights]
    observed = jax.jit(lambda t, m, i: observe(model, t, m, weights, candidates, BLOCK, importance=i))

    def run(tokens, mask=None, importance=None):
        return observed(tokens, jnp.ones(tokens.shape) if mask is None else mask, importance)

    return run


@pytest.fixture(scope="module")
def importance_of(model):
    """The importance of tokens of which all count."""
    return jax.jit(lambda t: token_importance(model, t, jnp.ones((t.shape[0], t.shape[1] - 1))))


def test_two_batches_merged_are_one_batch(run):
    tokens = jax.random.randint(jax.random.key(0), (4, 10), 0, 40)
    whole, counts = run(tokens)
    parts = merge(run(tokens[:2])[0], run(tokens[2:])[0])
    for a, b in zip(whole, parts):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(counts.sum(axis=0), whole.counts)


def test_a_masked_sequence_counts_for_nothing(run):
    tokens = jax.random.randint(jax.random.key(0), (4, 10), 0, 40)
    masked, _ = run(tokens, jnp.ones((4, 10)).at[2:].set(0))
    for a, b in zip(masked, run(tokens[:2])[0]):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_importance_is_the_squared_gradient_by_the_experts_output(model, importance_of):
    """Against finite differences along each direction of each token."""
    tokens = jax.random.randint(jax.random.key(3), (1, 8), 0, 40)
    got = importance_of(tokens)

    def loss(shift):
        def experts(index, x, routing, weights, form):
            from dynamo_jax.models.experts import expert_outputs

            return expert_outputs(x, routing, weights, form) + (shift if index == 1 else 0), None

        hidden, _ = model.hidden_states(tokens[:, :-1], experts=experts)
        return next_token_nll(hidden, model.head_weights(), tokens[:, 1:]).sum()

    zero, basis, step = jnp.zeros((7, 32)), np.eye(7 * 32, dtype=np.float32), 1e-2
    columns = basis.reshape(-1, 7, 32)
    shifted = jax.jit(jax.vmap(lambda d: loss(zero + d)))
    up, down = shifted(step * columns), shifted(-step * columns)
    squared = (np.asarray(up - down).reshape(7, 32) / (2 * step)) ** 2
    np.testing.assert_allclose(got[1, 0], squared.sum(axis=1) / 2 / 32, rtol=1e-2, atol=1e-3 * squared.sum())


def test_errors_count_by_the_importance_of_their_tokens(run):
    """One token alone: its errors are those of a run in which the others are masked."""
    tokens = jax.random.randint(jax.random.key(0), (2, 10), 0, 40)
    one = jnp.zeros((2, 2, 10)).at[0, 0, 4].set(3.0).at[1, 0, 4].set(5.0)
    found, masked = run(tokens, importance=one)[0], run(tokens, one[0] / 3)[0]
    for name in ("errors", "apart_errors", "block_errors"):
        for layer, weight in enumerate((3.0, 5.0)):
            want = weight * getattr(masked, name)[layer]
            np.testing.assert_allclose(getattr(found, name)[layer], want, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found.counts, run(tokens)[0].counts)


def test_a_blocks_error_is_that_of_an_expert_whose_other_blocks_are_exact():
    x, routing, weights = layer()
    other = noisy(weights)
    _, stats = observed_experts(x, routing, weights, [other], jnp.ones(TOKENS), BLOCK)
    assert stats.block_errors.shape == (EXPERTS, CHANNELS // BLOCK, 1)
    for block in range(CHANNELS // BLOCK):
        own = slice(block * BLOCK, (block + 1) * BLOCK)
        one = ExpertWeights(*(w.at[:, own].set(o[:, own]) for w, o in zip(weights, other)))
        _, alone = observed_experts(x, routing, weights, [one], jnp.ones(TOKENS), BLOCK)
        np.testing.assert_allclose(stats.block_errors[:, block], alone.errors, rtol=1e-4, atol=1e-6)


def test_the_error_of_gate_and_up_or_of_down_is_that_of_an_expert_whose_other_projections_are_exact():
    x, routing, weights = layer()
    other = noisy(weights)
    _, stats = observed_experts(x, routing, weights, [other], jnp.ones(TOKENS), BLOCK, apart=True)
    blocks = CHANNELS // BLOCK
    assert stats.apart_errors.shape == (EXPERTS, 2, 1) and stats.block_errors.shape == (EXPERTS, 2 * blocks, 1)
    for index, mixed in enumerate((other._replace(down=weights.down), weights._replace(down=other.down))):
        _, alone = observed_experts(x, routing, weights, [mixed], jnp.ones(TOKENS), BLOCK)
        np.testing.assert_allclose(stats.apart_errors[:, index], alone.errors, rtol=1e-4, atol=1e-6)
        own = stats.block_errors[:, index * blocks : (index + 1) * blocks]
        np.testing.assert_allclose(own, alone.block_errors, rtol=1e-4, atol=1e-6)


def test_a_channels_significance_is_the_energy_that_it_adds_to_the_output():
    x, routing, weights = layer()
    _, stats = observed_experts(x, routing, weights, [], jnp.ones(TOKENS), BLOCK)
    found = channel_significance(jax.tree.map(lambda a: a[None], stats), weights.down[None])[0]
    only = weights._replace(down=jnp.zeros_like(weights.down).at[2, 7].set(weights.down[2, 7]))
    _, alone = observed_experts(x, routing, only, [], jnp.ones(TOKENS), BLOCK)
    assert found[2, 7] == pytest.approx(float(alone.output_energy[2]) / TOKENS, rel=1e-4)


def test_an_expert_that_calibration_missed_needs_no_correction():
    ratio = whole_over_blocks(np.zeros((1, 2, 1)), np.zeros((1, 2, 3, 1)))
    assert (ratio == 1).all()


def test_few_rows_say_little_of_what_a_row_costs_and_none_say_nothing():
    """By hand: two layers of three experts; of the second no row was seen."""
    sums = np.array([[[30.0, 3.0], [0.0, 0.0], [10.0, 1.0]], [[0.0, 0.0]] * 3])
    rows = np.array([[10.0, 0.0, 30.0], [0.0, 0.0, 0.0]])
    found = cost_of_row(sums, rows, 10.0)
    assert found.shape == sums.shape
    np.testing.assert_allclose(found[0], [[2.0, 0.2], [1.0, 0.1], [0.5, 0.05]])  # the layer's row costs 1 and 0.1
    np.testing.assert_array_equal(found[1], 0)
    np.testing.assert_allclose(cost_of_row(sums[..., None], rows, 1e9)[0, :, 0, 0], 1.0, rtol=1e-6)


def test_repeating_the_data_leaves_significance_unchanged(run, importance_of):
    tokens = jax.random.randint(jax.random.key(0), (2, 11), 0, 40)
    twice = jnp.concatenate([tokens, tokens])

    def significance(t):
        return expert_significance(run(t[:, :-1], importance=importance_of(t))[0])

    np.testing.assert_allclose(significance(tokens), significance(twice), rtol=1e-3, atol=1e-9)
