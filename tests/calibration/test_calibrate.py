"""The layer-by-layer calibration: the sums of the plain definitions, and the same bits after any kill."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamo_jax.analysis.statistics import observe, token_importance
from dynamo_jax.calibration import experts, pipeline
from dynamo_jax.calibration.analyses import Analysis, dynamics_of
from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.calibration.experts import padded_rows, portions
from dynamo_jax.calibration.knowledge import noticed
from dynamo_jax.calibration.layers import routed_pieces
from dynamo_jax.calibration.pipeline import analyze_layers, quantize, quantize_folder
from dynamo_jax.calibration.plans import favoured
from dynamo_jax.calibration.sweeps import Draft
from dynamo_jax.kernels.layout import WIDTHS
from dynamo_jax.models.config import ExpertSizes
from dynamo_jax.models.experts import ExpertWeights
from dynamo_jax.models.huggingface import Source, load_decoder
from dynamo_jax.models.sources import layer_weights
from dynamo_jax.models.tokenizer import load_tokenizer
from dynamo_jax.quant.planes import dequantize
from dynamo_jax.quant.planes import quantize as quantize_planes
from dynamo_jax.runtime.quantized import odd_words, ranges
from dynamo_jax.storage.work import FolderWork, MemoryWork

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = QuantizeConfig(
    unseen_windows=0, quantizer="rtn", bits=3.5, group_size=8, channel_block=8, window=12, batch_size=2
)


def plain(model, channel_block, apart):
    """A function of windows: statistics, sensitivity and routing by their definitions, on the whole model at once."""
    weights = [layer_weights(model, i) for i in range(model.config.num_moe_layers)]
    stored = [quantize_planes(np.stack(w, axis=1), SMALL.group_size) for w in weights]
    rounded = [[dequantize(s, w).astype(jnp.bfloat16).astype(jnp.float32) for w in WIDTHS] for s in stored]
    candidates = [[ExpertWeights(*w.swapaxes(0, 1)) for w in layer] for layer in rounded]

    @jax.jit
    def measured(tokens):
        mask = jnp.ones((len(tokens), tokens.shape[1] - 1))
        importance = token_importance(model, tokens, mask)
        options = (weights, candidates, channel_block, apart, importance)
        stats, counts = observe(model, tokens[:, :-1], mask, *options)
        return stats, importance.sum(axis=(1, 2)), counts

    return measured


@pytest.mark.parametrize(
    ("family", "apart"),
    [
        ("gpt_oss", True),
        pytest.param("deepseek_v3", False, marks=pytest.mark.slow),
        pytest.param("qwen2_moe", True, marks=pytest.mark.slow),
        pytest.param("gpt_oss", False, marks=pytest.mark.slow),
        pytest.param("granitemoe", False, marks=pytest.mark.slow),
        pytest.param("afmoe", True, marks=pytest.mark.slow),
        pytest.param("gemma4_text", False, marks=pytest.mark.slow),
    ],
)
def test_the_sweeps_give_the_sums_of_the_plain_definitions(family_model, family, apart, tmp_path):
    """With dense and shared parts, biases, windows and scaled residuals; two datasets at once, a part batch."""
    family_model(family).save_pretrained(tmp_path, max_shard_size="60KB")
    rng = np.random.default_rng(0)
    windows = {name: rng.integers(3, 61, (count, 13)).astype(np.int32) for name, count in (("a", 3), ("b", 2))}
    block = 10 if family == "gpt_oss" else SMALL.channel_block  # of 24 channels: the last block has four
    settings = dataclasses.replace(SMALL, per_projection=apart, channel_block=block)
    got = analyze_layers(Source(tmp_path), windows, settings, MemoryWork())
    model = load_decoder(tmp_path)
    samples = [(got[name], part) for name, part in windows.items()]
    samples.append((got["a"].halves[0], windows["a"][:2]))
    definition = plain(model, block, apart)
    for found, part in samples:
        stats, sensitivity, counts = definition(part)
        for field, want in stats._asdict().items():
            want, own = np.asarray(want), getattr(found.stats, field)
            np.testing.assert_allclose(own, want, rtol=2e-3, atol=1e-5 * np.abs(want).max(initial=0), err_msg=field)
        np.testing.assert_allclose(found.sensitivity, sensitivity, rtol=1e-3)
        np.testing.assert_array_equal(found.windows.sum(axis=1), counts)


def test_a_drafted_plan_is_that_of_whole_datasets(small_folder):
    """However the sums of a dataset are spread over its halves."""
    config = Source(small_folder).config
    rng = np.random.default_rng(0)
    widths = np.array([1.0, 0.25, 0.06, 0.001])
    errors = rng.lognormal(0, 2, (2, config.num_moe_layers, config.num_experts, 2, 1)) * widths
    counts = rng.lognormal(0, 1, (2, config.num_moe_layers, config.num_experts))
    sensitivity, tokens = rng.lognormal(0, 1, (2, config.num_moe_layers)), np.array([100.0, 300.0])

    def emphasis(share):
        parts = (np.stack([share * a, (1 - share) * a], axis=1) for a in (errors, counts, sensitivity, tokens))
        draft = Draft(*(p.reshape(4, *p.shape[2:]) for p in parts))
        settings = QuantizeConfig(bits=3.5, weights={"b": 7.0})
        return favoured([draft], ["a", "b"], settings, [config.expert_sizes])[0]

    whole = emphasis(1.0)
    assert len(np.unique(whole)) > 3
    np.testing.assert_array_equal(emphasis(0.3), whole)


def test_a_draft_counts_the_rows_that_the_statistics_count(small_folder, monkeypatch):
    windows = {n: np.arange(3, 3 + 33 * s, dtype=np.int32).reshape(s, 33) % 61 for n, s in (("a", 3), ("b", 2))}
    drafts = []

    def seen(given, *settings):
        drafts.extend(given)
        return favoured(given, *settings)

    monkeypatch.setattr(pipeline, "favoured", seen)
    found = analyze_layers(Source(small_folder), windows, QuantizeConfig(bits=3.5), MemoryWork())
    halves = [half.stats.counts for a in found.values() for half in a.halves]
    np.testing.assert_array_equal(drafts[0].counts, np.stack(halves))
    assert drafts[0].counts.sum() > 0


def test_portions_are_all_experts_in_order_and_go_by_their_sizes():
    for count, channels, hidden in ((48, 64, 256), (47, 64, 256), (5, 8, 8), (300, 16, 32), (9, 2048, 7168)):
        found = portions(ExpertSizes(layers=1, experts=count, channels=channels, hidden_size=hidden))
        assert [e for portion in found for e in portion.experts] == list(range(count))
        assert all(set(portion.experts) <= set(portion.chunk) for portion in found)
        assert len(found) >= min(8, count)


@pytest.mark.slow
def test_how_many_experts_are_quantized_in_one_go_changes_no_bit(small_folder, monkeypatch):
    windows = {"a": np.arange(3, 3 + 33 * 3, dtype=np.int32).reshape(3, 33) % 61}
    bundles = []
    for count in (8, 1):
        monkeypatch.setattr(experts, "PORTIONS", count)
        work = MemoryWork()
        analyze_layers(Source(small_folder), windows, QuantizeConfig(bits=3.5), work)
        bundles.append({f"{n}/{key}": a for n in work.names() for key, a in work.get(n).items()})
    assert list(bundles[0]) == list(bundles[1])
    for name, array in bundles[0].items():
        np.testing.assert_array_equal(array, bundles[1][name], err_msg=name)


def test_one_window_has_no_second_half(small_folder):
    windows = {"one": np.arange(3, 36, dtype=np.int32)[None]}
    found = analyze_layers(Source(small_folder), windows, QuantizeConfig(quantizer="rtn", bits=3.5), MemoryWork())
    first, second = found["one"].halves
    assert len(first.windows) == 1 and len(second.windows) == 0
    np.testing.assert_array_equal(found["one"].expert_significance(), first.expert_significance())
    assert np.isnan(second.expert_significance()).all()
    assert np.isnan(dynamics_of(found).halves.within["one"].experts.correlation).all()


def test_a_folder_and_memory_give_the_same_model(small_folder, words, tmp_path):
    """The planes bit for bit; and quantize leaves nothing but its result."""
    from dynamo_jax.storage import checkpoint

    settings = QuantizeConfig(unseen_windows=0, calibration_windows=2, window=32, bits=3.5)
    known = {"some": words(0), "other": words(1)}
    here, _ = quantize(load_decoder(small_folder), load_tokenizer(small_folder), known, settings)
    quantize_folder(small_folder, tmp_path / "out", known, settings)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    loaded = checkpoint.load(tmp_path / "out")
    np.testing.assert_array_equal(here.plan.widths, loaded.plan.widths)
    for width in WIDTHS:
        np.testing.assert_array_equal(here.store.codes[width], loaded.store.codes[width])
    np.testing.assert_array_equal(here.knowledge.block_errors, loaded.knowledge.block_errors)
    assert sorted(here.parameters) == sorted(loaded.parameters)


def digests(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.slow
def test_a_quantization_killed_three_times_ends_with_the_same_bits(small_folder, words, tmp_path):
    """SIGKILL at random layers of any sweep; the last run is left alone."""
    (tmp_path / "words.txt").write_text(words(0))
    command = [sys.executable, "-m", "dynamo_jax", "quantize", "--model", str(small_folder)]
    command += ["--known", f"words={tmp_path / 'words.txt'}", "--windows", "2", "--window", "32", "--bits", "3.5"]
    command += ["--out"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([*command, str(tmp_path / "whole")], env=environment, check=True, capture_output=True)
    seed = random.SystemRandom().randrange(10**6)
    rng = random.Random(seed)
    work = tmp_path / "killed" / "unfinished"
    up, down = [f"hidden-{i:03d}" for i in range(1, 6)], [f"sensitivity-{i:03d}" for i in range(4, 0, -1)]
    steps = [*up, *down, "emphasis", *(f"stats-{i:03d}" for i in range(5))]
    chosen = rng.sample(steps, 3)
    marks = [name for name in steps if name in chosen]  # in the order in which they appear
    for mark in marks:
        process = subprocess.Popen(
            [*command, str(tmp_path / "killed")], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while not (work / f"{mark}.safetensors").exists() and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert [p.name for p in (tmp_path / "killed").iterdir()] == ["unfinished"], f"seed {seed}"
    subprocess.run([*command, str(tmp_path / "killed")], env=environment, check=True, capture_output=True)
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole"), f"seed {seed}"
    assert not work.exists()


def test_a_full_disk_is_one_line_and_the_run_resumes_after_it(small_folder, words, tmp_path):
    """Files may hold 5 kB at most, less than the embeddings; then they may hold anything."""
    (tmp_path / "words.txt").write_text(words(0))
    arguments = ["quantize", "--model", str(small_folder), "--known", f"words={tmp_path / 'words.txt'}"]
    arguments += ["--windows", "1", "--window", "32", "--bits", "3.5", "--out", str(tmp_path / "out")]
    arguments += ["--quantizer", "rtn", "--unseen-windows", "0"]
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))"
    program = f"import resource, sys; {limit}; sys.argv = ['dynamo-jax', *{arguments!r}]; import dynamo_jax.__main__"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    failed = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    errors = [line for line in failed.stderr.splitlines() if "error" in line]
    assert failed.returncode == 2 and len(errors) == 1 and "top.safetensors: cannot be written" in errors[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["words.txt"]  # nothing was finished
    subprocess.run([sys.executable, "-m", "dynamo_jax", *arguments], env=environment, check=True, capture_output=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "words.txt"]


def test_the_same_call_again_is_done_already_and_another_one_needs_to_say_so(small_folder, words, tmp_path):
    settings = QuantizeConfig(unseen_windows=0, calibration_windows=1, window=32, bits=3.5, quantizer="rtn")
    known, said = {"some": words(0)}, []
    plan = quantize_folder(small_folder, tmp_path / "out", known, settings, log=said.append)
    before = digests(tmp_path / "out")
    again = quantize_folder(small_folder, tmp_path / "out", known, settings, log=said.append)
    np.testing.assert_array_equal(plan.widths, again.widths)
    assert said == [f"{tmp_path / 'out'}: done already, by the same command"] and digests(tmp_path / "out") == before
    other = dataclasses.replace(settings, bits=4.5)
    with pytest.raises(ValueError, match=r"finished result \(bits 3.5 there, 4.5 here\); --overwrite"):
        quantize_folder(small_folder, tmp_path / "out", known, other)
    with pytest.raises(ValueError, match=r"finished result \(other texts\); --overwrite"):
        quantize_folder(small_folder, tmp_path / "out", {"some": words(1)}, settings)
    assert digests(tmp_path / "out") == before
    quantize_folder(small_folder, tmp_path / "out", known, other, overwrite=True)
    quantize_folder(small_folder, tmp_path / "new", known, other)
    assert digests(tmp_path / "out") == digests(tmp_path / "new")


def test_finished_bundles_are_what_was_written_or_an_error(tmp_path):
    bundle = {"a": np.arange(1000.0)}
    work = FolderWork(tmp_path)
    work.put("one", bundle)
    work.put("two", bundle)
    (tmp_path / ".tmpABC").write_bytes(b"of a process that was killed in a write")
    (tmp_path / "three.safetensors").write_bytes((tmp_path / "one.safetensors").read_bytes())
    with (tmp_path / "digests").open("a") as file:
        file.write("0123")  # and one that was killed before the end of its line
    work = FolderWork(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["digests", "one.safetensors", "two.safetensors"]
    assert work.has("one") and not work.has("three")
    work.put("three", bundle)
    np.testing.assert_array_equal(FolderWork(tmp_path).get("three")["a"], bundle["a"])
    content = bytearray((tmp_path / "two.safetensors").read_bytes())
    content[-5] ^= 16
    (tmp_path / "two.safetensors").write_bytes(content)
    work = FolderWork(tmp_path)
    for use in (lambda: work.get("two"), lambda: work.sums(["one", "two"])):
        with pytest.raises(ValueError, match=r"two.safetensors: damaged since it was finished"):
            use()
    (tmp_path / "one.safetensors").unlink()
    lines = (tmp_path / "digests").read_text().splitlines(keepends=True)
    (tmp_path / "digests").write_text("".join(line for line in lines if "three" not in line))
    work = FolderWork(tmp_path)
    for name in ("one", "three"):
        for use in (lambda: work.get(name), lambda: work.sums([name])):  # noqa: B023
            with pytest.raises(ValueError, match=f"{name}.safetensors: gone since it was finished; delete {tmp_path}"):
                use()


@pytest.mark.parametrize("rows", [0, 1, 32, 33, 48, 49, 1000, 12345])
def test_rows_are_padded_by_half_at_most(rows):
    size = padded_rows(rows)
    assert size >= rows and (size == 32 or size <= 1.5 * rows)


def test_weights_that_are_not_numbers_are_named(bundled, texts):
    from dynamo_jax.models.decoder import parameters, with_parameters

    model, tokenizer = bundled
    arrays = parameters(model)
    arrays["layers.2.up"] = arrays["layers.2.up"].at[7, 3, 0].set(jnp.nan)
    broken = with_parameters(model.config, arrays)
    with pytest.raises(ValueError, match="layer 2, expert 7: weights to quantize hold NaN"):
        quantize(
            broken,
            tokenizer,
            {"code": texts["code"]},
            QuantizeConfig(calibration_windows=1, window=64, unseen_windows=0),
        )


@pytest.mark.parametrize(("length", "pieces"), [(64, 1), (383, 1), (385, 2), (1000, 4)])
def test_long_windows_are_counted_in_pieces_of_what_the_monitor_looks_at(small_folder, length, pieces):
    config = Source(small_folder).config
    chosen = np.random.default_rng(0).integers(0, config.num_experts, (3, length * config.num_experts_per_tok))
    counts = routed_pieces(chosen.reshape(3, length, -1), config.num_experts)
    assert counts.shape == (3, pieces, config.num_experts)
    sizes = counts.sum(axis=2) / config.num_experts_per_tok
    assert sizes.max() - sizes.min() <= 1 and (sizes.sum(axis=1) == length).all()
    whole = [np.bincount(own, minlength=config.num_experts) for own in chosen]
    np.testing.assert_array_equal(counts.sum(axis=1), whole)
    first = chosen[0, : int(sizes[0, 0]) * config.num_experts_per_tok]
    np.testing.assert_array_equal(counts[0, 0], np.bincount(first, minlength=config.num_experts))


def test_odd_windows_are_told_by_their_numbers_whatever_their_length():
    """Of windows of two pieces and of half a piece; a foreign stretch is windows 3 to 6, or 5 to 12."""
    rng = np.random.default_rng(0)
    own, foreign = rng.dirichlet(np.ones(16), (2, 3))

    def drawn(kinds):
        return np.array([[rng.multinomial(1024, p) for p in kind] for kind in kinds], float)

    for window, shape in ((512, (16, 2)), (256, (32, 1)), (128, (64, 1))):
        each = window // shape[1]
        kinds = [foreign if 4 * 256 <= i * each < 12 * 256 else own for i in range(shape[0] * shape[1])]
        analysis = Analysis(None, None, drawn(kinds).reshape(*shape, 3, 16))
        _, odd = noticed({"a": analysis}, window)
        assert odd == {"a": tuple(range(4 * 256 // window + 1, 12 * 256 // window + 1))}
        assert odd_words(odd, {"a": shape[0]})[0].startswith(
            f"a: {len(odd['a'])} of {shape[0]} windows ({odd['a'][0]}-"
        )
    assert odd_words({"a": ()}, {"a": 3}) == [] and ranges((1, 2, 4, 6, 7, 8)) == "1-2, 4, 6-8"
