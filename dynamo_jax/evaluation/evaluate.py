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
    there = VARIANTS if isinstance(model, QuantizedModel) else tuple(UNIFORM)
    names = tuple(dict.fromkeys(variants)) or (VARIANTS if isinstance(model, QuantizedModel) else ("bf16",))
    if unknown := [name for name in names if name not in there]:
        raise ValueError(f"variant {unknown[0]}: the model has {', '.join(there)}")
    if isinstance(model, QuantizedModel):
        data = [
            make_dataset(n, kind, t, model.tokenizer, config, calibrated_windows(model, n, t, config), vocabulary)
            for n, kind, t in texts
        ]
        if against is None:
            return evaluate_quantized(model, data, config, names, progress=progress)
        if against.config != model.config:
            raise ValueError("against: a model of another configuration than the quantized one")
        first, floats = evaluate_uniform(against, data, config, names=("bf16",), progress=progress)
        rows, adaptations = evaluate_quantized(model, data, config, names, floats, progress)
        order = {d.name: i for i, d in enumerate(data)}
        return sorted(first + rows, key=lambda row: order[row.dataset]), adaptations
    if tokenizer is None:
        raise ValueError("tokenizer: an unquantized model does not bring its own, so one has to be given")
    data = [make_dataset(n, kind, t, tokenizer, config, vocab_size=vocabulary) for n, kind, t in texts]
    rows, _ = evaluate_uniform(model, data, config, names=names, progress=progress)
    return rows, {}
