"""Damaged tokenizers, templates, texts and settings of generation: a right result, or a ValueError that names the file.

As in ``judge.py``, but an error here names a file and not its folder: what is tried has contents, not paths.
"""

from __future__ import annotations

import copy
import json
import os
import random

import pytest
import tokenizers
from fuzz.judge import LONGEST, SCALE, SECONDS, SEED, TooLong, said, time_limit

from dynamo_jax.generation import prompt_tokens
from dynamo_jax.models import chat, template
from dynamo_jax.models.tokenizer import decode, load_tokenizer
from dynamo_jax.texts.reading import digest, read_text
from dynamo_jax.texts.windows import token_windows

DEEP = "[" * 100_000
ODD = (
    *(None, True, False, 0, -1, 1, 3.5, 1e300, 10**20, 2**31, 2**32, 2**63, float("nan"), float("inf"), "", "x"),
    *("\ud800", "é" * 50, "a" * 10_000, [], [1], [[1]], ["x"], [None], {}, {"a": 1}, {"content": 1}, {"content": "x"}),
)


def fault(call, names):
    """What is wrong with a call's end, or nothing. names: of files, of which an error has one."""
    try:
        with time_limit(SECONDS):
            call()
    except TooLong:
        return f"no end after {SECONDS:g} s"
    except ValueError as error:
        message = str(error)
        if isinstance(error, UnicodeError):
            return f"{type(error).__name__}: {message[:200]}"
        if not any(name in message for name in names):
            return f"names no file: {message[:200]}"
        return f"{len(message)} characters: {message[:200]}" if len(message) > LONGEST else ""
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def judge(kind, number, make):
    """``make(draw)`` gives a name, a call, and names of files, for each of ``number`` cases."""
    wrong: list[str] = []
    for case in range(round(number * SCALE)):
        name, call, names = make(random.Random(f"{SEED} {kind} {case}"))
        if found := fault(call, names):
            wrong.append(f"{case} {name[:200]!a}: {found!a}")
    said(round(number * SCALE), kind)
    assert not wrong, f"seed {SEED}: {len(wrong)} of {round(number * SCALE)} {kind}\n" + "\n".join(wrong[:30])


def places(value, path=()):
    """Paths to everything in a JSON value, the largest lists and dictionaries by some of their members alone."""
    yield path
    if isinstance(value, dict):
        for key in list(value)[:12]:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(min(len(value), 4)):
            yield from places(value[index], (*path, index))


def changed_json(draw, value):
    """A name and a JSON text: the value with one or two of its parts replaced, left out, doubled or renamed."""
    value, names = copy.deepcopy(value), []
    for _ in range(draw.choice((1, 1, 2))):
        path = draw.choice([p for p in places(value) if p])
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        how = draw.choice(("odd", "odd", "odd", "without", "other"))
        if how == "without":
            del parent[path[-1]]
        else:
            inside = [p for p in places(value) if p]
            other = value
            for key in draw.choice(inside):
                other = other[key]
            parent[path[-1]] = copy.deepcopy(draw.choice(ODD) if how == "odd" else other)
        names.append(f"{path} {how}")
        if not isinstance(value, dict) or not value:
            break
    return "; ".join(names), json.dumps(value)


def changed_bytes(draw, content):
    """A name and bytes: some flipped, cut off, repeated or put in."""
    data = bytearray(content)
    how = draw.choice(("flip", "flip", "cut", "drop", "put", "repeat", "odd"))
    place = draw.randrange(len(data)) if data else 0
    if how == "flip":
        for _ in range(draw.choice((1, 1, 5))):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif how == "cut":
        del data[place:]
    elif how == "drop":
        del data[place : place + draw.randrange(1, 9)]
    elif how == "put":
        data[place:place] = draw.randbytes(draw.randrange(1, 9))
    elif how == "repeat":
        data[place:place] = data[place : place + 50] * draw.randrange(1, 20)
    else:
        data = bytearray(
            draw.choice((b"", b"\0", DEEP.encode(), b"{" * 1000, b"9" * 5000, b"\xff\xfe", b"null", b'"x"'))
        )
    return f"{how} at {place}", bytes(data)


TEXT = "Once upon a time, in 1984, there was a small model; it said: <pad> w1 w2 émigré 漢字 🙂!\n" * 20


def tokenizer_json(kind):
    """A small tokenizer with all the parts that a file may have."""
    pre, processors = tokenizers.pre_tokenizers, tokenizers.processors
    if kind == "bytes":
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = pre.Sequence([pre.Digits(), pre.ByteLevel(add_prefix_space=False)])
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        letters = pre.ByteLevel.alphabet()
        asked = tokenizers.trainers.BpeTrainer(vocab_size=300, show_progress=False, initial_alphabet=letters)
        tokenizer.train_from_iterator([TEXT], asked)
    else:
        words = {word: i for i, word in enumerate(["[UNK]", "<s>", "</s>", *sorted(set(TEXT.lower().split()))])}
        model = tokenizers.models.WordLevel if kind == "words" else tokenizers.models.WordPiece
        tokenizer = tokenizers.Tokenizer(model(words, unk_token="[UNK]"))
        tokenizer.normalizer = tokenizers.normalizers.Sequence(
            [
                tokenizers.normalizers.Lowercase(),
                tokenizers.normalizers.NFC(),
                tokenizers.normalizers.Replace("``", '"'),
            ]
        )
        tokenizer.pre_tokenizer = pre.WhitespaceSplit() if kind == "words" else pre.BertPreTokenizer()
        tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.add_special_tokens(["<pad>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    tokenizer.enable_truncation(64)
    tokenizer.enable_padding(length=128)
    return tokenizer.to_str().encode()


@pytest.fixture(scope="module")
def no_backtraces():
    """The library's panics write to standard error, with a stack where the environment asks for it."""
    before = os.environ.get("RUST_BACKTRACE")
    os.environ["RUST_BACKTRACE"] = "0"
    yield
    os.environ.pop("RUST_BACKTRACE")
    os.environ |= {"RUST_BACKTRACE": before} if before is not None else {}


@pytest.mark.parametrize("kind", ["bytes", "words", "pieces"])
def test_tokenizers(kind, tmp_path, no_backtraces):
    content = tokenizer_json(kind)
    good, path = json.loads(content), tmp_path / "tokenizer.json"

    def make(draw):
        name, damaged = changed_json(draw, good) if draw.random() < 0.6 else changed_bytes(draw, content)
        limit = draw.choice((None, 2))

        def call():
            path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
            tokenizer = load_tokenizer(tmp_path)
            try:
                windows = token_windows(TEXT, tokenizer, 16, "a", limit, 1000)
            except ValueError as error:
                if "fewer than one window" in str(error):  # a tokenizer may know none of a text's words
                    return
                raise
            assert windows.shape[1] == 17 and 0 <= windows.min() <= windows.max() < 1000
            decode(tokenizer, windows[0].tolist())
            assert limit is None or (windows == token_windows(TEXT, tokenizer, 16, "a")[:limit]).all()

        return name, call, ["tokenizer.json"]

    judge(f"tokenizers of {kind}", 200, make)


PIECES = (
    *(
        "{{ messages[0].content }}",
        "{{ messages[0]['role'] }}",
        "{{ bos_token }}",
        "{% for m in messages %}",
        "{% if x %}",
    ),
    *(
        "{% endfor %}",
        "{% endif %}",
        "{% else %}",
        "{% set x = 3 %}",
        "{{ x }}",
        "{{ 1 / 0 }}",
        "{{ x.y.z }}",
        "{{",
        "%}",
    ),
    *("{{ messages | tojson }}", "{{ raise_exception('no') }}", "{{ ''.__class__ }}", "{% generation %}", "text ö\n"),
    *("{% endgeneration %}", "{{ tools }}", "{{ range(10) | list }}", "{{ range(10**9) | list }}", "{% break %}"),
    *("{{ x | nothing }}", "{{ 'a' * 1000 }}", "{{ none + 1 }}", "{{ messages.append(1) }}", "{% macro f(y) %}"),
    *(
        "{% endmacro %}",
        "{{ f(1) }}",
        "{% set n = namespace(a=1) %}",
        "{% set n.a = n.a + 1 %}",
        "{{ n.a }}",
        "{#",
        "#}",
    ),
    *("{{ strftime_now('%Y') }}", "{{ strftime_now(3) }}", "{{ cycler(1) }}", "{{ lipsum() }}", "{% include 'x' %}"),
    *("{{ messages[9] }}", "{{ {}['a'] }}", "{{ [1][5] }}", "{{ 'x'.format(1) }}", "{{ '{0.__class__}'.format(1) }}"),
    *(
        "{% extends 'x' %}",
        "{% import 'x' as y %}",
        "{% raw %}",
        "{% endraw %}",
        "{{ 5 | int('x') }}",
        "{{ -messages }}",
    ),
)
CHATML = (
    "{%- if tools is not none %}{{ tools | tojson(indent=2) }}{% endif %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}{{ bos_token }}<|im_start|>system"
    "\nBe kind.<|im_end|>\n{% endif %}"
    "{% generation %}{{ '<|im_start|>' + message.role + '\n' + message.content | trim + '<|im_end|>\n' }}"
    "{% endgeneration %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_templates_put_together_at_random(monkeypatch):
    monkeypatch.setattr(template, "run", template.rendered)

    def make(draw):
        source = "".join(draw.choices(PIECES, k=draw.randrange(1, 8)))
        files = {"chat_template.jinja": source.encode()}
        return source, lambda: chat.chat_prompts(files, ["hi", ""]), ["chat_template.jinja"]

    judge("templates", 250, make)


def test_templates_with_damage(monkeypatch):
    monkeypatch.setattr(template, "run", template.rendered)

    def make(draw):
        name, damaged = changed_bytes(draw, CHATML.encode())
        files = {"chat_template.jinja": damaged}
        return name, lambda: chat.chat_prompts(files, ["hi ö", "\ufffd"]), ["chat_template.jinja"]

    judge("damaged templates", 150, make)


def test_templates_in_their_own_process(monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 1)
    hard = (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ ('%9000000000d' % 5) }}",
        "{{ raise_exception('a' * 10**8) }}",
        "{% set n = namespace(x=[1]) %}{% for i in range(64) %}{% set n.x = n.x + n.x %}{% endfor %}",
    )

    def make(draw):
        source = draw.choice(hard) if draw.random() < 0.4 else "".join(draw.choices(PIECES, k=4))
        files = {"chat_template.jinja": source.encode()}
        return source, lambda: chat.chat_prompts(files, ["hi"]), ["chat_template.jinja"]

    judge("templates in a process", 10, make)


def test_texts(tmp_path):
    lines = [json.dumps({"text": part, "id": 3}) for part in TEXT.split("\n")[:5]]
    contents = {
        "a.txt": TEXT.encode(),
        "a.md": b"[1] A note\n" + TEXT.encode(),
        "a.jsonl": "\n".join(lines).encode(),
        "a.JSONL": "\r\n".join(lines).encode(),
        "a.json": f"[{','.join(lines)}]".encode(),
        "b.json": "\n".join(lines).encode(),
        "b.txt": "\n".join(lines).encode(),
        "surrogates.jsonl": b'{"text": "cut \\ud83d and \\ude00 or \\ud83d\\ude00"}\n' * 5,
    }

    def make(draw):
        file = draw.choice(list(contents))
        if file.endswith("json") and draw.random() < 0.5:
            value = [{"text": part, "n": [1, None]} for part in ("one", "two")]
            name, damaged = changed_json(draw, value)
            damaged = damaged.encode()
        else:
            name, damaged = changed_bytes(draw, contents[file])

        def call():
            (tmp_path / file).write_bytes(damaged)
            text = read_text(tmp_path / file)
            assert text.strip() and digest(text) and text.encode()

        return f"{file} {name}", call, [str(tmp_path / file)]

    judge("texts", 300, make)


SETTINGS = {
    "generation_config.json": {"eos_token_id": [2, 3], "bos_token_id": 1, "temperature": 0.6, "do_sample": True},
    "config.json": {"eos_token_id": 2, "model_type": "olmoe"},
    "tokenizer_config.json": {
        "bos_token": {"content": "<s>", "lstrip": False},
        "eos_token": "</s>",
        "add_bos_token": True,
        "pad_token": None,
        "chat_template": [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "x"}],
    },
}


def test_settings_of_generation(monkeypatch, tokenizer_file, no_backtraces):
    monkeypatch.setattr(template, "run", template.rendered)
    tokenizer = load_tokenizer(tokenizer_file.parent)

    def make(draw):
        files = {name: json.dumps(value).encode() for name, value in SETTINGS.items()}
        if draw.random() < 0.3:
            del files["generation_config.json"]
        file = draw.choice(list(files))
        if draw.random() < 0.7:
            name, damaged = changed_json(draw, SETTINGS[file])
            files[file] = damaged.encode()
        else:
            name, files[file] = changed_bytes(draw, files[file])

        def call():
            stops = chat.stop_tokens(files)
            assert all(type(i) is int and 0 <= i < 2**31 for i in stops)
            assert all(isinstance(i, int) for i in prompt_tokens(tokenizer, files, "w1 w2", chat=True))

        return f"{file} {name}", call, [file, "tokenizer_config.json"]

    judge("settings", 300, make)
