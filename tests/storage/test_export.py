"""Out again: transformers computes with an exported folder what the quantized model computes here."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from quantized_runs import signed

from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.calibration.pipeline import quantize_folder
from dynamo_jax.generation import load_text_model, quantized_language_model
from dynamo_jax.models.bundled import BUNDLED
from dynamo_jax.models.decoder import with_parameters
from dynamo_jax.models.families.table import FAMILIES
from dynamo_jax.models.huggingface import load_decoder
from dynamo_jax.progress import no_progress
from dynamo_jax.runtime.generate import GenerateConfig, generate
from dynamo_jax.runtime.serving import experts
from dynamo_jax.storage import checkpoint, results
from dynamo_jax.storage.export import export

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = QuantizeConfig(bits=5.8, group_size=8, channel_block=8, window=24, calibration_windows=2, batch_size=2)


FILLED = {"gpt_oss": {"bits": 8.0, "group_size": 24, "channel_block": 10}}  # of its 32 hidden and 24 channels


def family_case(family):
    """The experts of gpt_oss lie in files in their own way, those of the others much as olmoe's."""
    return pytest.param(family, False, marks=[] if family == "gpt_oss" else [pytest.mark.slow])


@pytest.mark.parametrize(("family", "apart"), [*map(family_case, FAMILIES), ("olmoe", True)])
def test_transformers_loads_an_export_and_has_our_logits(family_model, family, apart, tokenizer_file, tmp_path):
    """A bfloat16 checkpoint in several shards, quantized with several widths, exported, loaded in float32."""
    model = family_model(family).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hub", max_shard_size="60KB")
    (tmp_path / "hub" / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    rng = np.random.default_rng(0)
    text = " ".join(f"w{i}" for i in rng.integers(3, 61, 200))
    settings = dataclasses.replace(SMALL, per_projection=apart, **FILLED.get(family, {}))
    plan = quantize_folder(tmp_path / "hub", tmp_path / "quantized", {"words": text}, settings)
    assert len(np.unique(plan.widths)) > 1
    export(tmp_path / "quantized", tmp_path / "out", no_progress)

    quantized = checkpoint.load(tmp_path / "quantized")
    ours, _ = quantized_language_model(quantized)
    tokens = rng.integers(3, 61, (2, 20))
    run = jax.jit(lambda arrays, state: with_parameters(ours.config, arrays)(tokens, experts=experts(state))[0])
    logits = run(ours.parameters, ours.state)
    read, info = type(model).from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] - {"lm_head.weight"} and not info["unexpected_keys"]
    with torch.no_grad():
        theirs = read.eval()(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits, theirs, atol=1e-4 * np.abs(theirs).max(), rtol=0)
    again, _ = jax.jit(load_decoder(tmp_path / "out"))(jnp.asarray(tokens))
    np.testing.assert_allclose(again, theirs, atol=1e-4 * np.abs(theirs).max(), rtol=0)
    if family in ("gpt_oss", "deepseek_v3"):  # with biases, and with shared experts: decoding picks single experts
        written = load_text_model(tmp_path / "out", jnp.float32)[0]
        settings = GenerateConfig(max_tokens=8)
        assert generate(ours, [[5, 9, 33]], settings) == generate(written, [[5, 9, 33]], settings)


@pytest.fixture(scope="module")
def exported(small_folder, words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    settings = QuantizeConfig(calibration_windows=1, window=32, bits=3.5)
    quantize_folder(small_folder, folder / "quantized", {"words": words(0)}, settings)
    export(folder / "quantized", folder / "out", no_progress)
    return folder


def test_an_export_is_a_whole_folder_with_a_tokenizer(exported, small_folder):
    config = json.loads((exported / "out" / "config.json").read_text())
    assert config["model_type"] == "olmoe" and config["dtype"] == "bfloat16"
    model = transformers.AutoModelForCausalLM.from_pretrained(exported / "out")
    assert next(model.parameters()).dtype == torch.bfloat16
    assert (exported / "out" / "tokenizer.json").read_bytes() == (small_folder / "tokenizer.json").read_bytes()
    assert sorted(p.name for p in exported.iterdir()) == ["out", "quantized"]


def test_an_export_goes_to_an_empty_place_only(exported, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds something else \(mine.txt\)"):
        export(exported / "quantized", tmp_path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_the_same_export_is_done_already_and_another_one_needs_to_say_so(exported, tmp_path, small_folder, words):
    said = []
    before = results.read_sums(exported / "out" / "SHA256SUMS")
    export(exported / "quantized", exported / "out", log=said.append)
    assert "done already" in said[0] and results.read_sums(exported / "out" / "SHA256SUMS") == before
    settings = QuantizeConfig(calibration_windows=1, window=32, bits=4.5, quantizer="rtn")
    quantize_folder(small_folder, tmp_path / "other", {"words": words(0)}, settings)
    shutil.copytree(exported / "out", tmp_path / "out")
    with pytest.raises(ValueError, match=r"a finished result .*--overwrite"):
        export(tmp_path / "other", tmp_path / "out")
    export(tmp_path / "other", tmp_path / "out", overwrite=True)
    after = results.read_sums(tmp_path / "out" / "SHA256SUMS")
    assert after.keys() == before.keys() and after != before


def test_what_config_json_promises_and_an_export_does_not_have_is_taken_out(exported, tmp_path):
    """The source named Python files of its own, layers that predict further tokens, and float16 in the older key."""
    folder = tmp_path / "quantized"
    shutil.copytree(exported / "quantized", folder)
    own = folder / "source" / "config.json"
    more = {"auto_map": {"AutoConfig": "a.B"}, "num_nextn_predict_layers": 1, "torch_dtype": "float16"}
    own.write_text(json.dumps(json.loads(own.read_text()) | more))
    signed(folder, "source/config.json")
    said = []
    export(folder, tmp_path / "out", log=said.append)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "auto_map" not in config and config["num_nextn_predict_layers"] == 0
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert len(said) == 2 and "auto_map" in said[0] and "num_nextn_predict_layers" in said[1]


def test_a_failed_export_leaves_nothing(exported, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dynamo_jax.storage.export.expert_tensors", full_disk)
    with pytest.raises(OSError, match="No space"):
        export(exported / "quantized", tmp_path / "out", no_progress)
    assert not list(tmp_path.iterdir())


def test_an_unquantized_folder_cannot_be_exported(tmp_path):
    with pytest.raises(ValueError, match="not a dynamo_jax quantized model"):
        export(BUNDLED, tmp_path / "out", no_progress)
