"""Adaptation, evaluation and the checkpoint, on the bundled model and text made here."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamo_jax.analysis.statistics import observe
from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.calibration.pipeline import quantize
from dynamo_jax.calibration.plans import plan
from dynamo_jax.calibration.sources import DecoderSource
from dynamo_jax.evaluation.perplexity import EvalConfig, make_dataset
from dynamo_jax.evaluation.switched import Device, calibrated_windows, choose_plan, evaluate_quantized
from dynamo_jax.evaluation.uniform import evaluate_uniform
from dynamo_jax.kernels.layout import WIDTHS
from dynamo_jax.models.decoder import with_parameters
from dynamo_jax.models.experts import ExpertWeights, expert_outputs
from dynamo_jax.precision.plan import Plan
from dynamo_jax.quant.nested_gptq import PRIOR_ROWS
from dynamo_jax.quant.planes import dequantize
from dynamo_jax.runtime.adapt import (
    PRIOR_COST_ROWS,
    PRIOR_TOKENS,
    Observation,
    adapted_plan,
    expected,
    observe_windows,
    saved_by,
)
from dynamo_jax.runtime.quantized import Knowledge
from dynamo_jax.runtime.store import page_counts
from dynamo_jax.storage import checkpoint

pytestmark = pytest.mark.usefixtures("quick_compilation")

SETTINGS = QuantizeConfig(
    bits=3.0,
    per_projection=False,
    calibration_windows=4,
    window=64,
    batch_size=4,
    adaptation_windows=2,
    quantizer="rtn",
)
EVAL = EvalConfig(window=64, batch_size=4, adaptation_windows=4, limit=4)


@pytest.fixture(scope="module")
def quantized(shallow, texts):
    model, tokenizer = shallow
    return quantize(model, tokenizer, {"code": texts["code"], "sums": texts["sums"]}, SETTINGS)[0]


@pytest.fixture(scope="module")
def novel(quantized, texts):
    return make_dataset("verse", "novel", texts["verse"], quantized.tokenizer, EVAL)


def adapt(model, windows):
    return adapted_plan(model.plan, model.knowledge, observe_windows(model, windows))


def test_the_baseline_meets_its_budget_and_gives_each_expert_one_width(quantized):
    assert quantized.plan.bits_per_weight() <= SETTINGS.bits
    assert (quantized.plan.widths == quantized.plan.widths[:, :, :1]).all()


@pytest.fixture(scope="module")
def apart(shallow, texts, tmp_path_factory):
    """Two widths an expert, written and read back."""
    model, tokenizer = shallow
    settings = dataclasses.replace(SETTINGS, per_projection=True)
    here = quantize(model, tokenizer, {"code": texts["code"], "sums": texts["sums"]}, settings)[0]
    folder = tmp_path_factory.mktemp("apart") / "model"
    checkpoint.save(folder, here)
    assert "down blocks by width" in checkpoint.describe(folder)
    loaded = checkpoint.load(folder)
    np.testing.assert_array_equal(loaded.plan.widths, here.plan.widths)
    return loaded


def test_a_plan_by_projection_meets_its_budget_and_gives_down_widths_of_its_own(apart):
    widths, blocks = apart.plan.widths, apart.plan.blocks
    assert 0.995 * SETTINGS.bits < apart.plan.bits_per_weight() <= SETTINGS.bits
    assert (widths[:, :, :blocks] == widths[:, :, :1]).all() and (widths[:, :, blocks:] == widths[:, :, -1:]).all()
    assert (widths[:, :, 0] != widths[:, :, -1]).any()


@pytest.mark.parametrize("kind", ["quantized", "apart"])
def test_adaptation_keeps_the_stored_bytes_and_the_bytes_that_it_expects_to_read(request, kind, novel):
    model = request.getfixturevalue(kind)
    seen = observe_windows(model, novel.first)
    plan = adapted_plan(model.plan, model.knowledge, seen)
    before, after = page_counts(model.plan), page_counts(plan)
    assert all(after[level] <= before[level] for level in before)
    assert plan.stored_bytes() <= model.plan.stored_bytes()
    assert plan.apart == model.plan.apart and not (plan.widths == model.plan.widths).all()
    use = expected(model.knowledge, seen).use
    assert plan.bytes_per_token(use, 1) <= model.plan.bytes_per_token(use, 1) * (1 + 1e-6)


def known_of(counts, tokens, block_errors, correction, loss_per_error):
    """One known dataset, with a monitor that knows nothing."""
    return Knowledge(
        names=("a",),
        counts=counts[None],
        centre=np.zeros((1, 1)),
        inverse=np.zeros((1, 1, 1)),
        limit=np.zeros(1),
        threshold=1.0,
        loss_per_error=np.array(loss_per_error),
        block_errors=block_errors,
        correction=correction,
        calibrated={},
        tokens=tokens,
    )


def test_what_is_expected_by_hand():
    """Two experts, 64 tokens known and 64 seen. The first had 128 known rows and 128 new ones that cost three times as
    much; the second none, so that a row costs what the layer's do, and its share is what is left."""
    block_errors = np.array([[[[4.0, 2.0, 1.0, 0.0]], [[0.0] * 4]]])
    known = known_of(np.array([[128.0, 0.0]]), 64, block_errors, np.full((1, 2, 4), 2.0), [0.5])
    # 4 nats a token on 64 tokens are 2 nats a row of 128; seen: 128 rows of 6
    errors = np.array([[[[768.0, 384.0, 192.0, 0.0]], [[0.0] * 4]]])
    seen = Observation(errors, np.array([[[128.0, 0.0]]]), np.array([64.0]), np.zeros((1, 64, 1)))
    found = expected(known, seen)
    assert (PRIOR_TOKENS, PRIOR_COST_ROWS) == (64, 128)
    np.testing.assert_allclose(found.use, [[2.0, 0.0]])
    np.testing.assert_allclose(found.errors[0, 0, 0], [2 * 4, 2 * 2, 2 * 1, 0])
    new = seen._replace(counts=np.array([[[96.0, 32.0]]]))
    found = expected(known, new)
    np.testing.assert_allclose(found.use, [[(96 + 128) / 128, 32 / 128]])
    np.testing.assert_allclose(found.errors[0, 0, 0, 0], (96 + 128) / 128 * (768 + 128 * 2) / (96 + 128))
    np.testing.assert_allclose(found.errors[0, 1, 0, 0], 32 / 128 * 128 * 2 / (32 + 128))


def test_what_a_plan_saves_follows_the_router(quantized, novel):
    """On rows as the plan was expected to have them, it saves what it was expected to; the baseline saves nothing."""
    model, known = quantized, quantized.knowledge
    seen = observe_windows(model, novel.first)
    plan, found = adapted_plan(model.plan, known, seen), expected(known, seen)
    saves = saved_by(plan, model.plan, known, seen)
    assert saves.shape == seen.counts.shape[1:] and (saved_by(model.plan, model.plan, known, seen) == 0).all()
    before, after = (p.chosen(found.errors).sum() for p in (model.plan, plan))
    assert (found.use * saves).sum() == pytest.approx(before - after, rel=1e-9) and before > after


@pytest.mark.parametrize(("tokens", "most"), [(2048, 0.01), (512, 0.02)])
def test_later_text_reads_no_more_bytes_though_the_plan_follows_the_text_it_saw(tokens, most):
    """Where a few rows make an expert look busy, pages would go there; over many texts that must not cost bytes."""
    layers, experts, blocks, chosen, ratios = 3, 48, 4, 4, []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        share = rng.dirichlet(np.full(experts, 2.0), layers)
        novel = rng.dirichlet(np.full(experts, 2.0), layers) / 2 + share / 2
        cost = rng.lognormal(0, 0.5, (layers, experts, blocks, 1)) * np.array([4.0, 1.0, 0.25, 0.0])
        widths = np.array(rng.choice([2, 2, 3, 4], (layers, experts, 1)).repeat(blocks, 2), np.int8)
        plan = Plan(widths=widths, channel_block=16, group_size=64, hidden_size=64)
        calibrated = 24576
        counts = np.stack([rng.multinomial(calibrated * chosen, p) for p in share]).astype(float)
        errors = counts[:, :, None, None] / calibrated * cost
        known = known_of(counts, calibrated, errors, np.ones((layers, experts, 4)), [1.0] * layers)
        routed = np.stack([rng.multinomial(tokens * chosen, p) for p in novel]).astype(float)
        noise = rng.gamma(np.maximum(routed, 1e-9))[:, :, None, None]
        seen = Observation(noise * cost, routed[None], np.array([float(tokens)]), np.zeros((1, 1, 1)))
        found = adapted_plan(plan, known, seen)
        assert not (found.widths == plan.widths).all()
        ratios.append(found.bytes_per_token(chosen * novel, 1) / plan.bytes_per_token(chosen * novel, 1))
    assert np.mean(ratios) <= 1 + most


@pytest.mark.parametrize(("kind", "window"), [("quantized", [5, 9]), ("apart", [5] * 17)])
def test_one_token_and_one_repeated_token_make_a_plan(request, kind, window):
    model = request.getfixturevalue(kind)
    plan = adapt(model, np.array([window], np.int32))
    before, after = page_counts(model.plan), page_counts(plan)
    assert all(after[level] <= before[level] for level in before)


def times(seen, factor):
    return Observation(seen.errors * factor, seen.counts * factor, seen.tokens * factor, seen.exact)


def test_much_text_is_believed_and_little_text_is_not(quantized, novel):
    """As the same text goes on, what is expected goes from the known datasets' means to its own."""
    known, seen = quantized.knowledge, observe_windows(quantized, novel.first)
    little, much = expected(known, times(seen, 1e-9)), expected(known, times(seen, 1e9))
    rows, tokens = known.counts.sum(axis=0), known.tokens
    np.testing.assert_allclose(little.use, rows / tokens, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(much.use, seen.counts.sum(axis=0) / seen.tokens.sum(), rtol=1e-4, atol=1e-6)
    scale = known.correction[:, :, None, :] * known.loss_per_error[:, None, None, None]
    np.testing.assert_allclose(much.errors, seen.errors / seen.tokens.sum() * scale, rtol=1e-4, atol=1e-12)
    sums = known.block_errors * tokens
    of_layer = sums.sum(axis=1, keepdims=True) / rows.sum(axis=1)[:, None, None, None]
    a_row = (sums + PRIOR_COST_ROWS * of_layer) / (rows + PRIOR_COST_ROWS)[:, :, None, None]
    np.testing.assert_allclose(little.errors, (rows / tokens)[:, :, None, None] * a_row, rtol=1e-6, atol=1e-12)


def test_an_expert_without_rows_costs_what_the_known_datasets_say_a_row_costs(quantized, novel):
    """At the share of tokens that is left for it; one that they did not reach either, what its layer's experts cost."""
    known, seen = quantized.knowledge, observe_windows(quantized, novel.first)
    errors, counts, known_counts, block_errors = (
        np.array(a) for a in (seen.errors, seen.counts, known.counts, known.block_errors)
    )
    errors[:, 3], counts[:, :, 3] = 0, 0
    block_errors[:, 3], known_counts[:, :, 3] = 0, 0
    unknown = dataclasses.replace(known, counts=known_counts, block_errors=block_errors)
    alone = expected(known, seen._replace(errors=errors, counts=counts))
    share = known.counts.sum(axis=0)[:, 3] / known.tokens
    left = PRIOR_TOKENS / (seen.tokens.sum() + PRIOR_TOKENS)
    np.testing.assert_allclose(alone.use[:, 3], share * left)
    before = expected(known, times(seen, 0.0))
    np.testing.assert_allclose(alone.errors[:, 3], before.errors[:, 3] * left)
    never = expected(unknown, seen._replace(errors=errors, counts=counts))
    assert (never.use[:, 3] == 0).all() and (never.errors[:, 3] == 0).all()
    counts[:, :, 3] = 1
    once = expected(unknown, seen._replace(errors=errors, counts=counts))
    of_layer = (block_errors * known.tokens).sum(axis=1) / known_counts.sum(axis=(0, 2))[:, None, None]
    rows = len(counts)
    a_row = of_layer * PRIOR_COST_ROWS / (rows + PRIOR_COST_ROWS)
    np.testing.assert_allclose(once.errors[:, 3], rows / (seen.tokens.sum() + PRIOR_TOKENS) * a_row)


def test_the_timeline_tells_of_the_first_windows_and_the_rest(quantized, novel):
    unknown = dataclasses.replace(quantized, knowledge=dataclasses.replace(quantized.knowledge, threshold=0.0))
    rows, found = evaluate_quantized(unknown, [novel], EVAL)
    line = found["verse"].timeline
    assert line.tokens.tolist() == [256, 512]  # four windows of 64 tokens each
    assert set(line.nearest) <= {"code", "sums", "novel"} and np.isfinite(line.score).all()
    assert line.auto[0] == line.baseline[0] and line.baseline[1] == pytest.approx(rows[0].nll, rel=1e-6)
    assert line.auto[1] == pytest.approx(rows[1].nll, rel=1e-6)
    taken = found["verse"].gain > 0
    assert line.adapted.tolist() == [False, taken]
    only, found = evaluate_quantized(quantized, [novel], EVAL, variants=("auto",))
    assert found["verse"].timeline is None and len(only) == 1


def test_adaptation_is_a_function_of_the_window(quantized, novel):
    np.testing.assert_array_equal(adapt(quantized, novel.first).widths, adapt(quantized, novel.first).widths)


def test_adaptation_to_no_tokens_is_an_error(quantized, novel):
    with pytest.raises(ValueError, match="no tokens"):
        adapt(quantized, novel.first[:0])


def test_rows_count_exactly_the_tokens_after_the_adaptation_windows(quantized, novel):
    rows, _ = evaluate_quantized(quantized, [novel], EVAL)
    assert [r.variant for r in rows] == ["baseline", "auto"]
    assert all(r.tokens == 4 * 64 for r in rows)
    np.testing.assert_array_equal(novel.rest[0, 0], novel.first[-1, -1])  # neighbours share one token


@pytest.mark.parametrize("gain", [-1e-6, 1e-6])
def test_an_adapted_plan_is_taken_only_if_it_is_nearer_to_8_bits(quantized, novel, monkeypatch, gain):
    monkeypatch.setattr(Device, "gain", lambda *_: gain)
    unknown = dataclasses.replace(quantized, knowledge=dataclasses.replace(quantized.knowledge, threshold=0.0))
    found = choose_plan(Device(unknown), novel.first, EVAL.batch_size)
    assert found.verdict.novel and (found.plan is quantized.plan) == (gain < 0)


def test_what_is_observed_is_what_the_whole_model_shows(quantized, novel):
    """Layer after layer, window after window, against ``statistics.observe`` of all at once."""
    planes = jax.tree.map(jnp.asarray, quantized.store)

    def at(width):
        weights = dequantize(planes, width).astype(jnp.bfloat16).astype(jnp.float32)
        return [ExpertWeights(*layer.swapaxes(0, 1)) for layer in weights]

    full, *others = (at(width) for width in sorted(WIDTHS, reverse=True))
    model = with_parameters(quantized.config, quantized.device_parameters())
    tokens = jnp.asarray(novel.first[:, :-1])
    candidates = [list(layer) for layer in zip(*others[::-1])]
    sums, counts = observe(model, tokens, jnp.ones(tokens.shape), full, candidates, quantized.plan.channel_block)
    seen = observe_windows(quantized, novel.first)
    np.testing.assert_allclose(seen.errors[..., :-1], sums.block_errors, rtol=2e-3, atol=1e-7)
    assert (seen.errors[..., -1] == 0).all() and seen.tokens.tolist() == [64.0] * len(novel.first)
    np.testing.assert_array_equal(seen.counts, counts)
    exact = lambda layer, x, routing, _, form: (expert_outputs(x, routing, full[layer], form), None)  # noqa: E731
    np.testing.assert_allclose(seen.exact, model.hidden_states(tokens, experts=exact)[0], rtol=2e-3, atol=1e-3)


def test_known_data_keeps_the_baseline(quantized, novel):
    sure = dataclasses.replace(quantized, knowledge=dataclasses.replace(quantized.knowledge, threshold=1.0))
    found = choose_plan(Device(sure), novel.first, EVAL.batch_size)
    assert found.gain is None and found.plan is quantized.plan


def test_evaluating_every_dataset_and_variant_again_compiles_nothing(quantized, novel, compilations):
    evaluate_quantized(quantized, [novel], EVAL)
    with compilations() as count:
        evaluate_quantized(quantized, [novel], EVAL)
    assert count.compiled == 0


def test_a_model_in_bfloat16_reads_two_bytes_a_weight(bundled, novel):
    model, _ = bundled
    rows, losses = evaluate_uniform(model, [novel], EVAL, names=("bf16", "rtn2"))
    config = model.config
    per_expert = 3 * config.intermediate_size * config.hidden_size
    assert rows[0].bytes_per_token == 2 * per_expert * config.num_experts_per_tok * config.num_hidden_layers
    assert losses["verse"][0] == "bf16"
    assert rows[1].difference == pytest.approx(rows[1].nll - rows[0].nll, abs=1e-9)


def test_a_loaded_checkpoint_gives_exactly_the_same_rows(quantized, novel, tmp_path):
    checkpoint.save(tmp_path / "model", quantized)
    loaded = checkpoint.load(tmp_path / "model")
    before, after = (evaluate_quantized(m, [novel], EVAL)[0] for m in (quantized, loaded))
    assert before == after
    assert loaded.knowledge.threshold == quantized.knowledge.threshold
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


def test_calibration_windows_are_recognized_only_in_the_calibrated_text(quantized, texts):
    assert calibrated_windows(quantized, "code", texts["code"], EVAL) == SETTINGS.calibration_windows
    assert calibrated_windows(quantized, "code", texts["verse"], EVAL) == 0
    assert calibrated_windows(quantized, "verse", texts["verse"], EVAL) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 1.9}, "too small: the least is 2.125"),
        ({"bits": 2.1}, "too small"),
        ({"bits": None, "budget_bytes": 1000}, "3,760,128 bytes, or"),
        ({"bits": None, "fits_gib": 0.001}, "GiB with the 6,712,320 bytes that are not quantized"),
        ({"fits_gib": 1.0}, "bits and fits_gib: a budget is given one way only"),
        ({"bits": math.nan}, "bits nan: expected a positive number"),
        ({"weights": {"prose": 2.0}}, "prose is none of the known datasets, code"),
        ({"weights": {"code": -1.0}}, "code = -1.0"),
        ({"weights": {"code": 0.0}}, "no known dataset counts"),
        ({"objective": "worst", "weights": {"code": 2.0}}, "the objective worst takes none"),
        ({"objective": "best"}, "known are sum, worst"),
        ({"channel_block": 100}, r"channel_block 100 is not in 1\.\.64"),
        ({"group_size": 264}, "group_size 264 is no multiple of 8 up to the hidden size 256"),
        ({"group_size": 100}, "group_size 100"),
        ({"window": 100_000}, "positions"),
    ],
)
def test_settings_that_cannot_work_are_named(bundled, texts, change, message):
    model, tokenizer = bundled
    with pytest.raises(ValueError, match=message):
        settings = QuantizeConfig(**{**SETTINGS.__dict__, **change})
        quantize(model, tokenizer, {"code": texts["code"]}, settings)


def test_a_budget_in_bytes_or_gib_is_met_and_used(bundled, texts):
    model, tokenizer = bundled
    source = DecoderSource(model)
    for given in ({"budget_bytes": 5_000_000}, {"fits_gib": 0.01}):
        settings = dataclasses.replace(SETTINGS, bits=None, quantizer="rtn", **given)
        plan = quantize(model, tokenizer, {"code": texts["code"]}, settings)[0].plan
        budget = given.get("budget_bytes") or int(given["fits_gib"] * 2**30) - source.other_bytes()
        assert 0.995 * budget < plan.stored_bytes() <= budget


class Losses(NamedTuple):
    """One dataset's significance, where a plan needs nothing else of an analysis."""

    values: np.ndarray

    def expert_significance(self):
        return self.values


def test_the_objective_decides_which_datasets_a_plan_serves(bundled):
    """Two datasets that need different experts, one of them with a hundredth of the other's loss."""
    config = bundled[0].config
    rng = np.random.default_rng(0)
    own = rng.lognormal(0, 2, (2, config.num_moe_layers, config.num_experts, 1)) * np.array([1, 0.25, 0.06, 0.0003])
    analyses = {"a": Losses(own[0]), "b": Losses(own[1] / 100)}

    def losses(objective, known, weights=None):
        settings = dataclasses.replace(SETTINGS, objective=objective, weights=weights)
        widths = plan(known, settings, config).widths[:, :, 0]
        chosen = np.searchsorted(WIDTHS, widths)[..., None]
        return np.array([np.take_along_axis(a.values, chosen, axis=-1).sum() for a in analyses.values()])

    alone = np.array([losses("sum", {name: a})[i] for i, (name, a) in enumerate(analyses.items())])
    summed, worst = (losses(objective, analyses) for objective in ("sum", "worst"))
    assert summed.sum() < worst.sum()
    assert (worst / alone).max() < 0.7 * (summed / alone).max()
    weighted = losses("sum", analyses, {"b": 100.0})
    assert weighted[1] < summed[1] and weighted[0] > summed[0]
    assert losses("sum", analyses, {"b": 0.0}).tolist() == losses("sum", {"a": analyses["a"]}).tolist()


def test_experts_that_calibration_hardly_reached_are_named_by_layer(bundled):
    config = bundled[0].config
    counts = np.full((2, config.num_moe_layers, config.num_experts), PRIOR_ROWS / 2)
    assert checkpoint.hardly_reached(config, counts) == "0 of 288 experts"
    counts[1, 2, [7, 40]] -= 1
    counts[0, 5, 0] = 0
    assert checkpoint.hardly_reached(config, counts) == "3 of 288 experts (layer 2: 7, 40; layer 5: 0)"


def test_a_monitor_that_can_call_nothing_novel_says_so():
    assert checkpoint.monitor_words(np.array([17.87, 22.6])) == "squared distances up to 17.9, 22.6 are known"
    assert "calls nothing novel" in checkpoint.monitor_words(np.array([np.inf, np.inf]))


def test_no_known_dataset_is_an_error(bundled):
    with pytest.raises(ValueError, match="no known dataset"):
        quantize(*bundled, {}, SETTINGS)
