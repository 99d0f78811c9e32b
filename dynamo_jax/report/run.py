"""How a result was made: versions, device, date, time, memory."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax


class Run(NamedTuple):
    """A run that made a result. command: as it was given; seconds: of each stage; out: where the model was saved;
    memory: what ``storage.facts.describe`` says of its bytes."""

    command: str
    seconds: dict[str, float]
    out: Path
    memory: dict[str, str]


def versions() -> dict[str, str]:
    """Of what decides the figures."""
    return {"dynamo_jax": metadata.version("dynamo_jax"), "jax": jax.__version__}


def run_facts(run: Run) -> dict[str, str]:
    """Facts on a run that is ending now."""
    total = sum(run.seconds.values())
    stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in run.seconds.items())
    now = datetime.datetime.now(datetime.UTC)
    with_python = versions() | {"Python": platform.python_version()}
    return {
        **run.memory,
        "versions": ", ".join(f"{name} {version}" for name, version in with_python.items()),
        "device": f"{device_words()}; {os.cpu_count()} CPU cores, {platform.system()} on {platform.machine()}",
        "date": f"{now:%Y-%m-%d %H:%M} UTC",
        "seed": "none, for nothing is drawn at random",
        "time": f"{total:.0f} s: {stages}",
        "peak memory of the process": peak_memory(),
    }


def device_words() -> str:
    devices = jax.devices()
    kind = devices[0].device_kind
    return kind if len(devices) == 1 else f"{len(devices)} x {kind}"


def peak_memory() -> str:
    """Of this process so far, as the operating system counts it."""
    try:
        import resource
    except ImportError:  # not on Windows
        return "not known on this system"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB"
