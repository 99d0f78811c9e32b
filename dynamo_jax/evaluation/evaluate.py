"""Texts or tasks in, rows out: of a quantized model or a float one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import tokenizers

from dynamo_jax.evaluation.perplexity import EvalConfig, Row, make_dataset
from dynamo_jax.evaluation.switched import VARIANTS, Adaptation, calibrated_windows, evaluate_quantized
from dynamo_jax.evaluation.tasks import Scores, TaskRow, compared, scores
from dynamo_jax.evaluation.uniform import UNIFORM, evaluate_uniform, uniform_parameters
from dynamo_jax.models.decoder import Decoder, parameters
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
    against: Decoder | None = None,
    progress: Progress = no_progress,
) -> tuple[list[Row], dict[str, Adaptation]]:
    """Rows of each text and variant, and what the run time did on each text (of a quantized model).

    known, novel: texts by name. The first ``config.adaptation_windows`` windows of a text are what the monitor and
    adaptation see; rows count the rest, without the windows that calibration used. variants: of a quantized model
    ``baseline`` and ``auto`` (both by default), of an unquantized one ``bf16``, ``rtn4``, ``rtn3`` and ``rtn2`` (by
    default ``bf16``). tokenizer: of an unquantized model; a quantized one has its own. against: the model that a
    quantized one was made from, whose ``bf16`` row then comes first, and which the next row is compared with.
    progress: is called with (stage, done, of). Losses are nats a token, paired by window; source: docs/method.md.

    ValueError: no text, a name given twice, a text with fewer than two windows left, windows past the model's
    positions, an unknown variant, no tokenizer, or ``against`` of another configuration.
    """
    texts = [(n, kind, t) for kind, named in (("known", known), ("novel", novel)) for n, t in (named or {}).items()]
    if not texts:
        raise ValueError("nothing to evaluate: no known and no novel text")
    if twice := (known or {}).keys() & (novel or {}).keys():
        raise ValueError(f"{min(twice)}: a text of that name is known, and one is novel")
    config = config or EvalConfig()
    config.check(model.config)
    vocabulary = model.config.vocab_size
    names = _checked_variants(model, variants)
    if isinstance(model, QuantizedModel):
        data = [
            make_dataset(n, kind, t, model.tokenizer, config, calibrated_windows(model, n, t, config), vocabulary)
            for n, kind, t in texts
        ]
        if against is None:
            return evaluate_quantized(model, data, config, names, progress=progress)
        _check_same_model(model, against)
        first, floats = evaluate_uniform(against, data, config, names=("bf16",), progress=progress)
        rows, adaptations = evaluate_quantized(model, data, config, names, floats, progress)
        order = {d.name: i for i, d in enumerate(data)}
        return sorted(first + rows, key=lambda row: order[row.dataset]), adaptations
    if tokenizer is None:
        raise ValueError("tokenizer: an unquantized model does not bring its own, so one has to be given")
    data = [make_dataset(n, kind, t, tokenizer, config, vocab_size=vocabulary) for n, kind, t in texts]
    rows, _ = evaluate_uniform(model, data, config, names=names, progress=progress)
    return rows, {}


def _checked_variants(model: QuantizedModel | Decoder, variants: Sequence[str]) -> tuple[str, ...]:
    """Each once, or the default ones. ValueError: one that the model does not have."""
    there = VARIANTS if isinstance(model, QuantizedModel) else tuple(UNIFORM)
    names = tuple(dict.fromkeys(variants)) or (VARIANTS if isinstance(model, QuantizedModel) else ("bf16",))
    if unknown := [name for name in names if name not in there]:
        raise ValueError(f"variant {unknown[0]}: the model has {', '.join(there)}")
    return names


def _check_same_model(model: QuantizedModel, against: Decoder) -> None:
    if against.config != model.config:
        raise ValueError("against: a model of another configuration than the quantized one")


def evaluate_tasks(
    model: QuantizedModel | Decoder,
    tasks: Mapping[str, Sequence[Document]],
    config: EvalConfig | None = None,
    variants: Sequence[str] = (),
    tokenizer: tokenizers.Tokenizer | None = None,
    prefix: int | None = None,
    against: Decoder | None = None,
    dtype: Any = jnp.float32,
    progress: Progress = no_progress,
) -> tuple[list[TaskRow], dict[str, list[Event]]]:
    """Rows of each task and variant, and what the run time did on each task (of ``auto``).

    tasks: documents by name. ``auto`` follows a task's documents in their order, as one client's text, and begins each
    task at the baseline. prefix: the token that an empty context has. variants, tokenizer, against: as ``evaluate``
    takes them; a row is compared with the one before it, document by document. dtype: of all but quantized experts.
    ValueError: as of ``evaluate``, no task, a task without documents, a continuation of no tokens.
    """
    if not tasks:
        raise ValueError("nothing to evaluate: no task")
    if empty := [name for name, documents in tasks.items() if not documents]:
        raise ValueError(f"{empty[0]}: a task without documents")
    config = config or EvalConfig()
    names = _checked_variants(model, variants)
    found: dict[str, dict[str, Scores]] = {task: {} for task in tasks}
    events: dict[str, list[Event]] = {}
    if isinstance(model, QuantizedModel):
        tokenizer = model.tokenizer
        if against is not None:
            _check_same_model(model, against)
            arrays = {name: a.astype(dtype) for name, a in parameters(against).items()}
            exact = LanguageModel(config=model.config, parameters=arrays, dtype=dtype)
            for task, documents in tasks.items():
                found[task]["bf16"] = scores(exact, tokenizer, documents, prefix, None, progress)
            del arrays, exact
        host, state = init(model)
        ready = LanguageModel(config=model.config, parameters=model.device_parameters(dtype), state=state, dtype=dtype)
        for task, documents in tasks.items():
            for name in names:
                host, state = whole(host, begun(state, 1))
                follower = Follower(model, host, state, config.batch, config.reads) if name == "auto" else None
                now = dataclasses.replace(ready, state=state)
                found[task][name] = scores(now, tokenizer, documents, prefix, follower, progress)
                if follower:
                    host, state, events[task] = follower.host, follower.state, follower.events
    else:
        if tokenizer is None:
            raise ValueError("tokenizer: an unquantized model does not bring its own, so one has to be given")
        for name in names:
            arrays = {key: a.astype(dtype) for key, a in uniform_parameters(model, name).items()}
            ready = LanguageModel(config=model.config, parameters=arrays, dtype=dtype)
            for task, documents in tasks.items():
                found[task][name] = scores(ready, tokenizer, documents, prefix, None, progress)
    return [row for task, of_task in found.items() for row in compared(task, of_task)], events
