"""What ``--help`` teaches: each command has an example whose options exist."""

from __future__ import annotations

import re
import shlex
import sys

import pytest
import typer.main
from typer.testing import CliRunner

from dynamo_jax.commands.app import app

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_an_example_with_options_that_there_are(name):
    command = COMMANDS[name]
    (example,) = re.findall(r"For example: (dynamo-jax [^\n(]*)", command.help)
    words = shlex.split(example)
    assert words[:2] == ["dynamo-jax", name]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    used = [word for word in words if word.startswith("--")]
    assert used and (name == "lm-eval" or set(used) <= known)
    required = {
        parameter.opts[0] for parameter in command.params if parameter.required and parameter.opts[0][:2] == "--"
    }
    assert required <= set(used)


def test_lm_eval_has_help_without_the_harness(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    shown = CliRunner().invoke(app, ["lm-eval", "--help"])
    assert shown.exit_code == 0
    assert "For example: dynamo-jax lm-eval" in shown.output and "pip install" in shown.output


def test_options_are_explained():
    for name, command in COMMANDS.items():
        for parameter in command.params:
            assert name == "lm-eval" or parameter.name == "help" or parameter.help, f"{name} {parameter.name}"
