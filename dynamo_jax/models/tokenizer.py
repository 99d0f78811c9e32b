"""Tokenizers from files that are not trusted, and texts as ids of a model's vocabulary.

A tokenizer.json may ask that texts be cut or padded; whole texts are what calibration and prompts mean, so both are
switched off. What the library cannot do ends in bare exceptions or in panics; here they are errors with a name.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers

from dynamo_jax.files import LFS_POINTER, check_readable

TOKENIZER = "tokenizer.json"
LONGEST_ERROR = 500  # characters of the library's own words


def load_tokenizer(folder: str | Path) -> tokenizers.Tokenizer:
    """The tokenizer.json in ``folder``, without the truncation and the padding that it may ask for.

    It may know fewer tokens than the model (padded embeddings), and more: an id past the model's vocabulary is an error
    where a text has it (``check_ids``). ValueError: no such file, an unreadable or a damaged one.
    """
    path = Path(folder) / TOKENIZER
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; with transformers AutoTokenizer.from_pretrained(..).save_pretrained(..) makes one"
        )
    check_readable(path)
    return tokenizer_from(path.read_bytes(), path)


def tokenizer_from(content: bytes, where: str | Path) -> tokenizers.Tokenizer:
    """The tokenizer of a file's content, as ``load_tokenizer`` returns it; ``where`` names it in errors.

    ValueError: damaged.
    """
    if content.startswith(LFS_POINTER):
        raise ValueError(f"{where}: not a tokenizer: a pointer of git-lfs in its place; git lfs pull fetches the file")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 at byte {error.start}") from error
    _check_prefix(text, where)
    with named_errors(f"{where}: not a tokenizer"):
        tokenizer = tokenizers.Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return tokenizer


def _check_prefix(text: str, where: str | Path) -> None:
    """ValueError for merges without the prefix that they should have: the library takes the prefix off unseen, which
    may abort the whole process (tokenizers 0.23)."""
    if not re.search(r'"continuing_subword_prefix"\s*:\s*"[^"]', text):
        return
    try:
        model = json.loads(text)["model"]
        prefix, merges = model["continuing_subword_prefix"], model.get("merges") or []
        seconds = [(merge.split(" ") if isinstance(merge, str) else merge)[1] for merge in merges]
        fits = all(second.startswith(prefix) for second in seconds)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError):
        return  # the library says what is wrong
    if not fits:
        raise ValueError(f"{where}: not a tokenizer: a merge without the prefix {prefix[:50]!r} of its model")


@contextlib.contextmanager
def named_errors(what: str) -> Iterator[None]:
    """Whatever the library raises becomes a ValueError that begins with ``what``."""
    try:
        yield
    except Exception as error:  # it raises bare Exception on any damage
        raise ValueError(f"{what}: {str(error)[:LONGEST_ERROR]}") from error
    except BaseException as error:  # of a panic in Rust; interrupts are no panics
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what}: {str(error)[:LONGEST_ERROR]}") from error


def encode(tokenizer: tokenizers.Tokenizer, text: str, special: bool = True) -> list[int]:
    """The ids of a text; special: with the tokens that the tokenizer puts around one. ValueError: it cannot."""
    with named_errors(f"{TOKENIZER}: it fails on a text"):
        return tokenizer.encode(whole_characters(text), add_special_tokens=special).ids


def decode(tokenizer: tokenizers.Tokenizer, ids: Sequence[int]) -> str:
    """The text of ids. ValueError: the tokenizer cannot."""
    with named_errors(f"{TOKENIZER}: it fails on token ids"):
        return tokenizer.decode(ids)


def check_ids(ids: Sequence[int], vocab_size: int, what: str) -> None:
    """ValueError that names an id outside of 0 .. ``vocab_size`` - 1; ``what``: the text that the ids are of."""
    if not ids:
        return
    worst = low if (low := min(ids)) < 0 else max(ids)
    if not 0 <= worst < vocab_size:
        raise ValueError(
            f"{what} has the token id {worst} (of {TOKENIZER}), outside the model's vocabulary of {vocab_size}"
        )


def whole_characters(text: str) -> str:
    """The text with U+FFFD in the place of halves of characters, which no tokenizer and no file takes.

    They come from escapes in JSON, and from arguments of a command that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
