"""Texts in, rows out: a quantized model or a float one on known and novel texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import tokenizers

from dynamo_jax.evaluation.perplexity import EvalConfig, Row, make_dataset
from dynamo_jax.evaluation.switched import VARIANTS, Adaptation, calibrated_windows, evaluate_quantized
from dynamo_jax.evaluation.uniform import UNIFORM, evaluate_uniform
from dynamo_jax.models.decoder import Decoder
from dynamo_jax.progress import Progress, no_progress
from dynamo_jax.runtime.quantized import QuantizedModel


def evaluate(
    model: QuantizedModel | Decoder,
    known: Mapping[str, str] | None = None,
    novel: Mapping[str, str] | None = None,
    config: EvalConfig | None = None,
    variants: Sequence[str] = (),
    tokenizer: tokenizers.Tokenizer | None = None,
    progress: Progress = no_progress,
) -> tuple[list[Row], dict[str, Adaptation]]:
    """Rows of each text and variant, and what the run time did on each text (of a quantized model).

    known, novel: texts by name. The first ``config.adaptation_windows`` windows of a text are what the monitor and
    adaptation see; rows count the rest, without the windows that calibration used. variants: of a quantized model
    ``baseline`` and ``auto`` (both by default), of an unquantized one ``bf16``, ``rtn4``, ``rtn3`` and ``rtn2`` (by
    default ``bf16``). tokenizer: of an unquantized model; a quantized one has its own.

    ValueError: no text, one with fewer than two windows left, an unknown variant, no tokenizer.
    """
    texts = [(n, kind, t) for kind, named in (("known", known), ("novel", novel)) for n, t in (named or {}).items()]
    if not texts:
        raise ValueError("nothing to evaluate: no known and no novel text")
    config = config or EvalConfig()
    quantized = isinstance(model, QuantizedModel)
    there = VARIANTS if quantized else tuple(UNIFORM)
    names = tuple(variants) or (VARIANTS if quantized else ("bf16",))
    if unknown := [name for name in names if name not in there]:
        raise ValueError(f"variant {unknown[0]}: the model has {', '.join(there)}")
    if isinstance(model, QuantizedModel):
        data = [
            make_dataset(n, kind, t, model.tokenizer, config, calibrated_windows(model, n, t, config))
            for n, kind, t in texts
        ]
        return evaluate_quantized(model, data, config, names, progress=progress)
    if tokenizer is None:
        raise ValueError("tokenizer: an unquantized model does not bring its own, so one has to be given")
    data = [make_dataset(n, kind, t, tokenizer, config) for n, kind, t in texts]
    rows, _ = evaluate_uniform(model, data, config, names=names, progress=progress)
    return rows, {}
