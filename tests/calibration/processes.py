"""One of several processes that quantize a folder together: ``test_hosts.py`` starts them.

    python processes.py PORT COUNT NUMBER MARK ARGUMENT..     # the command line's arguments of quantize or analyze

MARK is "none", or "damaged:NAME": reading what is called so in the source fails on process 1.
"""

from __future__ import annotations

import sys

port, count, number, mark, *arguments = sys.argv[1:]
hosts = ["--hosts", f"localhost:{port},{count},{number}"] if int(count) > 1 else []
sys.argv = ["dynamo-jax", *arguments, *hosts]

import jax  # noqa: E402

from dynamo_jax.commands.app import script  # noqa: E402
from dynamo_jax.models.huggingface import Source  # noqa: E402
from dynamo_jax.runtime import hosts as module  # noqa: E402

jax.config.update("jax_disable_most_optimizations", True)
module.HEARTBEAT_S = 10
if mark == "damaged" and number == "1":
    original = Source.expert

    def expert(self, layer, expert):
        if (layer, expert) == (2, 3):
            raise ValueError("model.safetensors: holds NaN")
        return original(self, layer, expert)

    Source.expert = expert
script()
