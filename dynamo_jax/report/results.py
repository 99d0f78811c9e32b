"""The content of a report, from what a run has: rows, analyses, plans, and what the monitor said of each text.

Axes: L layers, E experts, N channel blocks an expert, M widths of an expert, W widths.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from dynamo_jax.calibration.analyses import Analysis, dynamics_of
from dynamo_jax.calibration.knowledge import without_unseen
from dynamo_jax.evaluation.perplexity import Row
from dynamo_jax.evaluation.switched import Adaptation, Timeline
from dynamo_jax.evaluation.tasks import TaskRow
from dynamo_jax.kernels.layout import WIDTHS
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.precision.plan import Plan, expert_plan
from dynamo_jax.report.content import PLAN, Line, Predicted, ReportContent
from dynamo_jax.report.run import Run, run_facts
from dynamo_jax.runtime.memory import device_bytes
from dynamo_jax.runtime.quantized import Knowledge, odd_words

KNOWN_TEXTS = "known texts"  # what calibration saw, where the model no longer tells datasets apart


def report_content(
    name: str,
    config: ModelConfig,
    run: Run,
    *,
    plan: Plan | None = None,
    knowledge: Knowledge | None = None,
    spare: float = 0.0,
    analyses: Mapping[str, Analysis] | None = None,
    grid: tuple[int, int] | None = None,
    rows: Sequence[Row] = (),
    adaptations: Mapping[str, Adaptation] | None = None,
    tasks: Sequence[TaskRow] = (),
    events: Mapping[str, Sequence[str]] | None = None,
) -> ReportContent:
    """What the report on a model shows: all of it that is given.

    name, config: of the model; run: that made the result. plan, knowledge, spare: of a quantized model. analyses: of
    its known datasets, where they were made; grid: channel block and group size of analyses without a plan. rows,
    adaptations: of texts; tasks: rows of tasks, and events: what the run time did on each, in words.
    """
    given: dict[str, Any] = {}
    facts: dict[str, str] = {
        "experts": f"{config.num_moe_layers} layers of {config.num_experts}, top {config.num_experts_per_tok}, "
        f"{config.intermediate_size} channels of {config.hidden_size} inputs each",
    }
    if plan is not None and knowledge is not None:
        facts |= _quantized_facts(plan, knowledge)
        errors = knowledge.block_errors
        at_least = errors[..., 0].reshape(*errors.shape[:2], -1, plan.blocks).sum(axis=2)
        given |= {
            "baseline_bits": plan.page_widths(),
            "apart": plan.apart,
            "significance": {KNOWN_TEXTS: at_least.sum(axis=2)},
            "block_significance": {KNOWN_TEXTS: at_least},
            "predicted": _predicted(config, plan, errors, spare),
        }
    analyses = without_unseen(analyses or {})
    if analyses:
        given |= {
            "significance": {n: a.expert_significance()[..., 0] for n, a in analyses.items()},
            "block_significance": {n: a.block_significance()[..., 0] for n, a in analyses.items()},
            "dynamics": dynamics_of(analyses),
        }
        if plan is None and grid is not None:
            given["predicted"] = _predicted_uniform(config, analyses, *grid)
    found = dict(adaptations or {})
    return ReportContent(
        model=name,
        facts={**facts, "experts in bfloat16": f"{2 * config.num_expert_weights:,} bytes", **run_facts(run)},
        expert_weights=config.num_expert_weights,
        rows=[row.to_dict() for row in rows],
        tasks=[row.to_dict() for row in tasks],
        events={task: list(words) for task, words in (events or {}).items()},
        adapted_bits={n: a.plan.page_widths() for n, a in found.items() if a.plan is not plan},
        verdicts={n: (a.verdict.nearest, a.verdict.score, a.verdict.novel) for n, a in found.items()},
        timelines={n: line_of(a.timeline) for n, a in found.items() if a.timeline},
        command=run.command,
        stages=dict(run.stages),
        next_steps=dict(run.next_steps),
        **given,
    )


def _quantized_facts(plan: Plan, known: Knowledge) -> dict[str, str]:
    """Of the plan and the calibration texts: also which are not of one kind, and whether text can be novel."""
    windows = {name: count for name, (_, count) in known.calibrated.items()}
    said = {"not of one kind": "; ".join(odd_words(known.odd, windows)), "monitor": known.blind() or ""}
    return {
        "channel block, group": f"{plan.channel_block} channels, {plan.group_size} weights a scale",
        "calibration": ", ".join(f"{n} ({w} windows)" for n, w in windows.items()),
        **{name: words for name, words in said.items() if words},
    }


def _predicted(config: ModelConfig, plan: Plan, errors: Float[np.ndarray, "L E M W"], spare: float) -> list[Predicted]:
    """Of the plan, and of its planes at one width for all experts, which need no slots."""
    uniform = [
        Predicted(
            f"{width} bits",
            dataclasses.replace(plan, widths=np.full_like(plan.widths, width)).stored_bytes(),
            float(errors[..., i].sum()),
        )
        for i, width in enumerate(WIDTHS)
    ]
    own = Predicted(PLAN, device_bytes(plan, spare).total, float(plan.chosen(errors).sum()))
    return _finite([_unquantized(config), *uniform, own])


def _predicted_uniform(
    config: ModelConfig, analyses: Mapping[str, Analysis], channel_block: int, group_size: int
) -> list[Predicted]:
    """All experts at one width, mean over the datasets."""
    losses = np.mean([a.expert_significance().sum(axis=(0, 1)) for a in analyses.values()], axis=0)
    shape = config.num_moe_layers, config.num_experts
    sizes = config.intermediate_size, channel_block, group_size, config.hidden_size
    held = [expert_plan(np.full(shape, width, np.int8), *sizes).stored_bytes() for width in WIDTHS]
    uniform = [Predicted(f"{w} bits", b, float(lost)) for w, b, lost in zip(WIDTHS, held, losses)]
    return _finite([_unquantized(config), *uniform])


def _unquantized(config: ModelConfig) -> Predicted:
    return Predicted("bf16", 2 * config.num_expert_weights, 0.0)


def _finite(found: list[Predicted]) -> list[Predicted]:
    return [point for point in found if math.isfinite(point.lost) and point.held > 0]


def line_of(of: Timeline) -> Line:
    gained = (of.auto - of.baseline).tolist()
    return Line(of.tokens.tolist(), of.score.tolist(), of.nearest, gained, of.adapted.tolist())


def next_steps(model: Path) -> dict[str, str]:
    """What to do with a quantized model that was saved, and with a model of one's own."""
    of = f"--model {shlex.quote(str(model))}"
    own = "--model FOLDER --known a=A.txt --known b=B.txt --bits 3.0 --out quantized --report report.html"
    return {
        "What the model holds, and its bytes": f"dynamo-jax inspect {of}",
        "A text of your own, at the baseline and switched": f"dynamo-jax eval {of} --novel mine=MINE.txt "
        "--report report.html",
        "Text from the model, switching as it goes": f'dynamo-jax generate {of} --adapt --prompt "Once upon a time"',
        "Your own model and your own texts": f"dynamo-jax quantize {own}",
    }
