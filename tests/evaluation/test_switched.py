"""Rows of a quantized model: which tokens count, what the run time did, and that nothing compiles twice."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from quantized_runs import EVAL, SETTINGS

from dynamo_jax.evaluation.switched import Device, calibrated_windows, choose_plan, evaluate_quantized
from dynamo_jax.evaluation.uniform import evaluate_uniform

pytestmark = pytest.mark.usefixtures("quick_compilation")


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


@pytest.fixture(scope="module")
def evaluated(quantized, novel):
    return evaluate_quantized(quantized, [novel], EVAL)[0]


def test_rows_count_exactly_the_tokens_after_the_adaptation_windows(evaluated, novel):
    rows = evaluated
    assert [r.variant for r in rows] == ["baseline", "auto"]
    assert all(r.tokens == 4 * 64 for r in rows)
    np.testing.assert_array_equal(novel.rest[0, 0], novel.first[-1, -1])  # neighbours share one token


@pytest.mark.parametrize("gain", [-1e-6, 1e-6])
def test_an_adapted_plan_is_taken_only_if_it_is_nearer_to_8_bits(quantized, novel, monkeypatch, gain):
    monkeypatch.setattr(Device, "gain", lambda *_: gain)
    unknown = dataclasses.replace(quantized, knowledge=dataclasses.replace(quantized.knowledge, threshold=0.0))
    found = choose_plan(Device(unknown), novel.first, EVAL.batch_size)
    assert found.verdict.novel and (found.plan is quantized.plan) == (gain < 0)


def test_known_data_keeps_the_baseline(quantized, novel):
    sure = dataclasses.replace(quantized, knowledge=dataclasses.replace(quantized.knowledge, threshold=1.0))
    found = choose_plan(Device(sure), novel.first, EVAL.batch_size)
    assert found.gain is None and found.plan is quantized.plan


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
