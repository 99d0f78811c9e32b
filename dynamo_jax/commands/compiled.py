"""Compiled programs are kept from one command to the next: JAX's persistent cache, in the user's cache folder.

``JAX_ENABLE_COMPILATION_CACHE=false`` keeps none, ``JAX_COMPILATION_CACHE_DIR`` keeps them elsewhere.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import warnings
from pathlib import Path
from typing import Any

from dynamo_jax.files import cache_folder

UNREADABLE = "Error reading persistent compilation cache entry"
LEAST_SECONDS = "0.1"  # of compiling, from which on a program is kept


def keep_compiled() -> None:
    """Have JAX keep compiled programs; to be called before it is imported. Where no folder can be made, none is kept.

    Programs for a CPU go by its kind, since those for another one crash. A damaged entry, as of a process that was
    killed, costs a compilation, after which the cache begins anew.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        folder = cache_folder("compiled") / _machine()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError):
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", LEAST_SECONDS)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    shown = warnings.showwarning

    def show(message: Any, *where: Any, **more: Any) -> None:
        if str(message).startswith(UNREADABLE):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
        else:
            shown(message, *where, **more)

    warnings.showwarning = show


def _machine() -> str:
    """A name for this kind of CPU."""
    said = [platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        said += sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    except OSError:  # not on Linux
        pass
    return hashlib.sha256("\n".join(said).encode()).hexdigest()[:16]
