"""Checkpoints of quantized models: the same rows after loading, whole or absent, errors that name the file."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from quantized_runs import EVAL, signed

from dynamo_jax.evaluation.switched import evaluate_quantized
from dynamo_jax.models.formats.tensor_files import write_tensors
from dynamo_jax.quant.nested_gptq import PRIOR_ROWS
from dynamo_jax.storage import checkpoint, facts
from dynamo_jax.storage.bundles import read_bundle

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


def test_an_earlier_checkpoint_is_replaced_only_when_asked_and_nothing_else_is_left(quantized, tmp_path):
    checkpoint.save(tmp_path / "model", quantized)
    with pytest.raises(ValueError, match="--overwrite replaces it"):
        checkpoint.save(tmp_path / "model", quantized)
    before = sorted(p.name for p in (tmp_path / "model").iterdir())
    checkpoint.save(tmp_path / "model", quantized, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == before


def test_a_folder_with_other_things_is_left_alone(quantized, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        checkpoint.save(tmp_path, quantized, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_failed_save_leaves_the_earlier_checkpoint_whole(quantized, tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "model", quantized)

    def full_disk(path, bundle):
        if "layer-001" in path.name:
            raise OSError(28, "No space left on device")
        write_tensors(path, bundle)

    monkeypatch.setattr("dynamo_jax.storage.work.write_tensors", full_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path / "model", quantized, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["model"] and not (tmp_path / "model" / "unfinished").exists()
    assert checkpoint.load(tmp_path / "model").plan.stored_bytes() == quantized.plan.stored_bytes()


@pytest.fixture(scope="module")
def saved(quantized, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    checkpoint.save(folder, quantized)
    return folder


def test_damage_is_an_error_that_names_the_file(saved, tmp_path):
    """A few bits of every file; ``test_damage.py`` flips a thousand."""
    folder = tmp_path / "model"
    for path in sorted(p for p in saved.rglob("*") if p.is_file()):
        name = path.relative_to(saved).as_posix()
        for damaged in (path.read_bytes()[:-1], b"", None):
            shutil.copytree(saved, folder)
            (folder / name).write_bytes(damaged) if damaged is not None else (folder / name).unlink()
            with pytest.raises(ValueError, match=f"{folder}.*" if "SUMS" in name else f"{folder}.*{path.name}"):
                checkpoint.load(folder)
            if name in ("dynamo_jax.json", "plan.safetensors", "SHA256SUMS") or damaged is None:
                with pytest.raises(ValueError, match=str(folder)):
                    facts.describe(folder)
            shutil.rmtree(folder)
    shutil.copytree(saved, folder)
    shutil.copyfile(folder / "layer-000.safetensors", folder / "layer-001.safetensors")
    with pytest.raises(ValueError, match=r"layer-001.safetensors: damaged: its SHA-256"):
        checkpoint.load(folder)


def other(change):
    """An edit of the arrays of one file."""

    def edit(arrays):
        arrays |= change(arrays)

    return edit


WRONG = {
    "a parameter is missing": ("top", lambda a: a.pop("embed"), "embed is missing"),
    "one too many": ("top", other(lambda a: {"more": np.zeros(3, np.float32)}), "more is not expected"),
    "a row less": ("top", other(lambda a: {"embed": a["embed"][1:]}), "embed is "),
    "not a float": ("top", other(lambda a: {"embed": a["embed"].astype(np.int32)}), "embed is int32, expected float"),
    "a router of nothing": (
        "layer-000",
        other(lambda a: {"parameters/router": a["parameters/router"] * np.nan}),
        "NaN",
    ),
    "scales that are not finite": ("layer-001", other(lambda a: {"planes/scales": a["planes/scales"] * np.inf}), "NaN"),
    "codes as floats": ("layer-000", other(lambda a: {"planes/codes2": a["planes/codes2"] * 1.0}), "expected uint8"),
    "no planes": ("layer-001", lambda a: a.pop("planes/codes3"), "planes/codes3 is missing"),
    "widths of another model": ("plan", other(lambda a: {"widths": a["widths"][:1]}), "is \\("),
    "widths that are none": ("plan", other(lambda a: {"widths": a["widths"] + 1}), "plan holds widths"),
    "other tables": ("plan", other(lambda a: {"page_table3": a["page_table3"] + 1}), "does not fit the widths"),
    "counts of nothing": ("plan", other(lambda a: {"counts": a["counts"].ravel()}), "counts is "),
    "no knowledge": ("plan", lambda a: a.pop("correction"), "correction is missing"),
    "a monitor of nothing": ("plan", other(lambda a: {"monitor/place": a["monitor/place"] * np.nan}), "holds NaN"),
    "no widths": ("plan", lambda a: a.pop("widths"), "widths is missing"),
}


@pytest.mark.parametrize("case", WRONG)
def test_arrays_that_do_not_fit_the_description_are_named(saved, tmp_path, case):
    name, change, said = WRONG[case]
    folder, file = tmp_path / "model", f"{name}.safetensors"
    shutil.copytree(saved, folder)
    arrays = read_bundle(folder / file)
    change(arrays)
    write_tensors(folder / file, arrays)
    signed(folder, file)
    with pytest.raises(ValueError, match=f"{folder}.*({said})"):
        checkpoint.load(folder)
    with pytest.raises(ValueError, match=f"{folder}.*({said})"):
        checkpoint.check(folder)


@pytest.mark.parametrize(
    "change",
    [
        *({"format": f} for f in (6, "7", None)),
        *({"channel_block": b} for b in (0, -16, 32, 16.0, "16", None)),
        *({"group_size": g} for g in (0, 12, 10**9)),
        *({"window": w} for w in (0, "256", None)),
        *({"max_width": w} for w in (5, 16, True)),
        *({"spare": s} for s in (-0.1, float("nan"), float("inf"), "x")),
        *({"calibrated": c} for c in ([], {}, {"a": 1}, 5)),
        *({"names": n} for n in ([], "ab", [1, 2], ["code"])),
        *({"tokens": t} for t in (0, 1.5, None)),
        *({"odd": o} for o in (None, {"x": []})),
        *({"config": c} for c in (None, [], {})),
        *({"sizes": z} for z in (None, {}, {"top.safetensors": 5})),
        {"per_projection": 1},
        {"more": 1},
    ],
)
def test_a_description_that_cannot_be_is_named(saved, tmp_path, change):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    meta = json.loads((folder / "dynamo_jax.json").read_text())
    (folder / "dynamo_jax.json").write_text(json.dumps(meta | change))
    signed(folder, "dynamo_jax.json")
    for read in (checkpoint.load, facts.describe):
        with pytest.raises(ValueError, match=f"{folder}/(dynamo_jax.json|plan.safetensors)"):
            read(folder)


def test_what_else_lies_in_the_folder_is_not_read(saved, tmp_path):
    """Nor sent on by an export: ``source`` may hold a link to anything."""
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    (folder / "secret.txt").symlink_to("/etc/passwd")
    (folder / "notes.txt").write_text("mine")
    assert set(checkpoint.load(folder).files) == {"tokenizer.json", "config.json"}
    assert checkpoint.check(folder) == sum(p.stat().st_size for p in saved.rglob("*") if p.is_file())


def test_experts_that_calibration_hardly_reached_are_named_by_layer(bundled):
    config = bundled[0].config
    counts = np.full((2, config.num_moe_layers, config.num_experts), PRIOR_ROWS / 2)
    assert facts.hardly_reached(config, counts.sum(axis=0)) == "0 of 288 experts"
    counts[1, 2, [7, 40]] -= 1
    counts[0, 5, 0] = 0
    assert facts.hardly_reached(config, counts.sum(axis=0)) == "3 of 288 experts (layer 2: 7, 40; layer 5: 0)"


def test_a_monitor_that_can_call_nothing_novel_says_so():
    words = facts.monitor_words(["a", "b"], 2 * np.log([3.0, 2.5]), 9000)
    assert words.endswith("times 3 (a), 2.5 (b)")
    words = facts.monitor_words(["a", "b"], np.array([np.inf, np.inf]), 512)
    assert "nothing can be called novel" in words and "512 tokens" in words and "needs 2,560" in words


def test_what_is_not_of_one_kind_is_named_with_its_windows(quantized, tmp_path):
    odd = dataclasses.replace(quantized.knowledge, odd={"code": (1, 2, 3, 5), "sums": ()})
    checkpoint.save(tmp_path / "model", dataclasses.replace(quantized, knowledge=odd))
    described = facts.describe(tmp_path / "model")
    words = "code: 4 of 4 windows (1-3, 5) are unlike the rest; the monitor leaves them out"
    assert described["not of one kind"] == words
