"""Several processes, of one host or of several, that do one job together: how they join, and what they tell each other.

A failure of one process is an error on all of them. ``agreed`` is that rule for one step, ``Hosts`` for a whole job.

A message is a dictionary of arrays. Whatever its dtypes are, it travels as bytes, so that every process has the same
bits. Nothing here needs a file system that the hosts share.

Axes: n processes.
"""

from __future__ import annotations

from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

HEARTBEAT_S = 30  # without a word from a process, after which it counts as gone
WORDS = 400  # bytes of an error that other processes are told
TOGETHER = 2**27  # bytes that all processes have on their way at a time ..
LEAST = 2**12  # .. and the least that one of them sends
ALIGNED = 64  # bytes: where an array of a message begins
Item = TypeVar("Item")
Message = dict[str, np.ndarray]


def join_hosts(words: str) -> None:
    """Make this process one of several: "auto", where JAX finds the others by itself (TPU pods, Slurm, Open MPI), or
    "ADDRESS:PORT,COUNT,NUMBER". To be called before anything asks for a device. ValueError: other words."""
    if words == "auto":
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_S)
        return
    address, *numbers = words.split(",")
    if ":" not in address or len(numbers) != 2 or not all(n.isdecimal() for n in numbers):
        raise ValueError(f"hosts {words!r}: expected auto, or ADDRESS:PORT,COUNT,NUMBER")
    count, number = map(int, numbers)
    if not number < count:
        raise ValueError(f"hosts {words!r}: process {number} of {count}: they are counted from 0")
    jax.distributed.initialize(address, count, number, heartbeat_timeout_seconds=HEARTBEAT_S)


def first() -> bool:
    """Whether this is the process that writes, of all or alone."""
    return jax.process_index() == 0


def agreed(error: Exception | None, number: int = 0) -> list[int]:
    """The number that each process has, where none of them has an error. Else this process's own error, or a ValueError
    that names the process and says its error. All processes call it."""
    said = np.zeros(8 + WORDS, np.uint8)
    said[:8] = np.frombuffer(np.int64(number).tobytes(), np.uint8)
    if error is not None:
        words = (str(error) or type(error).__name__).encode()[:WORDS]
        said[8 : 8 + len(words)] = np.frombuffer(words, np.uint8)
    each = np.asarray(multihost_utils.process_allgather(said)).reshape(-1, 8 + WORDS)
    if error is not None:
        raise error
    for process, told in enumerate(each[:, 8:]):
        if told.any():
            raise ValueError(f"process {process}: {bytes(told).rstrip(bytes(1)).decode(errors='replace')}")
    return [int(np.frombuffer(row[:8].tobytes(), np.int64)[0]) for row in each]
