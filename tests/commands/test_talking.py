"""``generate`` without prompts: standard input, files, and a talk in the terminal."""

from __future__ import annotations

import io
import sys

import pytest

from dynamo_jax.commands import talking
from dynamo_jax.commands.generate import read_prompts
from dynamo_jax.commands.talking import Speed, talk
from dynamo_jax.generation import TextModel, load_text_model, prompts_tokens, stream
from dynamo_jax.models.chat import user
from dynamo_jax.runtime.generate import GenerateConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

TEMPLATE = (
    b"{% for m in messages %}{{ m.role[:1] }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
FOUR = GenerateConfig(max_tokens=4)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(scope="module")
def model(shallow_folder):
    return load_text_model(shallow_folder, "float32")


def chatting(model: TextModel) -> TextModel:
    return model._replace(files=model.files | {"chat_template.jinja": TEMPLATE})


def asked(monkeypatch, *lines):
    given = iter(lines)

    def line(_):
        try:
            return next(given)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", line)


def test_prompts_come_from_options_files_and_standard_input(monkeypatch, tmp_path):
    (tmp_path / "a.txt").write_text("from a file\n", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    assert read_prompts(["first"], [tmp_path / "a.txt"]) == ["first", "from a file\n"]
    assert read_prompts([], []) == ["from a pipe"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    with pytest.raises(ValueError, match="--prompt-file - is empty"):
        read_prompts([], [])
    monkeypatch.setattr(sys, "stdin", Terminal("typed"))
    assert read_prompts([], []) == []
    assert read_prompts(["x"], []) == ["x"]


def test_a_talk_is_remembered_where_the_model_has_a_template(model, monkeypatch, capsys):
    chat = chatting(model)
    asked(monkeypatch, "2 + 2?", "And 3 + 3?")
    speed = Speed()
    talk(chat, FOUR, False, speed)
    printed, said = capsys.readouterr()
    first = "".join(p for (p,) in stream(chat, ["2 + 2?"], FOUR))
    messages = [user("2 + 2?"), {"role": "assistant", "content": first}, user("And 3 + 3?")]
    second = "".join(p for (p,) in stream(chat, [messages], FOUR))
    assert printed == f"{first}\n{second}\n" and "remembered" in said
    assert (speed.begun, speed.steps) == (2, 8)


def test_lines_are_continued_by_themselves_without_a_template(model, monkeypatch, capsys):
    asked(monkeypatch, "King of", "King of", "", "never read")
    talk(model, FOUR, False, Speed())
    printed, said = capsys.readouterr()
    first, second = printed.splitlines()
    assert first == second and "continued by itself" in said


def test_a_line_that_the_model_cannot_take_is_said_and_the_talk_goes_on(model, monkeypatch, capsys):
    asked(monkeypatch, "1 2 " * 300, "King of")
    talk(chatting(model), FOUR, False, Speed())
    printed, said = capsys.readouterr()
    assert "256 positions" in said
    assert printed == "".join(p for (p,) in stream(chatting(model), ["King of"], FOUR)) + "\n"


def test_the_beginning_of_a_long_talk_is_left_out(model):
    chat = chatting(model)
    long = [user("one two " * 20), {"role": "assistant", "content": "three " * 20}] * 4 + [user("King of")]
    kept = talking._fitting(chat, long, 8)
    assert kept == long[-len(kept) :] and 1 < len(kept) < len(long) and kept[0]["role"] == "user"
    assert len(prompts_tokens(chat, [kept], True)[0]) <= 256 - 8
    with pytest.raises(ValueError, match="positions"):
        prompts_tokens(chat, [long[-len(kept) - 4 :]], True)
    assert talking._fitting(chat, [user("x " * 500)], 8) == [user("x " * 500)]
    with pytest.raises(ValueError, match="a chat, and the model has no chat template"):
        prompts_tokens(model, [[user("hi")]], True)


def test_speed_counts_steps_and_leaves_the_first_out():
    times = iter([0.0, 2.0, 2.5, 3.0, 3.0])
    speed = Speed(lambda: next(times))
    assert [p for (p,) in speed.timed([["a"], ["b"], ["c"], [""]])] == ["a", "b", "c", ""]
    assert speed.words(1) == "3 tokens, the first after 2.0 s, then 2.0 a second"
    assert Speed().words(1).startswith("0 tokens")
