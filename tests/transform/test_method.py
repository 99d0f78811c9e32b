"""Analysis, plans and planes of models that are not ours; and that they are those of our own decoder's path."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from own_models import Model, StackedModel, batches, forward, known, nll
from small_decoders import decoder_config

from dynamo_jax import transform
from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.calibration.pipeline import analyze_layers
from dynamo_jax.models.decoder import Decoder, Layer, expert_parameter_names, parameters
from dynamo_jax.models.experts import activation_of
from dynamo_jax.models.loss import next_token_nll
from dynamo_jax.models.sources import DecoderSource
from dynamo_jax.runtime.adapt import observe_windows
from dynamo_jax.runtime.quantized import QuantizedModel
from dynamo_jax.storage.bundles import stacked_planes
from dynamo_jax.storage.work import MemoryWork

pytestmark = pytest.mark.usefixtures("quick_compilation")

SETTINGS = QuantizeConfig(channel_block=8, group_size=16)


@pytest.fixture(scope="module")
def model():
    return Model(nnx.Rngs(0))


@pytest.fixture(scope="module")
def analysis(model):
    return transform.analyze(model, known(), nll, SETTINGS)


def divergence(model, other, tokens):
    p, q = (jax.nn.log_softmax(m(tokens)) for m in (model, other))
    return float((jnp.exp(p) * (p - q)).sum(axis=-1).mean())


def test_significance_is_a_pytree_by_layer(model, analysis):
    found = analysis.significance("low")
    assert list(found) == ["blocks.0.experts", "blocks.1.experts"]
    one = found["blocks.0.experts"]
    assert one.experts.shape == (6, 4) and one.channels.shape == (6, 24)
    assert (one.experts[:, 0] > one.experts[:, 2]).all() and (one.experts >= 0).all()
    assert jax.tree.leaves(found) and analysis.datasets == ("low", "high")
    (moved,) = analysis.dynamics()
    assert moved is not None and analysis.unreached() == {}


def test_planes_of_the_analysis_are_nearer_than_rounding(model, analysis):
    text = jnp.concatenate(known()["low"])[:, :-1]
    for width in (2, 3):
        plan = transform.uniform(model, width, 8, 16)
        rounded, made = (transform.quantize(model, plan, own)[0] for own in (None, analysis))
        assert divergence(model, made, text) < 0.8 * divergence(model, rounded, text)


def test_a_plan_keeps_its_budget_and_more_bits_lose_less(model, analysis):
    predicted = []
    for bits in (3.1, 3.6, 4.6):
        plan = transform.plan(analysis, bits=bits)
        assert plan.device_bytes(SETTINGS.spare) * 8 <= bits * 2 * 6 * 3 * 24 * 32
        quantized, _ = transform.quantize(model, plan, analysis)
        predicted.append(divergence(model, quantized, jnp.concatenate(known()["low"])[:, :-1]))
    assert predicted[0] > predicted[1] > predicted[2]
    by_bytes = transform.plan(analysis, bytes=int(3.6 * 2 * 6 * 3 * 24 * 32 / 8))
    np.testing.assert_array_equal(by_bytes.plans[0].widths, transform.plan(analysis, bits=3.6).plans[0].widths)
    rest = analysis.other_bytes
    fits = transform.plan(analysis, fits_gib=(rest + 11059) / 2**30, reserve_gib=0.0)
    assert fits.device_bytes(SETTINGS.spare) <= 11059
    with pytest.raises(ValueError, match="the budget, bits 1, is too small"):
        transform.plan(analysis, bits=1)
    with pytest.raises(ValueError, match="distil 2048: trains models that dynamo_jax loads"):
        transform.analyze(model, known(), nll, dataclasses.replace(SETTINGS, distil=2048))
    with pytest.raises(ValueError, match="rest 8: of models that dynamo_jax loads"):
        transform.analyze(model, known(), nll, dataclasses.replace(SETTINGS, rest=8))
    with pytest.raises(ValueError, match="a budget is given one way only"):
        transform.plan(analysis, bits=3.0, bytes=10000)


def test_a_dataset_named_unseen_counts_in_the_plan_and_is_not_known(model, analysis):
    data = known()
    given = transform.analyze(model, data | {"unseen": data["high"]}, nll, SETTINGS)
    shares = [transform.plan(given, bits=3.4, novelty_weight=share).plans[0].widths for share in (1e-9, 1.0)]
    assert (shares[0] != shares[1]).any()
    _, host = transform.quantize(model, transform.plan(given, bits=3.4), given)
    assert host.datasets == ("low", "high") and given.datasets == ("low", "high", "unseen")
    with pytest.raises(ValueError, match="unseen_windows 4: nothing is drawn here; give the dataset unseen"):
        transform.analyze(model, data, nll, dataclasses.replace(SETTINGS, unseen_windows=4))


def test_eight_bits_are_near_the_users_experts(model, analysis):
    rng = np.random.default_rng(0)
    x, gates = jnp.asarray(rng.normal(size=(40, 32)), jnp.float32), jnp.full((40, 2), 0.5)
    ids = jnp.asarray(rng.integers(0, 6, (40, 2)))
    quantized, _ = transform.quantize(model, transform.uniform(model, 8, 8, 16), analysis)
    want, got = (m.blocks[1].experts(x, ids, gates) for m in (model, quantized))
    assert float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want)) < 0.05


def test_layers_one_at_a_time_give_the_same(model, analysis):
    again = transform.analyze(model, known(), nll, SETTINGS, layers_at_once=1)
    for name in again.datasets:
        jax.tree.map(np.testing.assert_array_equal, again.significance(name), analysis.significance(name))
    jax.tree.map(np.testing.assert_array_equal, again.parts[0].planes, analysis.parts[0].planes)
    with pytest.raises(ValueError, match="low: a generator can be read once"):
        transform.analyze(model, {"low": iter(known()["low"])}, nll, SETTINGS, layers_at_once=1)


@pytest.mark.slow
def test_sizes_that_differ_share_one_budget():
    model = Model(nnx.Rngs(0), blocks=((6, 24), (4, 16), (6, 24)))
    config = dataclasses.replace(SETTINGS, favour=1.0)
    found = transform.analyze(model, known(), nll, config)
    assert [p.names for p in found.parts] == [("blocks.0.experts", "blocks.2.experts"), ("blocks.1.experts",)]
    plan = transform.plan(found, bits=3.3)
    weights = 3 * 32 * (2 * 6 * 24 + 4 * 16)
    assert 3.1 * weights < plan.device_bytes(config.spare) * 8 <= 3.3 * weights
    quantized, host = transform.quantize(model, plan, found, requests=4)
    step = nnx.jit(observed)
    for batch in known()["high"] * 3:
        step(quantized, batch[:, :-1])
    assert (np.asarray(transform.labels(quantized)) == 1).all()
    transform.adapt(quantized, host, batches(5, 30, 50), forward)


def observed(model, tokens):
    with transform.observe(model):
        out = model(tokens)
    return out


def taken_decoder(decoder):
    """Our own decoder as somebody else's model."""

    def experts(layer):
        layer.with_experts = False
        form = activation_of(layer.mixture)
        return transform.Experts(layer.gate, layer.up, layer.down, layout="efd", activation=form)

    def call(layer, experts, x, _, places, cache=None):
        def run(index, flat, routing, weights, form):
            shape = (*x.shape[:2], -1)
            ids, gates = (a.reshape(shape) for a in (routing.experts, routing.gates))
            return experts(flat.reshape(*x.shape[:2], -1), ids, gates).reshape(flat.shape), routing

        return layer(x, run, places, cache)

    rule = transform.ExpertsRule(Layer, experts, call)
    return transform.with_experts(decoder, [rule], jnp.arange(8).reshape(1, 8))


OURS = decoder_config(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=6,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    initializer_range=0.2,
)


def our_loss(model, tokens):
    hidden, _ = model.hidden_states(tokens[:, :-1])
    return next_token_nll(hidden, model.head_weights(), tokens[:, 1:]).sum()


def our_forward(model, windows):
    return model.hidden_states(windows[:, :-1])


def test_taps_and_sweeps_find_the_same():
    """Our own decoder, by its own path and as somebody else's model: the same significance and planes, and what is
    measured for adaptation is nearly the same, since a tap is of the baseline's pass and not of one at 8 bits."""
    decoder = Decoder(OURS, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    config = dataclasses.replace(SETTINGS, window=32, calibration_windows=8)
    windows = {n: rng.integers(low, low + 40, (8, 33)).astype(np.int32) for n, low in (("a", 0), ("b", 20))}
    taken = taken_decoder(decoder)
    own = transform.analyze(taken, {n: [w[:5], w[5:]] for n, w in windows.items()}, our_loss, config)
    work = MemoryWork()
    swept = analyze_layers(DecoderSource(decoder), windows, config, work)
    for name, analysis in swept.items():
        mine = own.parts[0].analyses[name]
        np.testing.assert_array_equal(mine.stats.counts, analysis.stats.counts)
        for field in ("hidden_energy", "errors", "apart_errors", "block_errors"):
            got, want = (np.asarray(getattr(a.stats, field)) for a in (mine, analysis))
            np.testing.assert_allclose(got, want, rtol=0.02, atol=1e-3 * want.max())
        np.testing.assert_allclose(mine.sensitivity, analysis.sensitivity, rtol=1e-3)
        np.testing.assert_allclose(mine.halves[0].stats.counts, analysis.halves[0].stats.counts)
    planes = stacked_planes(work.get, OURS)
    differ = [np.mean(a != b) for a, b in zip(jax.tree.leaves(planes), jax.tree.leaves(own.parts[0].planes))]
    assert max(differ) < 0.02

    quantized, host = transform.quantize(taken, transform.plan(own, bits=4.0), own)
    experts, names = host.parts[0].experts, set(expert_parameter_names(OURS))
    rest = {name: a for name, a in parameters(decoder).items() if name not in names}
    fields = {f.name: getattr(experts, f.name) for f in dataclasses.fields(experts)}
    ours = QuantizedModel(config=OURS, parameters=rest, tokenizer=None, window=32, files={}, **fields)
    text = rng.integers(40, 61, (6, 33)).astype(np.int32)
    (mine,) = transform.serving.observations(quantized, host, [text], our_forward)
    seen = observe_windows(ours, text)
    assert np.abs(mine.counts.sum(axis=0) - seen.counts.sum(axis=0)).sum() < 0.1 * seen.counts.sum()
    assert np.linalg.norm(mine.errors - seen.errors) < 0.2 * np.linalg.norm(seen.errors)


def analyzed(model):
    return transform.analyze(model, known(), nll, SETTINGS)


def test_what_is_wrong_with_data_is_named(model):
    data = known()
    with pytest.raises(ValueError, match="data is a list: expected a dict"):
        transform.analyze(model, known()["low"], nll, SETTINGS)
    with pytest.raises(ValueError, match="low, batch 0: the loss does not take it"):
        transform.analyze(model, {"low": ["text"]}, nll, SETTINGS)
    with pytest.raises(ValueError, match="the loss returns something else than one number"):
        transform.analyze(model, data, lambda m, b: (nll(m, b), 3), SETTINGS)
    with pytest.raises(ValueError, match=r"low: the loss does not depend on the experts of blocks\.0\.experts"):
        transform.analyze(model, data, lambda m, b: jax.lax.stop_gradient(nll(m, b)), SETTINGS)
    bad = r"low, batch 0: blocks\.0\.experts: the gradient of the loss holds NaN"
    with pytest.raises(ValueError, match=bad):
        transform.analyze(model, data, lambda m, b: 1 + jnp.sqrt(0 * nll(m, b)), SETTINGS)
    with pytest.raises(ValueError, match="no known dataset"):
        transform.analyze(model, {}, nll, SETTINGS)
    with pytest.raises(ValueError, match="low: no batch"):
        transform.analyze(model, {"low": []}, nll, SETTINGS)
    with pytest.raises(ValueError, match="low, batch 0: the loss is nan"):
        transform.analyze(model, data, lambda m, b: nll(m, b) * jnp.nan, SETTINGS)
    with pytest.raises(ValueError, match=r"blocks\.0\.experts: these experts were not called"):
        transform.analyze(model, data, lambda m, b: m.embed(b).sum(), SETTINGS)
    with pytest.raises(ValueError, match=r"blocks\.0\.experts: these experts are called twice in one pass"):
        transform.analyze(model, data, lambda m, b: nll(m, b) + nll(m, b), SETTINGS)
    with pytest.raises(ValueError, match=r"low, batch 0: blocks\.1\.experts: ids .* to 6; there are experts 0 to 5"):
        transform.analyze(Shifted(model), data, nll, SETTINGS)
    with pytest.raises(ValueError, match=r"model\.blocks\.0\.experts: no token of any dataset goes to"):
        transform.analyze(Silent(model), data, nll, SETTINGS)


class Shifted(nnx.Module):
    """A router's ids are one too high in the second block."""

    def __init__(self, model):
        self.embed, self.blocks = model.embed, model.blocks

    def __call__(self, tokens):
        first, second = self.blocks
        x = first(self.embed(tokens))
        ids = jnp.full((*x.shape[:2], 1), 6)
        return self.embed.attend(x + second.experts(x, ids, jnp.ones(ids.shape)))


class Silent(nnx.Module):
    """Nothing is routed anywhere in the first block."""

    def __init__(self, model):
        self.model = model

    def __call__(self, tokens):
        x = self.model.embed(tokens)
        ids = jnp.full((*x.shape[:2], 1), -1)
        x = x + self.model.blocks[0].experts(x, ids, jnp.ones(ids.shape))
        return self.model.embed.attend(self.model.blocks[1](x))


def test_experts_that_nothing_reaches_are_named(model):
    closed = nnx.clone(model)
    closed.blocks[0].router.bias.set_value(jnp.array([0.0, 0, -1e9, 0, 0, 0]))
    with pytest.warns(UserWarning, match=r"blocks\.0\.experts: no token of any dataset went to experts 2;"):
        found = transform.analyze(closed, known(), nll, dataclasses.replace(SETTINGS, favour=1.0))
    assert found.unreached() == {"blocks.0.experts": [2]}


def test_nan_weights_are_named(model):
    broken = nnx.clone(model)
    gate = broken.blocks[1].experts.gate
    gate.set_value(gate[...].at[3, 0, 0].set(jnp.nan))
    with pytest.raises(ValueError, match=r"blocks\.1\.experts: weights to quantize hold NaN"):
        transform.quantize(broken, transform.uniform(broken, 4, 8, 16))


def test_tokens_that_do_not_count_change_nothing(model):
    """Padding by a mask, and tokens that have no expert in any layer; the loss leaves the same ones out."""
    config = dataclasses.replace(SETTINGS, favour=1.0)
    short = {name: [b[:, :17] for b in batches] for name, batches in known().items()}
    padded = {name: [jnp.pad(b, ((0, 0), (0, 16)), constant_values=7) for b in own] for name, own in short.items()}

    def masked(model, tokens):
        logits = jax.nn.log_softmax(model(tokens[:, :-1])[:, :16])
        return -jnp.take_along_axis(logits, tokens[:, 1:17, None], axis=-1).sum()

    def mask(tokens):
        return np.arange(tokens.shape[1] - 1) < 16 + np.zeros((len(tokens), 1))

    one = transform.analyze(model, short, nll, config)
    other = transform.analyze(model, padded, masked, config, mask=mask)
    for name in one.datasets:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.max(b)),
            one.significance(name),
            other.significance(name),
        )
    with pytest.raises(ValueError, match=r"the mask is float64 .* of a batch of 128 tokens: expected bool"):
        transform.analyze(model, padded, masked, config, mask=lambda tokens: np.ones((4, 32)))


def test_batches_that_change_between_passes_are_refused(model):
    class Shuffled:
        turn = 0

        def __iter__(self):
            self.turn += 1
            return iter(known()["low"][:: 1 if self.turn == 1 else -1])

    with pytest.raises(ValueError, match="low: batches are others, or in another order, the second time"):
        transform.analyze(model, {"low": Shuffled()}, nll, SETTINGS, layers_at_once=1)


def test_plans_and_analyses_of_other_models_are_refused(model, analysis):
    other = Model(nnx.Rngs(0), blocks=((6, 24),))
    with pytest.raises(ValueError, match="the plan is for another model: it has 2 layers with experts, the model 1"):
        transform.quantize(other, transform.uniform(model, 4, 8, 16))
    with pytest.raises(ValueError, match="the analysis is of another model"):
        transform.quantize(other, transform.uniform(other, 4, 8, 16), analysis)
    wide = Model(nnx.Rngs(0), blocks=((6, 16), (6, 16)))
    with pytest.raises(ValueError, match=r"the plan is for .* \(2, 6, 24, 32\); the model has \(2, 6, 16, 32\)"):
        transform.quantize(wide, transform.uniform(model, 4, 8, 16))
    trained = nnx.clone(model)
    down = trained.blocks[1].experts.down
    down.set_value(down[...] * 1.01)
    with pytest.raises(ValueError, match=r"blocks\.1\.experts: its weights are not those that were analysed"):
        transform.quantize(trained, transform.uniform(model, 4, 8, 16), analysis)
    done, _ = transform.quantize(model, transform.uniform(model, 4, 8, 16))
    for again in (lambda: transform.quantize(done, transform.uniform(model, 4, 8, 16)), lambda: analyzed(done)):
        with pytest.raises(ValueError, match=r"blocks\.0\.experts: these experts are quantized already"):
            again()
    with pytest.raises(ValueError, match="the plan has groups of 32 and blocks of 8, the planes of the analysis 16"):
        transform.quantize(model, transform.uniform(model, 4, 8, 32), analysis)


def test_stacked_layers_are_analysed_one_by_one():
    model = StackedModel(nnx.Rngs(0), layers=2)
    found = transform.analyze(model, known(), nll, dataclasses.replace(SETTINGS, favour=1.0))
    assert found.parts[0].names == ("blocks.experts, layer 0", "blocks.experts, layer 1")
    quantized, host = transform.quantize(model, transform.plan(found, bits=3.4), found, requests=4)
    step = nnx.jit(observed)
    for batch in known()["low"] * 3:
        step(quantized, batch[:, :-1])
    assert (np.asarray(transform.labels(quantized)) == 0).all()
    transform.adapt(quantized, host, batches(5, 30, 50), forward)


class Clamped(nnx.Module):
    """Experts whose activation is a method: of each block with a limit of its own."""

    def __init__(self, limit):
        self.limit = limit
        self.experts = transform.Experts(*(jnp.ones((2, 16, 16)) for _ in range(3)), activation=self.activation)

    def activation(self, gate, up):
        return jnp.clip(gate, -self.limit, self.limit) * up


def test_activations_are_told_apart_by_what_they_hold():
    def part_count(*modules):
        return len(transform.uniform(nnx.List(list(modules)), 4, 8, 16).plans)

    def gelu(scale):
        return transform.Experts(
            *(jnp.ones((2, 16, 16)) for _ in range(3)), activation=lambda a, u: jax.nn.gelu(a * scale) * u
        )

    assert part_count(gelu(1.0), gelu(1.0)) == 1  # the same lambda, made twice
    assert part_count(gelu(1.0), gelu(2.0)) == 2
    assert part_count(Clamped(0.1), Clamped(7.0)) == 2
