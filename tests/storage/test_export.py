"""Out again: transformers computes with an exported folder what the quantized model computes here."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stored
import torch
import transformers
from conftest import FAMILY_MODELS
from quantized_runs import signed

from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.calibration.pipeline import quantize_folder
from dynamo_jax.generation import load_text_model, quantized_language_model
from dynamo_jax.models.bundled import BUNDLED
from dynamo_jax.models.decoder import with_parameters
from dynamo_jax.models.formats.declared import declared
from dynamo_jax.models.formats.stored import StoredTensors
from dynamo_jax.models.huggingface import Source, load_decoder
from dynamo_jax.progress import no_progress
from dynamo_jax.runtime.generate import GenerateConfig, generate
from dynamo_jax.runtime.serving import experts
from dynamo_jax.storage import checkpoint, facts, results
from dynamo_jax.storage.bundles import read_bundle
from dynamo_jax.storage.export import export

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = QuantizeConfig(
    unseen_windows=0, bits=5.8, group_size=8, channel_block=8, window=24, calibration_windows=2, batch_size=2
)


FILLED = {"gpt_oss": {"bits": 8.0, "group_size": 24, "channel_block": 10}}  # of its 32 hidden and 24 channels


def family_case(family):
    """The experts of gpt_oss lie in files in their own way, those of the others much as olmoe's."""
    return pytest.param(family, False, marks=[] if family == "gpt_oss" else [pytest.mark.slow])


@pytest.mark.parametrize(
    ("family", "apart"), [*map(family_case, FAMILY_MODELS), pytest.param("olmoe", True, marks=pytest.mark.slow)]
)
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
    indexed = Source(tmp_path / "hub").unread  # the index of DeepSeek-V3.2 and GLM-5, which only the source has
    source = tmp_path / "hub" if indexed else None
    export(tmp_path / "quantized", tmp_path / "out", no_progress, source=source)

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
    settings = QuantizeConfig(unseen_windows=0, calibration_windows=1, window=32, bits=3.5)
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


@pytest.fixture(scope="module")
def packed_with_more(family_model, tokenizer_file, tmp_path_factory):
    """A model in FP8 with tensors that no decoder here reads: some of them in FP8, too, and one of whole numbers."""
    folder = tmp_path_factory.mktemp("packed") / "hub"
    sizes = {"hidden_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    family_model("qwen3_moe", **sizes).to(torch.bfloat16).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    fmt = stored.FORMATS["fp8 in blocks"]
    tensors, values = read_bundle(folder / "model.safetensors"), {}
    packed = {name for name in tensors if ".experts." in name} | {"mtp.fc.weight"}
    tensors["mtp.fc.weight"] = tensors["model.embed_tokens.weight"]
    tensors |= {"mtp.norm.weight": np.ones(32, np.float32), "model.visual.at": np.arange(5)}
    for name in packed:
        made = fmt.make(tensors.pop(name).astype(np.float32))
        tensors |= {name.removesuffix("weight") + leaf: a for leaf, a in made.tensors.items()}
        values[name] = made.value
    stored.write_file(folder / "model.safetensors", tensors)
    raw = json.loads((folder / "config.json").read_text()) | {"quantization_config": fmt.config}
    raw["num_nextn_predict_layers"] = 1
    (folder / "config.json").write_text(json.dumps(raw))
    return folder, tensors | values


def test_what_was_not_read_is_copied_from_the_folder_that_was_quantized(packed_with_more, words, tmp_path):
    folder, tensors = packed_with_more
    quantize_folder(folder, tmp_path / "quantized", {"words": words(0)}, dataclasses.replace(SMALL, bits=7.0))
    said = facts.summary(tmp_path / "quantized")
    assert said["not read"].endswith("(mtp: 2, model.visual: 1)")
    export(tmp_path / "quantized", tmp_path / "out", source=folder)
    out = StoredTensors(tmp_path / "out", declared({}))
    for name in ("mtp.fc.weight", "mtp.norm.weight", "model.visual.at"):
        np.testing.assert_array_equal(out.read(name), tensors[name])
        assert out.read(name).dtype == tensors[name].dtype
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in raw and raw["num_nextn_predict_layers"] == 1
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 61, (2, 20)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        want = theirs(torch.tensor(np.asarray(tokens))).logits.numpy()
    got = jax.jit(load_decoder(tmp_path / "out"))(tokens)[0]
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max(), rtol=0)
    logged = []
    export(tmp_path / "quantized", tmp_path / "without", log=logged.append)
    assert "3 tensors" in logged[0] and "--source" in logged[0]
    assert "mtp.fc.weight" not in StoredTensors(tmp_path / "without", declared({}))
    with pytest.raises(ValueError, match=r"config\.json: not what was quantized"):
        export(tmp_path / "quantized", tmp_path / "other", source=tmp_path / "out")


def test_a_plan_that_is_wider_than_its_source_says_so(packed_with_more, words, tmp_path):
    """FP8 takes 8 bits and some for scales: no plan is wider. int4 does not, and the 8-bit blocks are counted."""
    folder, tensors = packed_with_more
    quantize_folder(folder, tmp_path / "eight", {"words": words(0)}, dataclasses.replace(SMALL, bits=10.0))
    for said in (facts.summary(tmp_path / "eight"), facts.describe(tmp_path / "eight")):
        assert re.fullmatch(r"experts: FP8 in blocks of 24 x 20, 8\.\d\d bits a weight", said["source"])
    own = tmp_path / "hub"
    shutil.copytree(folder, own)
    fmt, packed = stored.FORMATS["int4 in groups"], {}
    for name, array in tensors.items():
        if ".experts." in name and name.endswith("proj.weight"):
            made = fmt.make(array.astype(np.float32))
            packed |= {name.removesuffix("weight") + leaf: a for leaf, a in made.tensors.items()}
        elif ".experts." not in name and not name.startswith("mtp"):
            packed[name] = array
    stored.write_file(own / "model.safetensors", packed)
    raw = json.loads((own / "config.json").read_text()) | {"quantization_config": fmt.config}
    (own / "config.json").write_text(json.dumps(raw))
    plan = quantize_folder(own, tmp_path / "four", {"words": words(0)}, dataclasses.replace(SMALL, bits=10.0))
    wide = (plan.widths == 8).sum()
    assert wide
    for said in (facts.summary(tmp_path / "four"), facts.describe(tmp_path / "four")):
        assert said["source"].startswith("experts: int4 with a scale a row, 4.")
        assert f"; {wide:,} of {plan.widths.size:,} blocks are wider" in said["source"]


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
    settings = QuantizeConfig(unseen_windows=0, calibration_windows=1, window=32, bits=4.5, quantizer="rtn")
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
    own = folder / "config.json"
    more = {"auto_map": {"AutoConfig": "a.B"}, "num_nextn_predict_layers": 1, "torch_dtype": "float16"}
    raw = json.loads(own.read_text()) | more
    layers = raw["num_hidden_layers"]
    raw["text_config"] = {"mtp_num_hidden_layers": 2, "layer_types": [*range(layers + 2)], "other": [1]}
    own.write_text(json.dumps(raw))
    signed(folder, "config.json")
    said = []
    export(folder, tmp_path / "out", log=said.append)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "auto_map" not in config and config["num_nextn_predict_layers"] == 0
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["text_config"] == {"mtp_num_hidden_layers": 0, "layer_types": [*range(layers)], "other": [1]}
    assert len(said) == 3 and "auto_map" in said[0] and "num_nextn" in said[1] and "mtp_num" in said[2]


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
