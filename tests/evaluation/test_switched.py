"""Rows of a quantized model: which tokens count, what the run time did, and that nothing compiles twice."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from quantized_runs import EVAL, SETTINGS

from dynamo_jax.commands.console import describe_verdict
from dynamo_jax.evaluation.perplexity import run_windows
from dynamo_jax.evaluation.switched import Device, calibrated_windows, choose_plan, evaluate_quantized, verdict_of
from dynamo_jax.evaluation.uniform import evaluate_uniform
from dynamo_jax.runtime import monitor

pytestmark = pytest.mark.usefixtures("quick_compilation")


def limited(quantized, limit):
    """The model with a monitor that calls novel what lies farther off than ``limit``, a log distance."""
    known = quantized.knowledge
    signatures = known.signatures._replace(limit=jnp.full(len(known.names), limit))
    return dataclasses.replace(quantized, knowledge=dataclasses.replace(known, signatures=signatures))


def test_the_timeline_tells_of_the_first_windows_and_the_rest(quantized, novel):
    rows, found = evaluate_quantized(limited(quantized, 1e-3), [novel], EVAL)
    line = found["verse"].timeline
    assert line.tokens.tolist() == [256, 512]  # four windows of 64 tokens each
    assert set(line.nearest) <= {"code", "sums", "novel"} and np.isfinite(line.score).all()
    assert line.auto[0] == line.baseline[0] and line.baseline[1] == pytest.approx(rows[0].nll, rel=1e-6)
    assert line.auto[1] == pytest.approx(rows[1].nll, rel=1e-6)
    taken = found["verse"].plan is not quantized.plan
    assert line.adapted.tolist() == [False, taken]
    only, found = evaluate_quantized(quantized, [novel], EVAL, variants=("auto",))
    assert found["verse"].timeline is None and len(only) == 1


@pytest.fixture(scope="module")
def evaluated(quantized, novel):
    return evaluate_quantized(quantized, [novel], EVAL)[0]


def test_rows_count_exactly_the_tokens_after_the_adaptation_windows(evaluated, novel):
    rows = evaluated
    assert [r.variant for r in rows] == ["baseline", "auto"]
    assert all(r.tokens == 4 * 64 for r in rows)
    np.testing.assert_array_equal(novel.rest[0, 0], novel.first[-1, -1])  # neighbours share one token


@pytest.mark.parametrize("novelty", [1e-3, 1e3])
@pytest.mark.parametrize(
    ("gains", "positive", "certain"),
    [((-1e-6, -2e-6), False, False), ((3e-6, -1e-6), True, False), ((3e-6, 2e-6, 3e-6), True, True)],
)
def test_novel_text_is_adapted_to_for_any_gain_and_known_text_for_a_sure_one(
    quantized, novel, monkeypatch, novelty, gains, positive, certain
):
    size = novel.first[0, 1:].size
    monkeypatch.setattr(Device, "divergence", lambda *given: np.array(gains) * size * (given[-1] == 0))
    found = choose_plan(Device(limited(quantized, novelty)), novel.first, EVAL)
    assert found.verdict.novel == (novelty < 1) and found.verdict.nearest in ("code", "sums")
    assert found.sure == certain and found.gain == pytest.approx(np.mean(gains))
    assert (found.plan is not quantized.plan) == (positive if found.verdict.novel else certain)
    words = describe_verdict(found)
    assert words.startswith("novel" if found.verdict.novel else "known")
    assert ("adapted (" in words or "adapted all the same" in words) == (found.plan is not quantized.plan)


def test_the_verdict_is_the_label_that_a_stream_of_the_same_text_ends_with(quantized, novel):
    """Whatever the windows' length: the counts come in pieces of what the monitor takes in at once."""
    model = limited(quantized, 0.3)
    device = Device(model)
    tokens = np.concatenate([novel.first[:, :-1].reshape(-1), novel.rest[:, :-1].reshape(-1)])
    windows = np.stack([tokens[:201], tokens[200:401]])
    counts = run_windows(device.step(model.plan, 0), windows, 2).counts
    assert counts.shape[:2] == (2, 2)
    found = verdict_of(model, counts, 200)
    state = monitor.start(model.knowledge.signatures)
    sizes = jnp.asarray([[128.0, 72.0, 128.0, 72.0]])
    state = monitor.watch(
        model.knowledge.signatures, state, jnp.asarray(counts.reshape(1, 4, *counts.shape[2:])), sizes
    )
    assert int(state.decisions[0]) > 0
    assert found.novel == (int(state.label[0]) == 2) and found.score == pytest.approx(float(state.score[0]))


def test_text_that_is_too_short_is_not_novel(quantized, novel):
    model = limited(quantized, 1e-3)
    counts = run_windows(Device(model).step(model.plan, 0), novel.first[:2], 2).counts
    assert not verdict_of(model, counts, 64).novel


def test_evaluating_every_dataset_and_variant_again_compiles_nothing(quantized, evaluated, novel, compilations):
    with compilations() as count:
        again = evaluate_quantized(quantized, [novel], EVAL)[0]
    assert count.compiled == 0 and again == evaluated


def test_a_model_in_bfloat16_reads_two_bytes_a_weight(shallow, novel):
    model, _ = shallow
    rows, losses = evaluate_uniform(model, [novel], EVAL, names=("bf16", "rtn2"))
    config = model.config
    per_expert = 3 * config.intermediate_size * config.hidden_size
    assert rows[0].bytes_per_token == 2 * per_expert * config.num_experts_per_tok * config.num_hidden_layers
    assert losses["verse"][0] == "bf16"
    assert rows[1].difference == pytest.approx(rows[1].nll - rows[0].nll, abs=1e-9)


def test_calibration_windows_are_recognized_only_in_the_calibrated_text(quantized, texts):
    assert calibrated_windows(quantized, "code", texts["code"], EVAL) == SETTINGS.calibration_windows
    assert calibrated_windows(quantized, "code", texts["verse"], EVAL) == 0
    assert calibrated_windows(quantized, "verse", texts["verse"], EVAL) == 0
