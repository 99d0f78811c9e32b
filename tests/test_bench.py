"""A recipe run from the command line: its figures are those of eval, and its exit code says whether it is reached."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest

import dynamo_jax
from dynamo_jax import bench as job
from dynamo_jax.commands import app
from dynamo_jax.evaluation.perplexity import EvalConfig
from dynamo_jax.texts.demo import KINDS
from dynamo_jax.texts.fetched import EVALUATION_SETS, FLAX_SOURCES, opened

RECIPE = """
model = "tiny-moe"
budgets = [4.5]
uniform = [3]
tasks = ["mine={folder}/rows.jsonl"]
documents = 9
waiting = "a machine of this test"
[known]
code = "{folder}/code.txt"
[judged]
code = "{folder}/sums.txt"
[novel]
verse = "{folder}/verse.txt"
[quantize]
quantizer = "rtn"
window = 64
calibration_windows = 4
[evaluate]
window = 64
limit = 4
adaptation_windows = 4
[[thresholds]]
budget = 4.5
variant = "auto"
measure = "recovery"
on = "novel"
least = 0.5
[[published]]
method = "theirs"
bits = 3.0
on = "mine"
measure = "accuracy"
value = 0.25
variant = "gptq3"
source = "a table"
"""
FAILS = """[[thresholds]]
variant = "gptq3"
measure = "agreement"
on = "known"
most = 0.01
"""


@pytest.fixture
def folder(texts, tmp_path):
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    row = {"context": "Tom has", "continuations": [" apples", " a river"], "label": 0}
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row | {"label": i % 2}) for i in range(8)))
    (tmp_path / "reached.toml").write_text(RECIPE.format(folder=tmp_path))
    (tmp_path / "missed.toml").write_text(RECIPE.format(folder=tmp_path) + FAILS)
    return tmp_path


@pytest.fixture
def bench(monkeypatch, capsys):
    """Call ``dynamo-jax bench``; returns (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["dynamo-jax", "bench", *map(str, arguments)])
        code = 0
        try:
            app.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


@pytest.mark.usefixtures("quick_compilation_here")
def test_a_recipe_is_missed_or_reached_and_its_figures_are_those_of_eval(
    bench, folder, narrow_folder, texts, monkeypatch
):
    given = ("--model", narrow_folder, "--json", folder / "out.json", "--documents", "2", "--keep", folder / "kept")
    results, run = [], job.run
    monkeypatch.setattr(job, "run", lambda *args: results.append(run(*args)) or results[-1])
    code, printed, said = bench(folder / "missed.toml", *given)
    assert code == 1, said
    assert "failed" in printed and "passed" in printed and "waiting for a machine of this test" in printed
    assert "theirs" in printed and "baseline 4.5" not in printed  # of one budget
    found = json.loads((folder / "out.json").read_text())
    missed, reached = found["thresholds"][::-1]
    assert missed["variant"] == "gptq3" and not missed["passed"]

    monkeypatch.setattr(job, "run", lambda recipe, *_: dataclasses.replace(results[0], recipe=recipe))
    code, printed, _ = bench(folder / "reached.toml", *given)
    assert code == 0 and "passed" in printed and "failed" not in printed
    assert json.loads((folder / "out.json").read_text())["thresholds"] == [reached]

    variants = [("bf16", None), ("gptq3", None), ("baseline", 4.5), ("auto", 4.5)]
    places = [(r["dataset"], r["variant"], r["budget"]) for r in found["results"]]
    assert places == [(name, *variant) for name in ("code", "verse") for variant in variants]
    assert [(r["task"], r["variant"], r["budget"]) for r in found["tasks"]] == [("mine", *v) for v in variants]
    assert {r["documents"] for r in found["tasks"]} == {2}  # of the option, not the recipe's 9
    assert (found["recipe"]["model"], found["waiting"]) == (str(narrow_folder), "a machine of this test")
    assert found["made_by"].keys() == {"dynamo_jax", "jax"} and found["seconds"] > 0

    own = {place: r for place, r in zip(places, found["results"])}
    exact, auto = own["verse", "bf16", None], own["verse", "auto", 4.5]
    assert reached["passed"] and reached["value"] == pytest.approx(exact["perplexity"] / auto["perplexity"])
    accuracy = next(r["accuracy"] for r in found["tasks"] if r["variant"] == "gptq3")
    assert [p["ours"] for p in found["published"]] == [accuracy]

    loaded = dynamo_jax.load(folder / "kept" / "4.5-bits")
    settings = EvalConfig(window=64, limit=4, adaptation_windows=4)
    rows, _ = dynamo_jax.evaluate(loaded, {"code": texts["sums"]}, {"verse": texts["verse"]}, settings)
    for row in rows:
        assert own[row.dataset, row.variant, 4.5]["nll"] == pytest.approx(row.nll, rel=1e-6)
    model, tokenizer = dynamo_jax.load_decoder(narrow_folder), dynamo_jax.load_tokenizer(narrow_folder)
    rows, _ = dynamo_jax.evaluate(model, None, {"verse": texts["verse"]}, settings, tokenizer=tokenizer)
    assert exact["nll"] == pytest.approx(rows[0].nll, rel=1e-5)


@pytest.mark.slow
def test_kept_models_are_taken_again_and_give_the_figures_of_those_in_memory(bench, folder, narrow_folder):
    text = RECIPE.replace("[4.5]", "[3.4, 4.5]").format(folder=folder)
    (folder / "two.toml").write_text(text)
    found = []
    for more in ((), ("--keep", folder / "kept"), ("--keep", folder / "kept")):
        code, printed, said = bench(folder / "two.toml", "--model", narrow_folder, "--json", folder / "two.json", *more)
        assert code == 0, said
        assert "baseline 3.4" in printed and "auto 4.5" in printed
        found.append(json.loads((folder / "two.json").read_text()))
    assert f"{folder / 'kept' / '3.4-bits'}: done already" in said
    for other in found[1:]:
        assert other["results"] == found[0]["results"] and other["tasks"] == found[0]["tasks"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"code.txt": "missing.txt"}, r"missing\.txt: no such file"),
        ({"{folder}/code.txt": "demo:cod"}, "demo:cod: no such kind of text; there are encyclopedic"),
        ({"rows.jsonl": "none.jsonl"}, r"none\.jsonl: no such file"),
        ({"mine={folder}/rows.jsonl": "mine"}, "task mine: known are hellaswag", ),
        ({"window = 64\nlimit": "window = 6400\nlimit"}, "window 6400 is past the model's 256 positions"),
        ({"[4.5]": "[1.0]"}, "the budget, bits 1, is too small"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_any_long_work(bench, folder, narrow_folder, changes, message):
    text = RECIPE.split("[[thresholds]]")[0]
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "own.toml").write_text(text.format(folder=folder))
    code, printed, said = bench(folder / "own.toml", "--model", narrow_folder)
    assert code == 2 and not printed
    with pytest.raises(ValueError, match=message):
        raise ValueError(said)


def test_a_recipe_that_there_is_not_names_those_that_there_are(bench):
    code, _, said = bench("tiny")
    assert code == 2 and "presets are gpt_oss_20b, mixtral_8x7b, olmoe_1b_7b" in said


@pytest.mark.slow
def test_the_bundled_models_recipe_is_reached(bench, tmp_path):
    try:
        opened(EVALUATION_SETS).close()
        opened(FLAX_SOURCES).close()
    except ValueError as error:
        pytest.skip(f"the texts of the demo are not to be had: {error}")
    code, _, said = bench("tiny_moe", "--json", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert code == 0, (said, found["thresholds"])
    assert {r["dataset"] for r in found["results"]} <= set(KINDS) and not found["waiting"]
