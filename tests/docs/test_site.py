"""The site is built, as ``make docs`` builds it: a dead link or a page outside of the menu ends it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    first = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "<svg" in first and "drawings/way.svg" not in first  # drawn in the page, to follow its colours
    commands = (tmp_path / "site" / "reference" / "commands.html").read_text(encoding="utf-8")
    assert "quantize" in commands and "--dry-run" in commands
    assert "Read as a file" not in commands and "For example:" not in commands
    names = (tmp_path / "site" / "reference" / "package.html").read_text(encoding="utf-8")
    assert "dynamo_jax.Decoder.cached_states" in names and "Read as a file" not in names
