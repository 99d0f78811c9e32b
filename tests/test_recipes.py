"""Recipes: those that come with the package, what a wrong one is told, and how figures become measures."""

from __future__ import annotations

import dataclasses
import math

import pytest

from dynamo_jax.evaluation.perplexity import Row
from dynamo_jax.evaluation.tasks import TaskRow
from dynamo_jax.recipes import Found, Recipe, Threshold, value_at
from dynamo_jax.settings import PRESETS, load_toml

SHIPPED = sorted((PRESETS / "recipes").glob("*.toml"))
GOOD = """
model = "tiny-moe"
budgets = [3.0, 2.5]
uniform = [3]
tasks = ["sciq", "mine=ROWS.jsonl"]
[known]
prose = "A.txt"
[novel]
code = "B.txt"
[[thresholds]]
budget = 3.0
variant = "baseline"
measure = "recovery"
on = "known"
least = 0.9
"""


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_a_recipe_has_run_and_says_what_it_must_reach_or_waits_for_a_machine(path):
    recipe = load_toml(Recipe, path)
    assert recipe.waiting or any(t.measure == "recovery" for t in recipe.thresholds)
    header = path.read_text().split("\n\n")[0]
    assert all(f"# {word}: " in header for word in ("Purpose", "Command", "Hardware", "Expect"))
    assert f"dynamo-jax bench {path.stem} " in header
    for figure in recipe.published:
        assert "arXiv" in figure.source and "table" in figure.source


def test_the_bundled_models_recipe_waits_for_nothing():
    assert {p.stem for p in SHIPPED if not load_toml(Recipe, p).waiting} == {"tiny_moe"}


WRONG = {  # what stands in the place of what -> what is said
    ('prose = "A.txt"', ""): "known: no text",
    ("budgets = [3.0, 2.5]", "budgets = []"): "budgets: none",
    ("budgets = [3.0, 2.5]", "budgets = [3.0, 3.0]"): "budgets: a number is given twice",
    ("budgets = [3.0, 2.5]", "budgets = [-1.0]"): "budgets: -1, expected a positive number",
    ("uniform = [3]", "uniform = [9]"): "uniform: 9, expected widths of 2 to 8 bits",
    ("code =", "prose ="): "novel: prose is among known, too",
    ("code =", "sciq ="): "tasks: sciq is among novel, too",
    ("code =", "tasks ="): "novel: tasks stands for all of them",
    ('"sciq"', '"=x"'): "tasks: =x: expected NAME=FILE, or the name of a set",
    ('"sciq"', '"mine=x"'): "tasks: mine=ROWS.jsonl: the name mine is given twice",
    ("budget = 3.0", "budget = 2.7"): "thresholds 1: budget 2.7: the budgets are 3, 2.5",
    ("budget = 3.0", ""): "thresholds 1: budget None: the budgets are 3, 2.5",
    ('variant = "baseline"', 'variant = "gptq3"'): "thresholds 1: budget 3: gptq3 has none",
    ('variant = "baseline"', 'variant = "gptq4"'): "variant 'gptq4': there are bf16, gptq3, baseline, auto",
    ('budget = 3.0\nvariant = "baseline"', 'variant = "bf16"'): "variant bf16 is what others are compared with",
    ('"recovery"', '"accuracy"'): "measure 'accuracy': on known there are recovery, agreement, divergence, perplexity",
    ('on = "known"', 'on = "prosa"'): "on 'prosa': expected one of known, novel, tasks, prose, code, sciq, mine",
    (
        'tasks = ["sciq", "mine=ROWS.jsonl"]\n',
        "",
        'on = "known"',
        'on = "tasks"',
    ): "on 'tasks': the recipe has no tasks",
    (
        '"recovery"\non = "known"',
        '"agreement"\non = "mine"',
    ): "measure 'agreement': on mine there are recovery, accuracy",
    ("least = 0.9", "least = 0.9\nmost = 1.0"): "thresholds 1: expected least or most",
    ("least = 0.9", ""): "thresholds 1: expected least or most",
    ("least = 0.9", "last = 0.9"): r"\[thresholds\] 1: unknown key 'last', did you mean 'least'",
    ("[novel]", "[quantize]\nbits = 2.0\n[novel]"): "quantize: holds a budget",
    ("[novel]", '[judged]\nverse = "C.txt"\n[novel]'): "judged: verse is not among known, prose",
    ("[novel]", "[documents]\n[novel]"): "documents = {}, expected int",
    ("[[thresholds]]", "[[published]]"): r"\[published\] 1: unknown key",
    ("[[thresholds]]", "[thresholds]"): "thresholds = .*, expected",
}


@pytest.mark.parametrize("changes", WRONG, ids=lambda c: " -> ".join(c).replace("\n", " "))
def test_a_wrong_recipe_is_told_the_file_and_the_key(changes, tmp_path):
    text = GOOD
    for old, new in zip(changes[::2], changes[1::2]):
        assert old in text
        text = text.replace(old, new, 1)
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"own\.toml.*{WRONG[changes]}"):
        load_toml(Recipe, path)


def row(dataset, variant, perplexity):
    return Row(
        dataset=dataset, kind="known", variant=variant, device_bits=3.0, bytes_per_token=1.0, batch=1,
        bytes_per_step=1.0, tokens=64, nll=math.log(perplexity), perplexity=perplexity,
    )  # fmt: skip


def task_row(task, variant, accuracy):
    return TaskRow(
        task=task, variant=variant, documents=4, accuracy=accuracy, standard_error=0.1, accuracy_norm=0.5,
        standard_error_norm=0.1, margin=0.0, cut=0,
    )  # fmt: skip


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "own.toml").write_text(GOOD)
    return load_toml(Recipe, tmp_path / "own.toml")


def test_recovery_is_a_share_of_the_unquantized_models(recipe):
    found = [Found(None, row("prose", "bf16", 8.0)), Found(3.0, row("prose", "auto", 10.0))]
    found += [Found(2.5, row("prose", "auto", 16.0)), Found(None, row("prose", "gptq3", 9.0))]
    found += [Found(None, task_row("sciq", "bf16", 0.75)), Found(None, task_row("mine", "bf16", 0.25))]
    found += [Found(3.0, task_row("sciq", "auto", 0.5)), Found(3.0, task_row("mine", "auto", 0.25))]

    def at(budget, variant, on):
        return value_at(recipe, found, Threshold(budget=budget, variant=variant, measure="recovery", on=on, least=0.0))

    assert at(3.0, "auto", "known") == 8 / 10 and at(2.5, "auto", "prose") == 8 / 16
    assert at(None, "gptq3", "known") == 8 / 9
    assert at(3.0, "auto", "tasks") == (0.5 + 0.25) / (0.75 + 0.25) and at(3.0, "auto", "sciq") == 0.5 / 0.75


def test_a_threshold_is_reached_from_its_side_and_never_by_no_number(recipe):
    least = recipe.thresholds[0]
    most = dataclasses.replace(least, least=None, most=0.9)
    assert [least.passes(v) for v in (0.9, 0.8999, math.nan)] == [True, False, False]
    assert [most.passes(v) for v in (0.9, 0.9001, math.nan)] == [True, False, False]
