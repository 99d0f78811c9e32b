"""Experts whose sizes are no multiples of blocks and groups: their planes are filled up, and nobody sees it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_decoders import decoder_config

from dynamo_jax import transform
from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.calibration.pipeline import quantize
from dynamo_jax.kernels.layout import WIDTHS, block_bytes, filled
from dynamo_jax.models.decoder import Decoder, with_parameters
from dynamo_jax.models.experts import ExpertWeights
from dynamo_jax.precision.plan import Plan, expert_plan, num_weights
from dynamo_jax.quant.planes import dequantize, filled_up
from dynamo_jax.quant.planes import quantize as rounded
from dynamo_jax.runtime import serving
from dynamo_jax.runtime.memory import device_bits, slots
from dynamo_jax.runtime.residency import residency
from dynamo_jax.runtime.store import page_counts
from dynamo_jax.storage import checkpoint

pytestmark = pytest.mark.usefixtures("quick_compilation")

CHANNELS, HIDDEN = 20, 56  # blocks of 8: three, the last with half; groups of 16: four, the last with half
CONFIG = decoder_config(
    vocab_size=61,
    hidden_size=HIDDEN,
    intermediate_size=CHANNELS,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=6,
    num_experts_per_tok=2,
    max_position_embeddings=128,
    expert_bias=True,
    initializer_range=0.1,
)
SETTINGS = QuantizeConfig(unseen_windows=0, bits=5.5, channel_block=8, group_size=16, window=32, calibration_windows=8)


def decoder():
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    for layer, each in enumerate(model.moe_layers()):
        for name in ("gate_bias", "up_bias", "down_bias"):
            bias = getattr(each, name)
            bias[...] = jax.random.normal(jax.random.key(layer), bias[...].shape) * 0.1
    return model


@pytest.fixture(scope="module", params=["gptq", pytest.param("rtn", marks=pytest.mark.slow)])
def quantized(request, tokenizer_file):
    import tokenizers

    rng = np.random.default_rng(0)
    known = {n: " ".join(f"w{i}" for i in rng.integers(a, a + 20, 600)) for n, a in (("low", 3), ("high", 35))}
    settings = dataclasses.replace(SETTINGS, quantizer=request.param)
    return quantize(decoder(), tokenizers.Tokenizer.from_file(str(tokenizer_file)), known, settings)


def at_plan(model):
    """The float model whose experts are what the planes say at the plan's widths."""
    of_channel = model.plan.channel_widths()[..., :CHANNELS, None]
    whole = {w: np.asarray(dequantize(model.store, w))[..., :CHANNELS, :HIDDEN] for w in WIDTHS}
    weights = sum(np.where(of_channel == w, whole[w], 0) for w in WIDTHS)
    exact = jnp.asarray(weights).astype(jnp.bfloat16).astype(jnp.float32)
    own = {f"layers.{i}.{p}": exact[i, :, j] for i in range(2) for j, p in enumerate(ExpertWeights._fields)}
    return with_parameters(CONFIG, model.device_parameters() | own)


def test_a_filled_model_computes_what_its_planes_say(quantized):
    model, _ = quantized
    assert len(np.unique(model.plan.widths)) > 1
    assert model.store.scales.shape == (2, 6, 3, 24, 4)
    _, state = serving.init(model, requests=2)
    for length in (1, 20):  # few rows and many
        tokens = jnp.asarray(np.random.default_rng(length).integers(3, 61, (2, length)))
        want = jax.jit(at_plan(model))(tokens)[0]
        decoder = with_parameters(CONFIG, model.device_parameters())
        run = jax.jit(lambda state, tokens, decoder=decoder: decoder(tokens, experts=serving.experts(state))[0])
        for number in (0, [0, 1]):
            got = run(serving.switch(state, number), tokens)
            np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


def test_channels_that_fill_up_are_zeros_and_scales_are_those_of_the_weights():
    w = np.asarray(jax.random.normal(jax.random.key(0), (3, CHANNELS, HIDDEN)))
    whole = filled_up(w, 8, 16)
    assert whole.shape == (3, 24, 64) and filled_up(whole, 8, 16) is whole
    planes = rounded(whole, 16)
    for width in WIDTHS:
        assert not np.asarray(dequantize(planes, width))[:, CHANNELS:].any()
    np.testing.assert_array_equal(planes.scales[:, :CHANNELS, :3], rounded(w[..., :48], 16).scales)
    np.testing.assert_array_equal(planes.scales[:, :CHANNELS, 3], rounded(w[..., 48:], 8).scales[..., 0])
    large = w.copy()
    large[..., 40] *= 50  # of the group before the last, which has eight weights and is filled up by forty
    few, many = (rounded(filled_up(x[..., :56], 8, 48), 48).scales[..., 1] for x in (w, large))
    np.testing.assert_array_equal(few, many)


def test_the_budget_counts_what_fills_up_and_bits_are_of_the_real_weights(quantized):
    model, _ = quantized
    plan = model.plan
    assert num_weights(plan) == CONFIG.num_expert_weights
    assert plan.bits_per_weight() < device_bits(plan, model.spare) <= 5.5
    assert device_bits(plan, model.spare) > 5.2
    arrays = jax.tree.leaves(residency(serving.init(model)[0].pages, [plan]).resident)
    assert plan.stored_bytes() == sum(a.nbytes for a in arrays)
    assert block_bytes(2, 8, HIDDEN, 16) == block_bytes(2, 8, filled(HIDDEN, 16), 16)


def test_adaptation_moves_pages_of_filled_blocks(quantized):
    model, _ = quantized
    host, state = serving.init(model)
    windows = np.random.default_rng(5).integers(20, 30, (2, 33))
    host, state = serving.adapt(model, host, state, windows)
    there = slots(model.plan, model.spare)  # the baseline's and the spare ones
    assert all(count <= there[level] for level, count in page_counts(host.plans[1]).items())
    assert (host.plans[1].widths != model.plan.widths).any()


def test_a_filled_checkpoint_comes_back(quantized, tmp_path):
    model, _ = quantized
    checkpoint.save(tmp_path / "out", model)
    again = checkpoint.load(tmp_path / "out")
    assert again.plan.channels == CHANNELS and again.plan.hidden_size == HIDDEN
    for a, b in zip(jax.tree.leaves(model.store), jax.tree.leaves(again.store)):
        np.testing.assert_array_equal(a, b)


def test_errors_are_those_of_the_real_experts(quantized):
    """A block's error is that of its own channels, and whole experts are not charged for what fills them up."""
    _, analyses = quantized
    for each in analyses.values():
        errors = each.apart_significance()
        assert errors.shape == (2, 6, 2, 4) and (errors[..., 3] < 0.02 * errors[..., 0] + 1e-9).all()
        blocks = each.stats.block_errors.reshape(2, 6, 2, 3, 4)
        assert (blocks[:, :, 1, :, 0].sum(axis=2) > 0.3 * each.stats.apart_errors[:, :, 1, 0]).all()


def test_a_plan_knows_its_channels():
    sizes = {"channel_block": 8, "group_size": 16, "hidden_size": HIDDEN}
    plan = expert_plan(np.array([[2, 4]]), CHANNELS, **sizes)
    assert plan.blocks == 3 and plan.channels == CHANNELS
    assert Plan(widths=plan.widths, **sizes).channels == 24
    with pytest.raises(ValueError, match="16 channels are not 3 blocks of 8"):
        Plan(widths=plan.widths, channels=16, **sizes)


def test_a_users_experts_are_filled_too():
    weights = [jax.random.normal(jax.random.key(i), (6, *s)) * 0.2 for i, s in enumerate([(HIDDEN, CHANNELS)] * 2)]
    weights.append(jax.random.normal(jax.random.key(2), (6, CHANNELS, HIDDEN)) * 0.2)
    exact = transform.Experts(*weights)
    x = jax.random.normal(jax.random.key(7), (9, HIDDEN))
    gates, ids = jax.lax.top_k(jax.nn.softmax(jax.random.normal(jax.random.key(8), (9, 6))), 2)
    plans = [transform.uniform(exact, width, channel_block=8, group_size=16) for width in (8, 2)]
    model, _ = transform.quantize(exact, plans[0], None, plans[1])
    far = []
    for number in range(2):
        transform.switch(model, number)
        out, want = model(x, ids, gates), exact(x, ids, gates)
        far.append(float(jnp.linalg.norm(out - want) / jnp.linalg.norm(want)))
    assert out.shape == x.shape and far[0] < 0.03 < 0.2 < far[1]
    with pytest.raises(ValueError, match=r"inputs \(3, 40\) for experts of hidden size 56"):
        model(jnp.zeros((3, 40)), ids[:3], gates[:3])
