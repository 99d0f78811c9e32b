"""Checkpoints of quantized models: the same rows after loading, whole or absent, errors that name the file."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from quantized_runs import EVAL

from dynamo_jax.evaluation.switched import evaluate_quantized
from dynamo_jax.quant.nested_gptq import PRIOR_ROWS
from dynamo_jax.storage import checkpoint

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_a_loaded_checkpoint_gives_exactly_the_same_rows(quantized, novel, tmp_path):
    checkpoint.save(tmp_path / "model", quantized)
    loaded = checkpoint.load(tmp_path / "model")
    before, after = (evaluate_quantized(m, [novel], EVAL)[0] for m in (quantized, loaded))
    assert before == after
    assert loaded.knowledge.odd == quantized.knowledge.odd
    for one, two in zip(loaded.knowledge.signatures, quantized.knowledge.signatures):
        np.testing.assert_array_equal(one, two)
    assert loaded.tokenizer.to_str() == quantized.tokenizer.to_str()


def test_saving_again_replaces_the_checkpoint_and_leaves_nothing_else(quantized, tmp_path):
    checkpoint.save(tmp_path / "model", quantized)
    checkpoint.save(tmp_path / "model", quantized)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_folder_with_other_things_is_left_alone(quantized, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        checkpoint.save(tmp_path, quantized)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_failed_save_leaves_the_earlier_checkpoint_whole(quantized, tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "model", quantized)

    real = checkpoint.write_tensors

    def full_disk(path, bundle):
        if "layer-001" in path.name:
            raise OSError(28, "No space left on device")
        real(path, bundle)

    monkeypatch.setattr(checkpoint, "write_tensors", full_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path / "model", quantized)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert checkpoint.load(tmp_path / "model").plan.stored_bytes() == quantized.plan.stored_bytes()


@pytest.mark.parametrize("damage", ["truncate", "remove meta", "not json", "remove data", "other shape", "other plan"])
def test_a_damaged_checkpoint_is_an_error_that_names_it(quantized, tmp_path, damage):
    folder = tmp_path / "model"
    checkpoint.save(folder, quantized)
    largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    if damage == "truncate":
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    elif damage == "remove data":
        largest.unlink()
    elif damage == "remove meta":
        (folder / "dynamo_jax.json").unlink()
    elif damage == "other shape":
        shutil.copyfile(folder / "top.safetensors", folder / "layer-001.safetensors")
    elif damage == "other plan":
        meta = json.loads((folder / "dynamo_jax.json").read_text())
        (folder / "dynamo_jax.json").write_text(json.dumps(meta | {"channel_block": 32}))
    else:
        (folder / "dynamo_jax.json").write_text("{")
    with pytest.raises(ValueError, match=str(folder)):
        checkpoint.load(folder)


def test_experts_that_calibration_hardly_reached_are_named_by_layer(bundled):
    config = bundled[0].config
    counts = np.full((2, config.num_moe_layers, config.num_experts), PRIOR_ROWS / 2)
    assert checkpoint.hardly_reached(config, counts) == "0 of 288 experts"
    counts[1, 2, [7, 40]] -= 1
    counts[0, 5, 0] = 0
    assert checkpoint.hardly_reached(config, counts) == "3 of 288 experts (layer 2: 7, 40; layer 5: 0)"


def test_a_monitor_that_can_call_nothing_novel_says_so():
    words = checkpoint.monitor_words(["a", "b"], 2 * np.log([3.0, 2.5]), 9000)
    assert words.endswith("times 3 (a), 2.5 (b)")
    words = checkpoint.monitor_words(["a", "b"], np.array([np.inf, np.inf]), 512)
    assert "nothing can be called novel" in words and "512 tokens" in words and "needs 2,560" in words


def test_what_is_not_of_one_kind_is_named_with_its_windows(quantized, tmp_path):
    odd = dataclasses.replace(quantized.knowledge, odd={"code": (1, 2, 3, 5), "sums": ()})
    checkpoint.save(tmp_path / "model", dataclasses.replace(quantized, knowledge=odd))
    facts = checkpoint.describe(tmp_path / "model")
    words = "code: 4 of 4 windows (1-3, 5) are unlike the rest; the monitor leaves them out"
    assert facts["not of one kind"] == words
