"""A rest at 8 or 4 bits from calibration to the folder and out again: what experts see, bytes, files, export."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantized_runs import SETTINGS, signed

from dynamo_jax.calibration import distil as distilling
from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.calibration.estimate import estimate
from dynamo_jax.calibration.pipeline import quantize, quantize_folder
from dynamo_jax.evaluation.divergence import divergence, log_probabilities
from dynamo_jax.evaluation.perplexity import EvalConfig
from dynamo_jax.generation import quantized_language_model
from dynamo_jax.models.decoder import expert_parameter_names, parameters, with_parameters
from dynamo_jax.models.formats.tensor_files import write_tensors
from dynamo_jax.models.huggingface import Source, load_decoder
from dynamo_jax.models.rest import CODES, expanded
from dynamo_jax.models.rest import quantized as with_quantized_rest
from dynamo_jax.models.tokenizer import load_tokenizer
from dynamo_jax.runtime.generate import GenerateConfig, generate
from dynamo_jax.storage import checkpoint, facts
from dynamo_jax.storage.bundles import read_bundle
from dynamo_jax.storage.export import export

pytestmark = pytest.mark.usefixtures("quick_compilation")

REST = dataclasses.replace(SETTINGS, rest=8)


@pytest.fixture(scope="module")
def known(texts):
    return {"code": texts["code"], "sums": texts["sums"]}


@pytest.fixture(scope="module")
def original(narrow_folder):
    return load_decoder(narrow_folder)


@pytest.fixture(scope="module")
def folder(narrow_folder, known, tmp_path_factory):
    out = tmp_path_factory.mktemp("rest") / "quantized"
    quantize_folder(narrow_folder, out, known, REST)
    return out


@pytest.fixture(scope="module")
def loaded(folder):
    return checkpoint.load(folder)


@pytest.fixture(scope="module")
def floats(loaded):
    """The same model with the weights that its codes stand for."""
    return dataclasses.replace(loaded, parameters=expanded(loaded.parameters, jnp.float32))


def same(one, two):
    assert one.keys() == two.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, two[name])
        assert array.dtype == two[name].dtype, name


def test_experts_are_calibrated_behind_the_quantized_rest(original, narrow_folder, known, loaded, floats):
    """As those of a float model that has the dequantized weights; and in memory as from a folder."""
    tokenizer = load_tokenizer(narrow_folder)
    changed = with_parameters(original.config, parameters(original) | floats.parameters)
    oracle, _ = quantize(changed, tokenizer, known, SETTINGS)
    here, _ = quantize(original, tokenizer, known, REST)
    same(here.parameters, loaded.parameters)
    for model in (oracle, here):
        np.testing.assert_array_equal(model.plan.widths, loaded.plan.widths)
        for a, b in zip(jax.tree.leaves(model.store), jax.tree.leaves(loaded.store), strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(model.knowledge.block_errors, loaded.knowledge.block_errors, rtol=1e-4)
    before, _ = quantize(original, tokenizer, known, SETTINGS)
    assert not np.allclose(before.knowledge.block_errors, loaded.knowledge.block_errors, rtol=1e-4)


def test_what_is_counted_lies_on_the_device(narrow_folder, known, folder, loaded):
    held = loaded.device_parameters()
    counted = sum(a.nbytes for a in held.values())
    source = Source(narrow_folder)
    assert source.other_bytes(8) == counted < 0.55 * source.other_bytes()
    layers = 2 * (2 * 256 * 256 + 2 * 256 * 128)  # weights of q, o, k and v
    assert 0.9 * layers / 2 < counted - source.other_bytes(4) < layers / 2
    assert {a.dtype.name for n, a in held.items() if n.endswith(CODES)} == {"int8"}
    assert {a.dtype.name for a in loaded.device_parameters(jnp.float32).values()} == {"int8", "float32"}
    said = facts.describe(folder)
    assert said["rest"] == "8 bits" and said["all else on the device"] == f"{counted:,} bytes"
    assert said["not quantized"].startswith("rest: 8 bits")
    assert f"{facts.bytes_words(counted)} for all else (rest: 8 bits)" in facts.summary(folder)["size"]
    assert estimate(narrow_folder, known, REST).others == counted
    ready, _ = quantized_language_model(loaded, jnp.bfloat16)
    assert sum(a.nbytes for a in jax.tree.leaves(ready.parameters)) == counted


def test_a_budget_of_the_whole_model_gives_experts_what_the_rest_leaves(narrow_folder):
    source = Source(narrow_folder)
    asked = {bits: QuantizeConfig(fits_gib=0.01, reserve_gib=0.001, rest=bits) for bits in (16, 8, 4)}
    left = {b: c.bytes_for(source.config.num_expert_weights, source.other_bytes(b)) for b, c in asked.items()}
    for bits in (8, 4):
        assert left[bits] - left[16] == source.other_bytes() - source.other_bytes(bits) > 0


def test_a_saved_model_is_read_back_bit_for_bit(loaded, tmp_path):
    checkpoint.save(tmp_path / "model", loaded)
    again = checkpoint.load(tmp_path / "model")
    same(again.parameters, loaded.parameters)
    meta = checkpoint.read_description(tmp_path / "model").meta
    assert meta.rest == 8 and meta.rest_bytes == sum(a.nbytes for a in again.parameters.values())


@pytest.mark.parametrize("bits", [16, 4])
def test_other_bits_are_read_back_too_and_folders_of_before(loaded, floats, tmp_path, bits):
    own = {n: np.asarray(a, jnp.bfloat16) for n, a in floats.parameters.items()}
    own = {n: jnp.asarray(a) for n, a in with_quantized_rest(own, bits).items()}
    checkpoint.save(tmp_path, dataclasses.replace(loaded, parameters=own))
    same(checkpoint.load(tmp_path).parameters, own)
    if bits == 16:
        meta = json.loads((tmp_path / "dynamo_jax.json").read_text())
        assert meta.pop("rest") == 16 and meta.pop("rest_bytes") == sum(a.nbytes for a in own.values())
        (tmp_path / "dynamo_jax.json").write_text(json.dumps(meta))
        signed(tmp_path, "dynamo_jax.json")
        same(checkpoint.load(tmp_path).parameters, own)
        assert facts.describe(tmp_path)["rest"] == "its own dtype"


def without(arrays, name):
    arrays.pop(name)
    return {}


WRONG = {
    "codes as floats": ("top", lambda a: {"embed.codes": a["embed.codes"] * 1.0}, "is float64, expected int8"),
    "a row less": ("top", lambda a: {"embed.codes": a["embed.codes"][1:]}, "embed.codes is "),
    "scales of nothing": ("top", lambda a: {"embed.scales": a["embed.scales"] * np.nan}, "embed.scales holds NaN"),
    "floats for codes": (
        "layer-000",
        lambda a: {"parameters/attention.q": a.pop("parameters/attention.q.codes") * 1.0},
        "parameters/attention.q is not expected",
    ),
    "no scales": ("layer-001", lambda a: without(a, "parameters/attention.o.scales"), "attention.o.scales is missing"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_damaged_rest_is_an_error_that_names_the_file(loaded, tmp_path, case):
    name, change, message = WRONG[case]
    checkpoint.save(tmp_path, loaded)
    path = tmp_path / f"{name}.safetensors"
    arrays = read_bundle(path)
    arrays |= change(arrays)
    write_tensors(path, {n: np.asarray(a) for n, a in arrays.items()})
    signed(tmp_path, path.name)
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        checkpoint.load(tmp_path)


def test_bits_that_cannot_be_are_an_error_that_names_the_file(loaded, tmp_path):
    checkpoint.save(tmp_path, loaded)
    meta = json.loads((tmp_path / "dynamo_jax.json").read_text())
    (tmp_path / "dynamo_jax.json").write_text(json.dumps(meta | {"rest": 5}))
    signed(tmp_path, "dynamo_jax.json")
    with pytest.raises(ValueError, match=r"dynamo_jax.json: damaged: .*rest 5: known are 16, 8, 4 bits"):
        checkpoint.load(tmp_path)
    with pytest.raises(ValueError, match="rest 5: known are 16, 8, 4 bits"):
        QuantizeConfig(rest=5)


def test_what_runs_is_what_its_dequantized_weights_are(original, loaded, floats, texts):
    """Divergence from the float model, and text; the reference is the model that was quantized."""
    given = {"verse": texts["verse"]}, EvalConfig(window=64, batch_size=4, limit=4)
    ours, theirs = (divergence(original, model, *given)[0] for model in (loaded, floats))
    assert ours.divergence == pytest.approx(theirs.divergence, rel=1e-3) and ours.divergence > 0
    assert ours.nll_unquantized == theirs.nll_unquantized
    prompts, settings = [loaded.tokenizer.encode("And in the").ids], GenerateConfig(max_tokens=8)
    texts_of = [generate(quantized_language_model(m)[0], prompts, settings) for m in (loaded, floats)]
    assert texts_of[0] == texts_of[1]


def test_an_export_has_the_weights_that_codes_stand_for(folder, loaded, tmp_path):
    export(folder, tmp_path / "hub")
    exported = parameters(load_decoder(tmp_path / "hub"))
    own = {n: a for n, a in exported.items() if n not in expert_parameter_names(loaded.config)}
    same({n: jnp.asarray(a, jnp.bfloat16) for n, a in expanded(loaded.parameters).items()}, own)


def test_distillation_compares_the_quantized_rest_with_the_float_model(original, loaded, floats):
    """At planes that are not trained, its measure is the divergence between the two models' predictions."""
    config = original.config
    arrays = {n: jnp.asarray(a, jnp.float32) for n, a in parameters(original).items()}
    others = distilling._others(config, parameters(original), 8)
    same(others, loaded.parameters)
    student = distilling._student(loaded.store, loaded.plan)
    now = distilling._Trained(jnp.asarray(distilling._value(student)), jnp.zeros(student.scales.shape))
    windows = np.random.default_rng(0).integers(0, config.vocab_size, (2, 16))
    found = distilling._check(config, arrays, others, student, now, jnp.asarray(windows))
    model = distilling._with_planes(config, floats.parameters, student, now)
    tokens = jnp.asarray(np.pad(windows, [(0, 0), (0, 1)]))
    p, q = (log_probabilities(config, a, tokens) for a in (arrays, parameters(model)))
    np.testing.assert_allclose(found, (jnp.exp(p) * (p - q)).sum(axis=-1).mean(axis=1), rtol=1e-3)
