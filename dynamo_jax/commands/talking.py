"""What ``generate`` shows of texts as they come: how fast, and line by line in a talk."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynamo_jax.generation import TextModel
    from dynamo_jax.models.template import Chat
    from dynamo_jax.runtime.generate import GenerateConfig


class Speed:
    """Counts the steps of streams, and their time. The first step of each, which reads the prompt and may compile, is
    counted apart."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.steps, self.begun, self.first, self.later = 0, 0, 0.0, 0.0
        self._clock = clock

    def timed(self, pieces: Iterable[list[str]]) -> Iterator[list[str]]:
        """The same pieces. A stream's last ones are what is left of the text, and no step."""
        started = last = self._clock()
        count = 0
        for piece in pieces:
            yield piece
            now = self._clock()
            if count == 0:
                self.begun, self.first = self.begun + 1, self.first + now - started
            else:
                self.later += now - last
            last, count = now, count + 1
        self.steps += max(0, count - 1)

    def words(self, texts: int) -> str:
        """texts: that a step goes on with."""
        later = self.steps - self.begun
        said = f"{self.steps * texts:,} tokens, the first after {self.first / max(1, self.begun):.1f} s"
        return f"{said}, then {later * texts / self.later:.1f} a second" if later > 0 and self.later > 0 else said


def show(pieces: Iterable[list[str]]) -> str:
    """Print one text as it comes, and return it."""
    text = ""
    for (piece,) in pieces:
        print(piece, end="", flush=True)
        text += piece
    return text


def talk(model: TextModel, settings: GenerateConfig, raw: bool, speed: Speed) -> None:
    """Lines from the terminal, and what the model says to each, until an empty line or the end of input.

    A model with a chat template answers, and remembers the talk; its beginning is left out once it is past the model's
    positions. Another model continues each line.
    """
    from dynamo_jax.generation import stream
    from dynamo_jax.models.chat import chat_template, user

    answers = not raw and chat_template(model.files) is not None
    how = "is asked, and the talk remembered" if answers else "is continued by itself"
    print(f"each line {how}; an empty line ends", file=sys.stderr)
    said: Chat = []
    while line := _asked():
        said = _fitting(model, [*said, user(line)], settings.max_tokens) if answers else []
        try:
            text = show(speed.timed(stream(model, [said or line], settings, not raw)))
        except ValueError as error:  # of this line
            print(error, file=sys.stderr)
            said = said[:-1]
            continue
        print()
        said = [*said, {"role": "assistant", "content": text}] if answers else []


def _fitting(model: TextModel, chat: Chat, new: int) -> Chat:
    """The end of a chat that leaves room for ``new`` tokens; its last message at least."""
    from dynamo_jax.generation import prompts_tokens

    room = model.model.config.max_position_embeddings - new
    while len(chat) > 2:
        try:
            if len(prompts_tokens(model, [chat], True)[0]) <= room:
                break
        except ValueError:  # past all positions, or what the shortest will say again
            pass
        chat = chat[2:]
    return chat


def _asked() -> str:
    try:
        return input("> ")
    except EOFError:
        print(file=sys.stderr)
        return ""
