"""Tokenizers from files: whole texts whatever the file asks for, and what goes wrong is an error that names it."""

from __future__ import annotations

import json

import pytest
import tokenizers

from dynamo_jax.models.bundled import BUNDLED
from dynamo_jax.models.tokenizer import check_ids, decode, encode, load_tokenizer, tokenizer_from, whole_characters

TEXT = "Once upon a time there was a small model. " * 30


def bundled():
    return tokenizers.Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))


def truncated(tokenizer):
    tokenizer.enable_truncation(16)


def padded(tokenizer):
    tokenizer.enable_padding(length=2000)


def padded_on_the_left(tokenizer):
    tokenizer.enable_padding(direction="left", length=2000)


@pytest.mark.parametrize("change", [truncated, padded, padded_on_the_left])
def test_truncation_and_padding_of_the_file_are_switched_off(change, tmp_path):
    tokenizer = bundled()
    want = tokenizer.encode(TEXT).ids
    change(tokenizer)
    assert tokenizer.encode(TEXT).ids != want
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert encode(load_tokenizer(tmp_path), TEXT) == want
    assert encode(tokenizer_from((tmp_path / "tokenizer.json").read_bytes(), "x"), TEXT) == want


def changed(**values):
    return json.dumps(json.loads((BUNDLED / "tokenizer.json").read_text()) | values).encode()


DAMAGES = {
    "no tokenizer": b'{"model": 1}',
    "not JSON": b"{",
    "a pointer of git": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "empty": b"",
    "not UTF-8": b"\xff\xfe",
    "deep": b"[" * 100_000,
    "a panic": changed(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
}

model = json.loads((BUNDLED / "tokenizer.json").read_text())["model"]
DAMAGES["a merge without its prefix"] = changed(model=model | {"continuing_subword_prefix": "x"})  # aborts the process


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_tokenizer_is_an_error_that_names_the_file(case, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(DAMAGES[case])
    with pytest.raises(ValueError, match=r"tokenizer\.json: (not |a git-lfs pointer)") as caught:
        load_tokenizer(tmp_path)
    assert len(str(caught.value)) < 1000


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json: no such file"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_fails_on_a_text_is_named():
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}
    tokenizer = tokenizer_from(changed(model=words, added_tokens=[], pre_tokenizer=None, decoder=None), "x")
    assert encode(tokenizer, "a") == [0]
    with pytest.raises(ValueError, match=r"tokenizer\.json: it fails on a text"):
        encode(tokenizer, "c")
    with pytest.raises(ValueError, match=r"tokenizer\.json: it fails on token ids"):
        decode(tokenizer, [-1])


def test_interrupts_are_no_panics():
    class Interrupted:
        def encode(self, *_, **__):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(Interrupted(), "a")


def test_halves_of_characters_are_replaced():
    assert whole_characters("cut \ud83d end") == "cut \ufffd end"
    assert whole_characters("caf\udce9") == "caf\ufffd"
    assert whole_characters("\ud83d\ude00") == "\U0001f600" and whole_characters("zwölf 🙂") == "zwölf 🙂"
    assert encode(bundled(), "a\ud800b") == encode(bundled(), "a\ufffdb")


def test_only_ids_that_a_text_has_must_be_the_models():
    """A fine-tuned folder may know an added token past the embeddings."""
    tokenizer = bundled()
    tokenizer.add_tokens(["<pad>"])
    check_ids(encode(tokenizer, TEXT), 8192, "a")
    with pytest.raises(ValueError, match=r"a has the token id 8192 \(of tokenizer.json\), outside .* of 8192"):
        check_ids(encode(tokenizer, "x <pad>"), 8192, "a")
    with pytest.raises(ValueError, match="token id -1"):
        check_ids([3, -1], 8192, "a")
