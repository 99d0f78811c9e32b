"""The command line as a user meets it: the acceptance path, and one-line errors with exit code 2."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys

import jax
import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats
from made_up_reports import Page

import dynamo_jax
from dynamo_jax.calibration import estimate as estimates
from dynamo_jax.calibration import pipeline
from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.calibration.estimate import estimate
from dynamo_jax.commands import app as cli
from dynamo_jax.commands.console import fact_words
from dynamo_jax.models.bundled import BUNDLED
from dynamo_jax.storage import facts

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def files(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    lines = [json.dumps({"text": part}) for part in texts["verse"].split("\n\n")]
    (folder / "verse.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the command line; returns (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["dynamo-jax", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


FAST = ("--windows", "4", "--window", "64")


@pytest.fixture(scope="module")
def folder(files, shallow_folder, tmp_path_factory):
    """A model that the quantize command wrote."""
    out = tmp_path_factory.mktemp("models") / "quantized"
    known = ("--known", f"code={files / 'code.txt'}", "--known", f"sums={files / 'sums.txt'}")
    arguments = ["quantize", "--model", str(shallow_folder), *known, "--bits", "3.0", "--out", str(out), *FAST]
    cli.app([*arguments, "--quantizer", "rtn"], standalone_mode=False)
    return out


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


def with_tokenizer(change):
    def changed(folder):
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer | change))

    return changed


def into_a_cache(folder):
    (folder / "snapshots" / "0").mkdir(parents=True)
    (folder / "config.json").rename(folder / "snapshots" / "0" / "config.json")


FOREIGN = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [9999], "tokens": ["<s>"]}},
}


def cut(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])


BROKEN = {
    "deep": lambda folder: (folder / "config.json").write_text("[" * 100_000),
    "panic": with_tokenizer({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}),
    "pointer": lambda folder: (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n"),
    "foreign": with_tokenizer({"post_processor": FOREIGN}),
    "template": lambda folder: (folder / "chat_template.jinja").write_text("{{ 1 / 0 }}"),
    "stop": lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}'),
    "cache": into_a_cache,
    "truncated": cut,
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A folder of model folders that only reading shows to be wrong."""
    folders = tmp_path_factory.mktemp("broken")
    for name, change in BROKEN.items():
        shutil.copytree(BUNDLED, folders / name)
        change(folders / name)
    return folders


def bad_inputs(files, folder, broken, tmp_path):
    empty, latin, short = tmp_path / "empty.txt", tmp_path / "latin.txt", tmp_path / "short.txt"
    empty.write_text("")
    latin.write_bytes(b"caf\xe9 " * 1000)
    short.write_text("too short")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("mine")
    truncated = broken / "truncated"
    code = files / "code.txt"
    out = ("--out", tmp_path / "result")
    rows = tmp_path / "rows.txt"
    rows.write_text('[{"text": "a"}]')
    given = ("quantize", "--known", f"a={code}", *FAST, *out)
    generate = ("generate", "--prompt", "a")
    return {
        "JSON as text": (("quantize", "--known", f"a={rows}", *out), "rows.txt: it holds JSON"),
        "a folder as text": (("quantize", "--known", f"a={tmp_path}", *out), "a folder, not a file"),
        "deep JSON": (("inspect", "--model", broken / "deep"), "config.json: not JSON"),
        "a tokenizer that panics": ((*given, "--model", broken / "panic"), "tokenizer.json: not a tokenizer"),
        "a pointer": (
            (*generate, "--model", broken / "pointer"),
            "tokenizer.json: a git-lfs pointer in place of the file",
        ),
        "an id past the vocabulary": (
            ("eval", "--model", broken / "foreign", "--known", f"a={code}", "--window", "64"),
            "a has the token id 9999 (of tokenizer.json), outside the model's vocabulary of 8192",
        ),
        "the same in a prompt": ((*generate, "--model", broken / "foreign"), "prompt 0 has the token id 9999"),
        "a template that fails": (
            (*generate, "--model", broken / "template"),
            "chat_template.jinja: the chat template fails: division by zero (generate --raw leaves",
        ),
        "a stop token": ((*generate, "--model", broken / "stop"), "generation_config.json: eos_token_id is '</s>'"),
        "hub name": (("inspect", "--model", "org/some-model"), "hf download org/some-model --local-dir some-model"),
        "empty folder": (("inspect", "--model", taken), "holds no config.json; --model takes tiny-moe"),
        "a cache of the hub": (
            ("inspect", "--model", broken / "cache"),
            f"{broken / 'cache' / 'snapshots' / '0'} does",
        ),
        "no model name": (("inspect", "--model", ""), "--model is empty"),
        "a file as model": (("inspect", "--model", code), "a file, not a model folder"),
        "json folder": (("eval", "--model", folder, "--known", f"a={code}", "--json", tmp_path), "a folder; expected"),
        "json device": (("eval", "--model", folder, "--known", f"a={code}", "--json", "/dev/null"), "no regular file"),
        "too many bits": ((*given, "--bits", "9"), "bits 9: more than there are; all planes of the experts up to 8"),
        "filling": (
            (*given, "--bits", "3", "--channel-block", "60"),
            "channel_block 60 fills the 64 channels of an expert up to 120: choose one that divides them",
        ),
        "too large": ((*given, "--fits-gib", "1e308"), "fits_gib 1e+308: expected at most 1,048,576"),
        "too much spare": ((*given, "--spare", "1e300"), "spare 1e+300: expected"),
        "a huge weight": ((*given, "--weight", "a=1e308"), "weights: a = 1e+308, expected a number of 0 to 1e+09"),
        "seed": ((*generate, "--seed", "9" * 20), f"seed {'9' * 20}: expected 0 to 4294967295"),
        "negative seed": ((*generate, "--seed", "-1"), "seed -1: expected 0 to"),
        "temperature": ((*generate, "--temperature", "nan"), "temperature nan cannot be"),
        "max tokens": ((*generate, "--max-tokens", "0"), "--max-tokens"),
        "no number": ((*generate, "--seed", "x"), "Invalid value for '--seed'"),
        "no option": (("eval", "--modle", "x"), "No such option: --modle"),
        "a missing option": (("quantize",), "Missing option '--known'. (options: dynamo-jax quantize --help)"),
        "no command": (("quantise",), "No such command 'quantise'"),
        "no such file": (("quantize", "--known", f"a={tmp_path / 'none.txt'}", *out), "none.txt: no such file"),
        "empty": (("quantize", "--known", f"a={empty}", *out), "empty.txt: the file is empty"),
        "not UTF-8": (("quantize", "--known", f"a={latin}", *out), "latin.txt: not UTF-8"),
        "short": (("quantize", "--known", f"a={short}", *out), "a: 3 tokens, fewer than one window"),
        "short novel": (("eval", "--model", folder, "--novel", f"n={short}"), "n: 3 tokens, fewer than one window"),
        "budget": (
            ("quantize", "--known", f"a={code}", "--bits", "1.5", *FAST, *out),
            "bits 1.5, is too small: the least is",
        ),
        "two budgets": (
            ("quantize", "--known", f"a={code}", "--bits", "3", "--bytes", "9000", *out),
            "bits and budget_bytes: a budget is given one way only",
        ),
        "weight": (("quantize", "--known", f"a={code}", "--weight", "a", *out), "--weight a: expected NAME=NUMBER"),
        "truncated": (("quantize", "--model", truncated, "--known", f"a={code}", *out), "model.safetensors: damaged"),
        "taken": (("quantize", "--known", f"a={code}", "--out", taken), "taken: exists and holds something else"),
        "no name": (("quantize", "--known", str(code), *out), "expected NAME=FILE"),
        "name twice": (("quantize", "--known", f"a={code}", "--known", f"a={code}", *out), "given twice"),
        "no model": (("eval", "--model", tmp_path / "nothing", "--known", f"a={code}"), "no such model folder"),
        "nothing to do": (("eval", "--model", "tiny-moe"), "nothing to evaluate"),
        "report": (
            ("eval", "--model", folder, "--known", f"a={code}", "--report", tmp_path),
            "a folder; expected the name",
        ),
        "variant": (("eval", "--model", "tiny-moe", "--known", f"a={code}", "--variant", "auto"), "--variant auto"),
        "json": (("eval", "--model", folder, "--known", f"a={code}", "--json", tmp_path / "x" / "y"), "no such folder"),
        "rest": ((*given, "--rest", "5"), "rest 5: known are 16, 8, 4 bits"),
        "window": (("eval", "--model", folder, "--known", f"a={code}", "--window", "9999"), "past the model's"),
        "empty prompt": (("generate", "--prompt", ""), "--prompt is empty"),
        "empty prompt file": (("generate", "--prompt-file", tmp_path / "empty.txt"), "empty.txt is empty"),
        "no prompt file": (("generate", "--prompt-file", tmp_path / "none.txt"), "no such file"),
        "dtype": (("generate", "--prompt", "a", "--dtype", "int8"), "--dtype int8: known are bfloat16, float32"),
        "top p": (("generate", "--prompt", "a", "--top-p", "1.5"), "top_p 1.5 cannot be"),
        "prompt too long": (("generate", "--prompt", "a b " * 300), "the model has 256 positions"),
        "export of a float": (("export", "--model", truncated, *out), "not a dynamo_jax quantized model"),
        "export to a full folder": (("export", "--model", folder, "--out", taken), "holds something else (thesis.txt)"),
        "inspect of a truncated": (("inspect", "--model", truncated), "model.safetensors: damaged"),
        "quantized twice": (("quantize", "--model", folder, "--known", f"a={code}", *out), "is quantized already"),
    }


CASES = [
    *("JSON as text", "a folder as text", "deep JSON", "a tokenizer that panics", "a pointer", "a stop token"),
    *("an id past the vocabulary", "the same in a prompt", "a template that fails", "hub name"),
    *("empty folder", "a cache of the hub", "no model name", "a file as model", "json folder", "json device"),
    *(
        "too many bits",
        "filling",
        "too large",
        "too much spare",
        "a huge weight",
        "seed",
        "negative seed",
        "temperature",
    ),
    *("max tokens", "no number", "no option", "a missing option", "no command"),
    *(
        "no such file",
        "empty",
        "not UTF-8",
        "short",
        "short novel",
        "budget",
        "two budgets",
        "weight",
        "truncated",
        "taken",
        "no name",
    ),
    *("name twice", "no model", "nothing to do", "variant", "json", "report", "rest", "window", "quantized twice"),
    *(
        "empty prompt",
        "empty prompt file",
        "no prompt file",
        "dtype",
        "top p",
        "prompt too long",
        "export of a float",
        "export to a full folder",
    ),
    "inspect of a truncated",
]


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_exit_code_2_and_writes_nothing(run, files, folder, broken, tmp_path, case):
    arguments, message = bad_inputs(files, folder, broken, tmp_path)[case]
    code, _, err = run(*arguments)
    lines = [line for line in err.splitlines() if "error" in line]
    assert code == 2 and len(lines) == 1
    assert lines[0].startswith("dynamo-jax: error:") and message in lines[0]
    assert "Traceback" not in err
    assert not (tmp_path / "result").exists()
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["thesis.txt"]
    assert not list(tmp_path.glob(".*partial*"))


GREEDY = ("--max-tokens", "12", "--dtype", "float32")


def test_calibration_takes_no_ids_that_the_model_does_not_know(run, files, broken, tmp_path):
    given = ("--known", f"a={files / 'code.txt'}", "--out", tmp_path / "result", *FAST)
    code, _, err = run("quantize", "--model", broken / "foreign", *given)
    assert code == 2 and "has the token id 9999 (of tokenizer.json), outside the model's vocabulary of 8192" in err


def test_text_that_is_no_unicode_is_read_all_the_same(run, shallow_folder, files, tmp_path):
    """A cut emoji in JSON, and an argument of a terminal that is not UTF-8."""
    generate = ("generate", "--model", shallow_folder, *GREEDY)
    code, printed, err = run(*generate, "--prompt", "caf\udce9")
    assert code == 0 and err.startswith("12 tokens") and printed == run(*generate, "--prompt", "caf\ufffd")[1]
    lines = [json.dumps({"text": part + " \ud83d"}) for part in (files / "code.txt").read_text().split("\n\n")]
    (tmp_path / "cut.JSONL").write_text("\n".join(lines))
    code, *_ = run("eval", "--model", shallow_folder, "--known", f"a={tmp_path / 'cut.JSONL'}", *("--limit", "2"))
    assert code == 0


def test_a_file_that_cuts_and_pads_texts_changes_nothing(run, shallow_folder, files, tmp_path):
    shutil.copytree(shallow_folder, tmp_path / "cutting")
    truncation = {"direction": "Right", "max_length": 130, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 600}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    padding |= {"pad_type_id": 0, "pad_token": "<|endoftext|>"}
    with_tokenizer({"truncation": truncation, "padding": padding})(tmp_path / "cutting")
    given = ("--known", f"a={files / 'code.txt'}", "--window", "64", "--limit", "8", "--json", tmp_path / "out.json")
    rows = []
    for model in (shallow_folder, tmp_path / "cutting"):
        assert run("eval", "--model", model, *given)[0] == 0
        rows.append(json.loads((tmp_path / "out.json").read_text())["results"])
    assert rows[0] == rows[1] and rows[0][0]["tokens"] == 512
    asked = [
        run("generate", "--model", m, "--prompt", "def f(", *GREEDY)[1] for m in (shallow_folder, tmp_path / "cutting")
    ]
    assert asked[0] == asked[1]


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
