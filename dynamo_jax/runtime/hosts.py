"""Several processes, of one host or of several, that do one job together: how they join, and what they tell each other.

A failure of one process is an error on all of them. ``agreed`` is that rule for one step, ``Hosts`` for a whole job.

A message is a dictionary of arrays. Whatever its dtypes are, it travels as bytes, so that every process has the same
bits. Nothing here needs a file system that the hosts share.

Axes: n processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import UInt8

HEARTBEAT_S = 30  # without a word from a process, after which it counts as gone
WORDS = 400  # bytes of an error that other processes are told
TOGETHER = 2**27  # bytes that all processes have on their way at a time ..
LEAST = 2**12  # .. and the least that one of them sends
AHEAD = 8  # items that a process runs before it tells the others
ALIGNED = 64  # bytes: where an array of a message begins
Item = TypeVar("Item")
Message = dict[str, np.ndarray]


def join_hosts(words: str) -> None:
    """Make this process one of several: "auto", where JAX finds the others by itself (TPU pods, Slurm, Open MPI), or
    "ADDRESS:PORT,COUNT,NUMBER". To be called before anything asks for a device. SIGTERM ends the process as it does one
    alone, which JAX would have it ignore. ValueError: other words."""
    jax.config.update("jax_enable_preemption_service", False)
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


class ProcessGone(ConnectionError):
    """Another process does not answer any more."""


def _sent(send: Callable[[np.ndarray], Any], array: np.ndarray) -> np.ndarray:
    try:
        return np.asarray(send(array))
    except (RuntimeError, ValueError) as error:  # by backend
        raise ProcessGone(f"another process is gone: {str(error).splitlines()[0]}") from error


def agreed(error: Exception | None, number: int = 0) -> list[int]:
    """The number that each process has, where none of them has an error. Else this process's own error, or a ValueError
    that names the process and says its error, or ProcessGone. All processes call it."""
    said = np.zeros(8 + WORDS, np.uint8)
    said[:8] = np.frombuffer(np.int64(number).tobytes(), np.uint8)
    if error is not None:
        words = (str(error) or type(error).__name__).encode()[:WORDS]
        said[8 : 8 + len(words)] = np.frombuffer(words, np.uint8)
    each = _sent(multihost_utils.process_allgather, said).reshape(-1, 8 + WORDS)
    if error is not None:
        raise error
    for process, told in enumerate(each[:, 8:]):
        if told.any():
            raise ValueError(f"process {process}: {bytes(told).rstrip(bytes(1)).decode(errors='replace')}")
    return [int(np.frombuffer(row[:8].tobytes(), np.int64)[0]) for row in each]


class Hosts:
    """The processes that do one job together, ``count`` of them, and the number of this one. One alone sends nothing.

    All of them call the same methods in the same order. What a method sends begins with whether its process has failed,
    so that inside of ``together`` a process may fail anywhere: the others hear of it at their next call.
    """

    def __init__(self, count: int = 1, index: int = 0):
        self.count, self.index = count, index
        self._inside, self._over = 0, False

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.index == 0

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """All processes leave well, or all with an error: its own where one failed, a ValueError that names that one
        elsewhere, or ProcessGone."""
        self._inside += 1
        try:
            yield
            if self._inside == 1:
                self._agreed(0)
        except Exception as error:
            told = self._over or isinstance(error, ProcessGone)
            if self._inside == 1 and not told and self.count > 1:
                self._over = True
                with contextlib.suppress(Exception):  # this one's own error is raised below
                    agreed(error)
            raise
        finally:
            self._inside -= 1

    def shared(
        self, items: Sequence[Item], run: Callable[[Item], Message], *, keep: bool = True
    ) -> Iterator[tuple[Item, Message]]:
        """Each item with what ``run`` makes of it, in the order of the items, on every process; without ``keep`` on the
        first one alone, which others have nothing of. A process runs every n-th item, ``AHEAD`` of them before it waits
        for the others: what is compiled, and what has more rows than others, takes one of them longer each time."""
        ahead = 1 if self.count == 1 else AHEAD
        for begin in range(0, len(items), self.count * ahead):
            group = items[begin : begin + self.count * ahead]
            own = [run(item) for item in group[self.index :: self.count]]
            for start in range(0, len(group), self.count):
                some = group[start : start + self.count]
                found = self.exchange(own.pop(0) if self.index < len(some) else {})
                yield from zip(some, found if keep or self.first else [{}] * len(some))

    def exchange(self, message: Message) -> list[Message]:
        """The message of each process."""
        if self.count == 1:
            return [message]
        data = packed(message)
        sizes = self._agreed(len(data))
        longest = -(-max(sizes) // ALIGNED) * ALIGNED
        whole = np.empty((self.count, longest), np.uint8)
        for start, piece in self._pieces(data, longest):
            part = _sent(multihost_utils.process_allgather, piece)[:, : longest - start]
            whole[:, start : start + part.shape[1]] = part
        return [unpacked(row[:size]) for row, size in zip(whole, sizes)]

    def of_first(self, make: Callable[[], Message]) -> Message:
        """What ``make`` gives on the first process, where alone it is called, for all."""
        if self.count == 1:
            return make()
        data = packed(make()) if self.first else np.zeros(0, np.uint8)
        size = self._agreed(len(data))[0]
        whole = np.empty(size, np.uint8)
        for start, piece in self._pieces(data, size):
            part = _sent(multihost_utils.broadcast_one_to_all, piece)[: size - start]
            whole[start : start + len(part)] = part
        return unpacked(whole)

    def check_same(self, given: dict[str, str]) -> None:
        """ValueError, which names a process: it was not given what the first one was. given: by words for it."""
        digests = {name: hashlib.sha256(words.encode()).digest() for name, words in given.items()}
        each = self.exchange({name: np.frombuffer(found, np.uint8) for name, found in digests.items()})
        for process, found in enumerate(each):
            if wrong := [name for name in given if not np.array_equal(found[name], each[0][name])]:
                raise ValueError(f"process {process} was given other {' and '.join(wrong)} than process 0")

    def _pieces(self, data: UInt8[np.ndarray, " _"], size: int) -> Iterator[tuple[int, UInt8[np.ndarray, " _"]]]:
        """Of so many bytes, those that are sent at a time, and where they begin. Their lengths are powers of two: each
        length is a program."""
        step = max(LEAST, 2 ** ((TOGETHER // self.count).bit_length() - 1))
        for start in range(0, size, step):
            own = data[start : start + step]
            piece = np.zeros(max(LEAST, 2 ** (min(step, size - start) - 1).bit_length()), np.uint8)
            piece[: len(own)] = own
            yield start, piece

    def _agreed(self, number: int) -> list[int]:
        if self.count == 1:
            return [number]
        try:
            return agreed(None, number)
        except ValueError:
            self._over = True
            raise


ALONE = Hosts()


def all_hosts() -> Hosts:
    """All processes of ``jax.distributed``, or this one alone where it was not initialized: what ``quantize_folder``
    and ``analyze_folder`` take as ``hosts``. Source: docs/scale.md, "Calibrating over hosts"."""
    return Hosts(jax.process_count(), jax.process_index())


def packed(message: Message) -> UInt8[np.ndarray, " _"]:
    """The bytes of a message: the length of a JSON list, the list (name, dtype, shape, first byte), the arrays."""
    arrays = {name: np.ascontiguousarray(a) for name, a in message.items()}
    entries: list[tuple[str, str, tuple[int, ...], int]] = []
    end = 0
    for name, array in arrays.items():
        entries.append((name, array.dtype.name, np.shape(message[name]), end))
        end += -(-array.nbytes // ALIGNED) * ALIGNED
    words = json.dumps(entries).encode()
    begin = -(-(8 + len(words)) // ALIGNED) * ALIGNED
    out = np.zeros(begin + end, np.uint8)
    out[:8] = np.frombuffer(np.int64(len(words)).tobytes(), np.uint8)
    out[8 : 8 + len(words)] = np.frombuffer(words, np.uint8)
    for (*_, start), array in zip(entries, arrays.values()):
        out[begin + start : begin + start + array.nbytes] = array.reshape(-1).view(np.uint8)
    return out


def unpacked(data: UInt8[np.ndarray, " _"]) -> Message:
    """The message of these bytes, whose arrays lie in them."""
    length = int(data[:8].view(np.int64)[0])
    begin = -(-(8 + length) // ALIGNED) * ALIGNED
    message = {}
    for name, dtype, shape, start in json.loads(data[8 : 8 + length].tobytes()):
        kind = jnp.dtype(dtype)
        size = kind.itemsize * math.prod(shape)
        message[name] = data[begin + start : begin + start + size].view(kind).reshape(shape)
    return message
