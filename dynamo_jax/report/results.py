"""The content of a report, from what a run has: rows, analyses, plans, and what the monitor said of each text."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dynamo_jax.calibration.analyses import Analysis, dynamics_of
from dynamo_jax.evaluation.perplexity import Row
from dynamo_jax.evaluation.switched import Adaptation, Timeline
from dynamo_jax.models.decoder import Decoder
from dynamo_jax.models.sources import layer_weights
from dynamo_jax.report.content import Line, ReportContent
from dynamo_jax.report.run import Run, run_facts
from dynamo_jax.runtime.quantized import Knowledge, QuantizedModel, odd_words


def line_of(of: Timeline) -> Line:
    gained = (of.auto - of.baseline).tolist()
    return Line(of.tokens.tolist(), of.score.tolist(), of.nearest, gained, of.adapted.tolist())


def _said_of(known: Knowledge) -> dict[str, str]:
    """What a reader must know of the calibration texts: which are not of one kind, and whether text can be novel."""
    odd = odd_words(known.odd, {name: windows for name, (_, windows) in known.calibrated.items()})
    said = {"not of one kind": "; ".join(odd), "monitor": known.blind() or ""}
    return {name: words for name, words in said.items() if words}


def report_content(
    name: str,
    model: Decoder,
    quantized: QuantizedModel,
    analyses: dict[str, Analysis],
    rows: Sequence[Row],
    adaptations: dict[str, Adaptation],
    run: Run,
) -> ReportContent:
    """name: of the model; run: that made the result."""
    config, plan, known = model.config, quantized.plan, quantized.knowledge
    down = np.stack([np.asarray(layer_weights(model, i).down, np.float32) for i in range(config.num_moe_layers)])
    blocks = np.arange(0, plan.channels, plan.channel_block)
    return ReportContent(
        model=name,
        facts={
            "experts": f"{config.num_moe_layers} layers of {config.num_experts}, top {config.num_experts_per_tok}, "
            f"{config.intermediate_size} channels of {config.hidden_size} inputs each",
            "channel block, group": f"{plan.channel_block} channels, {plan.group_size} weights a scale",
            "calibration": ", ".join(f"{n} ({w} windows)" for n, (_, w) in known.calibrated.items()),
            **_said_of(known),
            "experts in bfloat16": f"{2 * config.num_expert_weights:,} bytes",
            **run_facts(run),
        },
        expert_weights=config.num_expert_weights,
        rows=[row.to_dict() for row in rows],
        significance={n: a.expert_significance()[:, :, 0] for n, a in analyses.items()},
        channel_significance={
            n: np.add.reduceat(a.channel_significance(down), blocks, axis=-1) for n, a in analyses.items()
        },
        baseline_bits=plan.page_widths(),
        apart=plan.apart,
        adapted_bits={n: a.plan.page_widths() for n, a in adaptations.items() if a.plan is not plan},
        verdicts={n: (a.verdict.nearest, a.verdict.score, a.verdict.novel) for n, a in adaptations.items()},
        dynamics=dynamics_of(analyses),
        timelines={n: line_of(a.timeline) for n, a in adaptations.items() if a.timeline},
        command=run.command,
        next_steps=next_steps(run.out),
    )


def next_steps(model: Path) -> dict[str, str]:
    """What to do with the model that was saved, and with one's own."""
    of = f"--model {shlex.quote(str(model))}"
    own = "--model FOLDER --known a=A.txt --known b=B.txt --bits 3.0 --out quantized"
    return {
        "What the model holds, and its bytes": f"dynamo-jax inspect {of}",
        "A text of your own, at the baseline and switched": f"dynamo-jax eval {of} --novel mine=MINE.txt",
        "Text from the model, switching as it goes": f'dynamo-jax generate {of} --adapt --prompt "Once upon a time"',
        "Your own model and your own texts": f"dynamo-jax quantize {own}",
    }
