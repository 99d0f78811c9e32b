"""The command line as a user meets it: the acceptance path, and one-line errors with exit code 2."""

from __future__ import annotations

import json
import math
import re
import shutil

import jax
import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats
from made_up_reports import Page
from quantized_runs import FAST, GREEDY

import dynamo_jax
from dynamo_jax.calibration import estimate as estimates
from dynamo_jax.calibration import pipeline
from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.calibration.estimate import estimate
from dynamo_jax.commands import app as cli
from dynamo_jax.commands.console import fact_words
from dynamo_jax.storage import facts

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_quantize_says_what_a_person_needs_and_on_its_own_result_that_it_is_done(run, folder, shallow_folder, files):
    """``folder`` was made by the same command, in another process or this one."""
    known = ("--known", f"code={files / 'code.txt'}", "--known", f"sums={files / 'sums.txt'}")
    command = ("quantize", "--model", shallow_folder, *known, *FAST, "--quantizer", "rtn", "--out", folder)
    code, printed, said = run(*command, "--bits", "3.0")
    assert code == 0 and f"{folder}: done already, by the same command" in said
    facts = dict(line.split(None, 1) for line in printed.splitlines() if not line.startswith("next:"))
    assert "before;" in facts["size"] and "3.00 bits a weight" in facts["size"] and "on disk" in facts["host"]
    assert 0 < float(facts["loss"].split()[0]) < 1 and "--windows" in facts["experts"]
    assert f"dynamo-jax generate --model {folder}" in printed
    code, _, said = run(*command, "--bits", "4.0")
    assert code == 2 and "holds a finished result (bits 3.0 there, 4.0 here); --overwrite replaces it" in said


def test_inspect_reads_every_file_when_asked(run, folder, shallow_folder, tmp_path):
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    (line,) = [one for one in run("inspect", "--model", folder, "--check")[1].splitlines() if "checked" in one]
    assert f"{size:,} bytes" in line and line.endswith("are what was written")
    shutil.copytree(folder, tmp_path / "damaged")
    content = bytearray((folder / "layer-001.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "damaged" / "layer-001.safetensors").write_bytes(content)
    assert run("inspect", "--model", tmp_path / "damaged")[0] == 0  # which reads the description alone
    code, _, said = run("inspect", "--model", tmp_path / "damaged", "--check")
    assert code == 2 and "layer-001.safetensors: damaged: its SHA-256" in said
    assert "has no digests" in run("inspect", "--model", shallow_folder, "--check")[2]


def test_eval_writes_the_rows_that_the_readme_promises(run, folder, files, tmp_path):
    out = tmp_path / "out.json"
    code, printed, _ = run(
        *("eval", "--model", folder, "--novel", f"verse={files / 'verse.jsonl'}", "--window", "64", "--limit", "4"),
        *("--variant", "baseline", "--variant", "auto", "--json", out),
    )
    assert code == 0 and "verse" in printed and "nothing can be called novel" in printed  # of so few windows
    rows = json.loads(out.read_text())["results"]
    assert [(r["dataset"], r["kind"], r["variant"]) for r in rows] == [
        ("verse", "novel", "baseline"),
        ("verse", "novel", "auto"),
    ]
    for row in rows:
        assert row["device_bits"] <= 3.0 and row["tokens"] == 256 and row["bytes_per_token"] > 0
        assert row["perplexity"] == pytest.approx(math.exp(row["nll"]))


def test_eval_says_how_far_a_quantized_model_is_from_its_original(run, folder, shallow_folder, files, tmp_path):
    out = tmp_path / "out.json"
    given = ("--novel", f"verse={files / 'verse.txt'}", "--window", "64", "--limit", "4", "--variant", "baseline")
    logits, page, task = tmp_path / "logits", tmp_path / "page.html", tmp_path / "task.jsonl"
    task.write_text(json.dumps({"context": "2 + 2 =", "continuations": [" 4", " five"], "label": 0}))
    code, printed, _ = run(
        *("eval", "--model", folder, *given, "--reference", shallow_folder, "--json", out),
        *("--reference-logits", logits, "--task", f"four={task}", "--report", page),
    )
    first, row = json.loads(out.read_text())["results"]
    assert code == 0 and f"{row['divergence']['mean']:.5f}" in printed and logits.is_file()
    assert first["variant"] == "reference" and row["tokens"] == 256 and 0 < row["divergence"]["mean"] < 1
    shown = Page(page.read_text()).text()
    for words in (f"{row['divergence']['mean']:.5f}", "experts on the device", f"--report {page}", "Tasks", "four"):
        assert words in shown
    assert "What the monitor saw" not in shown  # which was not asked
    code, printed, _ = run("eval", "--model", folder, *given, "--reference-logits", logits)
    assert code == 0 and "reference" in printed
    code, _, said = run("eval", "--model", folder, *given, "--reference", folder)
    assert code == 2 and "is quantized already" in said


def test_quantize_asks_for_what_its_settings_would(monkeypatch, files, shallow_folder, tmp_path):
    """Options that are not given, and what stands for unseen text where it is."""
    asked = []
    monkeypatch.setattr(pipeline, "quantize_folder", lambda *given, **_: asked.append(given[3]))
    monkeypatch.setattr(facts, "summary", lambda _: {})
    known = ("--known", f"code={files / 'code.txt'}", "--out", str(tmp_path / "out"))
    for more in ((), ("--novelty-weight", "0.5"), ("--unseen-windows", "7")):
        cli.app(["quantize", "--model", str(shallow_folder), *known, *more], standalone_mode=False)
    assert asked == [QuantizeConfig(), QuantizeConfig(novelty_weight=0.5), QuantizeConfig(unseen_windows=7)]


def test_a_dry_run_says_what_it_would_take_and_does_nothing(run, folder, shallow_folder, files, tmp_path, monkeypatch):
    known = ("--known", f"code={files / 'code.txt'}", "--known", f"sums={files / 'sums.txt'}")
    out = tmp_path / "out"
    given = ("quantize", "--model", shallow_folder, *known, *FAST, "--quantizer", "rtn", "--out", out)
    code, printed, _ = run(*given, "--dry-run")
    said = dict(line.split(None, 1) for line in printed.splitlines())
    assert code == 0 and not out.exists() and "are free" in said["disk"] and said["time"].startswith("about ")
    real = facts.summary(folder)
    assert said["host"].split(" in ")[0] == real["host"].split(" in ")[0]
    assert "1,024 tokens, 85 for an expert" in said["calibration"] and "--windows" in said["calibration"]
    assert said["time"].endswith("and as long as drawing 512 tokens takes")
    monkeypatch.setattr(estimates, "_seconds", lambda *_: 1.0)  # measured once, above
    found = estimate(shallow_folder, {"code": (files / "code.txt").read_text()}, QuantizeConfig(window=64))
    assert abs(found.result / sum(p.stat().st_size for p in folder.iterdir() if p.is_file()) - 1) < 0.05
    code, _, said = run(*given, "--dry-run", "--bits", "1.5")
    assert code == 2 and "is too small" in said


def test_the_version_is_that_of_the_package(run):
    assert run("--version")[1].split() == ["dynamo-jax", dynamo_jax.__version__]


def test_eval_of_the_bundled_model_is_the_bf16_row(run, files, tmp_path):
    out = tmp_path / "out.json"
    arguments = ("--known", f"sums={files / 'sums.txt'}", "--window", "64", "--limit", "2", "--json", out)
    assert run("eval", "--model", "tiny-moe", *arguments)[0] == 0
    (row,) = json.loads(out.read_text())["results"]
    assert (row["variant"], row["kind"], row["device_bits"]) == ("bf16", "known", 16.0)


def test_analyze_reports_each_dataset_and_their_divergence(run, files, narrow_folder, tmp_path):
    out = tmp_path / "out.json"
    known = ("--known", f"code={files / 'code.txt'}", "--known", f"verse={files / 'verse.txt'}")
    page = tmp_path / "page.html"
    code, printed, _ = run("analyze", "--model", narrow_folder, *known, *FAST, "--json", out, "--report", page)
    assert code == 0 and "code | verse" in printed
    result = json.loads(out.read_text())
    assert set(result["datasets"]) == {"code", "verse"}
    layers, experts, blocks = np.shape(result["datasets"]["code"]["block_significance"])
    counts = {n: np.array(d["counts"]) for n, d in result["datasets"].items()}
    significance = {n: np.array(d["expert_significance"])[:, :, 0] for n, d in result["datasets"].items()}
    moved = result["dynamics"]
    pair = moved["between"]["code | verse"]
    want = [scipy.spatial.distance.jensenshannon(p, q, base=2) ** 2 for p, q in zip(counts["code"], counts["verse"])]
    np.testing.assert_allclose(pair["divergence"], want, rtol=1e-6)
    for values, found in ((counts, pair["use"]), (significance, pair["experts"])):
        ranks = [scipy.stats.spearmanr(x, y).statistic for x, y in zip(values["code"], values["verse"])]
        np.testing.assert_allclose(found["correlation"], ranks, rtol=1e-6)
    assert len(pair["blocks"]["correlation_within_experts"]) == layers
    halves = moved["halves"]["within"]
    assert set(halves) == {"code", "verse"} and np.mean(halves["code"]["experts"]["correlation"]) > 0.5
    assert set(moved["spans"]["within"]) == {"code", "verse"} and moved["spans"]["tokens"] % 64 == 0
    assert moved["by_chance"]["experts"] == -(-experts // 10) / experts
    assert "NaN" not in out.read_text() and "blocks of one expert" in printed and blocks > 1
    shown = Page(page.read_text()).text()
    assert "Which experts matter" in shown and "All results" not in shown and "Bits chosen" not in shown
    mean = np.mean([values.sum() for values in significance.values()])
    assert f"{mean:.4f} with 2 bits" in shown
    made, again = tmp_path / "made", tmp_path / "again.json"
    given = ("quantize", "--model", narrow_folder, *known, *FAST, "--quantizer", "rtn", "--out", made)
    assert run(*given, "--analysis", again, "--report", page)[0] == 0
    shown = Page(page.read_text()).text()
    assert "the plan is predicted to lose" in shown and "Bits chosen for the baseline" in shown and "code" in shown
    (found, names), (wanted, known_names) = map(jax.tree.flatten, (json.loads(again.read_text()), result))
    assert names == known_names and found == pytest.approx(wanted, rel=1e-6)  # rounding, as analyze does
    code, _, said = run(*given, "--analysis", tmp_path / "late.json")
    assert code == 0 and "was done already" in said and not (tmp_path / "late.json").exists()
    assert run(*given, "--report", page)[0] == 0  # of what lies there: datasets are no longer told apart
    assert "known texts" in Page(page.read_text()).text()


@pytest.mark.parametrize("model", ["tiny-moe", "quantized"])
def test_inspect_names_the_sizes(run, folder, model):
    code, printed, _ = run("inspect", "--model", folder if model == "quantized" else model)
    assert code == 0 and "48" in printed


def test_facts_are_for_people(run, folder):
    code, printed, _ = run("inspect", "--model", folder)
    names = [line.split("  ")[0] for line in printed.splitlines()]
    assert code == 0 and all(name == name.lower() and "_" not in name for name in names)
    assert "8,192" in printed and "MiB)" in printed and "windows of known texts" in names
    few = next(line for line in printed.splitlines() if line.startswith("fewer than"))
    assert few.endswith("more --windows reach more") and max(map(len, printed.splitlines())) < 1100


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("vocab", 8192, "8,192"),
        ("bytes", "35,023,872", "35,023,872 bytes (33.4 MiB)"),
        ("x", "14,487,552 bytes (all planes)", "14,487,552 bytes (13.8 MiB; all planes)"),
        ("x", "95,000,000,000 bytes: a, 200 bytes", "95,000,000,000 bytes (88.5 GiB): a, 200 bytes"),
        ("x", {"a": 12_345}, "a=12,345"),
        ("fewer than 256 calibration tokens", "0 of 8 experts", "0 of 8 experts"),
        ("x", "y" * 10_000, "y" * 1000 + " .."),
    ],
)
def test_a_fact_has_units_and_an_end(name, value, words):
    assert fact_words(name, value) == words


def test_generate_prints_the_continuation_alone(run, shallow_folder):
    generate = ("generate", "--model", shallow_folder)
    code, one, err = run(*generate, "--prompt", "import numpy", *GREEDY)
    assert code == 0 and one.strip() and "import numpy" not in one
    assert re.fullmatch(r"12 tokens, the first after [0-9.]+ s, then [0-9.]+ a second\n", err)
    code, other, _ = run(*generate, "--prompt", "King of", *GREEDY)
    assert run(*generate, "--prompt", "import numpy", "--prompt", "King of", *GREEDY)[1] == one + other


def test_generate_that_adapts_serves_prompts_one_after_the_other_and_says_what_it_saw(run, folder, texts):
    """Two halves of a text of a known kind: the same continuations, and a word on the second at 256 tokens."""
    prompts = ("--prompt", texts["code"][:300], "--prompt", texts["code"][300:600])
    plain = run("generate", "--model", folder, *prompts, *GREEDY)
    code, printed, err = run("generate", "--model", folder, "--adapt", *prompts, *GREEDY)
    assert (code, printed) == (0, plain[1])
    why, *events, speed = err.splitlines()
    assert speed.startswith("24 tokens")
    assert why.startswith("nothing can be called novel") and "quantize --windows" in why
    assert all(line.startswith("text 2, token ") for line in events)


def test_only_a_quantized_model_can_adapt_and_all_prompts_are_checked_first(run, folder):
    code, printed, err = run("generate", "--adapt", "--prompt", "x")
    assert code == 2 and not printed and "is not quantized; --adapt switches the precision" in err
    code, printed, err = run("generate", "--model", folder, "--adapt", "--prompt", "x", "--prompt", "1 2 " * 200)
    assert code == 2 and not printed and "prompt 1 has" in err and "the model has 256 positions" in err


def test_an_exported_model_generates_what_the_quantized_one_does(run, folder, tmp_path):
    code, printed, _ = run("export", "--model", folder, "--out", tmp_path / "out")
    assert code == 0 and str(tmp_path / "out") in printed
    texts = [run("generate", "--model", f, "--prompt", "import os", *GREEDY)[1] for f in (folder, tmp_path / "out")]
    assert texts[0] == texts[1] and texts[0].strip()


def test_inspect_says_what_would_be_quantized(run):
    code, printed, _ = run("inspect", "--model", "tiny-moe")
    assert code == 0 and "14,155,776 weights of 864 expert tensors" in printed and "BF16=" in printed


def test_an_unknown_option_is_exit_code_2(run):
    assert run("eval", "--modle", "x")[0] == 2
