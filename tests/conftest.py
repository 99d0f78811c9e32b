"""Fixtures that several test files share. JAX runs on the CPU; no test needs a network or a GPU."""

from __future__ import annotations

import contextlib
import logging
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest


@pytest.fixture(scope="session")
def bundled():
    """The bundled model and its tokenizer."""
    from dynamo_jax.models.bundled import BUNDLED
    from dynamo_jax.models.huggingface import load_checkpoint, load_tokenizer

    return load_checkpoint(BUNDLED), load_tokenizer(BUNDLED)


@pytest.fixture(scope="session")
def texts():
    """Three clearly different kinds of text, made here: code, sums and verse."""
    code = "\n\n".join(
        f"def function_{i}(items, limit={i}):\n    total = 0\n    for item in items[:limit]:\n"
        f"        total += item.size * {i % 7}\n    return total if total > {i} else None"
        for i in range(120)
    )
    sums = "\n".join(
        f"Tom has {i} apples and buys {3 * i + 1} more. He has {i} + {3 * i + 1} = {4 * i + 1} apples."
        for i in range(200)
    )
    verse = "\n\n".join(
        f"And in the {i}th year of the king the people went up unto the city, and they said one to another: "
        "Behold, the river is risen, and the fields of our fathers lie under the water."
        for i in range(120)
    )
    return {"code": code, "sums": sums, "verse": verse}


class _Counter(logging.Handler):
    """Counts the compilations that JAX logs."""

    def __init__(self):
        super().__init__()
        self.compiled = 0

    def emit(self, record):
        self.compiled += record.getMessage().startswith("Compiling ")


@pytest.fixture
def compilations():
    """``with compilations() as count``: count.compiled is the number of programs that XLA compiled inside."""

    @contextlib.contextmanager
    def counting():
        handler = _Counter()
        logger = logging.getLogger("jax")
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        try:
            with jax.log_compiles():
                yield handler
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)

    return counting
