"""Faults that were met, one case each: what is right is right, and what is wrong is said in these words."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from fuzz.configs import ROPES, rope, setting
from fuzz.folders import Made
from fuzz.judge import Case, outcome
from fuzz.tensors import INDEX, ODD_FILES, SINGLE, join, split, with_tensors
from fuzz.values import ABSENT, DEEP, MANY_DIGITS

from dynamo_jax.models.huggingface import Source, describe, load_config

pytestmark = pytest.mark.usefixtures("quick_compilation")
RIGHT = ""


@pytest.fixture(scope="module")
def good(family_model, tmp_path_factory):
    return Made(family_model, tmp_path_factory.mktemp("good"))


def added(*names: str, shape=(4, 4)) -> Case:
    def edit(tensors):
        tensors |= {name: np.ones(shape, np.float32) for name in names}

    return with_tensors(f"with {', '.join(names)}", edit)


def renamed(name: str) -> Case:
    return Case(f"the only file is {name}", lambda folder: (folder / SINGLE).rename(folder / name))


def odd(kind: str, name: str) -> Case:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        ODD_FILES[kind](folder / name)

    return Case(f"{kind} as {name}", change)


def change_index(folder: Path, **places: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= places
    (folder / INDEX).write_text(json.dumps(index))


def stale_index(folder: Path) -> None:
    """An index of shards that are gone, beside the one whole file."""
    names = safetensors.numpy.load_file(folder / SINGLE)
    places = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))


def stale_shards(folder: Path) -> None:
    """The same, with the shards, which hold zeros."""
    stale_index(folder)
    zeros = {name: np.zeros_like(a) for name, a in safetensors.numpy.load_file(folder / SINGLE).items()}
    safetensors.numpy.save_file(zeros, folder / "model-00001-of-00002.safetensors")


def hub_cache(folder: Path) -> None:
    """The root of a model in the hub's cache: everything is two folders further down."""
    files = list(folder.iterdir())
    inner = folder / "snapshots" / "0123abcd"
    inner.mkdir(parents=True)
    for file in files:
        file.rename(inner / file.name)


def many_axes(folder: Path) -> None:
    """A tensor's size is what it was, its shape a hundred thousand ones more."""
    header, data = split(folder / SINGLE)
    tensor = header["model.layers.1.self_attn.q_proj.weight"]
    tensor["shape"] = [1] * 100_000 + tensor["shape"]
    join(folder / SINGLE, json.dumps(header), data)


def without_index(folder: Path) -> None:
    (folder / INDEX).unlink()


nan = float("nan")
CONFIG = {  # good folder -> (change, what is said)
    "mixtral": [
        (setting({"rope_theta": nan, "rope_parameters": ABSENT}), "rope_theta=nan: expected"),
        (setting({"rms_norm_eps": -1}), "rms_norm_eps=-1: expected a positive number"),
        (setting({"rms_norm_eps": 0}), "rms_norm_eps=0: expected a positive number"),
        *((setting({"sliding_window": v}), "sliding_window=") for v in ("x", [1], -1, 0, nan, 0.5, 10**20)),
        *((setting({"num_hidden_layers": v}), "num_hidden_layers=") for v in (10**6, 10**9, 2**63, 1.0, "2", True)),
        *((setting({"num_local_experts": v}), "experts") for v in (10**6, 10**7, 10**9, 2**63)),
        (setting({"num_hidden_layers": 1}), r"holds model\.layers\.1\.\S+, which config\.json does not ask for"),
        (setting({"vocab_size": 10**20}), "vocab_size=10+: expected a whole number of at most"),
        (setting({"model_type": ["mixtral"]}), "unknown model_type"),
        (setting({"model_type": "\ud800"}), r"unknown model_type '\\ud800'"),
        (setting({"hidden_act": "x" * 10**6}), "hidden_act"),
        (setting({"vocab_size": MANY_DIGITS}), "config.json: not JSON: Exceeds the limit"),
        (setting({"use_cache": DEEP}), "config.json: not JSON that can be read: nested too deeply"),
        (setting({"num_experts": 5}), "contradict each other"),
        (setting({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}), "of their own for full_attention"),
        (setting({"rope_parameters": [1]}), r"rope_parameters=\[1\]: expected an object"),
        (rope("linear", {"short_factor": [1.0] * 4}), RIGHT),
        (rope("llama3", {"short_factor": [1.0] * 4, "long_factor": "x"}), RIGHT),
        (rope("linear", {"factor": ABSENT}), "missing key factor"),
        (rope("llama3", {"low_freq_factor": 4.0}), "low_freq_factor=4.0 is not below 4.0"),
        (rope("longrope", {"short_factor": [1.0] * 3}), "short_factor has 3 entries for 4 frequencies"),
        (rope("longrope", {"short_factor": [1.0, 1.0, 1.0, nan]}), "short_factor: a member=nan"),
    ],
    "gpt_oss": [
        *((rope("yarn", {"factor": v}), "factor=") for v in ("x", 0, nan, -1, [1], float("inf"))),
        (rope("yarn", {"attention_factor": 0}), "attention_factor=0: expected a positive number"),
        (setting({"swiglu_limit": 0}), "swiglu_limit=0: expected a positive number"),
        (setting({"sliding_window": None}), "sliding_window=None"),
        (setting({"layer_types": ["full_attention"]}), "layer_types="),
        (
            setting({"quantization_config": {"bits": 4}}),
            "weights quantized by None are not read; known: fp8",
        ),
    ],
    "deepseek_v3": [
        (setting({"first_k_dense_replace": 10**6}), "first_k_dense_replace=1000000"),
        (setting({"n_routed_experts": 10**9}), "experts"),
        (
            setting({"n_shared_experts": None}),
            r"holds \S+shared_experts\S+, which config\.json .* \(n_shared_experts\)",
        ),
        (setting({"n_shared_experts": 0}), r"\(n_shared_experts\)"),
        (setting({"n_shared_experts": ABSENT, "routed_scaling_factor": ABSENT}), RIGHT),
        (setting({"q_lora_rank": None}), r"tensors missing, the first is model\.layers\.0\.self_attn\.q_proj\.weight"),
    ],
}
FILES = {
    "mixtral": [
        (added("model.layers.0.self_attn.q_proj.bias"), r"self_attn\.q_proj\.bias, which .* \(attention_bias"),
        (added("model.layers.0.self_attn.q_norm.weight"), r"\(model_type\)"),
        (added("model.layers.0.block_sparse_moe.experts.4.w1.weight"), r"\(the number of experts"),
        (added("model.layers.0.block_sparse_moe.shared_expert.up_proj.weight"), r"\(shared_expert_inter"),
        (added("model.layers.0.block_sparse_moe.gate.bias"), r"gate\.bias, which config\.json does not ask for"),
        (added("lm_head.bias"), r"\(lm_head_bias\)"),
        (added("model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.k_scale", "x"), RIGHT),
        (added("model.layers.7.eh_proj.weight", "model.layers.2.enorm.weight"), RIGHT),
        (Case("a shape of many axes", many_axes), r"\.weight is \(1, 1, .*\.\.\.\), config\.json asks for"),
        (Case("an index without its shards", stale_index), RIGHT),
        (Case("an index with other shards", stale_shards), RIGHT),
        (Case("a hub cache", hub_cache), r"config\.json: no such file; .* is a cache of the hub: .*0123abcd$"),
        (renamed("consolidated.safetensors"), r"model\.safetensors: no such file; there are consolidated\.safetensors"),
        (renamed("model.fp16.safetensors"), r"there are model\.fp16\.safetensors, but neither model\.safetensors nor"),
        (renamed("pytorch_model.bin"), r"pytorch_model\.bin: a pickle can run any code"),
        (odd("a git-lfs pointer", SINGLE), r"model\.safetensors: a git-lfs pointer .*`git lfs pull`"),
        (odd("a pipe", SINGLE), r"model\.safetensors: a pipe or a device, expected a file"),
        (odd("a folder", SINGLE), r"model\.safetensors: a folder, expected a file"),
        (odd("endless zeros", "config.json"), r"config\.json: a pipe or a device"),
        (odd("a hole of a terabyte", "config.json"), r"config\.json: larger than the 67,108,864 bytes"),
        (odd("an empty file", "config.json"), r"config\.json: an empty file"),
        (odd("Latin-1", "config.json"), r"config\.json: not UTF-8 text"),
    ],
}
SHARDED = [
    (Case("no index", without_index), r"there are model-00001-of-\d+\.safetensors, .* but neither"),
    (Case("a shard outside", lambda f: change_index(f, x="../secret.safetensors")), r"index\.json: weight_map"),
    (Case("a device", lambda f: change_index(f, x="/dev/zero")), r"index\.json: weight_map"),
    (odd("deep objects", INDEX), r"index\.json: not JSON that can be read: nested too deeply"),
    (odd("a pipe", INDEX), r"index\.json: a pipe or a device"),
]
CASES = [
    *((name, False, case, said) for table in (CONFIG, FILES) for name, cases in table.items() for case, said in cases),
    *(("mixtral", True, case, said) for case, said in SHARDED),
]


@pytest.mark.parametrize(("name", "sharded", "case", "said"), CASES, ids=lambda v: getattr(v, "name", None))
def test_a_fault_that_was_met(good, name, sharded, case, said, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(good(name, sharded), folder)
    case.change(folder)
    kind, words = outcome(describe, folder)
    assert kind == ("error" if said else "right"), words
    assert re.search(said, words) and len(words) < 700 + len(str(folder)), words


def test_every_kind_of_rotary_scaling_has_a_good_case(good, tmp_path):
    for kind in ROPES:
        folder = tmp_path / kind
        shutil.copytree(good("mixtral"), folder)
        rope(kind, {}).change(folder)
        assert load_config(folder).ropes[0].scaling.rope_type == kind


def test_a_file_that_may_not_be_read_is_called_that_and_not_damaged(good):
    """Whoever may do everything becomes nobody for the time of the test."""
    folder = Path(tempfile.mkdtemp(prefix="dynamo_jax-closed-"))
    root = os.geteuid() == 0
    try:
        shutil.copytree(good("mixtral"), folder, dirs_exist_ok=True)
        folder.chmod(0o755)
        for name in (SINGLE, "config.json"):
            (folder / "config.json").chmod(0o644)
            (folder / name).chmod(0)
            if root:
                os.seteuid(65534)
            try:
                with pytest.raises(ValueError, match=rf"{re.escape(name)}: not readable: permission denied"):
                    describe(folder)
            finally:
                if root:
                    os.seteuid(0)
        folder.chmod(0)
    finally:
        folder.chmod(stat.S_IRWXU)
        shutil.rmtree(folder)


def test_the_tensors_that_are_not_read_have_their_names(good, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(good("mixtral"), folder)
    assert Source(folder).unread == []
    extra = ["model.layers.2.eh_proj.weight", "model.layers.2.self_attn.q_proj.weight", "x"]
    added(*extra).change(folder)
    assert Source(folder).unread == extra
    assert describe(folder)["not read"].startswith("3 tensors")


def test_a_promised_layer_for_further_tokens_may_be_there(good, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(good("deepseek_v3"), folder)
    added("model.layers.2.mlp.experts.0.up_proj.weight").change(folder)
    setting({"num_nextn_predict_layers": 0, "num_mtp_layers": 0}).change(folder)
    with pytest.raises(ValueError, match=r"model\.layers\.2\..*\(num_hidden_layers\)"):
        Source(folder)
    setting({"num_nextn_predict_layers": 1}).change(folder)
    assert len(Source(folder).unread) == 1
