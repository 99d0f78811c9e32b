"""Text in: what is read, windows of tokens, and errors that name file and line."""

from __future__ import annotations

import os
import pathlib
import random
import re

import numpy as np
import pytest
import tokenizers

from dynamo_jax.texts import reading
from dynamo_jax.texts.reading import digest, read_text
from dynamo_jax.texts.windows import first_ids, token_windows

ROOT = pathlib.Path(__file__).parent.parent


def test_jsonl_texts_are_joined_by_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "zwölf", "x": 1}\n', encoding="utf-8")
    assert read_text(path) == "one\n\nzwölf"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: the file is empty"),
        ("a.txt", b" \n ", "a.txt: the file is empty"),
        ("a.txt", b"abc\xff", "a.txt: not UTF-8 at byte 3"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": 1}', "a.jsonl: line 2 is not a JSON object with a field 'text'"),
        ("a.jsonl", b"{", "a.jsonl: line 1 is not"),
        ("a.jsonl", b"[1]", "a.jsonl: line 1 is not"),
        ("a.jsonl", b'{"text": 3}', "a.jsonl: line 1: field 'text' is int"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl: line 1 is not"),
        ("a.jsonl", b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "a.jsonl: line 1 is not"),
        ("a.JSONL", b"plain text", "a.JSONL: line 1 is not"),
        ("a.json", b"[", "a.json: not JSON"),
        ("a.json", b"[" * 100_000, "a.json: not JSON"),
        ("a.json", b'[{"text": "x"}, {"txt": 1}]', "a.json: element 2 is not a JSON object with a field 'text'"),
        ("a.json", b'{"text": null}', "a.json: it: field 'text' is NoneType"),
        ("a.json", b"[]", "a.json: the file is empty"),
        ("a.txt", b'[{"text": "x"}]', "a.txt: it holds JSON; name it .json or .jsonl"),
        ("a.txt", b'\n{\n"text": "x"}\n', "a.txt: it holds JSON"),
        ("a", b'{"text": "x"}\n{"text": "y"}\n', "a: it holds JSON"),
    ],
)
def test_a_text_that_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_text(tmp_path / name)


@pytest.mark.parametrize("name", ["a.json", "a.JSON", "a.jsonl", "a.JSONL", "a.ndjson"])
def test_json_is_read_whatever_the_suffix_looks_like(tmp_path, name):
    lines = ['{"text": "one"}', '{"text": "two", "x": [1]}']
    (tmp_path / name).write_text("\n".join(lines))
    assert read_text(tmp_path / name) == "one\n\ntwo"
    if name.lower().endswith(".json"):
        (tmp_path / name).write_text("[" + ",\n".join(lines) + "]")
        assert read_text(tmp_path / name) == "one\n\ntwo"
        (tmp_path / name).write_text(lines[0])
        assert read_text(tmp_path / name) == "one"


@pytest.mark.parametrize("text", ["{x} is a set", "[1] A footnote", '{"a": 1} begins this', "[[", "{" * 100_000])
def test_a_text_that_begins_like_json_is_a_text(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert read_text(tmp_path / "a.txt") == text


def test_halves_of_characters_and_marks_of_byte_order_are_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "cut emoji \\ud83d end"}\n{"text": "\\ud83d\\ude00"}')
    text = read_text(tmp_path / "a.jsonl")
    assert text == "cut emoji \ufffd end\n\n\U0001f600" and digest(text)
    (tmp_path / "a.txt").write_text("\ufeffabc")
    assert read_text(tmp_path / "a.txt") == "abc"


def test_what_is_no_text_file_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"none\.txt: no such file"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="a folder, not a file"):
        read_text(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: not a regular file"):
        read_text(tmp_path / "pipe")
    monkeypatch.setattr(reading, "LARGEST", 3)
    (tmp_path / "large.txt").write_text("four")
    with pytest.raises(ValueError, match=r"large\.txt: 4 bytes, more than the 3 that are read"):
        read_text(tmp_path / "large.txt")


def test_windows_cover_the_tokens_in_order_and_share_one(bundled, texts):
    tokenizer = bundled[1]
    ids = tokenizer.encode(texts["verse"]).ids
    windows = token_windows(texts["verse"], tokenizer, 50, "verse")
    assert len(windows) == (len(ids) - 1) // 50
    np.testing.assert_array_equal(windows[:, 1:].reshape(-1), ids[1 : 1 + windows[:, 1:].size])
    np.testing.assert_array_equal(windows[1:, 0], windows[:-1, -1])
    assert len(token_windows(texts["verse"], tokenizer, 50, "verse", 3)) == 3


def test_too_few_tokens_for_a_window_is_named(bundled):
    with pytest.raises(ValueError, match=r"note: 1 tokens, fewer than one window of 51"):
        token_windows("a", bundled[1], 50, "note")


class Counted:
    """A tokenizer that counts the characters which it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.characters = tokenizer, 0

    def encode(self, text, **options):
        self.characters += len(text)
        return self.tokenizer.encode(text, **options)


def test_no_more_of_a_text_is_tokenized_than_its_windows_need(bundled, texts):
    text = texts["verse"] + texts["code"] + texts["sums"]
    text *= 8_000_000 // len(text)
    counted = Counted(bundled[1])
    windows = token_windows(text, counted, 256, "a", 4)
    needed = len(bundled[1].decode(windows[:, 1:].reshape(-1).tolist()))
    assert windows.shape == (4, 257) and counted.characters < 6 * needed + 2000
    token_windows(text[:100_000], counted, 256, "a")  # without a limit all of it
    assert counted.characters > 100_000


def trained(kind, text, pre=None, normalizer=None, **options):
    """A tokenizer of 400 tokens of that kind of model, trained on the text's lines."""
    tokenizer = tokenizers.Tokenizer(getattr(tokenizers.models, kind)(**options))
    if pre:
        tokenizer.pre_tokenizer = pre
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = getattr(tokenizers.trainers, f"{kind}Trainer".replace("BPE", "Bpe"))
    special = ["[UNK]", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        text.split("\n"), trainer(vocab_size=400, show_progress=False, special_tokens=special)
    )
    return tokenizer


def with_ends(text):
    tokenizer = trained("BPE", text, pre.ByteLevel())
    ends = tokenizers.processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 1), ("</s>", 2)])
    tokenizer.post_processor = ends
    return tokenizer


def of_one_word(text):
    """All of a text is one word, which is too long for its model."""
    tokenizer = trained("WordPiece", text, pre.Whitespace(), unk_token="[UNK]")
    tokenizer.pre_tokenizer = pre.Split("\x00", "removed")
    return tokenizer


def likely_pieces(text):
    pieces = {text[i : i + n].replace(" ", "\u2581"): -n / 3 for i in range(0, 500, 7) for n in (1, 2, 4, 6)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram([("[UNK]", 0.0), *pieces.items()], 0))
    tokenizer.pre_tokenizer = pre.Metaspace()
    return tokenizer


pre = tokenizers.pre_tokenizers
SPACES = tokenizers.normalizers.Sequence(
    [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
)
KINDS = {
    "bytes": lambda text: trained("BPE", text, pre.ByteLevel()),
    "bytes and ends": with_ends,
    "metaspace": likely_pieces,
    "no words": lambda text: trained("BPE", text, None, SPACES),
    "a word each": lambda text: trained("WordLevel", text, pre.WhitespaceSplit(), unk_token="[UNK]"),
    "a line each": lambda text: trained("BPE", text, pre.Split("\n", "isolated")),
    "one word": of_one_word,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_ids_are_those_of_the_whole_text(kind, texts):
    tokenizer = KINDS[kind](texts["verse"][:20_000])
    draw = random.Random(0)
    word = "".join(draw.choices("abcdefgh", k=30_000))
    for text in (texts["verse"] * 5, texts["code"] * 5, word, "a" * 30_000, " " * 30_000, "漢字\n" * 10_000):
        whole = tokenizer.encode(text).ids
        for count in (1, 65, 1000, 5000):
            assert first_ids(text, tokenizer, count) == whole[:count], (kind, count, text[:10])


def test_where_later_text_changes_the_first_ids_the_whole_text_is_tokenized():
    class Fickle:
        """Ids that depend on the text's length; but for that a word is an id."""

        def encode(self, text, **_):
            return tokenizers_ids([len(text), *range(len(text) // 4)])

    text = "abc " * 10_000
    assert first_ids(text, Fickle(), 10) == [len(text), *range(9)]


def tokenizers_ids(ids):
    class Encoding:
        pass

    found = Encoding()
    found.ids = ids
    return found


def test_an_id_past_the_models_vocabulary_is_named(bundled, texts):
    with pytest.raises(ValueError, match=r"^verse has the token id \d+ \(of tokenizer.json\), outside .* of 61"):
        token_windows(texts["verse"], bundled[1], 50, "verse", 3, 61)
    assert len(token_windows(texts["verse"], bundled[1], 50, "verse", 3, 8192)) == 3


def test_a_text_that_the_tokenizer_fails_on_is_named(bundled):
    class Failing:
        def encode(self, text, **_):
            raise Exception("unk token not found")

    with pytest.raises(ValueError, match=r"^note: tokenizer\.json: it fails on a text: unk token not found"):
        token_windows("a", Failing(), 50, "note", 3)
