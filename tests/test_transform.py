"""The transform of NNX models, on a model that is not ours, written here with plain nnx."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import dynamo_jax
from dynamo_jax.precision.plan import Plan
from dynamo_jax.quant.planes import dequantize, quantize
from dynamo_jax.transform import SwitchedExperts

pytestmark = pytest.mark.usefixtures("quick_compilation")

HIDDEN, CHANNELS, EXPERTS, BLOCK, GROUP = 32, 24, 6, 8, 16


class TopTwo(nnx.Module):
    """Experts as a user would write them: every expert on every token, then a choice."""

    def __init__(self, rngs, hidden=HIDDEN):
        def weights(*shape):
            return nnx.Param(jax.random.normal(rngs.params(), shape) * shape[1] ** -0.5)

        self.gate, self.up = weights(EXPERTS, hidden, CHANNELS), weights(EXPERTS, hidden, CHANNELS)
        self.down = weights(EXPERTS, CHANNELS, hidden)
        self.temperature = nnx.Param(jnp.asarray(1.5))

    def route(self, router_logits):
        gates, experts = jax.lax.top_k(jax.nn.softmax(router_logits / self.temperature[...]), 2)
        return experts, gates / gates.sum(axis=-1, keepdims=True)

    def activation(self, gate, up):
        return jax.nn.gelu(gate) * up

    def __call__(self, x, router_logits):
        experts, gates = self.route(router_logits)
        hidden = self.activation(*(jnp.einsum("nd,edf->nef", x, w[...]) for w in (self.gate, self.up)))
        out = jnp.einsum("nef,efd->ned", hidden, self.down[...])
        return jnp.einsum("nkd,nk->nd", jnp.take_along_axis(out, experts[:, :, None], axis=1), gates)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(HIDDEN, rngs=rngs)
        self.router = nnx.Linear(HIDDEN, EXPERTS, rngs=rngs)
        self.experts = TopTwo(rngs)

    def __call__(self, x):
        normed = self.norm(x)
        return x + self.experts(normed, self.router(normed))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(50, HIDDEN, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(x)


TOKENS = jnp.arange(40)


def random_plan(seed):
    widths = np.random.default_rng(seed).choice([2, 3, 4, 8], (2, EXPERTS, CHANNELS // BLOCK)).astype(np.int8)
    return Plan(widths=widths, channel_block=BLOCK, group_size=GROUP, hidden_size=HIDDEN)


def with_dequantized(model, plan):
    """The user's own model with the planes' values for its weights."""
    model = nnx.clone(model)
    for layer, block in enumerate(model.blocks):
        for part in ("gate", "up", "down"):
            own = getattr(block.experts, part)
            major = own[...] if part == "down" else own[...].swapaxes(1, 2)
            planes = quantize(major, GROUP)
            wide = np.repeat(plan.widths[layer], BLOCK, axis=1)[:, :, None]
            value = sum(np.where(wide == w, dequantize(planes, w).astype(jnp.bfloat16), 0) for w in (2, 3, 4, 8))
            value = jnp.asarray(value.astype(np.float32))
            own[...] = value if part == "down" else value.swapaxes(1, 2)
    return model


@pytest.fixture(scope="module")
def model():
    return Model(nnx.Rngs(0))


@pytest.mark.parametrize("tokens", [40, 2, 1], ids=["many", "few", "one"])
def test_a_quantized_model_computes_with_its_dequantized_weights(model, tokens):
    """Also where so few tokens come that only their own experts are unpacked."""
    plan = random_plan(0)
    got = dynamo_jax.quantize_model(model, plan)(TOKENS[:tokens])
    np.testing.assert_allclose(got, with_dequantized(model, plan)(TOKENS[:tokens]), atol=2e-4)
    assert not np.allclose(got, model(TOKENS[:tokens]), atol=1e-2)


def test_the_users_model_and_the_rest_stay_as_they_were(model):
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    quantized = dynamo_jax.quantize_model(model, random_plan(0))
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model)))
    assert all(isinstance(b.experts, SwitchedExperts) for b in quantized.blocks)
    rest = nnx.to_pure_dict(nnx.state(quantized, nnx.Param))
    np.testing.assert_array_equal(rest["embed"]["embedding"], before["embed"]["embedding"])
    assert float(rest["blocks"][0]["experts"]["inner"]["temperature"]) == 1.5
    assert "gate" not in rest["blocks"][0]["experts"]["inner"]


def test_switching_under_nnx_jit_compiles_nothing(model, compilations):
    plans = [random_plan(seed) for seed in range(3)]
    quantized = dynamo_jax.quantize_model(model, *plans)
    run = nnx.jit(lambda m, t: m(t))
    outs = [np.asarray(run(quantized, TOKENS))]
    with compilations() as count:
        for number in (1, 2, 0):
            dynamo_jax.switch_model(quantized, number)
            outs.append(np.asarray(run(quantized, TOKENS)))
    assert count.compiled == 0
    np.testing.assert_array_equal(outs[0], outs[3])
    for number, plan in enumerate(plans):
        np.testing.assert_allclose(outs[number], with_dequantized(model, plan)(TOKENS), atol=2e-4)


def test_split_merge_and_orbax_keep_the_model(model, tmp_path):
    quantized = dynamo_jax.quantize_model(model, random_plan(0), random_plan(1))
    dynamo_jax.switch_model(quantized, 1)
    want = np.asarray(quantized(TOKENS))
    graph, state = nnx.split(quantized)
    np.testing.assert_array_equal(nnx.merge(graph, state)(TOKENS), want)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", nnx.to_pure_dict(state))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "model", nnx.to_pure_dict(state))
    empty = jax.tree.map(jnp.zeros_like, state)
    nnx.replace_by_pure_dict(empty, restored)
    again = nnx.merge(graph, empty)
    np.testing.assert_array_equal(again(TOKENS), want)
    dynamo_jax.switch_model(again, 0)  # all layers still share one number
    dynamo_jax.switch_model(quantized, 0)
    np.testing.assert_array_equal(again(TOKENS), quantized(TOKENS))


def test_a_lone_experts_module_can_be_the_whole_model():
    experts = TopTwo(nnx.Rngs(0))
    plan = dynamo_jax.uniform_plan(experts, 8, BLOCK, GROUP)
    x = jax.random.normal(jax.random.key(0), (9, HIDDEN))
    logits = jax.random.normal(jax.random.key(1), (9, EXPERTS))
    got, want = dynamo_jax.quantize_model(experts, plan)(x, logits), experts(x, logits)
    assert float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want)) < 0.03


def test_what_does_not_fit_is_named(model):
    with pytest.raises(ValueError, match="no module of the model has gate, up, down and route"):
        dynamo_jax.uniform_plan(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), 4)
    with pytest.raises(ValueError, match=r"plan 1 is for .* \(2, 6, 48, 32\); blocks.0.experts has \(2, 6, 24, 32\)"):
        odd = Plan(widths=random_plan(0).widths, channel_block=16, group_size=GROUP, hidden_size=HIDDEN)
        dynamo_jax.quantize_model(model, random_plan(0), odd)
    with pytest.raises(ValueError, match=r"variant 2: the model has 0\.\.1"):
        dynamo_jax.switch_model(dynamo_jax.quantize_model(model, random_plan(0), random_plan(1)), 2)
    turned = TopTwo(nnx.Rngs(0))
    turned.down = nnx.Param(turned.down[...].swapaxes(1, 2))
    with pytest.raises(ValueError, match=r"the model: gate \(6, 32, 24\), up .* are not"):
        dynamo_jax.uniform_plan(turned, 4, BLOCK, GROUP)
    with pytest.raises(ValueError, match="group_size 20"):
        dynamo_jax.quantize_model(model, dynamo_jax.uniform_plan(model, 4, BLOCK, 20))
    with pytest.raises(AttributeError, match="no attribute 'quantise_model'"):
        dynamo_jax.quantise_model  # noqa: B018
