"""The OpenAI server of sglang-jax for one quantized model, as a program of its own.

    python -m dynamo_jax.engines.sglang_server quantized --variant quantized-2.5 -- --port 30000

Behind ``--`` are options of the engine. It starts its scheduler as a new process, which imports this program again
under another name (``__mp_main__``) and has the same arguments: so the model is registered at the top.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from dynamo_jax.engines.variants import Variants, variants_of


def parsed(arguments: list[str]) -> tuple[Variants, dict[str, Any], list[str]]:
    """The variants that arguments of this program name, how the adapted one is made, and what is the engine's.
    ValueError: no quantized model."""
    own, theirs = arguments, []
    if "--" in arguments:
        own, theirs = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    parser = argparse.ArgumentParser(prog="python -m dynamo_jax.engines.sglang_server")
    parser.add_argument("folder")
    parser.add_argument("--variant", action="append", default=[])
    parser.add_argument("--no-adapt", action="store_true")
    parser.add_argument("--no-monitor", action="store_true")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--reads", type=float, default=1.0)
    given = parser.parse_args(own)
    limits = {"batch": given.batch, "reads": given.reads}
    return variants_of(given.folder, given.variant, not given.no_adapt, not given.no_monitor), limits, theirs


if __name__ in ("__main__", "__mp_main__"):
    from dynamo_jax.engines import sglang

    served, limits, options = parsed(sys.argv[1:])
    sglang.register(served, **limits)
    if __name__ == "__main__":
        try:
            sglang.launch(served, options)
        except ValueError as error:
            print(f"dynamo-jax: error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
