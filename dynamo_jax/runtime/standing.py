"""When a variant is adapted to text, when it serves, and when it is left: the rule, which knows no model.

A variant is adapted after ``FIRST`` tokens of novel text and anew after ``AGAIN`` times as many; it serves if it gains
on what was seen. Known text is tried as well, after ``TRIED`` tokens, and there the gain must be ``sure``, on text that
the plan was not made from. When a variant would have lost more than the baseline on the last ``RECENT`` tokens, by
where the router sent them, it is left and another is adapted to these; each time that happens, twice as many tokens are
waited for. One that reads more than it may on as many tokens that it served is adapted anew, and serves on until then.

Axes: L layers, E experts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dynamo_jax.precision.plan import touched_share

FIRST = 256  # tokens of novel text, before a variant is adapted to it
AGAIN = 4  # times more tokens of novel text, and the variant is adapted once more
MOST = 2048  # tokens that a variant is adapted to
TRIED = MOST  # tokens of known text, before a variant is adapted to it
SURE = 3.0  # standard errors of a gain that is beyond chance
RECENT = 1024  # tokens of which the router says whether the variant still suits them
OVER = 0.01  # share of bytes above the limit, from which on the variant is adapted anew


def sure(gains: Float[np.ndarray, " S"]) -> bool:
    """Whether the mean gain of S windows is more than ``SURE`` standard errors above zero; not of one window."""
    if len(gains) < 2:
        return False
    return bool(gains.mean() > SURE * gains.std(ddof=1) / math.sqrt(len(gains)))


def parts(windows: Int[np.ndarray, "S T1"], known: bool) -> tuple[Int[np.ndarray, "Z T1"], Int[np.ndarray, "Y T1"]]:
    """The windows that a plan is made from, and those that judge it: novel text, all both times; of known text the
    first half and the rest, since a plan gains a little on what it was made from, which is all that is to be gained
    where the baseline was made for the text."""
    half = -(-len(windows) // 2)
    return (windows[:half], windows[half:] if half < len(windows) else windows) if known else (windows, windows)


class Limit(NamedTuple):
    """Of what a step may read. variant: bytes of each expert there; allowed: at most, as many times the baseline's as a
    plan may read; batch: tokens of a step."""

    variant: Float[np.ndarray, "L E"]
    allowed: Float[np.ndarray, "L E"]
    batch: int

    def over(self, use: Float[np.ndarray, "L E"]) -> float:
        """Share by which a step reads more than it may, where a token has ``use`` rows at each expert."""
        touched = touched_share(use, self.batch)
        return float((touched * self.variant).sum() / (touched * self.allowed).sum() - 1)


@dataclasses.dataclass
class Standing:
    """Of one variant, on text that is looked at in pieces of ``piece`` tokens.

    known: whether the text is taken for known. serves: whether it was better than the baseline where that was last
    looked at. wanted: tokens of text that the next adaptation waits for; least: that those after a variant was left
    wait for at least; both begin with ``FIRST``, of known text with ``TRIED``. saves: nats a row at each expert by
    which it is expected to lose less than the baseline, None before there is one. saved: nats a token, by the router,
    in the last pieces. limit: of what the variant may read; rows: of a token at each expert, in the last pieces that it
    served.
    """

    piece: int
    known: bool = False
    serves: bool = False
    wanted: int = 0
    least: int = 0
    saves: Float[np.ndarray, "L E"] | None = None
    saved: list[float] = dataclasses.field(default_factory=list)
    limit: Limit | None = None
    rows: list[np.ndarray] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.least = self.least or (TRIED if self.known else FIRST)
        self.wanted = self.wanted or self.least

    def takes(self, gains: Float[np.ndarray, " S"]) -> bool:
        """Whether a plan that gains so much on S windows serves."""
        return sure(gains) if self.known else bool(gains.mean() > 0)

    def due(self, tokens: int) -> bool:
        """Whether so many tokens of text are enough to adapt to; then the next time takes more."""
        if tokens < self.wanted:
            return False
        while self.wanted <= tokens:
            self.wanted *= AGAIN
        return True

    def ends(self) -> None:
        """The variant has lost its pages: if it served, another is due as soon as there is text for it."""
        if self.serves:
            self.serves, self.wanted = False, self.least

    def told(self, counts: Float[np.ndarray, "*S L E"], tokens: Float[np.ndarray, "*S"]) -> Float[np.ndarray, "*S"]:
        """Nats a token that the variant saves where the router sent rows as it did."""
        return (counts * self.saves).sum(axis=(-2, -1)) / tokens

    def begins(
        self,
        serves: bool,
        saves: Float[np.ndarray, "L E"],
        counts: Float[np.ndarray, "S L E"],
        tokens: Float[np.ndarray, " S"],
        limit: Limit | None = None,
    ) -> None:
        """The variant is a new one; counts and tokens of the pieces that it was adapted to, the oldest first."""
        self.serves, self.saves, self.limit = serves, saves, limit
        self.saved = self.told(counts, tokens)[-RECENT // self.piece :].tolist()
        self.rows = []

    def overreads(
        self,
        counts: Float[np.ndarray, "S L E"],
        tokens: Float[np.ndarray, " S"],
        agree: Callable[[bool], bool] = bool,
    ) -> bool:
        """Whether the variant reads more than it may on the last ``RECENT`` tokens that it served, with the next pieces
        of the text; then another is due; it serves on until that one has come. agree: what one of several processes
        finds, to what all take."""
        if not self.serves or self.limit is None:
            return False
        self.rows = [*self.rows, *(counts / tokens[:, None, None])][-RECENT // self.piece :]
        enough = len(self.rows) >= RECENT // self.piece
        if not agree(enough and self.limit.over(np.mean(self.rows, axis=0)) > OVER):
            return False
        self.rows, self.wanted = [], min(self.wanted, RECENT)
        return True

    def leaves(
        self,
        counts: Float[np.ndarray, "S L E"],
        tokens: Float[np.ndarray, " S"],
        agree: Callable[[bool], bool] = bool,
    ) -> bool:
        """Whether the variant no longer suits the text, with the next pieces of it; then another is due. agree: as
        ``overreads`` takes it."""
        if not self.serves or self.saves is None:
            return False
        self.saved = [*self.saved, *self.told(counts, tokens).tolist()][-RECENT // self.piece :]
        if not agree(len(self.saved) >= RECENT // self.piece and not np.mean(self.saved) > 0):
            return False
        self.serves, self.saved = False, []
        self.least = min(2 * self.least, MOST)
        self.wanted = max(self.least, RECENT)
        return True
