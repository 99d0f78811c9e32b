"""Compiled programs are kept between commands, and a cache that is damaged costs time alone."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
from dynamo_jax.commands.compiled import keep_compiled
keep_compiled()
import jax, jax.monitoring
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
print(float(jax.jit(lambda x: (x @ x.T).sum())(jax.numpy.ones((64, 64)))), len(hits))
"""


def run(cache, **changes):
    own = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_COMP", "JAX_PERS"))}
    own |= {"XDG_CACHE_HOME": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | changes
    ran = subprocess.run([sys.executable, "-c", PROGRAM], env=own, capture_output=True, text=True, check=True)
    value, hits = ran.stdout.split()
    assert float(value) == 64**3
    return int(hits), ran.stderr


def test_a_program_is_compiled_once_and_a_damaged_entry_is_made_anew_in_silence(tmp_path):
    def entries():
        return {path for path in (tmp_path / "dynamo_jax" / "compiled").rglob("*-cache")}

    assert run(tmp_path) == (0, "")
    first = entries()
    assert first and run(tmp_path)[0] == len(first)
    for path in first:
        path.write_bytes(path.read_bytes()[:100])
    assert run(tmp_path)[1] == ""
    assert run(tmp_path)[0] == len(entries()) > 0


def test_what_keeps_none_or_keeps_them_elsewhere(tmp_path):
    assert run(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false") == run(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")
    assert not list((tmp_path / "dynamo_jax").rglob("*-cache"))
    run(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "other"))
    assert list((tmp_path / "other").iterdir()) and not list((tmp_path / "dynamo_jax").rglob("*-cache"))
    (tmp_path / "file").write_text("in the way")
    assert run(tmp_path / "file") == (0, "")
