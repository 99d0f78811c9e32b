"""Switching: what each variant computes, and that no switch compiles anything."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamo_jax.kernels.layout import LEVELS
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.decoder import Decoder, expert_parameter_names, parameters
from dynamo_jax.precision.plan import Plan, expert_plan
from dynamo_jax.quant.planes import dequantize
from dynamo_jax.runtime.store import base_planes, page_counts, page_tables, quantize_experts, variant_of
from dynamo_jax.runtime.switch import float_step, switched_step

CONFIG = ModelConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=6,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    norm_topk_prob=True,
    initializer_range=0.1,
)
BLOCK, GROUP = 8, 32
BLOCKS = CONFIG.intermediate_size // BLOCK


@pytest.fixture(scope="module")
def model():
    decoder = Decoder(CONFIG, rngs=nnx.Rngs(0))
    store = quantize_experts([layer.expert_weights() for layer in decoder.layers], GROUP)
    experts = set(expert_parameter_names(CONFIG))
    params = parameters(decoder)
    return params, {n: a for n, a in params.items() if n not in experts}, store


def random_plan(seed: int) -> Plan:
    widths = np.random.default_rng(seed).choice([2, 3, 4, 8], size=(2, 6, BLOCKS)).astype(np.int8)
    return Plan(widths=widths, channel_block=BLOCK, group_size=GROUP, hidden_size=CONFIG.hidden_size)


def apart_plan(seed: int) -> Plan:
    """Gate and up of each block have one width, down has another."""
    widths = np.random.default_rng(seed).choice([2, 3, 4, 8], size=(2, 6, 2 * BLOCKS)).astype(np.int8)
    return Plan(widths=widths, channel_block=BLOCK, group_size=GROUP, hidden_size=CONFIG.hidden_size, apart=True)


PLANS = {"together": random_plan, "apart": apart_plan}


def uniform_plan(width: int) -> Plan:
    return expert_plan(np.full((2, 6), width), BLOCKS, BLOCK, GROUP, CONFIG.hidden_size)


def tokens(seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (3, 17), 0, CONFIG.vocab_size)


def oracle(params, store, plan, batch):
    """The float model whose expert weights are the planes' values at each block's width."""
    by_block = plan.page_widths().reshape(2, 6, -1, BLOCKS)
    width_of = np.repeat(by_block, plan.channel_block, axis=3)[..., None]  # (L, E, 1 or P, F, 1)
    values = {w: np.asarray(dequantize(store, w).astype(jnp.bfloat16)) for w in (2, 3, 4, 8)}
    chosen = sum(np.where(width_of == w, v, 0) for w, v in values.items())
    replaced = dict(params)
    for layer in range(2):
        for index, part in enumerate(("gate", "up", "down")):
            replaced[f"layers.{layer}.{part}"] = jnp.asarray(chosen[layer, :, index])
    return float_step(CONFIG, replaced, batch)


@pytest.mark.parametrize(
    "plan", [uniform_plan(2), uniform_plan(3), uniform_plan(8), random_plan(1), random_plan(2), apart_plan(3)]
)
def test_a_variant_computes_what_its_dequantized_weights_compute(model, plan):
    params, rest, store = model
    variant = variant_of(store, plan)
    other = variant_of(store, uniform_plan(2))
    got, counts = switched_step(CONFIG, rest, base_planes(store), (other, variant), jnp.asarray(1), tokens())
    want, want_counts = oracle(params, store, plan, tokens())
    np.testing.assert_allclose(got, want, rtol=2e-5)
    np.testing.assert_array_equal(counts, want_counts)


def test_the_index_chooses_the_branch(model):
    _, rest, store = model
    variants = (variant_of(store, uniform_plan(2)), variant_of(store, uniform_plan(8)))
    base = base_planes(store)
    low, high = (switched_step(CONFIG, rest, base, variants, jnp.asarray(i), tokens())[0] for i in (0, 1))
    assert not np.allclose(low, high, rtol=1e-4)


@pytest.mark.parametrize("kind", PLANS)
def test_a_switch_compiles_nothing(model, compilations, kind):
    _, rest, store = model
    base, plan = base_planes(store), PLANS[kind](3)
    capacity = page_counts(plan)
    first = variant_of(store, plan, capacity)
    moved = dataclasses.replace(plan, widths=np.random.default_rng(4).permutation(plan.widths, axis=0))
    second = variant_of(store, moved, capacity)
    batch, zero, one = tokens(), jnp.asarray(0), jnp.asarray(1)
    switched_step(CONFIG, rest, base, (first, first), zero, batch)
    with compilations() as count:
        for _ in range(5):
            switched_step(CONFIG, rest, base, (first, first), one, batch)
            switched_step(CONFIG, rest, base, (first, second), one, batch)  # new pages: new data, no new program
            switched_step(CONFIG, rest, base, (first, second), zero, batch)
    assert count.compiled == 0


def test_the_count_of_compilations_can_fail(compilations):
    with compilations() as count:
        jax.jit(lambda x: x * 3 + 1)(jnp.arange(7.0))
    assert count.compiled >= 1


def test_pages_beyond_the_capacity_are_refused(model):
    _, _, store = model
    with pytest.raises(ValueError, match="more than the capacity"):
        variant_of(store, uniform_plan(4), {3: 1, 4: 1, 8: 0})


@pytest.mark.parametrize("kind", PLANS)
def test_page_tables_and_plan_describe_each_other(kind):
    plan = PLANS[kind](5)
    tables = page_tables(plan)
    assert [int((tables[level] >= 0).sum()) for level in LEVELS] == list(page_counts(plan).values())
    for level in LEVELS:
        used = tables[level][tables[level] >= 0]
        assert sorted(used) == list(range(len(used)))


def test_one_expert_and_one_token():
    config = dataclasses.replace(CONFIG, num_experts=1, num_experts_per_tok=1)
    decoder = Decoder(config, rngs=nnx.Rngs(0))
    store = quantize_experts([layer.expert_weights() for layer in decoder.layers], GROUP)
    plan = expert_plan(np.full((2, 1), 4), BLOCKS, BLOCK, GROUP, config.hidden_size)
    rest = {n: a for n, a in parameters(decoder).items() if n not in expert_parameter_names(config)}
    batch = jnp.zeros((1, 2), jnp.int32)
    loss, counts = switched_step(config, rest, base_planes(store), (variant_of(store, plan),), jnp.asarray(0), batch)
    assert np.isfinite(loss).all() and counts.sum() == 2


def test_nan_weights_are_refused_by_layer():
    decoder = Decoder(CONFIG, rngs=nnx.Rngs(0))
    weights = [layer.expert_weights() for layer in decoder.layers]
    weights[1] = weights[1]._replace(up=weights[1].up.at[0, 0, 0].set(jnp.nan))
    with pytest.raises(ValueError, match="layer 1: weights to quantize hold NaN"):
        quantize_experts(weights, GROUP)
