"""TOML settings with any damage: settings whose numbers all make sense, or one line that names the file."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzz.judge import Case, count, judge, outcome, seeded
from fuzz.tensors import ODD_FILES

from dynamo_jax.demo import DemoConfig
from dynamo_jax.recipes import Recipe
from dynamo_jax.settings import find_preset, load_toml
from dynamo_jax.training import TrainConfig

NAME = "settings.toml"
KINDS: dict[str, tuple[type, Path]] = {
    "demo": (DemoConfig, find_preset("demo")),
    "train": (TrainConfig, find_preset("tiny_moe", "train")),
    "recipe": (Recipe, find_preset("olmoe_1b_7b", "recipes")),
}
ODD = (  # as TOML writes them
    *("nan", "inf", "-inf", "-1", "0", "1", "2", "7", "0.5", "-0.0", "1e308", "1e-320", "true", '""', '"x"', "[]"),
    *("[1]", '["x"]', "[nan]", "[[1]]", "[1.0, 2.0, 3.0]", "{}", "{a = 1}", "1979-05-27", "1979-05-27T07:32:00Z"),
    *(str(2**31), str(2**63), str(10**20), str(10**400), "9" * 5000, "0x10", "[" * 900 + "]" * 900, '"""a\n"""'),
    *("'''" + "x" * 1900 + "'''", "[" + "1, " * 500 + "]", '"\\ud800"', '"\\u202e"', "1_000", ".5", "nope"),
)
LINES = (
    *("x = 1", "[x]", "[model]\nx = 1", "[[model]]", "a." * 900 + "a = 1", "a." * 20_000 + "a = 1", "=", "\x00"),
    *("[" * 500, "[" * 20_000, "x = " + "{a = " * 300 + "1" + "}" * 300, "\ufeff", "steps = 2", "'' = 1", "\r"),
    *("x" * 1900 + " = 1", "x = '" + "y" * 70_000 + "'", "# \ud800", '"\U0001f600" = 1', "corpus = {}"),
)


def with_value(line: int, value: str) -> Case:
    """The value of one line of the file."""

    def change(folder: Path) -> None:
        lines = (folder / NAME).read_text().splitlines()
        settings = [i for i, text in enumerate(lines) if " = " in text and not text.startswith("#")]
        at = settings[line % len(settings)]
        lines[at] = f"{lines[at].split(' = ')[0]} = {value}"
        (folder / NAME).write_text("\n".join(lines))

    return Case(f"setting {line} = {value[:20]!r} ({len(value)})", change)


def with_line(line: int, text: str, instead: bool) -> Case:
    def change(folder: Path) -> None:
        lines = (folder / NAME).read_text().splitlines()
        at = line % len(lines)
        lines[at : at + instead] = [text]
        (folder / NAME).write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))

    return Case(f"line {line} {'is' if instead else 'after'} {text[:20]!r} ({len(text)})", change)


def flipped(at: float, bit: int) -> Case:
    def change(folder: Path) -> None:
        data = bytearray((folder / NAME).read_bytes())
        data[int(at * len(data))] ^= 1 << bit
        (folder / NAME).write_bytes(data)

    return Case(f"bit {bit} at {at:.6f}", change)


def cases(kind: str) -> Iterator[Case]:
    chance = seeded("settings", kind)
    for _ in range(count(150)):
        yield with_value(chance.randrange(1000), chance.choice(ODD))
    for _ in range(count(60)):
        yield with_line(chance.randrange(1000), chance.choice(LINES), chance.random() < 0.5)
    for _ in range(count(60)):
        yield flipped(chance.random(), chance.randrange(8))
    for name, make in ODD_FILES.items():
        yield Case(f"{name} as {NAME}", lambda folder, make=make: ((folder / NAME).unlink(), make(folder / NAME)))


def all_numbers(value: Any) -> list[float]:
    if isinstance(value, (int, float)):
        return [value]
    if isinstance(value, dict):
        return [n for v in value.values() for n in all_numbers(v)]
    if isinstance(value, (tuple, list)):
        return [n for v in value for n in all_numbers(v)]
    return all_numbers(vars(value)) if hasattr(value, "__dict__") else []


@pytest.mark.parametrize("kind", KINDS)
def test_any_settings_file(kind, tmp_path):
    cls, preset = KINDS[kind]
    good = tmp_path / "good"
    good.mkdir()
    (good / NAME).write_text(preset.read_text())

    def loaded(folder: Path) -> None:
        settings = load_toml(cls, folder / NAME)
        assert type(settings) is cls and all(map(math.isfinite, all_numbers(settings)))

    found = judge(cases(kind), good, tmp_path, loaded)
    assert found["right"] and found["error"]


WRONG = {  # settings of the training preset -> what is said
    "steps = 0": r"steps=0: expected a positive whole number",
    "learning_rate = nan": r"learning_rate = nan, expected float",
    "learning_rate = -1.0": r"learning_rate=-1\.0: expected a positive number",
    "warmup_steps = 1550": r"warmup_steps=1550: expected fewer than the 1550 steps",
    "window = 257": r"window=257 is past the model's 256 positions",
    "num_hidden_layers = 1000000000": r"\[model\]: num_hidden_layers=1000000000: expected a whole number of at most",
    "web = -1.0": r"corpus: 'web'=-1\.0",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_number_out_of_its_range_is_named(line, tmp_path):
    key = line.split(" = ")[0]
    lines = [line if text.startswith(f"{key} =") else text for text in KINDS["train"][1].read_text().splitlines()]
    assert line in lines and tomllib.loads("\n".join(lines))
    (tmp_path / NAME).write_text("\n".join(lines))
    kind, words = outcome(lambda folder: load_toml(TrainConfig, folder / NAME), tmp_path)
    assert kind == "error"
    with pytest.raises(ValueError, match=WRONG[line]):
        raise ValueError(words)
