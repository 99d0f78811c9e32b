"""A recipe run: the unquantized model, plain GPTQ at each width, and ours at each budget, on texts and tasks.

All rows stand beside the unquantized model, whose layers are read one after the other where only texts are judged.
Nothing is drawn at random: the same recipe, versions and machine give the same figures. Without a folder to keep
quantized models in, all is done in memory.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from dynamo_jax.calibration.analyses import known_windows
from dynamo_jax.calibration.config import check_shapes, settled
from dynamo_jax.calibration.pipeline import quantize, quantize_folder
from dynamo_jax.calibration.uniform import uniform_bits, uniform_gptq
from dynamo_jax.evaluation.evaluate import datasets_of, references_of, score_tasks
from dynamo_jax.evaluation.perplexity import Dataset, Reference, windows_over
from dynamo_jax.evaluation.reference import Exact, Likeliest
from dynamo_jax.evaluation.switched import VARIANTS, Adaptation, evaluate_quantized
from dynamo_jax.evaluation.tasks import Scores, task_row
from dynamo_jax.evaluation.uniform import evaluate_float, float_parameters, float_row, reference_row
from dynamo_jax.models.chat import prefix_token
from dynamo_jax.models.decoder import Decoder, parameters, with_parameters
from dynamo_jax.models.huggingface import Source, load_decoder, side_files
from dynamo_jax.models.tokenizer import load_tokenizer
from dynamo_jax.progress import Log, Progress, no_log, no_progress
from dynamo_jax.recipes import EXACT, GPTQ, Found, Recipe, value_at
from dynamo_jax.report.run import versions
from dynamo_jax.runtime.online import Event
from dynamo_jax.runtime.quantized import QuantizedModel
from dynamo_jax.storage import checkpoint
from dynamo_jax.texts.sources import read_source
from dynamo_jax.texts.tasks import Document, read_tasks


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run found. rows, tasks: by text or task, the unquantized model's first; adaptations, events: what the run
    time made of each text and saw in each task, by budget; seconds: of the whole run."""

    recipe: Recipe
    rows: list[Found]
    tasks: list[Found]
    adaptations: dict[float, dict[str, Adaptation]]
    events: dict[float, dict[str, list[Event]]]
    seconds: float

    def thresholds(self) -> list[dict[str, Any]]:
        """Each with what was found in its place, and whether that passes."""
        found = [(t, value_at(self.recipe, self.rows + self.tasks, t)) for t in self.recipe.thresholds]
        return [dataclasses.asdict(t) | {"value": value, "passed": t.passes(value)} for t, value in found]

    def published(self) -> list[dict[str, Any]]:
        """Each with ours in its place."""
        found = [(p, value_at(self.recipe, self.rows + self.tasks, p)) for p in self.recipe.published]
        return [dataclasses.asdict(p) | {"ours": value} for p, value in found]

    def passed(self) -> bool:
        return all(threshold["passed"] for threshold in self.thresholds())

    def to_dict(self) -> dict[str, Any]:
        return {
            "recipe": dataclasses.asdict(self.recipe),
            "made_by": versions(),
            "results": [found.row.to_dict() | {"budget": found.budget} for found in self.rows],
            "tasks": [found.row.to_dict() | {"budget": found.budget} for found in self.tasks],
            "published": self.published(),
            "thresholds": self.thresholds(),
            "seconds": self.seconds,
            "waiting": self.recipe.waiting,
        }


def run(
    recipe: Recipe,
    folder: Path,
    texts: Path | None = None,
    keep: Path | None = None,
    progress: Progress = no_progress,
    log: Log = no_log,
) -> Result:
    """Run a recipe on the model in ``folder``.

    texts: the folder of the pinned texts' packages, None for the cache. keep: a folder for the quantized models, one
    below it for each budget, which a later call takes as they are; calibration then comes first, and streams the model.
    progress, log: as ``quantize_folder`` takes them. ValueError: texts or tasks that are not to be had, and all of
    ``quantize_folder`` and ``evaluate``.
    """
    begin = time.perf_counter()
    known = {name: read_source(given, texts) for name, given in recipe.known.items()}
    judged = known | {name: read_source(given, texts) for name, given in recipe.judged.items()}
    novel = {name: read_source(given, texts) for name, given in recipe.novel.items()}
    documents = read_tasks(recipe.tasks, recipe.documents, texts, "tasks: ") if recipe.tasks else {}
    source, tokenizer = Source(folder), load_tokenizer(folder)
    asked = {budget: dataclasses.replace(recipe.quantize, bits=budget) for budget in recipe.budgets}
    for settings in asked.values():
        check_shapes(source.config, settings)
        settled(settings, [source.config.expert_sizes], source.other_bytes(settings.rest), list(known))
    windows = known_windows(known, tokenizer, recipe.quantize, source.config.vocab_size)
    calibrated = {
        name: windows_over(len(own), recipe.quantize.window, recipe.evaluate)
        for name, own in windows.items()
        if name not in recipe.judged
    }
    data = datasets_of(judged, novel, recipe.evaluate, source.config, tokenizer, calibrated)
    kept = {} if keep is None else {budget: keep / f"{budget:g}-bits" for budget in recipe.budgets}
    for budget, out in kept.items():
        quantize_folder(folder, out, known, asked[budget], _at(budget, progress), log=log)
    judge = Judge(recipe, data, documents, folder, progress)
    judge.references(source)
    decoder = load_decoder(folder) if documents or recipe.uniform or not kept else None
    if decoder is not None:
        judge.floats(source, decoder, np.concatenate(list(windows.values())))
    for budget, settings in asked.items():
        if kept:
            decoder, model = None, checkpoint.load(kept[budget])
        else:
            assert decoder is not None
            model = quantize(decoder, tokenizer, known, settings, _at(budget, progress))[0]
        judge.quantized(budget, model)
    return judge.result(time.perf_counter() - begin)


def _at(budget: float, progress: Progress) -> Progress:
    return _named(progress, f"{budget:g} bits")


def _named(progress: Progress, words: str) -> Progress:
    """Stages apart from the same ones of another model."""
    return lambda stage, done, of: progress(f"{stage}, {words}", done, of)


class Judge:
    """Texts and tasks, what the unquantized model makes of them, and the rows so far."""

    def __init__(
        self,
        recipe: Recipe,
        data: list[Dataset],
        documents: dict[str, list[Document]],
        folder: Path,
        progress: Progress,
    ):
        self.recipe, self.data, self.documents, self.progress = recipe, data, documents, progress
        self.tokenizer, self.prefix = load_tokenizer(folder), prefix_token(side_files(folder))
        self.rows: list[Found] = []
        self.tasks: list[Found] = []
        self.exact: dict[str, Exact | Likeliest] = {}
        self.losses: dict[str, Reference] = {}
        self.scores: dict[str, Scores] = {}
        self.adaptations: dict[float, dict[str, Adaptation]] = {}
        self.events: dict[float, dict[str, list[Event]]] = {}

    def references(self, source: Source) -> None:
        """Rows of texts of the unquantized model, a layer of it in memory at a time."""
        config = self.recipe.evaluate
        self.exact = references_of(self.data, source.config.vocab_size, config, source, progress=self.progress)
        for data in self.data:
            row, (_, losses) = reference_row(data, self.exact[data.name], config.batch)
            self.losses[data.name] = EXACT, losses
            self.rows.append(Found(None, dataclasses.replace(row, variant=EXACT)))

    def floats(self, source: Source, decoder: Decoder, windows: Int[np.ndarray, "S T1"]) -> None:
        """Rows of tasks of the unquantized model, and all of plain GPTQ; windows: of calibration."""
        for task, scores in self._scored(decoder, self.progress).items():
            self.scores[task] = scores
            self.tasks.append(Found(None, task_row(task, EXACT, scores)))
        if not self.recipe.uniform:
            return
        config, settings = source.config, self.recipe.quantize
        group = settings.group(config.hidden_size)
        found = uniform_gptq(source, windows, self.recipe.uniform, group, settings.batch_size, self.progress)
        for width in self.recipe.uniform:
            arrays = parameters(decoder) | {name: jnp.asarray(a) for name, a in found.pop(width).items()}
            rounded = with_parameters(config, arrays)
            self._uniform(f"{GPTQ}{width}", rounded, uniform_bits(width, group, config.expert_sizes))

    def _uniform(self, variant: str, rounded: Decoder, bits: float) -> None:
        evaluated, params = self.recipe.evaluate, float_parameters(rounded)
        for data in self.data:
            exact, reference = self.exact[data.name], self.losses[data.name]
            losses = evaluate_float(rounded.config, params, data, evaluated.batch_size, exact)
            self.rows.append(
                Found(None, float_row(rounded.config, data, variant, losses, bits, reference, evaluated.batch))
            )
        del params
        for task, scores in self._scored(rounded, _named(self.progress, variant)).items():
            self.tasks.append(Found(None, task_row(task, variant, scores, (EXACT, self.scores[task]))))

    def _scored(self, decoder: Decoder, progress: Progress) -> dict[str, Scores]:
        """Of each task, by a model in floats."""
        if not self.documents:
            return {}
        common: Any = {"tokenizer": self.tokenizer, "prefix": self.prefix, "progress": progress}
        found, _ = score_tasks(decoder, self.documents, self.recipe.evaluate, (EXACT,), **common)
        return {task: own[EXACT] for task, own in found.items()}

    def quantized(self, budget: float, model: QuantizedModel) -> None:
        """Rows of the baseline, compared with the unquantized model, and of ``auto``, compared with the baseline."""
        steps = _at(budget, self.progress)
        rows, self.adaptations[budget] = evaluate_quantized(
            model, self.data, self.recipe.evaluate, references=self.losses, progress=steps, exact=self.exact
        )
        self.rows += [Found(budget, row) for row in rows]
        if not self.documents:
            return
        common: Any = {"prefix": self.prefix, "progress": steps}
        found, self.events[budget] = score_tasks(model, self.documents, self.recipe.evaluate, VARIANTS, **common)
        for task, own in found.items():
            before = EXACT, self.scores[task]
            for variant in VARIANTS:
                self.tasks.append(Found(budget, task_row(task, variant, own[variant], before)))
                before = variant, own[variant]

    def result(self, seconds: float) -> Result:
        """Rows by text and by task, in the order in which these were given."""
        order = {data.name: i for i, data in enumerate(self.data)} | {name: i for i, name in enumerate(self.documents)}
        rows, tasks = (sorted(found, key=lambda f: order[f.name]) for found in (self.rows, self.tasks))
        return Result(self.recipe, rows, tasks, self.adaptations, self.events, seconds)
