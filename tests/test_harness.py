"""lm-evaluation-harness on our models, where it is installed (``pip install 'dynamo_jax[eval]'``)."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.usefixtures("quick_compilation")

import lm_eval  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from dynamo_jax.harness import DynamoJax  # noqa: E402
from dynamo_jax.models.bundled import BUNDLED  # noqa: E402
from dynamo_jax.storage import checkpoint  # noqa: E402

TEXTS = ["The cat sat on the mat. ", "def main(x):\n    return", "Was ist das? "]


def instances(kind, *arguments):
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


@pytest.fixture(scope="module")
def ours():
    return DynamoJax("tiny-moe", batch_size=4)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The harness's own model, one sequence at a time: together, its router decides otherwise where two experts are
    all but equal."""
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp("model")
    for file in BUNDLED.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return HFLM(str(folder), device="cpu", dtype="float32", batch_size=1, max_length=256)


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
