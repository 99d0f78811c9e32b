"""Hugging Face folders with any damage: a right result, or one line that names the file, in bounded time and memory."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import stored
from fuzz.configs import config_cases, rope_cases
from fuzz.folders import GOOD, ROPE_KINDS, Made
from fuzz.judge import Case, count, judge, seeded
from fuzz.tensors import INDEX, SINGLE, index_cases, odd_file_cases, tensor_cases

from dynamo_jax.models.huggingface import describe, load_config, load_decoder

pytestmark = pytest.mark.usefixtures("quick_compilation")
SHARE = 3  # cases of each kind with a pass
COMPILING = 120.0  # seconds for a pass, which compiles, as transformers is imported, beside other work


@pytest.fixture(scope="module")
def good(family_model, tmp_path_factory):
    return Made(family_model, tmp_path_factory.mktemp("good"))


def numbers(value):
    """All numbers of a configuration."""
    if isinstance(value, dict):
        return [n for v in value.values() for n in numbers(v)]
    return [n for v in value for n in numbers(v)] if isinstance(value, (list, tuple)) else [value]


def described(folder: Path) -> None:
    """Read from headers alone; what is read has every tensor that its configuration needs, and no odd number."""
    facts = describe(folder)
    config = load_config(folder)
    assert facts["vocabulary"] == config.vocab_size == 61 and config.hidden_size == 32
    assert all(math.isfinite(n) for n in numbers(config.to_dict()) if isinstance(n, (int, float)))


def tokens_for(config) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 61, (2, min(12, config.max_position_embeddings)))


def computed(folder: Path) -> None:
    """Read whole, and one pass: logits are finite, and those of transformers where it takes the folder too."""
    decoder = load_decoder(folder)
    tokens = tokens_for(decoder.config)
    logits = np.asarray(decoder(jnp.asarray(tokens))[0])
    assert logits.shape == (*tokens.shape, 61) and np.isfinite(logits).all()
    if (want := logits_of_transformers(folder, tokens)) is not None:
        np.testing.assert_allclose(logits, want, atol=2e-4 * np.abs(want).max(), rtol=0)


def logits_of_transformers(folder: Path, tokens: np.ndarray) -> np.ndarray | None:
    """None where it takes the folder not, or makes nothing finite of it."""
    import torch
    import transformers

    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            logits = model(torch.tensor(tokens)).logits.numpy()
    except Exception:
        return None
    return logits if np.isfinite(logits).all() else None


TOGETHER = 10


def both(cases: list[Case], good: Path, work: Path, kind: str, share: int) -> None:
    """All cases from headers alone; some of those that change the configuration and are taken, with a pass."""
    before, taken = load_config(good), []

    def inspected(folder: Path) -> None:
        described(folder)
        if load_config(folder) != before:
            taken.append(folder.name)

    found = judge(cases, good, work, inspected)
    assert found["right"] and found["error"]
    numbered = {f"case-{n}": case for n, case in enumerate(cases)}
    changed = [numbered[name] for name in taken]
    seeded(kind).shuffle(changed)
    for first in range(0, count(share), TOGETHER):
        judge(changed[first : min(first + TOGETHER, count(share))], good, work, computed, COMPILING)
        jax.clear_caches()  # what memory is taken is that of a few passes


OFTEN = ("deepseek_v3",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in OFTEN else [pytest.mark.slow]) for name in GOOD]
)
def test_any_field_of_a_config(good, name, tmp_path):
    both(list(config_cases(good(name), name)), good(name), tmp_path, f"config {name}", SHARE)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in ("gpt_oss", "qwen3_moe") else []) for name in ROPE_KINDS],
)
def test_any_rotary_scaling(good, name, tmp_path):
    both(list(rope_cases(name, ROPE_KINDS[name])), good(name), tmp_path, f"rope {name}", SHARE)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_any_damage_of_a_tensor_file(good, name, tmp_path):
    found = judge(tensor_cases(name), good(name), tmp_path, described)
    assert found["error"]


PACKED = ("int4 with zero points", "gptq", "awq", "fp8, scales are bytes")


@pytest.mark.parametrize("name", PACKED)
def test_any_damage_of_a_file_that_another_tool_packed(good, name, tmp_path):
    """Its header alone where it holds FP8, which safetensors' numpy part cannot write."""
    folder, fmt, tensors = tmp_path / "packed", stored.FORMATS[name], {}
    shutil.copytree(good("qwen3_moe"), folder)
    for own, array in safetensors.numpy.load_file(folder / SINGLE).items():
        if ".experts." in own and array.shape[1] % 16 == 0:
            made = fmt.make(array.astype(np.float32))
            tensors |= {own.removesuffix("weight") + leaf: a for leaf, a in made.tensors.items()}
        else:
            tensors[own] = array
    stored.write_file(folder / SINGLE, tensors)
    raw = json.loads((folder / "config.json").read_text()) | {"quantization_config": fmt.config}
    (folder / "config.json").write_text(json.dumps(raw))
    cases = [c for c in tensor_cases(name) if "fp8" not in name or not c.name.startswith("tensor ")]
    found = judge([Case(name, lambda folder: None), *cases], folder, tmp_path / "work", described)
    assert found["right"] and found["error"]


def test_any_index(good, tmp_path):
    found = judge(index_cases("mixtral"), good("mixtral", sharded=True), tmp_path, described)
    assert found["right"] and found["error"]


def test_anything_in_the_place_of_a_file(good, tmp_path):
    judge(odd_file_cases(("config.json", SINGLE)), good("mixtral"), tmp_path, described)
    shard = sorted(p.name for p in good("mixtral", sharded=True).glob("*.safetensors"))[0]
    judge(odd_file_cases((INDEX, shard, "config.json")), good("mixtral", sharded=True), tmp_path, described)


def test_the_good_folders_are_good(good, tmp_path):
    for name in GOOD:
        config = load_config(good(name))
        assert dataclasses.replace(config) == config and config.num_hidden_layers == 2
        assert judge([Case(name, lambda folder: None)], good(name), tmp_path, computed, COMPILING) == {"right": 1}
        assert logits_of_transformers(good(name), tokens_for(config)) is not None
