"""Texts or tasks in, rows out: of a quantized model or a float one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tokenizers

from dynamo_jax.evaluation.perplexity import Dataset, EvalConfig, Row, make_dataset
from dynamo_jax.evaluation.reference import Exact, Likeliest, exact_states, likeliest, read_references, write_references
from dynamo_jax.evaluation.switched import VARIANTS, Adaptation, calibrated_windows, evaluate_quantized
from dynamo_jax.evaluation.tasks import Scores, TaskRow, compared, scores
from dynamo_jax.evaluation.uniform import UNIFORM, evaluate_uniform, reference_row, uniform_parameters
from dynamo_jax.models.chat import prefix_token
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.decoder import Decoder, parameters
from dynamo_jax.models.sources import DecoderSource, LayerSource
from dynamo_jax.progress import Progress, no_progress
from dynamo_jax.runtime.generate import LanguageModel
from dynamo_jax.runtime.online import Event, Follower
from dynamo_jax.runtime.quantized import QuantizedModel
from dynamo_jax.runtime.serving import begun, init, whole
from dynamo_jax.texts.tasks import Document


def evaluate(
    model: QuantizedModel | Decoder,
    known: Mapping[str, str] | None = None,
    novel: Mapping[str, str] | None = None,
    config: EvalConfig | None = None,
    variants: Sequence[str] = (),
    tokenizer: tokenizers.Tokenizer | None = None,
    reference: Decoder | LayerSource | None = None,
    reference_logits: Path | None = None,
    progress: Progress = no_progress,
) -> tuple[list[Row], dict[str, Adaptation]]:
    """Rows of each text and variant, and what the run time did on each text (of a quantized model).

    known, novel: texts by name. The first ``config.adaptation_windows`` windows of a text are what the monitor and
    adaptation see; rows count the rest, without the windows that calibration used. variants: of a quantized model
    ``baseline`` and ``auto`` (both by default), of an unquantized one ``bf16``, ``rtn4``, ``rtn3`` and ``rtn2`` (by
    default ``bf16``). tokenizer: of an unquantized model; a quantized one has its own. reference: a model of the same
    vocabulary, as that which a quantized one was made from. Its row then comes first, the next row is compared with it,
    and each row says how far its predictions are from the reference's (``Row.divergence``); a folder's is read a layer
    at a time. reference_logits: a file that takes the reference's place, of the same windows; written if it is missing.
    progress: is called with (stage, done, of). Losses are nats a token, paired by window; source: docs/method.md.

    ValueError: no text, a name given twice, a text with fewer than two windows left, windows past the model's
    positions, an unknown variant, no tokenizer, a reference of another vocabulary or with fewer positions, a file of
    other windows, or that is missing without a reference.
    """
    config = config or EvalConfig()
    names = _checked_variants(model, variants)
    calibrated: dict[str, int] = {}
    if isinstance(model, QuantizedModel):
        tokenizer = model.tokenizer
        texts = {**(known or {}), **(novel or {})}
        calibrated = {name: calibrated_windows(model, name, text, config) for name, text in texts.items()}
    if tokenizer is None:
        raise ValueError("tokenizer: an unquantized model does not bring its own, so one has to be given")
    data = datasets_of(known, novel, config, model.config, tokenizer, calibrated)
    exact = references_of(data, model.config.vocab_size, config, reference, reference_logits, progress)
    beside = {d.name: reference_row(d, exact[d.name], config.batch) for d in data if d.name in exact}
    compared_with = {name: own for name, (_, own) in beside.items()}
    rows: list[Row] = []
    adaptations: dict[str, Adaptation] = {}
    if isinstance(model, QuantizedModel):
        rows, adaptations = evaluate_quantized(model, data, config, names, compared_with, progress, exact)
    else:
        rows, _ = evaluate_uniform(
            model, data, config, names=names, progress=progress, exact=exact, references=compared_with
        )
    if beside:
        order = {d.name: i for i, d in enumerate(data)}
        rows = sorted([row for row, _ in beside.values()] + rows, key=lambda row: order[row.dataset])
    return rows, adaptations


def datasets_of(
    known: Mapping[str, str] | None,
    novel: Mapping[str, str] | None,
    config: EvalConfig,
    model: ModelConfig,
    tokenizer: tokenizers.Tokenizer,
    calibrated: Mapping[str, int],
) -> list[Dataset]:
    """The windows of texts that a model is judged on; calibrated: of a text, the windows to leave out.

    ValueError: as of ``evaluate``.
    """
    texts = [(n, kind, t) for kind, named in (("known", known), ("novel", novel)) for n, t in (named or {}).items()]
    if not texts:
        raise ValueError("nothing to evaluate: no known and no novel text")
    if twice := (known or {}).keys() & (novel or {}).keys():
        raise ValueError(f"{min(twice)}: a text of that name is known, and one is novel")
    config.check(model)
    size = model.vocab_size
    return [make_dataset(n, kind, t, tokenizer, config, calibrated.get(n, 0), size) for n, kind, t in texts]


def references_of(
    data: list[Dataset],
    vocabulary: int,
    config: EvalConfig,
    reference: Decoder | LayerSource | None,
    file: Path | None = None,
    progress: Progress = no_progress,
) -> dict[str, Exact | Likeliest]:
    """What the reference makes of each dataset's windows, by name. file: as ``reference_logits`` of ``evaluate``."""
    windows = {d.name: d.rest for d in data}
    if file is not None and file.exists():
        return dict(read_references(file, windows, vocabulary))
    if reference is None:
        if file is not None:
            raise ValueError(f"{file}: no such file, and no reference to write it from")
        return {}
    source = DecoderSource(reference) if isinstance(reference, Decoder) else reference
    if source.config.vocab_size != vocabulary:
        raise ValueError(
            f"reference: of a vocabulary of {source.config.vocab_size:,} tokens, where the model has {vocabulary:,}"
        )
    config.check(source.config)
    whole = exact_states(source, np.concatenate(list(windows.values())), config.batch_size, progress)
    exact = {name: whole.part(at) for name, at in zip(windows, _places(list(windows.values())))}
    if file is not None:
        write_references(file, {name: likeliest(own) for name, own in exact.items()}, windows, vocabulary)
    return dict(exact)


def _places(parts: list[np.ndarray]) -> list[slice]:
    """Where each of some arrays is in all of them together."""
    ends = np.cumsum([len(part) for part in parts])
    return [slice(int(end) - len(part), int(end)) for part, end in zip(parts, ends)]


def _checked_variants(model: QuantizedModel | Decoder, variants: Sequence[str]) -> tuple[str, ...]:
    """Each once, or the default ones. ValueError: one that the model does not have."""
    there = VARIANTS if isinstance(model, QuantizedModel) else tuple(UNIFORM)
    names = tuple(dict.fromkeys(variants)) or (VARIANTS if isinstance(model, QuantizedModel) else ("bf16",))
    if unknown := [name for name in names if name not in there]:
        raise ValueError(f"variant {unknown[0]}: the model has {', '.join(there)}")
    return names


def evaluate_tasks(
    model: QuantizedModel | Decoder,
    tasks: Mapping[str, Sequence[Document]],
    config: EvalConfig | None = None,
    variants: Sequence[str] = (),
    tokenizer: tokenizers.Tokenizer | None = None,
    prefix: int | None = None,
    reference: Decoder | None = None,
    dtype: Any = jnp.float32,
    progress: Progress = no_progress,
) -> tuple[list[TaskRow], dict[str, list[Event]]]:
    """Rows of each task and variant, and what the run time did on each task (of ``auto``).

    tasks: documents by name. ``auto`` follows a task's documents in their order, as one client's text, and begins each
    task at the baseline. prefix: the token that an empty context has, of a quantized model by default its own.
    variants, tokenizer: as ``evaluate`` takes them. reference: a model of the same tokenizer, in memory, whose row then
    comes first. A row is compared with the one before it, document by document. dtype: of all but quantized experts.
    ValueError: as of ``evaluate``, no task, a task without documents, a continuation of no tokens.
    """
    found, events = score_tasks(model, tasks, config, variants, tokenizer, prefix, reference, dtype, progress)
    return [row for task, of_task in found.items() for row in compared(task, of_task)], events


def score_tasks(
    model: QuantizedModel | Decoder,
    tasks: Mapping[str, Sequence[Document]],
    config: EvalConfig | None = None,
    variants: Sequence[str] = (),
    tokenizer: tokenizers.Tokenizer | None = None,
    prefix: int | None = None,
    reference: Decoder | None = None,
    dtype: Any = jnp.float32,
    progress: Progress = no_progress,
) -> tuple[dict[str, dict[str, Scores]], dict[str, list[Event]]]:
    """As ``evaluate_tasks``, the scores of each document in place of rows: by task, then by variant."""
    if not tasks:
        raise ValueError("nothing to evaluate: no task")
    if empty := [name for name, documents in tasks.items() if not documents]:
        raise ValueError(f"{empty[0]}: a task without documents")
    config = config or EvalConfig()
    names = _checked_variants(model, variants)
    found: dict[str, dict[str, Scores]] = {task: {} for task in tasks}
    events: dict[str, list[Event]] = {}
    own_tokenizer = model.tokenizer if isinstance(model, QuantizedModel) else tokenizer
    if own_tokenizer is None:
        raise ValueError("tokenizer: an unquantized model does not bring its own, so one has to be given")
    tokenizer = own_tokenizer
    if prefix is None and isinstance(model, QuantizedModel):
        prefix = prefix_token(model.files)
    if reference is not None:
        arrays = {name: a.astype(dtype) for name, a in parameters(reference).items()}
        exact = LanguageModel(config=reference.config, parameters=arrays, dtype=dtype)
        for task, documents in tasks.items():
            found[task]["reference"] = scores(
                exact, tokenizer, documents, prefix, None, _of_task(progress, task, "reference")
            )
        del arrays, exact
    if isinstance(model, QuantizedModel):
        host, state = init(model)
        ready = LanguageModel(config=model.config, parameters=model.device_parameters(dtype), state=state, dtype=dtype)
        for task, documents in tasks.items():
            for name in names:
                host, state = whole(host, begun(state, 1))
                follower = Follower(model, host, state, config.batch, config.reads) if name == "auto" else None
                now, told = dataclasses.replace(ready, state=state), _of_task(progress, task, name)
                found[task][name] = scores(now, tokenizer, documents, prefix, follower, told)
                if follower:
                    host, state, events[task] = follower.host, follower.state, follower.events
    else:
        for name in names:
            arrays = {key: a.astype(dtype) for key, a in uniform_parameters(model, name).items()}
            ready = LanguageModel(config=model.config, parameters=arrays, dtype=dtype)
            for task, documents in tasks.items():
                found[task][name] = scores(ready, tokenizer, documents, prefix, None, _of_task(progress, task, name))
    return found, events


def _of_task(progress: Progress, task: str, variant: str) -> Progress:
    """A stage for each task and variant."""
    return lambda _, done, of: progress(f"{task}, {variant}", done, of)
