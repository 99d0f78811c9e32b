"""The content of reports on parts of the work, and their sections on divergence and tasks."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from made_up_reports import checked, group, make, row
from quantized_runs import SETTINGS

from dynamo_jax.calibration.pipeline import analyze
from dynamo_jax.evaluation.tasks import Scores, task_row
from dynamo_jax.kernels.layout import WIDTHS
from dynamo_jax.progress import Spent
from dynamo_jax.report.content import PLAN, Predicted, ReportContent
from dynamo_jax.report.findings import headline
from dynamo_jax.report.gains import lead_words
from dynamo_jax.report.page import render
from dynamo_jax.report.results import KNOWN_TEXTS, report_content
from dynamo_jax.report.run import Run
from dynamo_jax.runtime.memory import device_bytes

RUN = Run("dynamo-jax made up", {"read": Spent(1.25, 3_000_000), "count": Spent(2.0, None)})


def divergence(mean: float) -> dict[str, Any]:
    names = ("standard_error", "median", "p90", "p99", "p999", "largest", "agreement", "agreement_error")
    values = dict(zip(names, (mean / 10, mean / 2, 2 * mean, 3 * mean, 4 * mean, 5 * mean, 0.9, 0.01)))
    return {"mean": mean, **values, "ratio": 1 + mean, "ratio_error": None}


def scores(right: list[float], margin: list[float]) -> Scores:
    return Scores(np.array(right), np.array(right), np.array(margin), 1)


def empty(**changes: Any) -> ReportContent:
    return ReportContent(model="m", facts={}, expert_weights=1000, command="there", **changes)


def test_divergences_are_in_the_table_and_only_where_they_were_measured():
    content = make()
    assert 'id="divergence"' not in render(content)
    rows = [r | {"divergence": divergence(0.01 * i) if i else None} for i, r in enumerate(content.rows)]
    words = checked(dataclasses.replace(content, rows=rows)).text()
    assert "0.01000 \N{PLUS-MINUS SIGN} 0.00100 0.0050 0.0200 0.0300 0.0400 0.0500" in words
    assert "90.00% \N{PLUS-MINUS SIGN} 1.00% 1.0100" in words


def test_losses_are_measured_from_a_reference_as_from_bf16():
    def renamed(rows: list[dict]) -> list[dict]:
        names = {"bf16": "reference"}
        return [r | {k: names.get(r[k], r[k]) for k in ("variant", "reference")} for r in rows]

    content = make()
    other = dataclasses.replace(content, rows=renamed(content.rows))
    assert [f.words.replace("the reference", "bf16") for f in headline(other)] == [f.words for f in headline(content)]
    assert lead_words(other).replace("the reference", "bf16") == lead_words(content)
    words = checked(other).text()
    assert "nats a token above the reference" in words and "bf16" not in words


@pytest.mark.parametrize(("margin", "mark"), [(0.1, "better"), (-0.1, "worse"), (0.001, "noise")])
def test_what_switching_did_on_a_task_is_said(margin: float, mark: str):
    base = np.array([0.3, -0.2, 0.1, 0.4])
    spread = np.array([0.01, -0.01, 0.02, -0.02])
    first = scores([1, 0, 1, 1], list(base))
    second = scores([1, 1, 1, 1], list(base + margin + spread))
    rows = [task_row("odd <task>", "baseline", first), task_row("odd <task>", "auto", second, ("baseline", first))]
    content = empty(tasks=[r.to_dict() for r in rows], events={"odd <task>": ["text 3: switched & done"], "still": []})
    (found,) = headline(content)
    assert found.mark == mark and f"{margin:+.4f}".replace("-", "\N{MINUS SIGN}") in found.words
    assert "accuracy +25.0%" in found.words and "against baseline" in found.words
    words = checked(content).text()
    for shown in ("odd <task>", "75.00%", "100.00%", "text 3: switched & done", "It stayed at the baseline."):
        assert shown in words
    assert "All results" not in words and "Which experts matter" not in words


def test_a_task_of_one_continuation_has_no_margin():
    first = Scores(np.ones(3), np.ones(3), np.full(3, math.nan), 0)
    rows = [task_row("lambada", "baseline", first), task_row("lambada", "auto", first, ("baseline", first))]
    content = empty(tasks=[r.to_dict() for r in rows])
    assert headline(content) == [] and "100.00%" in checked(content).text()


def test_what_is_predicted_is_drawn_where_nothing_was_evaluated():
    points = [Predicted("bf16", 2000, 0.0), Predicted("2 bits", 280, 0.5), Predicted(PLAN, 375, 0.02)]
    content = empty(predicted=points)
    page = checked(content).text()
    assert "the plan is predicted to lose 0.0200" in lead_words(content) and "0.5000 with 2 bits" in page
    assert "predicted: the sum of what each expert's width was measured to cost" in page
    evaluated = dataclasses.replace(content, rows=group("prose", "known"))
    assert "predicted" not in checked(evaluated).text()
    assert lead_words(empty(predicted=points[:2])).startswith("Predicted for the known texts")
    checked(empty(predicted=points[:1]))
    assert lead_words(empty(rows=[row("prose", "bf16", 2.0)])) == ""


def test_stages_have_their_time_and_memory():
    words = checked(empty(stages=dict(RUN.stages))).text()
    assert "read 1.2 3 MB" in words and "count 2.0 missing" in words


@pytest.mark.parametrize("widths", ["quantized", "apart"])
def test_the_report_on_a_quantized_model_says_what_its_folder_knows(request, widths):
    model = request.getfixturevalue(widths)
    given = {"plan": model.plan, "knowledge": model.knowledge, "spare": model.spare}
    content = report_content("small", model.config, RUN, **given)
    errors, (own,) = model.knowledge.block_errors, [p for p in content.predicted if p.variant == PLAN]
    assert own.held == device_bytes(model.plan, model.spare).total
    assert own.lost == pytest.approx(model.plan.chosen(errors).sum())
    assert [p.variant for p in content.predicted] == ["bf16", *(f"{w} bits" for w in WIDTHS), PLAN]
    losses = [p.lost for p in content.predicted if p.variant.endswith("bits")]
    np.testing.assert_allclose(losses, errors.sum(axis=(0, 1, 2)))
    assert losses == sorted(losses, reverse=True)
    np.testing.assert_allclose(content.significance[KNOWN_TEXTS], errors[..., 0].sum(axis=2))
    words = checked(content).text()
    assert "Bits chosen for the baseline" in words and "How significance moves" not in words


def test_the_report_on_an_analysis_has_each_dataset_and_no_plan(shallow, texts):
    model, tokenizer = shallow
    analyses = analyze(model, tokenizer, {n: texts[n] for n in ("code", "verse")}, SETTINGS)
    content = report_content("small", model.config, RUN, analyses=analyses, grid=(16, 64))
    assert content.baseline_bits is None and set(content.significance) == {"code", "verse"}
    (two,) = [p for p in content.predicted if p.variant == "2 bits"]
    assert two.lost == pytest.approx(np.mean([m.sum() for m in content.significance.values()]))
    assert two.held == model.config.num_expert_weights * 2.25 / 8
    words = checked(content).text()
    assert "How significance moves between datasets" in words and "Bits chosen" not in words
