"""The commands that README and docs show are commands that there are, with options that they have."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from dynamo_jax.commands.app import app

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def shown(page: Path) -> list[list[str]]:
    """The command lines of a page's shell blocks and of its text between backquotes."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").split("\n")]
    lines += [" ".join(words.split()) for words in re.findall(r"`(dynamo-jax [^`]*)`", prose)]
    commands = []
    for line in lines:
        if "dynamo-jax " in line and not line.lstrip().startswith("#"):
            try:
                commands.append(shlex.split(line[line.index("dynamo-jax ") :], comments=True))
            except ValueError:  # a quotation that goes on on the next line
                continue
    return commands


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_options_exist(page):
    for words in shown(page):
        if len(words) < 2 or words[1] in ("COMMAND", "lm-eval") or words[1].startswith("-"):
            continue
        assert words[1] in COMMANDS, f"{page.name}: {' '.join(words)}"
        parameters = COMMANDS[words[1]].params
        known = {"--help", *(option for p in parameters for option in (*p.opts, *p.secondary_opts))}
        used = {word.split("=")[0] for word in words[2:] if word.startswith("--")}
        assert used <= known, f"{page.name}: {' '.join(words)} has no {', '.join(sorted(used - known))}"


def test_the_reader_finds_commands():
    assert sum(len(shown(page)) for page in PAGES) > 20
