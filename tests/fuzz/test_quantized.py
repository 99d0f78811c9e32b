"""Quantized folders with any damage: the model that was written, or one line that names the file.

Where digests and sizes are made to fit what was changed, only what the description says of the arrays is left to tell.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from fuzz.judge import Case, count, judge, seeded
from fuzz.tensors import odd_file_cases
from fuzz.values import ABSENT, ODD, dumps, near, words
from quantized_runs import signed

from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.calibration.pipeline import quantize_folder
from dynamo_jax.models.formats.tensor_files import write_tensors
from dynamo_jax.storage import checkpoint, facts
from dynamo_jax.storage.bundles import read_bundle

pytestmark = pytest.mark.usefixtures("quick_compilation")

META = "dynamo_jax.json"


@pytest.fixture(scope="module")
def good(small_folder, tokenizer_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "model"
    text = " ".join(f"w{i}" for i in seeded("text").choices(range(3, 61), k=400))
    settings = QuantizeConfig(unseen_windows=0, calibration_windows=1, window=32, bits=3.5, quantizer="rtn")
    quantize_folder(small_folder, folder, {"words": text}, settings)
    return folder


def the_same(good):
    """What is tried: reading all, and in what is read nothing that the good folder does not have, but in what a
    description may say otherwise."""
    model = checkpoint.load(good)

    def call(folder):
        facts.describe(folder)
        found = checkpoint.load(folder)
        for width, codes in model.store.codes.items():
            np.testing.assert_array_equal(found.store.codes[width], codes)
        for name, array in model.parameters.items():
            assert found.parameters[name].shape == array.shape
            assert np.isfinite(np.asarray(found.parameters[name], np.float32)).all()
        np.testing.assert_array_equal(found.plan.widths, model.plan.widths)
        checkpoint.check(folder)

    return call


def description_cases(good) -> Iterator[Case]:
    """A key of the description, or of its configuration, with another value."""
    chance, raw = seeded("description"), json.loads((good / META).read_text())
    places = [(None, key) for key in raw if key != "sizes"] + [("config", key) for key in raw["config"]]
    for number in range(count(260)):
        inside, key = chance.choice(places)
        own = raw if inside is None else raw[inside]
        value = near(own[key], chance) if chance.random() < 0.4 else chance.choice(ODD)
        yield Case(
            f"description {number}: {inside} {key} {words(value)}", lambda f, i=inside, k=key, v=value: put(f, i, k, v)
        )


def put(folder: Path, inside: str | None, key: str, value: Any) -> None:
    raw = json.loads((folder / META).read_text())
    own = raw if inside is None else raw[inside]
    if value is ABSENT:
        del own[key]
    else:
        own[key] = value
    (folder / META).write_text(dumps(raw))
    signed(folder, META)


def array_cases(good) -> Iterator[Case]:
    """An array of a file that is missing, or has another name, shape, dtype or contents."""
    chance = seeded("arrays")
    files = {path.name: list(read_bundle(path)) for path in sorted(good.glob("*.safetensors"))}
    for number in range(count(200)):
        file = chance.choice(sorted(files))
        name, how = chance.choice(files[file]), chance.choice(sorted(CHANGES))
        change = CHANGES[how]
        yield Case(f"arrays {number}: {file} {name} {how}", lambda f, file=file, n=name, c=change: edit(f, file, n, c))


def edit(folder: Path, file: str, name: str, change) -> None:
    arrays = read_bundle(folder / file)
    before = {n: a.copy() for n, a in arrays.items()}
    change(arrays, name)
    if all(n in before and np.array_equal(a, before[n]) and a.dtype == before[n].dtype for n, a in arrays.items()):
        return
    write_tensors(folder / file, arrays)
    signed(folder, file)


def _one(value):
    def change(arrays, name):
        if not np.issubdtype(arrays[name].dtype, np.integer):
            arrays[name].reshape(-1)[:1] = value

    return change


CHANGES = {
    "missing": lambda a, n: a.pop(n),
    "renamed": lambda a, n: a.update({f"{n}x": a.pop(n)}),
    "flat": lambda a, n: a.update({n: np.atleast_1d(a[n].reshape(-1)[:-1])}),
    "shorter": lambda a, n: a.update({n: a[n][:-1]}),
    "longer": lambda a, n: a.update({n: np.concatenate([a[n], a[n][:1]])}),
    "empty": lambda a, n: a.update({n: a[n][:0]}),
    "turned": lambda a, n: a.update({n: a[n].T}) if a[n].shape != a[n].T.shape else a.pop(n),
    "another dtype": lambda a, n: a.update({n: np.zeros(a[n].shape, np.int64)}),
    "floats for codes": lambda a, n: a.update({n: a[n].astype(ml_dtypes.bfloat16)}) if a[n].dtype != "f4" else a.pop(n),
    "nan": _one(np.nan),
    "infinite": _one(-np.inf),
    "one more": lambda a, n: a.update({"planes/more": a[n]}),
}  # fmt: skip


def sums_cases(good) -> Iterator[Case]:
    """SHA256SUMS with a line too few, too many, or changed."""
    chance, lines = seeded("sums"), (good / "SHA256SUMS").read_text().splitlines(keepends=True)
    for number in range(count(40)):
        at, how = chance.randrange(len(lines)), chance.choice(["gone", "twice", "other name", "upper", "space", "more"])
        line = lines[at]
        new = {
            "gone": "",
            "twice": line * 2,
            "other name": line.replace("safetensors", "x").replace("json", "jsin"),
            "upper": line[:64].upper() + line[64:] if line[:64].upper() != line[:64] else "",
            "space": " " + line,
            "more": line + "0" * 64 + "  ../../etc/passwd\n",
        }[how]
        text = "".join([*lines[:at], new, *lines[at + 1 :]])
        yield Case(f"sums {number}: {how} {line[66:-1]}", lambda f, t=text: (f / "SHA256SUMS").write_text(t))


KINDS = {
    "description": description_cases,
    "arrays": array_cases,
    "sums": sums_cases,
    "files": lambda good: odd_file_cases(tuple(p.relative_to(good).as_posix() for p in _files(good))),
}


def _files(good):
    """One of each kind."""
    skipped = ("layer-001", "layer-002", "layer-003", "layer-004", "layer-005", "generation_config")
    return sorted(p for p in good.rglob("*") if p.is_file() and not p.name.startswith(skipped))


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_quantized_folder_is_what_was_written_or_one_line(kind, good, tmp_path):
    found = judge(KINDS[kind](good), good, tmp_path, the_same(good))
    assert found["error"] >= 20
