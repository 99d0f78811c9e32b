"""Bad input on the command line: one line that names it, exit code 2, and nothing written; odd input that is none."""

from __future__ import annotations

import json
import shutil

import pytest
from quantized_runs import FAST, GREEDY

from dynamo_jax.models.bundled import BUNDLED

pytestmark = pytest.mark.usefixtures("quick_compilation")


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
