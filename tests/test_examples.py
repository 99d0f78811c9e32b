"""The examples run, and what they print of the method holds."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

from dynamo_jax.storage import checkpoint

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def printed_by(name: str, *arguments: object) -> str:
    """What an example prints; it has to end well."""
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(quantized, tmp_path_factory):
    """A small model that quantize wrote; code and sums are known."""
    path = tmp_path_factory.mktemp("quantized") / "model"
    checkpoint.save(path, quantized)
    return path


@pytest.fixture(scope="module")
def files(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("texts")
    for name, text in texts.items():
        (path / name).write_text(text, encoding="utf-8")
    return path


@pytest.mark.slow
def test_own_text(narrow_folder, files):
    given = ["--known", f"code={files / 'code'}", "--novel", f"verse={files / 'verse'}"]
    said = printed_by("own_text.py", "--model", narrow_folder, *given, "--windows", 2, "--limit", 2)
    assert re.search(r"verse +reference +16.000 bits", said) and re.search(r"verse +auto +[0-9.]+ bits", said)
    assert re.search(r"verse: (novel|like code) to the monitor", said)


def test_own_step_is_compiled_once_whatever_is_switched(folder, files):
    said = printed_by("own_step.py", "--model", folder, "--texts", files / "code", files / "verse")
    assert "the step was compiled 1 time(s)" in said and "at variants [0 0]" in said


@pytest.mark.slow
def test_serve(folder):
    said = printed_by("serve.py", "--model", folder, "--prompt", "def f(", "--prompt", "1 +", "--max-tokens", 4)
    assert said.startswith("> def f(") and "variant in use: 0" in said


@pytest.mark.slow
def test_tasks(folder, shallow_folder):
    assert re.search(r"mine: rtn2 +[0-9.]+% of 4 documents  [-+][0-9.]+% to bf16", printed_by("tasks.py"))
    said = printed_by("tasks.py", "--model", folder, "--reference", shallow_folder)
    assert "mine: auto" in said and "the run time switched 0 time(s)" in said


@pytest.mark.slow
def test_pod(folder):
    said = printed_by("pod.py", "--model", folder, "--emulate", 4, "--mesh", "1x4", "--max-tokens", 2)
    assert said.startswith("4 devices: experts in 4 parts, their blocks in 1")


@pytest.mark.slow
def test_a_model_of_ones_own_from_training_to_files():
    command = [sys.executable, str(EXAMPLES / "own_nnx_model.py"), "--steps", "20"]
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
