"""Switching: what each variant computes, and that no switch compiles anything."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_decoders import decoder_config, with_mixture

from dynamo_jax.kernels.layout import LEVELS
from dynamo_jax.models.decoder import Decoder, expert_parameter_names, parameters
from dynamo_jax.precision.plan import Plan, expert_plan
from dynamo_jax.quant.planes import dequantize
from dynamo_jax.runtime.residency import commit, levels_of, residency, stage, table_of
from dynamo_jax.runtime.store import host_pages, page_counts, page_tables, quantize_experts
from dynamo_jax.runtime.switch import float_step, switched_step

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = decoder_config(
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
CHANNELS = CONFIG.intermediate_size
BLOCKS = CHANNELS // BLOCK


@pytest.fixture(scope="module")
def model():
    decoder = Decoder(CONFIG, rngs=nnx.Rngs(0))
    store = quantize_experts([layer.expert_weights() for layer in decoder.layers], BLOCK, GROUP)
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
    return expert_plan(np.full((2, 6), width), CHANNELS, BLOCK, GROUP, CONFIG.hidden_size)


def placed(store, *plans, slots=None):
    """Planes and pages on the device, and each plan's table."""
    host = host_pages(store, plans[0])
    here = residency(host, list(plans), slots)
    return here.resident, tuple(table_of(here, plan, levels_of(plan)) for plan in plans)


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
    return float_step(CONFIG, replaced, batch)[:2]


@pytest.mark.parametrize(
    "plan", [uniform_plan(2), uniform_plan(3), uniform_plan(8), random_plan(1), random_plan(2), apart_plan(3)]
)
def test_a_variant_computes_what_its_dequantized_weights_compute(model, plan):
    params, rest, store = model
    other = dataclasses.replace(plan, widths=np.full_like(plan.widths, 2))
    resident, tables = placed(store, other, plan)
    assert not tables[0]
    got, counts, _ = switched_step(CONFIG, rest, resident, tables, jnp.asarray(1), tokens())
    want, want_counts = oracle(params, store, plan, tokens())
    np.testing.assert_allclose(got, want, rtol=2e-5)
    np.testing.assert_array_equal(counts, want_counts)


def test_the_index_chooses_the_branch(model):
    _, rest, store = model
    resident, tables = placed(store, uniform_plan(2), uniform_plan(8))
    low, high = (switched_step(CONFIG, rest, resident, tables, jnp.asarray(i), tokens())[0] for i in (0, 1))
    assert not np.allclose(low, high, rtol=1e-4)


@pytest.mark.parametrize("switches", [200, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", PLANS)
def test_a_switch_compiles_nothing(model, compilations, kind, switches):
    params, rest, store = model
    plan = PLANS[kind](3)
    slots = {level: 2 * count for level, count in page_counts(plan).items()}
    host = host_pages(store, plan)
    here = residency(host, [plan], slots)
    batch, levels = tokens(), levels_of(plan)

    def run(here, other, index):
        tables = (table_of(here, plan, levels), table_of(here, other, levels))
        return switched_step(CONFIG, rest, here.resident, tables, jnp.asarray(index), batch)[0]

    first = run(here, plan, 0)
    oracle(params, store, plan, batch)
    rng = np.random.default_rng(4)
    with compilations() as count:
        for switch in range(switches):
            if switch % (switches // 10) == 0:  # new pages: new data, no new program
                moved = dataclasses.replace(
                    plan, widths=rng.permutation(plan.widths.reshape(-1)).reshape(plan.widths.shape)
                )
                here = commit(here, stage(host, here, moved, keep=[plan]))
                want = oracle(params, store, moved, batch)[0]
            index = int(rng.integers(2))
            got = run(here, moved, index)
            np.testing.assert_allclose(got, want if index else first, rtol=2e-5)
    assert count.compiled == 0


@pytest.mark.parametrize("length", [17, 2], ids=["many rows", "few rows"])
@pytest.mark.parametrize("kind", PLANS)
def test_sequences_of_one_batch_run_at_variants_of_their_own(kind, length):
    """Each one gets the same bits whatever its neighbours are and run at, and what a batch of its variant gives."""
    config = with_mixture(CONFIG, num_experts=12)  # 3 sequences of 1 token to 2 experts: few rows
    decoder = Decoder(config, rngs=nnx.Rngs(0))
    store = quantize_experts([layer.expert_weights() for layer in decoder.layers], BLOCK, GROUP)
    rest = {n: a for n, a in parameters(decoder).items() if n not in expert_parameter_names(config)}
    rng = np.random.default_rng(0)
    first = dataclasses.replace(PLANS[kind](0), widths=rng.choice([2, 3, 8], (2, 12, PLANS[kind](0).widths.shape[-1])))
    plans = first, dataclasses.replace(first, widths=np.full_like(first.widths, 2))
    resident, tables = placed(store, *plans)
    assert sorted(map(len, tables)) == [0, 3]
    batch = np.asarray(jax.random.randint(jax.random.key(3), (3, length), 0, config.vocab_size))

    def run(numbers, batch=batch):
        return np.asarray(switched_step(config, rest, resident, tables, jnp.asarray(numbers), jnp.asarray(batch))[0])

    mixed = run([0, 1, 0])
    for numbers in ([0, 0, 0], [0, 1, 1], [1, 1, 0], [1, 1, 1]):
        for row, (own, number) in enumerate(zip([0, 1, 0], numbers)):
            assert (run(numbers)[row] == mixed[row]) == (own == number)
    others = batch.copy()
    others[0], others[2] = rng.integers(0, config.vocab_size, length), 5
    assert run([1, 1, 0], others)[1] == mixed[1]
    np.testing.assert_allclose(mixed[[0, 2]], run(0)[[0, 2]], rtol=2e-5)
    np.testing.assert_allclose(mixed[1], run(1)[1], rtol=2e-5)
    np.testing.assert_array_equal(run([-3, 7, 0]), run([0, 1, 0]))  # clamped, as one index is


def test_the_count_of_compilations_can_fail(compilations):
    with compilations() as count:
        jax.jit(lambda x: x * 3 + 1)(jnp.arange(7.0))
    assert count.compiled >= 1


@pytest.mark.parametrize("kind", PLANS)
def test_page_tables_and_plan_describe_each_other(kind):
    plan = PLANS[kind](5)
    tables = page_tables(plan)
    assert [int((tables[level] >= 0).sum()) for level in LEVELS] == list(page_counts(plan).values())
    for level in LEVELS:
        used = tables[level][tables[level] >= 0]
        assert sorted(used) == list(range(len(used)))


def test_one_expert_and_one_token():
    config = with_mixture(CONFIG, num_experts=1, num_experts_per_tok=1)
    decoder = Decoder(config, rngs=nnx.Rngs(0))
    store = quantize_experts([layer.expert_weights() for layer in decoder.layers], BLOCK, GROUP)
    plan = expert_plan(np.full((2, 1), 4), CHANNELS, BLOCK, GROUP, config.hidden_size)
    rest = {n: a for n, a in parameters(decoder).items() if n not in expert_parameter_names(config)}
    batch = jnp.zeros((1, 2), jnp.int32)
    loss, counts, _ = switched_step(config, rest, *placed(store, plan), jnp.asarray(0), batch)
    assert np.isfinite(loss).all() and counts.sum() == 2


def test_nan_weights_are_refused_by_layer():
    decoder = Decoder(CONFIG, rngs=nnx.Rngs(0))
    weights = [layer.expert_weights() for layer in decoder.layers]
    weights[1] = weights[1]._replace(up=weights[1].up.at[0, 0, 0].set(jnp.nan))
    with pytest.raises(ValueError, match="layer 1: weights to quantize hold NaN"):
        quantize_experts(weights, BLOCK, GROUP)
