"""The rest of a model at 8 and 4 bits: codes and scales, which matrices, and the forward pass that expands them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from conftest import FAMILY_MODELS, SMALL
from flax import nnx
from jax.extend.core import jaxprs_in_params
from small_decoders import decoder_config

from dynamo_jax.models.decoder import Decoder, new_cache, parameters, with_parameters
from dynamo_jax.models.families.table import config_from
from dynamo_jax.models.huggingface import load_decoder, parameter_shapes
from dynamo_jax.models.layerwise import embedded
from dynamo_jax.models.rest import (
    CODES,
    SCALES,
    Packed,
    bits_of,
    expanded,
    form_of,
    quantized,
    stored,
    stored_bytes,
    unpacked,
)
from dynamo_jax.models.stacked import stacked, stacked_cache, stacked_decoder

pytestmark = pytest.mark.usefixtures("quick_compilation")

# bits asked for, name, and what follows: bits, axis, weights that share a scale
CASES = {
    "8": (8, "layers.0.attention.q", (8, 0, 192)),
    "8, rows": (8, "embed", (8, 1, 320)),
    "4": (4, "layers.0.attention.q", (4, 0, 64)),
    "4, rows": (4, "head", (8, 1, 320)),
}
MOST = {8: 127.5, 4: 7.5}


ENDS = (CODES, SCALES)


def drawn(shape, seed=0):
    """Weights with groups of very different sizes, and one of zeros."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=shape) * np.exp(rng.normal(size=(shape[0], 1)) * 3)
    weights[:, 0] *= 100
    weights[0], weights[:, -1] = 0, 0
    return weights.astype(np.float32)


@pytest.mark.parametrize("case", CASES)
def test_a_weight_is_at_most_half_a_step_off(case):
    asked, name, (bits, axis, group) = CASES[case]
    weights = drawn((192, 320))
    assert form_of(name, weights.shape, asked) == (bits, axis, group)
    arrays = quantized({name: weights}, asked)
    codes, scales = arrays[name + CODES], np.asarray(arrays[name + SCALES], np.float64)
    back = np.asarray(expanded(arrays, jnp.float32)[name], np.float64)
    step = np.repeat(scales, group, axis=axis)
    assert (np.abs(back - weights) <= step / 2 * (1 + 1e-6)).all()
    largest = np.abs(weights).reshape(*weights.shape[:axis], -1, group, *weights.shape[axis + 1 :]).max(axis=axis + 1)
    assert (scales >= largest / MOST[bits]).all() and (scales <= largest / MOST[bits] * (1 + 2**-7)).all()
    assert codes.nbytes == weights.size * bits // 8


@pytest.mark.parametrize("case", ["8", "8, rows", "4"])
def test_rounding_is_that_of_qwix(case):
    """Google's quantization library at the same groups, but for its scales in float32."""
    qwix = pytest.importorskip("qwix")
    bits, name, (_, axis, group) = CASES[case]
    weights = np.random.default_rng(1).normal(size=(192, 320)).astype(np.float32)
    how = {"tiled_axes": {axis: group}, "channelwise_axes": [1 - axis]}
    theirs = qwix.dequantize(qwix.quantize(jnp.asarray(weights), f"int{bits}", **how))
    ours = expanded(quantized({name: weights}, bits), jnp.float32)[name]
    apart = [np.square(np.asarray(a) - weights).mean() for a in (ours, theirs)]
    assert apart[0] == pytest.approx(apart[1], rel=0.02)


@pytest.mark.parametrize("lead", [(), (3,)], ids=["a layer", "stacked"])
@pytest.mark.parametrize("rows", [64, 192, 40])
def test_codes_for_tpus_mean_the_same(rows, lead):
    """int4 in place of two in a byte, also of one group, and of groups of eight."""
    name, arrays = "loops.0.0.attention.q", [quantized({"q": drawn((rows, 24), n)}, 4) for n in range(3)]
    both = {name + end: np.stack([a["q" + end] for a in arrays]) if lead else arrays[0]["q" + end] for end in ENDS}
    theirs = unpacked(both)
    assert both[name + CODES].dtype == np.uint8 and theirs[name + CODES].dtype == jnp.int4
    assert theirs[name + CODES].shape == (*lead, rows, 24) == Packed(*both.values()).shape
    for dtype in (jnp.float32, jnp.bfloat16):
        np.testing.assert_array_equal(expanded(both, dtype)[name], expanded(theirs, dtype)[name])


QUANTIZED = {
    *("embed", "head", "dense.gate", "dense.up", "dense.down", "shared.gate", "shared.up", "shared.down"),
    *(f"attention.{n}" for n in ("q", "k", "v", "o", "gate", "q_down", "q_up", "kv_down", "kv_up")),
    *(f"attention.{n}" for n in ("qkv", "qkvz", "z", "out", "in_proj", "gate_down", "gate_up")),
}
FLOATS = {
    *("router", "shared_gate", "gate_bias", "up_bias", "down_bias"),
    *(f"attention.{n}" for n in ("a", "b", "ba", "decay", "decay_down", "decay_up")),
}


@functools.cache
def config_of(family):
    prefix, values = FAMILY_MODELS[family]
    if prefix == "BailingMoeV2":
        import ling_oracle as module
    else:
        module = transformers
    sizes = {n: 16 * v for n, v in {**SMALL, **values}.items() if n in ("hidden_size", "q_lora_rank") and v}
    kind = getattr(module, f"{prefix}ForCausalLM")
    return config_from(kind.config_class(**{**SMALL, **values, **sizes}).to_dict())


@functools.cache
def matrices(family):
    """(name without its layer's prefix, layer, shape) of all parameters with two axes."""
    found = []
    for name, shape in parameter_shapes(config_of(family)).items():
        parts = name.split(".")
        layer = int(parts[1]) if parts[0] == "layers" else None
        if len(shape) == 2:
            found.append((".".join(parts if layer is None else parts[2:]), layer, shape))
    return found


def test_matrices_of_all_families_are_quantized_and_small_ones_are_not():
    found = {True: set(), False: set()}
    for family in FAMILY_MODELS:
        for name, _, shape in matrices(family):
            assert (form_of(name, shape, 4) is None) == (form_of(name, shape, 8) is None)
            found[form_of(name, shape, 8) is not None].add(name)
    assert found[True] == QUANTIZED and found[False] == FLOATS


BASE = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64,
    "dense_layers": (1, 3), "dense_intermediate_size": 24, "shared_intermediate_size": 8,
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 9))


def model_of(**changes):
    config = decoder_config(**BASE | changes)
    arrays = parameters(Decoder(config, rngs=nnx.Rngs(0)))
    moved = {n: a + 0.3 * jax.random.normal(jax.random.key(i), a.shape) for i, (n, a) in enumerate(arrays.items())}
    return config, moved


def on_device(arrays):
    return {name: jnp.asarray(a) for name, a in arrays.items()}


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def logits_of(config, arrays, tokens, dtype):
    return with_parameters(config, arrays)(tokens, dtype=dtype)[0]


def checked(config, arrays, bits):
    """A quantized model has the logits of the one with the weights that its codes stand for, and not of the float."""
    packed = on_device(quantized(arrays, bits))
    assert bits_of(packed) == bits
    got = logits_of(config, packed, TOKENS, jnp.float32)
    want = logits_of(config, expanded(packed, jnp.float32), TOKENS, jnp.float32)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * float(jnp.abs(want).max()))
    assert (np.abs(got - logits_of(config, arrays, TOKENS, jnp.float32)) > 1e-4).any()


@pytest.mark.parametrize("bits", [8, 4])
def test_logits_are_those_of_the_dequantized_weights(bits):
    checked(*model_of(tie_word_embeddings=bits == 8, num_hidden_layers=2), bits)


def test_in_bfloat16_logits_are_as_near_to_those_of_float32():
    """XLA may leave the rounding of a dequantized weight out, so that they are not the same bit for bit."""
    config, arrays = model_of(num_hidden_layers=2)
    packed = on_device(quantized(arrays, 4))
    exact = logits_of(config, expanded(packed, jnp.float32), TOKENS, jnp.float32)
    ran = [logits_of(config, a, TOKENS, jnp.bfloat16) for a in (packed, expanded(packed, jnp.bfloat16))]
    ours, theirs = (float(jnp.abs(logits - exact).mean()) for logits in ran)
    assert 0 < ours < 1.05 * theirs


WIDER = {"deepseek_v3": {"q_lora_rank": 16}}


@pytest.mark.parametrize(
    ("family", "bits"),
    [
        ("deepseek_v3", 8),  # latent attention, a dense layer, shared experts
        ("qwen3_next", 4),  # delta nets, a gate of the shared expert
        pytest.param("gpt_oss", 8, marks=pytest.mark.slow),
        pytest.param("lfm2_moe", 8, marks=pytest.mark.slow),
        pytest.param("kimi_linear", 4, marks=pytest.mark.slow),
        pytest.param("bailing_hybrid", 8, marks=pytest.mark.slow),
    ],
)
def test_families_have_the_logits_of_their_dequantized_weights(family_model, family, bits, tmp_path):
    family_model(family, **WIDER.get(family, {})).save_pretrained(tmp_path)
    model = load_decoder(tmp_path)
    checked(model.config, parameters(model), bits)


@pytest.mark.parametrize("bits", [pytest.param(8, marks=pytest.mark.slow), 4])
def test_loops_of_layers_do_what_the_layers_do_one_after_the_other(bits):
    config, arrays = model_of(tie_word_embeddings=False)
    packed = on_device(quantized(arrays, bits))
    together = stacked(config, packed)
    said = jax.eval_shape(functools.partial(stacked, config), stored({n: a.shape for n, a in arrays.items()}, bits))
    for name, array in together.items():
        assert said[name].shape == array.shape and (said[name].dtype == array.dtype or CODES not in name)
    empty, mask = new_cache(config, 2, 16), jnp.ones((2, 9), bool)

    def run(decoder, cache):
        hidden, _, cache = decoder.cached_states(TOKENS[:, :8], mask[:, :8], cache)
        more, _, _ = decoder.cached_states(TOKENS[:, 8:], mask[:, 8:], cache)
        return decoder.logits(hidden), decoder.logits(more)

    one = jax.jit(lambda a, c: run(with_parameters(config, a), c))(packed, empty)
    loop = jax.jit(lambda a, c: run(stacked_decoder(config, a), c))(together, stacked_cache(config, empty))
    for a, b in zip(one, loop):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def floats_in(jaxpr):
    """Sizes of all floating-point arrays that a program makes."""
    for equation in jaxpr.eqns:
        yield from (v.aval.size for v in equation.outvars if jnp.issubdtype(v.aval.dtype, jnp.floating))
        for inner in jaxprs_in_params(equation.params):
            yield from floats_in(inner)


@pytest.mark.parametrize("bits", [8, 4])
def test_an_embedding_gathers_rows_and_expands_no_others(bits):
    config, arrays = model_of(tie_word_embeddings=True)
    packed = on_device(quantized(arrays, bits))
    model = with_parameters(config, packed)
    np.testing.assert_array_equal(model.embedded(TOKENS, jnp.float32), expanded(packed, jnp.float32)["embed"][TOKENS])
    one = TOKENS[:1, :1]
    np.testing.assert_array_equal(model.embedded(one, jnp.float32), expanded(packed, jnp.float32)["embed"][one])
    for run in (lambda t: model.embedded(t, jnp.float32), lambda t: embedded(config, packed, t)):
        sizes = list(floats_in(jax.make_jaxpr(run)(TOKENS[:1, :3]).jaxpr))
        assert sizes and max(sizes) <= 3 * config.hidden_size
    assert model.head_weights() is not None and model.head_weights().shape == arrays["embed"].shape


def test_a_model_gives_back_the_parameters_that_it_was_made_of():
    config, arrays = model_of(tie_word_embeddings=False)
    packed = on_device(quantized(arrays, 4))
    again = parameters(with_parameters(config, packed))
    assert again.keys() == packed.keys()
    assert all(again[n] is a or np.array_equal(again[n], a) for n, a in packed.items())


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_bytes_are_those_of_the_arrays(bits):
    _, arrays = model_of(tie_word_embeddings=False)
    arrays = {n: np.asarray(a, jnp.bfloat16) for n, a in arrays.items()}
    shapes = {n: a.shape for n, a in arrays.items()}
    made, said = quantized(arrays, bits), stored(shapes, bits)
    assert {n: (a.shape, a.dtype) for n, a in made.items()} == {n: (a.shape, a.dtype) for n, a in said.items()}
    assert stored_bytes({n: a.nbytes for n, a in arrays.items()}, shapes, bits) == sum(a.nbytes for a in made.values())


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match="rest 5: known are 16, 8, 4 bits"):
        quantized({"embed": np.zeros((8, 8))}, 5)
    with pytest.raises(ValueError, match="embed: weights to quantize hold NaN or infinity"):
        quantized({"embed": np.full((8, 8), np.inf)}, 8)
    config, arrays = model_of()
    packed = quantized(arrays, 8)
    del packed["embed" + SCALES]
    with pytest.raises(ValueError, match=r"embed is missing, expected .*embed.codes is"):
        with_parameters(config, packed)
    with pytest.raises(TypeError, match="scales are of columns"):
        Packed(np.zeros((64, 8), np.int8), np.zeros((1, 8)))[0]
