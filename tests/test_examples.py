"""The examples run, and what they print of the method holds."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


@pytest.mark.slow
def test_a_model_of_ones_own_from_training_to_files():
    command = [sys.executable, str(EXAMPLES / "own_model.py"), "--steps", "20"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"blocks\.1\.experts: at 2 bits expert \d+ loses most", done.stdout)
    assert "saved and loaded without float experts: the same logits" in done.stdout


def test_the_tunix_example_says_what_to_install():
    command = [sys.executable, str(EXAMPLES / "tunix_qwen3.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    installed = "no module" not in done.stderr and "not installed" not in done.stderr
    assert installed or "tunix is not installed: see the docstring of this file" in done.stderr


def test_the_users_code_of_the_tunix_example_is_as_short_as_it_says():
    source = (EXAMPLES / "tunix_qwen3.py").read_text()
    (said, own) = re.search(
        r"# --- (\d+) lines from a model to an adapted step\n(.*?)\n    # ---\n", source, re.DOTALL
    ).groups()
    lines = [line for line in own.split("\n") if line.strip()]
    assert len(lines) == int(said) <= 25
