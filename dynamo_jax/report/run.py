"""How a result was made: versions, device, date, time, memory."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import NamedTuple

import jax

from dynamo_jax.progress import Spent, peak_bytes


class Run(NamedTuple):
    """A run that made a result. command: as it was given; stages: what each took; memory: of a quantized model, what
    ``storage.facts.describe`` says of its bytes; next_steps: commands to go on with, by what they do."""

    command: str
    stages: Mapping[str, Spent]
    memory: Mapping[str, str] = {}
    next_steps: Mapping[str, str] = {}


def versions() -> dict[str, str]:
    """Of what decides the figures."""
    return {"dynamo_jax": metadata.version("dynamo_jax"), "jax": jax.__version__}


def run_facts(run: Run) -> dict[str, str]:
    """Facts on a run that is ending now."""
    now = datetime.datetime.now(datetime.UTC)
    with_python = versions() | {"Python": platform.python_version()}
    peak = peak_bytes()
    return {
        **run.memory,
        "versions": ", ".join(f"{name} {version}" for name, version in with_python.items()),
        "device": f"{device_words()}; {os.cpu_count()} CPU cores, {platform.system()} on {platform.machine()}",
        "date": f"{now:%Y-%m-%d %H:%M} UTC",
        "seed": "fixed: what is drawn is the same each time",
        "time": f"{sum(spent.seconds for spent in run.stages.values()):.0f} s",
        "peak memory of the process": "not known on this system" if peak is None else f"{peak / 1e9:.2f} GB",
    }


def device_words() -> str:
    devices = jax.devices()
    kind = devices[0].device_kind
    return kind if len(devices) == 1 else f"{len(devices)} x {kind}"
