"""The main job in one call: analyze, allocate, quantize, evaluate, switch, save, report.

The texts are pinned (``texts/demo.py``), so that the same versions of jax print the same figures everywhere.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dynamo_jax.calibration.analyses import Analysis
from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.calibration.pipeline import quantize
from dynamo_jax.evaluation.perplexity import EvalConfig, Row, make_dataset
from dynamo_jax.evaluation.switched import Adaptation, calibrated_windows, evaluate_quantized
from dynamo_jax.evaluation.uniform import evaluate_uniform
from dynamo_jax.files import write_json
from dynamo_jax.models.bundled import BUNDLED, BUNDLED_NAME
from dynamo_jax.models.huggingface import load_decoder
from dynamo_jax.models.tokenizer import load_tokenizer
from dynamo_jax.progress import Clock, Progress, no_progress
from dynamo_jax.report.gains import switching_words
from dynamo_jax.report.page import write_report
from dynamo_jax.report.results import next_steps, report_content
from dynamo_jax.report.run import Run, versions
from dynamo_jax.runtime.quantized import QuantizedModel
from dynamo_jax.storage import checkpoint, facts
from dynamo_jax.texts.demo import KNOWN, NOVEL, collect


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What the demo runs; configs/demo.toml holds the same values."""

    quantize: QuantizeConfig = dataclasses.field(default_factory=lambda: QuantizeConfig(group_size=256))
    evaluate: EvalConfig = dataclasses.field(default_factory=lambda: EvalConfig(limit=32))


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """What the demo found. summary: the report's first sentences, on what switching gained."""

    rows: list[Row]
    model: QuantizedModel
    adaptations: dict[str, Adaptation]
    analyses: dict[str, Analysis]
    summary: str = ""


def compute(config: DemoConfig, texts: Path | None, progress: Progress = no_progress) -> DemoResult:
    """All of the demo but the files; texts: the folder of their packages, None for the cache."""
    known = {name: collect(parts(texts)) for name, parts in KNOWN.items()}
    novel = {name: collect(parts(texts)) for name, parts in NOVEL.items()}
    model, tokenizer = load_decoder(BUNDLED), load_tokenizer(BUNDLED)
    quantized, analyses = quantize(model, tokenizer, known, config.quantize, progress)
    data = [
        make_dataset(n, "known", t, tokenizer, config.evaluate, calibrated_windows(quantized, n, t, config.evaluate))
        for n, t in known.items()
    ]
    data += [make_dataset(n, "novel", t, tokenizer, config.evaluate) for n, t in novel.items()]
    rows, floats = evaluate_uniform(model, data, config.evaluate, progress=progress)
    switched, adaptations = evaluate_quantized(quantized, data, config.evaluate, references=floats, progress=progress)
    order = {d.name: i for i, d in enumerate(data)}
    rows = sorted(rows + switched, key=lambda r: order[r.dataset])
    return DemoResult(rows, quantized, adaptations, analyses)


def _check_out(out: Path, overwrite: bool) -> None:
    """Before minutes of work: ValueError unless ``out`` is free. A demo writes its checkpoint first, so that a report
    without one is somebody else's."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: exists and is not a folder")
    found = {p.name for p in out.iterdir()} if out.is_dir() else set()
    own = {"checkpoint"} | ({"report.html", "results.json"} if checkpoint.is_checkpoint(out / "checkpoint") else set())
    if other := found - own:
        raise ValueError(f"{out}: exists and holds something else ({min(other)}); choose another --out")
    if found and not overwrite:
        raise ValueError(f"{out}: holds an earlier demo; --overwrite replaces it, or choose another --out")
    checkpoint.check_free_to_save(out / "checkpoint", overwrite)


def run(
    config: DemoConfig,
    texts: Path | None,
    out: Path,
    command: str,
    progress: Progress = no_progress,
    *,
    overwrite: bool = False,
) -> DemoResult:
    """The demo with its files: ``out``/checkpoint, report.html and results.json. ValueError: ``out`` holds anything,
    but, with ``overwrite``, the files of an earlier demo."""
    _check_out(out, overwrite)
    clock = Clock(progress)
    result = compute(config, texts, clock)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.save(out / "checkpoint", result.model, overwrite)
    clock("save", 1, 1)
    write_json(out / "results.json", {"made_by": versions(), "results": [r.to_dict() for r in result.rows]})
    made = result.model
    content = report_content(
        BUNDLED_NAME,
        made.config,
        Run(command, clock.stages, facts.memory(out / "checkpoint"), next_steps(out / "checkpoint")),
        plan=made.plan,
        knowledge=made.knowledge,
        spare=made.spare,
        analyses=result.analyses,
        rows=result.rows,
        adaptations=result.adaptations,
    )
    write_report(out / "report.html", content)
    return dataclasses.replace(result, summary=switching_words(content))
