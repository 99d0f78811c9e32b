"""What a model folder says about text: its chat template and its stop tokens.

Templates are Jinja programs from a file that is not trusted, so they run in Jinja's sandbox.
"""

from __future__ import annotations

import datetime
import json
from typing import Any

import jinja2
import jinja2.sandbox

Files = dict[str, bytes]  # small files of a model folder, by name


def _json(files: Files, name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        value = json.loads(files[name])
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name}: expected a JSON object")
    return value


def stop_tokens(files: Files) -> tuple[int, ...]:
    """The ids that end a text: of generation_config.json, or else of config.json."""
    found = _json(files, "generation_config.json").get("eos_token_id")
    if found is None:
        found = _json(files, "config.json").get("eos_token_id")
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list) else (found,)


def chat_template(files: Files) -> str | None:
    """The source of the template; of several named ones the default."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode()
    template = _json(files, "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default", next(iter(named.values()), None))
    return template


def chat_prompt(files: Files, message: str) -> str | None:
    """The text that asks the model to answer ``message``; None where the model has no chat template."""
    template = chat_template(files)
    if template is None:
        return None
    settings = _json(files, "tokenizer_config.json")
    special = {
        name: value["content"] if isinstance(value, dict) else value
        for name, value in settings.items()
        if name.endswith("_token") and value is not None
    }
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    messages = [{"role": "user", "content": message}]
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **special)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise ValueError(f"the chat template fails: {error}") from error


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
