"""What tests of commands share: files of text, the command line as a call, a model that it quantized."""

from __future__ import annotations

import json
import sys

import pytest
from quantized_runs import FAST

from dynamo_jax.commands import app as cli


@pytest.fixture(scope="session")
def files(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    lines = [json.dumps({"text": part}) for part in texts["verse"].split("\n\n")]
    (folder / "verse.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the command line; returns (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["dynamo-jax", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture(scope="session")
def folder(files, shallow_folder, tmp_path_factory):
    """A model that the quantize command wrote."""
    out = tmp_path_factory.mktemp("models") / "quantized"
    known = ("--known", f"code={files / 'code.txt'}", "--known", f"sums={files / 'sums.txt'}")
    arguments = ["quantize", "--model", str(shallow_folder), *known, "--bits", "3.0", "--out", str(out), *FAST]
    cli.app([*arguments, "--quantizer", "rtn"], standalone_mode=False)
    return out
