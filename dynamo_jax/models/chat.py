"""What a model folder says about text: its chat template and its stop tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from dynamo_jax.models import template

Files = dict[str, bytes]  # small files of a model folder, by name
TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # tokens that a tokenizer_config.json may name
LARGEST_ID = 2**31 - 1


class Template(NamedTuple):
    """A template's source, and the file that it is from."""

    source: str
    file: str


def _json(files: Files, name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        value = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name}: expected a JSON object")
    return value


def stop_tokens(files: Files) -> tuple[int, ...]:
    """The ids that end a text: of generation_config.json, or else of config.json.

    ValueError, which names file and key: something else than an id or a list of ids.
    """
    return _ids(files, "eos_token_id")


def prefix_token(files: Files) -> int | None:
    """The id that stands before a text that nothing else stands before: ``bos_token_id``, or else the first that ends a
    text; None where there is neither. ValueError: as of ``stop_tokens``."""
    return next(iter(_ids(files, "bos_token_id") or stop_tokens(files)), None)


def _ids(files: Files, key: str) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        found = _json(files, name).get(key)
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if not all(type(i) is int and 0 <= i <= LARGEST_ID for i in ids):
            raise ValueError(f"{name}: {key} is {_short(found)}, expected a token id or a list of them")
        return tuple(ids)
    return ()


def _short(value: Any) -> str:
    words = repr(value)
    return words if len(words) <= 100 else f"{words[:100]} .."


def chat_template(files: Files) -> Template | None:
    """The template; of several named ones the default. ValueError, which names the file: it is not one."""
    if TEMPLATE in files:
        try:
            return Template(files[TEMPLATE].decode(), TEMPLATE)
        except UnicodeDecodeError as error:
            raise ValueError(f"{TEMPLATE}: not UTF-8 at byte {error.start}") from error
    found = _json(files, TOKENIZER_CONFIG).get("chat_template")
    if isinstance(found, list):
        if not all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in found):
            raise ValueError(f"{TOKENIZER_CONFIG}: chat_template is a list of something else than names and templates")
        found = {entry["name"]: entry.get("template") for entry in found}
    if isinstance(found, dict):
        found = _chosen(found)
    if not (found is None or isinstance(found, str)):
        raise ValueError(f"{TOKENIZER_CONFIG}: chat_template is {_short(found)}, expected a text")
    return None if found is None else Template(found, TOKENIZER_CONFIG)


def _chosen(named: dict[str, Any]) -> Any:
    """The default, or the only one, of templates by name."""
    if not named:
        return None
    if "default" not in named and len(named) > 1:
        names = _short(", ".join(named))
        raise ValueError(f"{TOKENIZER_CONFIG}: chat_template has none that is called default, only {names}")
    return named.get("default", next(iter(named.values())))


def special_tokens(files: Files) -> dict[str, str]:
    """The tokens that a template may ask for, by name. ValueError, which names file and key: one that is no text."""
    tokens = {}
    for name, value in _json(files, TOKENIZER_CONFIG).items():
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and name.endswith("_token"):
            tokens[name] = text
        elif value is not None and name.removesuffix("_token") in SPECIAL and name.endswith("_token"):
            raise ValueError(f"{TOKENIZER_CONFIG}: {name} is {_short(value)}, expected a text or its content")
    return tokens


def chat_prompts(files: Files, chats: Sequence[str | template.Chat]) -> list[str] | None:
    """The texts that ask the model to answer each chat, or each message of a user; None where it has no template.

    ValueError, which names the file: it holds no template, or one that fails, does not end or takes too much memory.
    """
    found = chat_template(files)
    if found is None:
        return None
    special = special_tokens(files)
    try:
        return template.run(found.source, [[user(c)] if isinstance(c, str) else c for c in chats], special)
    except ValueError as error:
        raise ValueError(f"{found.file}: {error} (generate --raw leaves the template out)") from error


def user(message: str) -> dict[str, str]:
    """A message of a user."""
    return {"role": "user", "content": message}


def chat_text(files: Files, messages: template.Chat, answering: bool = True) -> str:
    """A whole chat in the model's template; answering: with the beginning of an answer, else up to the end of the last
    message, which the model is to go on with. The template has no limits of time and memory here.

    ValueError: the model has no template, or as of ``chat_prompts``, or one that does not show the last message.
    """
    found = chat_template(files)
    if found is None:
        raise ValueError("the model has no chat template")
    try:
        (text,) = template.rendered(found.source, [messages], special_tokens(files), answering)
    except ValueError as error:
        raise ValueError(f"{found.file}: {error}") from error
    if answering or not messages:
        return text
    last = messages[-1]["content"]
    place = text.rfind(last.strip())
    if place < 0:
        raise ValueError(f"{found.file}: the chat template does not show the last message as it is")
    whole = last.lstrip()
    return text[:place] + (whole if text.startswith(whole, place) else last.strip())


def chat_prompt(files: Files, message: str) -> str | None:
    """As ``chat_prompts``, of one message."""
    found = chat_prompts(files, [message])
    return None if found is None else found[0]
