"""``python killed.py FUNCTION N ..``: the command line, killed (SIGKILL) when FUNCTION is called for the Nth time.

FUNCTION is "sync" (a file is written, and has not got its name yet), or "replace" (a file gets its name).
"""

import os
import signal
import sys
from pathlib import Path

function, number = sys.argv[1], int(sys.argv[2])
sys.argv = ["dynamo-jax", *sys.argv[3:]]

from dynamo_jax import files  # noqa: E402
from dynamo_jax.commands.app import main  # noqa: E402

calls = 0


def counted(original):
    def wrapper(*args, **options):
        global calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)

    return wrapper


if function == "sync":
    files.sync = counted(files.sync)
else:
    Path.replace = counted(Path.replace)
main()
