"""Text in, settings in: what is read, and errors that name file, line and key."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re

import numpy as np
import pytest

from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.demo import DemoConfig
from dynamo_jax.evaluation.perplexity import EvalConfig
from dynamo_jax.files import write_json
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.settings import find_preset, load_toml
from dynamo_jax.texts.reading import read_text
from dynamo_jax.texts.windows import token_windows
from dynamo_jax.training import TrainConfig

ROOT = pathlib.Path(__file__).parent.parent.parent


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
    ],
)
def test_a_text_that_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_text(tmp_path / name)


def test_a_missing_text_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.txt: no such file"):
        read_text(tmp_path / "none.txt")


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


def test_a_failed_write_leaves_the_old_file_and_no_half_one(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_numbers_that_are_not_finite_are_null(tmp_path):
    write_json(tmp_path / "a.json", {"rows": [1.5, math.nan, (math.inf, "x")], "n": 3})
    assert json.loads((tmp_path / "a.json").read_text()) == {"rows": [1.5, None, [None, "x"]], "n": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[quantize]\nbit = 3", r"\[quantize\]: unknown key 'bit', did you mean 'bits'\?"),
        ("[quant]\nbits = 3", "unknown key 'quant', did you mean 'quantize'"),
        ("bits = ", "not a TOML file"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, text, message):
    (tmp_path / "demo.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_toml(DemoConfig, tmp_path / "demo.toml")


def test_missing_settings_are_named(tmp_path):
    (tmp_path / "train.toml").write_text("steps = 1")
    with pytest.raises(ValueError, match="missing key model, corpus"):
        load_toml(TrainConfig, tmp_path / "train.toml")


def test_the_demo_preset_is_the_demos_defaults():
    assert load_toml(DemoConfig, ROOT / "configs/demo.toml") == DemoConfig()


def test_the_training_preset_is_the_bundled_models(bundled):
    assert load_toml(TrainConfig, ROOT / "configs/train/tiny_moe.toml").model == bundled[0].config


def test_a_preset_is_found_by_its_short_name_and_a_file_by_its_path(tmp_path):
    assert load_toml(DemoConfig, find_preset("demo")) == DemoConfig()
    assert load_toml(TrainConfig, find_preset("tiny_moe", "train")).steps > 0
    (tmp_path / "own.toml").write_text("")
    assert find_preset(str(tmp_path / "own.toml")) == tmp_path / "own.toml"
    with pytest.raises(ValueError, match="dem: no such file, and no preset of that name; presets are demo"):
        find_preset("dem")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.toml")), ids=lambda p: p.name)
def test_a_presets_header_says_what_it_is_for(path):
    header = path.read_text().split("\n\n")[0]
    assert "# Purpose:" in header and "# Command: dynamo-jax" in header


@pytest.mark.parametrize("config", [TrainConfig, ModelConfig, QuantizeConfig, EvalConfig, DemoConfig])
def test_every_setting_is_read_somewhere(config):
    source = "\n".join(p.read_text() for p in (ROOT / "dynamo_jax").rglob("*.py"))
    unread = [f.name for f in dataclasses.fields(config) if not re.search(rf"\.{f.name}\b", source)]
    assert not unread
