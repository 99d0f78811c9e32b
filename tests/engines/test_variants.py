"""What a request says of its precision, and which folders are variants of one model; no engine is needed."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from dynamo_jax.commands import serve
from dynamo_jax.commands.app import app
from dynamo_jax.engines.sglang_server import parsed
from dynamo_jax.engines.variants import AUTO, architectures_of, variants_of
from dynamo_jax.runtime import memory
from dynamo_jax.runtime.store import page_counts
from dynamo_jax.storage import checkpoint


@pytest.fixture(scope="module")
def folders(quantized, tmp_path_factory):
    """A model, it at 2 bits, and it in other blocks of channels."""
    folder = tmp_path_factory.mktemp("variants")
    plan = quantized.plan
    low = dataclasses.replace(quantized, plan=dataclasses.replace(plan, widths=np.full_like(plan.widths, 2)))
    for name, model in (("base", quantized), ("low", low)):
        checkpoint.save(folder / name, model)
    return folder


def test_a_request_names_a_variant_or_leaves_it_to_its_monitor(folders):
    keys = None, "variant=auto", "variant=0", "variant=1"
    variants = variants_of(folders / "base", [folders / "low"])
    assert [variants.asked(key) for key in keys] == [AUTO, AUTO, 0, 2]
    still = variants_of(folders / "base", [folders / "low"], adapts=False)
    assert [still.asked(key) for key in keys] == [0, 0, 0, 1]
    assert not variants_of(folders / "base", watched=False).adapts
    own = checkpoint.read_description(folders / "base").plan
    for one, number in ((variants, 2), (still, 1)):  # the state has the plan under that number
        assert [own, *one.plans(own)][number] is one.others[0] and (one.others[0].widths == 2).all()


def test_slots_are_for_what_any_variant_reads_and_spare_ones_for_what_adapts(folders):
    own = checkpoint.read_description(folders / "base").plan
    low = variants_of(folders / "base", [folders / "low"])
    high = dataclasses.replace(own, widths=np.full_like(own.widths, 8))
    assert low.slots(own, 0.1) == memory.slots(own, 0.1)  # two bits need no page
    assert dataclasses.replace(low, adapts=False).slots(own, 0.1) == page_counts(own)
    both = dataclasses.replace(low, others=(high,))
    assert both.slots(own, 0.1) == page_counts(high)  # and there are no more pages than those


@pytest.mark.parametrize("key", ["variant=2", "variant=-1", "variant=", "1", "", "variant=1 ", "variant=99999999999"])
def test_a_key_that_names_no_variant_says_which_there_are(folders, key):
    with pytest.raises(ValueError, match=r'extra_key .*: expected "variant=N", N from 0 to 1, or'):
        variants_of(folders / "base", [folders / "low"]).asked(key)


def test_a_folder_that_is_no_variant_is_named(folders, tmp_path):
    with pytest.raises(ValueError, match="nothing: no such folder"):
        variants_of(folders / "base", [tmp_path / "nothing"])


def test_an_engine_finds_the_model_by_its_architecture(folders):
    variants = variants_of(folders / "base")
    assert architectures_of(variants, json.loads((folders / "base/config.json").read_text())) == ["OlmoeForCausalLM"]
    with pytest.raises(ValueError, match="architectures is 3, expected a list of names"):
        architectures_of(variants, {"architectures": 3})


def test_the_program_parts_our_arguments_from_the_engines(folders):
    base, low = str(folders / "base"), str(folders / "low")
    words = [base, "--variant", low, "--reads", "1.5", "--", "--port", "1", "--variant", "--no-adapt"]
    variants, limits, options = parsed(words)
    assert len(variants.others) == 1 and variants.adapts and str(variants.folder) == base
    assert limits == {"batch": None, "reads": 1.5} and options == words[6:]


def test_serve_says_what_it_lacks(folders, monkeypatch):
    for words in (["--reads", "1.3"], ["--batch", "4"]):
        run = CliRunner().invoke(app, ["serve", "--model", "x", "--engine", "vllm", *words])
        assert isinstance(run.exception, ValueError) and "with vllm nothing is adapted yet" in str(run.exception)
    run = CliRunner().invoke(app, ["serve", "--model", "x", "--engine", "other"])
    assert isinstance(run.exception, ValueError) and "--engine other: known are sglang, vllm" in str(run.exception)
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    for engine, words in serve.INSTALL.items():
        run = CliRunner().invoke(app, ["serve", "--model", "x", "--engine", engine])
        assert isinstance(run.exception, ValueError) and str(run.exception) == words


def test_serve_becomes_the_engines_program(folders, monkeypatch):
    started = []
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(serve.os, "execv", lambda path, program: started.append(program))
    base, low, own = str(folders / "base"), str(folders / "low"), ["--no-adapt", "--batch", "8"]
    run = CliRunner().invoke(
        app, ["serve", "--model", base, "--variant", low, *own, "--port", "7", "--page-size", "16"]
    )
    assert run.exit_code == 0, run.exception
    (program,) = started
    assert program[:3] == [sys.executable, "-m", "dynamo_jax.engines.sglang_server"]
    variants, limits, options = parsed(program[3:])
    assert len(variants.others) == 1 and not variants.adapts and limits == {"batch": 8, "reads": 1.0}
    assert options[-2:] == ["--page-size", "16"] and options[2:4] == ["--port", "7"]
    command = ["serve", "--model", base, "--variant", low, "--engine", "vllm", "--block-size", "16"]
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 0, run.exception
    assert started[1][3:5] == ["serve", base] and started[1][-2:] == ["--block-size", "16"]
