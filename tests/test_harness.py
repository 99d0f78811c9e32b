"""lm-evaluation-harness on our models, where it is installed (``pip install '.[eval]'``)."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.usefixtures("quick_compilation")

import lm_eval  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from dynamo_jax.harness import DynamoJax  # noqa: E402
from dynamo_jax.models.bundled import BUNDLED  # noqa: E402
from dynamo_jax.storage import checkpoint  # noqa: E402

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }} {% endfor %}" + (
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXTS = ["The cat sat on the mat. ", "def main(x):\n    return", "Was ist das? "]


def instances(kind, *arguments):
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


@pytest.fixture(scope="module")
def ours():
    return DynamoJax("tiny-moe", batch_size=4)


def harness_model(folder, end, positions):
    """The harness's own model, one sequence at a time: together, its router decides otherwise where two experts are
    all but equal."""
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(special | {"chat_template": TEMPLATE}))
    return HFLM(str(folder), device="cpu", dtype="float32", batch_size=1, max_length=positions)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    for file in BUNDLED.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    return harness_model(folder, "<|endoftext|>", 256)


def test_log_likelihoods_are_those_of_the_harness(ours, theirs):
    pairs = [(a, b) for a in (*TEXTS, "") for b in (" and", "the dog", "\n\n1 + 1 = 2")]
    for (a, b), (c, d) in zip(
        ours.loglikelihood(instances("loglikelihood", *pairs)), theirs.loglikelihood(instances("loglikelihood", *pairs))
    ):
        assert a == pytest.approx(c, abs=1e-3) and b == d


def test_rolling_log_likelihoods_are_those_of_the_harness(ours, theirs):
    texts = [(TEXTS[0] * 70,), (TEXTS[1],)]  # the first is longer than the positions
    for a, c in zip(
        ours.loglikelihood_rolling(instances("loglikelihood_rolling", *texts)),
        theirs.loglikelihood_rolling(instances("loglikelihood_rolling", *texts)),
    ):
        assert a == pytest.approx(c, rel=1e-5)


def test_greedy_generations_are_those_of_the_harness(ours, theirs):
    settings = {"until": ["\n", " of"], "max_gen_toks": 12, "do_sample": False}
    asked = [(text.rstrip(), settings) for text in TEXTS]
    own = ours.generate_until(instances("generate_until", *asked))
    assert own == theirs.generate_until(instances("generate_until", *asked))
    assert not any("\n" in text or " of" in text for text in own)


@pytest.mark.parametrize(
    "family", ["deepseek_v3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3_moe", "gpt_oss"))]
)
def test_random_models_of_other_lineages_are_as_likely_as_in_the_harness(
    family, family_model, tokenizer_file, tmp_path
):
    model = family_model(family)
    model.generation_config.eos_token_id = 0
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    theirs = harness_model(tmp_path, "w0", 64)
    ours = DynamoJax(str(tmp_path), batch_size=2)
    assert ours.max_length >= 64
    words = [f" w{i}" for i in np.random.default_rng(0).integers(1, 61, 60)]
    pairs = [
        ("".join(words[i : i + n]).strip(), "".join(words[40 : 40 + n // 3])) for i, n in ((0, 6), (3, 9), (1, 30))
    ]
    for (a, b), (c, d) in zip(
        ours.loglikelihood(instances("loglikelihood", *pairs)), theirs.loglikelihood(instances("loglikelihood", *pairs))
    ):
        assert a == pytest.approx(c, abs=1e-3) and b == d
    asked = [(context, {"until": [], "max_gen_toks": 8, "do_sample": False}) for context, _ in pairs]
    own = [text.lstrip() for text in ours.generate_until(instances("generate_until", *asked))]
    assert own == theirs.generate_until(instances("generate_until", *asked)) and all(own)  # which drops a blank before


def test_a_chat_is_asked_as_the_harness_asks_it(theirs, ours, monkeypatch):
    chat = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4, since"}]
    with pytest.raises(ValueError, match="tiny-moe: the model has no chat template"):
        ours.chat_template(True)
    monkeypatch.setitem(ours._text.files, "chat_template.jinja", TEMPLATE.encode())
    assert ours.chat_template(True) == theirs.chat_template(True) == TEMPLATE and ours.chat_template() is None
    for some, answering in ((chat[:1], True), (chat, False), (chat, True)):
        assert ours.apply_chat_template(some, answering) == theirs.apply_chat_template(some, answering)
    with pytest.raises(ValueError, match="tool: names are not known here"):
        ours.chat_template("tool")


def test_generation_needs_room(ours):
    with pytest.raises(ValueError, match="256 new tokens: the model has 256 positions"):
        ours.generate_until(instances("generate_until", ("a", {})))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "rtn3"}, "variant=rtn3: known are baseline, auto"),
        ({"adapt": True}, "is not quantized"),
        ({"dtype": "int8"}, "dtype=int8"),
        ({"batch_size": "0"}, "batch_size=0"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        DynamoJax("tiny-moe", **settings)


def test_a_task_runs_and_its_results_say_what_the_run_time_did(quantized, tmp_path):
    folder = tmp_path / "model"
    checkpoint.save(folder, quantized)
    rows = [{"context": f"{text}", "continuations": [" the", " x = 1"], "label": 0} for text in TEXTS * 20]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(f"""
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}, cache_dir: {tmp_path / "cache"}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{continuations}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    arguments = f"model={folder},adapt=True"
    found = lm_eval.simple_evaluate("dynamo_jax", arguments, ["mine"], task_manager=manager, bootstrap_iters=0)
    assert 0 <= found["results"]["mine"]["acc,none"] <= 1
    assert found["config"]["variant"] == "auto" and isinstance(found["config"]["events"], list)
