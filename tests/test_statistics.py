"""The streaming sums of a tiny decoder against float64 loops over its tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamo_jax.analysis.statistics import Statistics, merge, observe, observe_experts, output_sensitivity
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.decoder import Decoder, ExpertWeights, expert_outputs

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=64,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=32,
    initializer_range=0.15,
)
LAYERS, EXPERTS, HIDDEN, CHANNELS = 2, 4, 64, 32
DEAD = 3  # the expert of layer 1 that no token reaches
BATCH, LENGTH = 3, 9
# Sums of 27 products of dot products of 64 terms in float32: some hundred roundings at worst.
RTOL = 500 * float(np.finfo(np.float32).eps)


@pytest.fixture(scope="module")
def model():
    decoder = Decoder(CONFIG, rngs=nnx.Rngs(0))
    _, layers = decoder.hidden_states(tokens(), experts=keep)
    inputs = layers[1][0]
    # a router column against the mean input of layer 1: its logit is far below all others for every token here
    decoder.layers[1].router[...] = decoder.layers[1].router[...].at[:, DEAD].set(-50 * inputs.mean(axis=0))
    return decoder


def tokens(seed=0):
    return jax.random.randint(jax.random.key(seed), (BATCH, LENGTH), 0, CONFIG.vocab_size)


def keep(layer, x, routing, weights):
    """An experts function that hands out what it was given."""
    return expert_outputs(x, routing, weights), (x, routing, weights)


def noisy(weights, size):
    keys = jax.random.split(jax.random.key(9), 3)
    return ExpertWeights(*(w + size * jax.random.normal(k, w.shape) for w, k in zip(weights, keys)))


def run(decoder, batch, mask=None, measured=True):
    weights = [layer.expert_weights() for layer in decoder.layers]
    mask = jnp.ones(batch.shape) if mask is None else mask
    candidates = [[noisy(w, 0.05), noisy(w, 0.01)] for w in weights] if measured else []
    return observe(decoder, batch, mask, weights, candidates)


def assert_same(a: Statistics, b: Statistics):
    for name, left, right in zip(Statistics._fields, a, b):
        np.testing.assert_allclose(left, right, rtol=RTOL, atol=1e-7, err_msg=name)


def silu(a):
    return a / (1 + np.exp(-a))


def loop(x, routing, weights, candidates, mask):
    """Each sum written out, token by token and expert by expert."""
    x, gates, *arrays = (np.asarray(a, np.float64) for a in (x, routing.gates, *weights))
    gate, up, down = arrays
    others = [[np.asarray(a, np.float64) for a in c] for c in candidates]
    sums = {
        "counts": np.zeros(EXPERTS),
        "gate": np.zeros(EXPERTS),
        "gate_sq": np.zeros(EXPERTS),
        "input_energy": np.zeros((EXPERTS, HIDDEN)),
        "hidden_energy": np.zeros((EXPERTS, CHANNELS)),
        "up_gain": np.zeros((EXPERTS, CHANNELS)),
        "gate_gain": np.zeros((EXPERTS, CHANNELS)),
        "output_energy": np.zeros(EXPERTS),
        "errors": np.zeros((EXPERTS, len(candidates))),
    }
    for t in range(len(x)):
        if not mask[t]:
            continue
        for e, g in zip(np.asarray(routing.experts)[t], gates[t]):
            a, u = gate[e] @ x[t], up[e] @ x[t]
            h = silu(a) * u
            y = h @ down[e]
            step = 1e-5  # of the numerical derivatives of h by a
            slope = (silu(a + step) - silu(a - step)) / (2 * step) * u
            sums["counts"][e] += 1
            sums["gate"][e] += g
            sums["gate_sq"][e] += g**2
            sums["input_energy"][e] += g**2 * x[t] ** 2
            sums["hidden_energy"][e] += g**2 * h**2
            sums["up_gain"][e] += g**2 * silu(a) ** 2
            sums["gate_gain"][e] += g**2 * slope**2
            sums["output_energy"][e] += g**2 * np.sum(y**2)
            for i, (gate_c, up_c, down_c) in enumerate(others):
                y_c = (silu(gate_c[e] @ x[t]) * (up_c[e] @ x[t])) @ down_c[e]
                sums["errors"][e, i] += g**2 * np.sum((y - y_c) ** 2)
    return sums


@pytest.mark.parametrize("masked", [False, True])
def test_every_sum_of_every_layer_equals_a_loop_over_tokens(model, masked):
    mask = np.ones((BATCH, LENGTH))
    if masked:
        mask[0, 3] = mask[1, 0] = mask[2, 5:] = 0
    stats, _ = run(model, tokens(), jnp.asarray(mask))
    _, layers = model.hidden_states(tokens(), experts=keep)
    np.testing.assert_array_equal(stats.tokens, [mask.sum()] * LAYERS)
    for layer, (x, routing, weights) in enumerate(layers):
        want = loop(x, routing, weights, [noisy(weights, 0.05), noisy(weights, 0.01)], mask.reshape(-1))
        assert set(want) == set(Statistics._fields) - {"tokens"}
        for name, value in want.items():
            # an error is a difference of outputs, hence the absolute part
            np.testing.assert_allclose(getattr(stats, name)[layer], value, rtol=RTOL, atol=1e-6, err_msg=name)


def test_observing_leaves_the_outputs_as_they_are(model):
    _, layers = model.hidden_states(tokens(), experts=keep)
    for x, routing, weights in layers:
        out, _ = observe_experts(x, routing, weights, [noisy(weights, 0.1)], jnp.zeros(len(x)))
        np.testing.assert_allclose(out, expert_outputs(x, routing, weights), rtol=1e-6, atol=1e-7)


def test_a_masked_row_counts_like_one_that_is_not_there(model):
    _, layers = model.hidden_states(tokens(), experts=keep)
    x, routing, weights = layers[0]
    left = np.delete(np.arange(len(x)), [0, 7, 20])
    mask = jnp.zeros(len(x)).at[left].set(1)
    candidates = [noisy(weights, 0.05)]
    _, masked = observe_experts(x, routing, weights, candidates, mask)
    _, without = observe_experts(
        x[left], jax.tree.map(lambda a: a[left], routing), weights, candidates, jnp.ones(len(left))
    )
    assert_same(masked, without)


def test_what_a_masked_row_holds_is_not_seen(model):
    _, layers = model.hidden_states(tokens(), experts=keep)
    x, routing, weights = layers[0]
    mask = jnp.ones(len(x)).at[5].set(0)
    _, plain = observe_experts(x, routing, weights, [], mask)
    _, other = observe_experts(x.at[5].set(1e3), routing, weights, [], mask)
    assert_same(plain, other)


def test_masked_ends_of_sequences_count_like_shorter_sequences(model):
    mask = jnp.ones((BATCH, LENGTH)).at[:, 6:].set(0)
    assert_same(run(model, tokens(), mask)[0], run(model, tokens()[:, :6])[0])


def test_merged_batches_are_one_batch(model):
    whole, counts = run(model, tokens())
    merged = merge(run(model, tokens()[:1])[0], run(model, tokens()[1:])[0])
    assert_same(whole, merged)
    assert_same(merge(merged, whole), merge(whole, merged))
    np.testing.assert_array_equal(counts.sum(axis=0), whole.counts)


def test_the_routed_tokens_are_counted_for_each_sequence(model):
    _, counts = run(model, tokens(), measured=False)
    _, layers = model.hidden_states(tokens(), experts=keep)
    for layer, (_, routing, _) in enumerate(layers):
        chosen = np.asarray(routing.experts).reshape(BATCH, -1)
        for b in range(BATCH):
            assert counts[b, layer].tolist() == [int((chosen[b] == e).sum()) for e in range(EXPERTS)]
    assert (counts.sum(axis=-1) == LENGTH * CONFIG.num_experts_per_tok).all()


def test_an_expert_without_tokens_has_zeros_and_nothing_is_nan(model):
    stats, _ = run(model, tokens())
    assert (stats.counts[0] > 0).all() and stats.counts[1, DEAD] == 0
    for name, value in stats._asdict().items():
        assert np.isfinite(value).all(), name
        if name != "tokens":
            assert (value[1, DEAD] == 0).all(), name


def test_a_mask_of_zeros_leaves_all_sums_at_zero(model):
    stats, _ = run(model, tokens(), jnp.zeros((BATCH, LENGTH)))
    for name, value in stats._asdict().items():
        assert (value == 0).all(), name


def test_without_candidates_no_errors_are_measured(model):
    stats, _ = run(model, tokens(), measured=False)
    assert stats.errors.shape == (LAYERS, EXPERTS, 0)


def test_an_expert_compared_with_itself_has_no_error(model):
    weights = [layer.expert_weights() for layer in model.layers]
    stats, _ = observe(model, tokens(), jnp.ones((BATCH, LENGTH)), weights, [[w] for w in weights])
    assert (stats.errors == 0).all()


# Sensitivity


def dense(x, routing, weights):
    """All experts for all tokens, weighted by gates that are zero where a token was not routed: no sorting, no gathers."""
    gates = (jax.nn.one_hot(routing.experts, EXPERTS) * routing.gates[..., None]).sum(axis=1)
    h = jax.nn.silu(jnp.einsum("nd,efd->nef", x, weights.gate)) * jnp.einsum("nd,efd->nef", x, weights.up)
    return jnp.einsum("ne,nef,efd->nd", gates, h, weights.down)


def loss_of_shift(decoder, batch, mask, at):
    """The masked loss from full logits, as a function of a shift of one layer's expert output."""

    def loss(shift):
        def experts(layer, x, routing, weights):
            return dense(x, routing, weights) + (shift if layer == at else 0), None

        logits, _ = decoder(batch[:, :-1], experts=experts)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch[:, 1:, None], axis=2)[..., 0]
        return -(chosen * mask).sum()

    return loss


MASKS = {"all": jnp.ones((BATCH, LENGTH - 1)), "some": jnp.ones((BATCH, LENGTH - 1)).at[0, 4].set(0).at[2].set(0)}


@pytest.mark.parametrize("mask", MASKS)
def test_sensitivity_is_the_squared_gradient_of_a_plainly_written_loss(model, mask):
    got = output_sensitivity(model, tokens(), MASKS[mask])
    zero = jnp.zeros((BATCH * (LENGTH - 1), HIDDEN))
    for layer in range(LAYERS):
        gradient = jax.grad(loss_of_shift(model, tokens(), MASKS[mask], layer))(zero)
        assert float(got[layer]) == pytest.approx(float(jnp.sum(gradient**2)), rel=1e-4)


def test_along_its_gradient_the_loss_rises_by_the_sensitivity(model):
    """A finite difference: a step t along the gradient G changes the loss by t |G|^2."""
    loss = loss_of_shift(model, tokens(), MASKS["all"], 1)
    zero = jnp.zeros((BATCH * (LENGTH - 1), HIDDEN))
    gradient = jax.grad(loss)(zero)
    step = 0.05 / float(jnp.linalg.norm(gradient))
    rise = float(loss(step * gradient) - loss(-step * gradient)) / (2 * step)
    assert float(output_sensitivity(model, tokens(), MASKS["all"])[1]) == pytest.approx(rise, rel=1e-2)


def test_sequences_add_to_the_sensitivity(model):
    whole = output_sensitivity(model, tokens(), MASKS["all"])
    parts = [output_sensitivity(model, tokens()[b : b + 1], MASKS["all"][:1]) for b in range(BATCH)]
    np.testing.assert_allclose(whole, sum(parts), rtol=1e-4)
