"""The content of a report, from what a run has: rows, analyses, plans, and what the monitor said of each text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dynamo_jax.calibration.analyses import Analysis, dynamics_of
from dynamo_jax.calibration.sources import layer_weights
from dynamo_jax.evaluation.perplexity import Row
from dynamo_jax.evaluation.switched import Adaptation, Timeline
from dynamo_jax.models.decoder import Decoder
from dynamo_jax.report.content import Line, ReportContent
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
    command: str,
    seconds: float,
) -> ReportContent:
    """name: of the model; command: that made the report; seconds: that it took."""
    config, plan, known = model.config, quantized.plan, quantized.knowledge
    down = np.stack([np.asarray(layer_weights(model, i).down, np.float32) for i in range(config.num_moe_layers)])
    blocks = np.arange(0, plan.channels, plan.channel_block)
    return ReportContent(
        model=name,
        facts={
            "experts": f"{config.num_moe_layers} layers of {config.num_experts}, top {config.num_experts_per_tok}, "
            f"{config.intermediate_size} channels of {config.hidden_size} inputs each",
            "bits a weight": f"{plan.bits_per_weight():.3f}, scales included",
            "expert bytes stored": f"{plan.stored_bytes():,}, of {2 * config.num_expert_weights:,} in bfloat16",
            "channel block, group": f"{plan.channel_block} channels, {plan.group_size} weights a scale",
            "calibration": ", ".join(f"{n} ({w} windows)" for n, (_, w) in known.calibrated.items()),
            **_said_of(known),
            "time": f"{seconds:.0f} s from text to tables",
        },
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
        command=command,
    )
