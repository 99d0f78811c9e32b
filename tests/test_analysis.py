"""Streaming statistics against float64 loops, and significance where theory says what it must be."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial.distance
from flax import nnx

from dynamo_jax.analysis.significance import (
    block_errors,
    channel_significance,
    expert_significance,
    measured_over_predicted,
)
from dynamo_jax.analysis.statistics import merge, observe, observe_experts, output_sensitivity
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.decoder import Decoder
from dynamo_jax.models.experts import ExpertWeights
from dynamo_jax.models.loss import next_token_nll
from dynamo_jax.models.routing import Routing
from dynamo_jax.runtime.monitor import judge, novelty_threshold, routing_divergence

TOKENS, HIDDEN, EXPERTS, CHANNELS, TOP_K = 40, 32, 5, 16, 2


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
            "counts": (), "gate": (), "gate_sq": (), "output_energy": (), "errors": (1,), "input_energy": (HIDDEN,),
            "hidden_energy": (CHANNELS,), "up_gain": (CHANNELS,), "gate_gain": (CHANNELS,),
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
            slope = (silu(a + 1e-6) - silu(a - 1e-6)) / 2e-6
            values = {
                "counts": 1, "gate": g, "gate_sq": g**2, "output_energy": g**2 * y @ y,
                "errors": g**2 * np.sum((y - other) ** 2), "input_energy": g**2 * x[t] ** 2,
                "hidden_energy": g**2 * h**2, "up_gain": g**2 * silu(a) ** 2, "gate_gain": g**2 * (u * slope) ** 2,
            }  # fmt: skip
            for name, value in values.items():
                sums[name][e] += value
    return sums


def test_every_sum_equals_a_loop_over_tokens():
    x, routing, weights = layer()
    candidate = noisy(weights)
    _, stats = observe_experts(x, routing, weights, [candidate], jnp.ones(TOKENS))
    for name, want in loop(x, routing, weights, candidate).items():
        np.testing.assert_allclose(getattr(stats, name), want, rtol=2e-4, atol=1e-6, err_msg=name)
    assert stats.tokens == TOKENS


def test_an_expert_without_tokens_has_zeros_and_nothing_is_nan():
    _, stats = observe_experts(*layer(), [], jnp.ones(TOKENS))
    assert all(np.isfinite(a).all() for a in stats)
    assert stats.counts[3] == 0 and (stats.hidden_energy[3] == 0).all()


CONFIG = ModelConfig(
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


def run(model, tokens, mask=None):
    weights = [x.expert_weights() for x in model.layers]
    mask = jnp.ones(tokens.shape) if mask is None else mask
    return jax.jit(lambda t, m: observe(model, t, m, weights, [[noisy(w)] for w in weights]))(tokens, mask)


def test_two_batches_merged_are_one_batch(model):
    tokens = jax.random.randint(jax.random.key(0), (4, 10), 0, 40)
    whole, counts = run(model, tokens)
    parts = merge(run(model, tokens[:2])[0], run(model, tokens[2:])[0])
    for a, b in zip(whole, parts):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(counts.sum(axis=0), whole.counts)


def test_a_masked_sequence_counts_for_nothing(model):
    tokens = jax.random.randint(jax.random.key(0), (3, 10), 0, 40)
    masked, _ = run(model, tokens, jnp.ones((3, 10)).at[2].set(0))
    for a, b in zip(masked, run(model, tokens[:2])[0]):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_sensitivity_is_the_squared_gradient_by_the_experts_output(model):
    """A finite difference along the gradient's own direction gives its length."""
    tokens = jax.random.randint(jax.random.key(3), (1, 8), 0, 40)
    got = output_sensitivity(model, tokens, jnp.ones((1, 7)))

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
    assert float(got[1]) == pytest.approx(float(np.sum(((up - down) / (2 * step)) ** 2)), rel=1e-2)


def test_the_predicted_error_is_exact_when_one_channels_down_row_is_off():
    x, routing, weights = layer()
    off = weights._replace(down=weights.down.at[1, 4].add(0.1))
    _, stats = observe_experts(x, routing, weights, [off], jnp.ones(TOKENS))
    deltas = jnp.stack([o - w for o, w in zip(off, weights)])[None]
    stacked = jax.tree.map(lambda a: a[None], stats)
    predicted = block_errors(stacked, weights.down[None], deltas, 4)
    np.testing.assert_allclose(predicted.sum(axis=2)[0], stats.errors[:, 0], rtol=1e-4, atol=1e-7)
    assert (predicted[0, 1] > 0).tolist() == [False, True, False, False]


def test_the_predicted_error_is_near_the_measured_one_for_white_inputs_and_small_errors():
    x, routing, weights = layer(scale=0.1, tokens=2000)
    near = noisy(weights, size=0.003)
    _, stats = observe_experts(x, routing, weights, [near], jnp.ones(2000))
    deltas = jnp.stack([o - w for o, w in zip(near, weights)])[None]
    predicted = block_errors(jax.tree.map(lambda a: a[None], stats), weights.down[None], deltas, 4)
    # gains and errors both grow with |x|^2, whose relative variance is 2 / 32: gate and up terms correlate by
    # some multiples of that, which the prediction leaves out
    assert predicted.sum() == pytest.approx(float(stats.errors.sum()), rel=4 * 2 / HIDDEN)


def test_a_channels_significance_is_the_energy_that_it_adds_to_the_output():
    x, routing, weights = layer()
    _, stats = observe_experts(x, routing, weights, [], jnp.ones(TOKENS))
    found = channel_significance(jax.tree.map(lambda a: a[None], stats), weights.down[None])[0]
    only = weights._replace(down=jnp.zeros_like(weights.down).at[2, 7].set(weights.down[2, 7]))
    _, alone = observe_experts(x, routing, only, [], jnp.ones(TOKENS))
    assert found[2, 7] == pytest.approx(float(alone.output_energy[2]) / TOKENS, rel=1e-4)


def test_an_expert_that_calibration_missed_needs_no_correction():
    ratio = measured_over_predicted(np.zeros((1, 2, 1)), np.zeros((1, 2, 3, 1)))
    assert (ratio == 1).all()


def test_repeating_the_data_leaves_significance_unchanged(model):
    tokens = jax.random.randint(jax.random.key(0), (2, 11), 0, 40)
    twice = jnp.concatenate([tokens, tokens])

    def significance(t):
        sensitivity = jax.jit(lambda t: output_sensitivity(model, t, jnp.ones((len(t), 10))))(t)
        return expert_significance(run(model, t[:, :-1])[0], sensitivity)

    np.testing.assert_allclose(significance(tokens), significance(twice), rtol=1e-3, atol=1e-9)


def test_divergence_is_jensen_shannons():
    a, b = np.random.default_rng(0).random((2, 3, 7))
    want = [scipy.spatial.distance.jensenshannon(p, q, base=2) ** 2 for p, q in zip(a, b)]
    assert routing_divergence(a, b) == pytest.approx(np.mean(want))
    assert routing_divergence(a, b) == pytest.approx(float(routing_divergence(b, a)))
    assert routing_divergence(a, 5 * a) == pytest.approx(0, abs=1e-12)
    assert routing_divergence(np.array([[1.0, 0]]), np.array([[0, 1.0]])) == pytest.approx(1)


def test_no_tokens_cannot_be_judged():
    with pytest.raises(ValueError, match="no tokens"):
        routing_divergence(np.zeros((1, 3)), np.ones((1, 3)))


def test_the_monitor_finds_the_nearest_dataset_and_tells_novel_from_known():
    signatures = {"a": np.array([[9.0, 1, 0]]), "b": np.array([[0.0, 1, 9]])}
    near = judge(np.array([[8.0, 2, 0]]), signatures, 0.1)
    assert (near.nearest, near.novel) == ("a", False)
    assert judge(np.array([[0.0, 9, 1]]), signatures, 0.1).novel


def test_the_threshold_covers_every_span_of_the_known_windows():
    windows = np.random.default_rng(1).integers(1, 30, (12, 2, 6)).astype(float)
    threshold = novelty_threshold({"a": windows}, 3)
    for start in range(0, 12, 3):
        span = windows[start : start + 3].sum(axis=0)
        assert routing_divergence(span, windows.sum(axis=0) - span) <= threshold
