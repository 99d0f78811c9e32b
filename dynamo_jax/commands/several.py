"""One command that several processes run together (``--hosts``): the first one writes."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynamo_jax.progress import Progress
    from dynamo_jax.runtime.hosts import Hosts


@contextlib.contextmanager
def one_writes(words: str) -> Iterator[None]:
    """Become one of the processes that ``words`` means, none of them if it is empty; standard output is the first
    one's. What libraries write there by themselves, as Gloo does, goes to standard error."""
    if not words:
        yield
        return
    import jax

    from dynamo_jax.runtime.hosts import join_hosts

    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    try:
        join_hosts(words)
        with open(own, "w", closefd=False) if jax.process_index() == 0 else open(os.devnull, "w") as out:
            with contextlib.redirect_stdout(out):
                yield
    finally:
        os.dup2(own, 1)
        os.close(own)


@contextlib.contextmanager
def one_job(words: str) -> Iterator[tuple[Hosts, Progress]]:
    """As ``one_writes``, for a job that the processes share out: they end well together, or all with an error. The
    first one shows how far it is."""
    from dynamo_jax.commands.steps import progress_bar
    from dynamo_jax.progress import no_progress
    from dynamo_jax.runtime.hosts import ALONE, all_hosts

    with one_writes(words):
        hosts = all_hosts() if words else ALONE
        with hosts.together(), progress_bar() if hosts.first else contextlib.nullcontext(no_progress) as progress:
            yield hosts, progress
