"""Text in: UTF-8 files to documents, tokens and fixed windows, with errors that name the file."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int

END_OF_TEXT = "<|endoftext|>"


def read_text(path: str | Path) -> str:
    """A .txt file whole, or the ``text`` fields of a .jsonl file joined by blank lines."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from error
    if path.suffix == ".jsonl":
        text = "\n\n".join(_jsonl_texts(path, text))
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    return text


def _jsonl_texts(path: Path, text: str) -> list[str]:
    texts = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand inside a JSON string
        if not line.strip():
            continue
        try:
            field = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is not a JSON object with a field 'text'") from error
        if not isinstance(field, str):
            raise ValueError(f"{path}: line {number}: field 'text' is {type(field).__name__}, not a string")
        texts.append(field)
    return texts


def token_windows(
    text: str, tokenizer: tokenizers.Tokenizer, window: int, name: str, limit: int | None = None
) -> Int[np.ndarray, "W T1"]:
    """Consecutive windows of ``window`` + 1 tokens (each predicts ``window``); neighbours share one token.

    At most ``limit`` windows; what does not fill a last one is left out. Fewer tokens than one window is an error.
    """
    ids = np.asarray(tokenizer.encode(text).ids, np.int32)
    count = (len(ids) - 1) // window
    if count < 1:
        raise ValueError(f"{name}: {len(ids)} tokens, fewer than one window of {window + 1}")
    count = min(count, limit or count)
    return np.stack([ids[i * window : i * window + window + 1] for i in range(count)])


def tokenizer_from_texts(paths: list[Path], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE trained on the files: digits one by one, so that arithmetic has regular tokens."""
    pre, models, trainers = tokenizers.pre_tokenizers, tokenizers.models, tokenizers.trainers
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(p) for p in paths], trainer)
    return tokenizer


def write_json(path: Path, value: Any) -> None:
    """Write under a temporary name beside ``path`` and rename, so that no half file stays. Numbers that are not finite,
    which JSON does not have, become null."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(json.dumps(_finite(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
