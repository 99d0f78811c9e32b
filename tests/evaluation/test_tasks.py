"""Log-likelihoods of continuations, and accuracy on zero-shot tasks."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_decoders import decoder_config
from typer.testing import CliRunner

from dynamo_jax.commands.app import app
from dynamo_jax.evaluation.evaluate import evaluate_tasks
from dynamo_jax.evaluation.likelihood import Pair, likelihoods, pair_of
from dynamo_jax.evaluation.perplexity import EvalConfig
from dynamo_jax.evaluation.tasks import Scores, compared, task_row
from dynamo_jax.models.bundled import BUNDLED
from dynamo_jax.models.decoder import Decoder, parameters
from dynamo_jax.models.stacked import stacked
from dynamo_jax.models.tokenizer import load_tokenizer
from dynamo_jax.runtime.generate import LanguageModel
from dynamo_jax.texts.tasks import Document

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = decoder_config(
    vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, max_position_embeddings=40, initializer_range=0.2,
)  # fmt: skip


@pytest.fixture(scope="module")
def decoder():
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def model(decoder):
    return LanguageModel(config=CONFIG, parameters=parameters(decoder))


def pairs(count, rng):
    sizes = rng.integers(1, 20, (count, 2))
    return [Pair(rng.integers(0, 64, a).tolist(), rng.integers(0, 64, b).tolist()) for a, b in sizes]


@nnx.jit
def every_logit(decoder, ids):
    return decoder(ids[None])[0][0]


def alone(decoder, pair):
    """By the definition, from all logits of the sequence. What is after it changes none of them."""
    ids = [*pair.context, *pair.continuation]
    filled = np.pad(ids, (0, CONFIG.max_position_embeddings + 1 - len(ids)))
    logits = np.asarray(every_logit(decoder, filled)[: len(ids)], np.float64)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    places = range(len(pair.context), len(ids))
    return sum(logits[i - 1, ids[i]] for i in places), all(logits[i - 1].argmax() == ids[i] for i in places)


@pytest.mark.parametrize("together", [pytest.param(1, marks=pytest.mark.slow), 64, 4096])
def test_likelihoods_are_those_of_each_sequence_by_itself(decoder, model, together):
    asked = pairs(9, np.random.default_rng(0))
    best = int(decoder(jnp.asarray([asked[0].context]))[0][0, -1].argmax())
    asked.append(Pair(asked[0].context, [best]))
    found = likelihoods(model, asked, together=together)
    for pair, one in zip(asked, found, strict=True):
        nats, greedy = alone(decoder, pair)
        assert one.nats == pytest.approx(nats, abs=1e-4) and one.greedy == greedy and one.cut == 0
    assert found[-1].greedy


def test_stacked_layers_give_the_same(model):
    asked = pairs(5, np.random.default_rng(1))
    other = dataclasses.replace(model, parameters=stacked(CONFIG, model.parameters))
    for a, b in zip(likelihoods(model, asked), likelihoods(other, asked)):
        assert a.nats == pytest.approx(b.nats, abs=1e-4)


def test_a_context_past_the_positions_loses_its_beginning(decoder, model):
    rng = np.random.default_rng(2)
    long = Pair(rng.integers(0, 64, 70).tolist(), [5, 6, 7])
    (found,) = likelihoods(model, [long])
    nats, _ = alone(decoder, Pair(long.context[-38:], long.continuation))
    assert found.nats == pytest.approx(nats, abs=1e-4) and found.cut == 73 - 41
    all_of_it = Pair([1], rng.integers(0, 64, 60).tolist())
    (found,) = likelihoods(model, [all_of_it])
    nats, _ = alone(decoder, Pair(all_of_it.continuation[-41:-40], all_of_it.continuation[-40:]))
    assert found.nats == pytest.approx(nats, abs=1e-4)


def test_nothing_compiles_once_each_length_was_met(model, compilations):
    likelihoods(model, pairs(30, np.random.default_rng(3)))
    with compilations() as count:
        likelihoods(model, pairs(30, np.random.default_rng(4)))
    assert count.compiled == 0


def test_an_id_that_the_model_does_not_have_is_an_error(model):
    with pytest.raises(ValueError, match="sequence 1"):
        likelihoods(model, [Pair([1], [2]), Pair([1], [64])])


def test_blanks_between_belong_to_the_continuation():
    tokenizer = load_tokenizer(BUNDLED)
    a, b = pair_of(tokenizer, "One two", " three", 0), pair_of(tokenizer, "One two ", "three", 0)
    assert a == b and tokenizer.decode(a.continuation) == " three"
    assert pair_of(tokenizer, "", "three", 7).context == [7]
    assert pair_of(tokenizer, "  ", "three", 7).context == [7]
    with pytest.raises(ValueError, match="an empty context"):
        pair_of(tokenizer, "", "three", None)


def made(right, norm, margin):
    return Scores(*(np.array(a, float) for a in (right, norm, margin)), 0)


def test_rows_have_paired_errors():
    before, after = (
        made([1, 0, 1, 0], [1, 1, 1, 0], [0.1, -0.2, 0.3, -0.4]),
        made([1, 1, 1, 0], [1, 1, 1, 0], [0.2] * 4),
    )
    first, second = compared("task", {"a": before, "b": after})
    assert (first.accuracy, second.accuracy, second.difference) == (0.5, 0.75, 0.25) and second.reference == "a"
    assert first.standard_error == pytest.approx(np.std([1, 0, 1, 0], ddof=1) / 2)
    assert second.difference_error == pytest.approx(np.std([0, 1, 0, 0], ddof=1) / 2)
    assert second.difference_norm == 0 and second.difference_norm_error == 0
    assert second.difference_margin == pytest.approx(0.25)
    one = task_row("task", "a", made([1], [1], [math.nan]))
    assert one.standard_error is None and one.margin is None
    json.dumps(one.to_dict(), allow_nan=False)


@pytest.fixture(scope="module")
def documents():
    words = ["The cat", "Once upon a", "def main", "What is", "In the"]
    return [Document(w, (" time", " x = 1", " house"), n % 3) for n, w in enumerate(words * 8)]


@pytest.mark.slow
def test_a_quantized_model_follows_a_task(quantized, shallow, documents):
    """Each variant by itself gives what it gives beside others, and a task begins where another did."""
    tasks = {"a": documents, "b": documents}
    novel = quantized.knowledge.signatures
    novel = novel._replace(limit=jnp.ones_like(novel.limit), place=novel.place - 100)
    model = dataclasses.replace(quantized, knowledge=dataclasses.replace(quantized.knowledge, signatures=novel))
    rows, events = evaluate_tasks(model, tasks, EvalConfig(), prefix=0, reference=shallow[0])
    assert [(r.task, r.variant) for r in rows] == [(t, v) for t in "ab" for v in ("reference", "baseline", "auto")]
    assert [r.margin for r in rows[:3]] == [r.margin for r in rows[3:]]
    assert [e.what for e in events["a"]] == [e.what for e in events["b"]] and "novel" in {e.what for e in events["a"]}
    (only,), none = evaluate_tasks(model, {"a": documents}, EvalConfig(), variants=("baseline",), prefix=0)
    assert only.margin == rows[1].margin and not none
    uniform, _ = evaluate_tasks(shallow[0], {"a": documents}, tokenizer=shallow[1], prefix=0, variants=("bf16", "rtn2"))
    assert uniform[0].margin == rows[0].margin != uniform[1].margin


def test_what_cannot_be_evaluated_is_named(quantized, shallow, documents):
    with pytest.raises(ValueError, match="nothing to evaluate: no task"):
        evaluate_tasks(quantized, {})
    with pytest.raises(ValueError, match="a: a task without documents"):
        evaluate_tasks(quantized, {"a": []})
    with pytest.raises(ValueError, match="variant rtn2: the model has baseline, auto"):
        evaluate_tasks(quantized, {"a": documents}, variants=("rtn2",))
    with pytest.raises(ValueError, match="tokenizer"):
        evaluate_tasks(shallow[0], {"a": documents})
    with pytest.raises(ValueError, match="document 1: an empty context"):
        evaluate_tasks(shallow[0], {"a": [documents[0], Document("", (" a",), 0)]}, tokenizer=shallow[1])
    evaluate_tasks(quantized, {"a": [Document("", (" a",), 0)]}, variants=("baseline",))  # its own token


def test_the_command_evaluates_tasks(tmp_path):
    rows = [{"context": "The cat", "continuations": [" sat", " x = 1"], "label": 0}] * 3
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["eval", "--task", f"mine={tmp_path / 'rows.jsonl'}", "--documents", "2", "--json", str(tmp_path / "out")]
    run = CliRunner().invoke(app, [*command, "--model", "tiny-moe"])
    assert run.exit_code == 0, run.output
    (row,) = json.loads((tmp_path / "out").read_text())["tasks"]
    assert (row["task"], row["variant"], row["documents"], row["accuracy"]) == ("mine", "bf16", 2, 1.0)
    for wrong, message in (("mine=", "expected NAME=FILE"), ("nothing", "task nothing: known are hellaswag")):
        run = CliRunner().invoke(app, ["eval", "--model", "tiny-moe", "--task", wrong])
        assert run.exit_code and message in f"{run.exception}{run.output}"


def test_scores_agree_with_jax_alone(decoder):
    """The likeliest token and its loss, chunk by chunk, as softmax over all of them gives it."""
    from dynamo_jax.models.loss import next_token_nll, next_token_scores

    rng = np.random.default_rng(5)
    hidden, head = jnp.asarray(rng.normal(size=(3, 7, 8))), jnp.asarray(rng.normal(size=(11, 8)))
    targets = jnp.asarray(rng.integers(0, 11, (3, 7)))
    nll, right = next_token_scores(hidden, head, targets)
    own = jax.nn.log_softmax(hidden @ head.T)
    np.testing.assert_allclose(nll, -jnp.take_along_axis(own, targets[..., None], -1)[..., 0], rtol=1e-5)
    np.testing.assert_array_equal(right, own.argmax(-1) == targets)
    np.testing.assert_array_equal(nll, next_token_nll(hidden, head, targets))
