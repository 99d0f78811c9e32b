"""The demo from texts to files: what it writes, that the figures do not move, and how it says what was run."""

from __future__ import annotations

import html
import json
import sys

import pytest

from dynamo_jax import demo
from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.commands import app
from dynamo_jax.demo import DemoConfig
from dynamo_jax.evaluation.perplexity import EvalConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = DemoConfig(
    quantize=QuantizeConfig(quantizer="rtn", window=64, calibration_windows=4, bits=3.4),
    evaluate=EvalConfig(window=64, limit=4, adaptation_windows=4),
)
COMMAND = "dynamo-jax demo --out 'some where'"


@pytest.fixture
def small(monkeypatch, narrow_folder, texts):
    """Some layers and experts of the bundled model, and texts made here, in the place of the demo's."""
    monkeypatch.setattr(demo, "BUNDLED", narrow_folder)
    monkeypatch.setattr(demo, "KNOWN", {n: lambda _, n=n: iter(texts[n].split("\n\n")) for n in ("code", "sums")})
    monkeypatch.setattr(demo, "NOVEL", {"verse": lambda _: iter(texts["verse"].split("\n\n"))})


def test_the_demo_writes_its_files_and_the_same_figures_each_time(small, tmp_path):
    stages = []
    for name in ("one", "two"):
        result = demo.run(SMALL, None, tmp_path / name, COMMAND, lambda stage, done, of: stages.append(stage))
    with pytest.raises(ValueError, match=r"two: holds an earlier demo; --overwrite replaces it"):
        demo.run(SMALL, None, tmp_path / "two", COMMAND)
    first, second = ((tmp_path / name / "results.json").read_bytes() for name in ("one", "two"))
    assert first == second
    found = json.loads(first)
    assert found["results"] == [row.to_dict() for row in result.rows]
    assert {row["dataset"] for row in found["results"]} == {"code", "sums", "verse"}
    assert found["made_by"].keys() == {"dynamo_jax", "jax"}

    page = (tmp_path / "one" / "report.html").read_text()
    assert "dynamo-jax demo --out &#x27;some where&#x27;" in page
    assert f"dynamo-jax inspect --model {tmp_path / 'one' / 'checkpoint'}" in page
    for fact in ("experts on the device", "on disk", "versions", "date", "peak memory", *set(stages)):
        assert fact in page
    assert f"jax {found['made_by']['jax']}" in page
    assert f'class="lead">{html.escape(result.summary)}</p>' in page and "verse" in result.summary


def test_an_earlier_demo_is_replaced_when_asked_and_other_files_are_not(small, tmp_path, monkeypatch):
    result = demo.compute(SMALL, None)
    monkeypatch.setattr(demo, "compute", lambda *_: result)
    demo.run(SMALL, None, tmp_path / "out", COMMAND)
    demo.run(SMALL, None, tmp_path / "out", COMMAND, overwrite=True)
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"holds something else \(thesis.txt\)"):
            demo.run(SMALL, None, tmp_path / "out", COMMAND, overwrite=overwrite)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "checkpoint", "report.html", "results.json", "thesis.txt"
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["results.json", "report.html", "checkpoint/thesis.txt", "changed", "file"])
def test_what_a_demo_would_not_replace_is_named_before_anything_is_computed(small, tmp_path, monkeypatch, kind):
    out = tmp_path / "out"
    if kind == "changed":
        demo.run(SMALL, None, out, COMMAND)
        path = out / "checkpoint" / "tokenizer.json"
        path.write_text(path.read_text() + " ")
    else:
        path = out if kind == "file" else out / kind
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    content = path.read_text()
    monkeypatch.setattr(demo, "compute", lambda *_: pytest.fail("computed"))
    with pytest.raises(ValueError, match=r"something else|not as it was written|not a folder"):
        demo.run(SMALL, None, out, COMMAND, overwrite=True)
    assert path.read_text() == content


def test_the_command_that_a_report_names_is_the_one_that_was_given(monkeypatch, tmp_path):
    given = ["demo", "--out", str(tmp_path / "a b"), "--texts", str(tmp_path)]
    told = []

    def stand_in(settings, texts, out, command, progress, overwrite):
        told.append(command)
        raise ValueError("stop here")

    monkeypatch.setattr(demo, "run", stand_in)
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/dynamo-jax", *given])
    with pytest.raises(SystemExit):
        app.main()
    assert told == [f"dynamo-jax demo --out '{tmp_path / 'a b'}' --texts {tmp_path}"]
