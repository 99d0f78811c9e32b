"""Models by name, from a cache as the hub's library lays it out."""

from __future__ import annotations

import shutil
import sys

import pytest

from dynamo_jax.models.bundled import BUNDLED
from dynamo_jax.models.hub import hub_folder, is_hub_name, model_folder
from dynamo_jax.models.huggingface import describe, side_files

constants = pytest.importorskip("huggingface_hub.constants")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache with the bundled model as org/tiny: a snapshot of links to blobs."""
    repository = tmp_path / "cache" / "models--org--tiny"
    for part in ("blobs", "refs", "snapshots/0123"):
        (repository / part).mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123")
    for file in BUNDLED.iterdir():
        if file.suffix in (".json", ".safetensors"):
            shutil.copy(file, repository / "blobs" / file.name)
            (repository / "snapshots" / "0123" / file.name).symlink_to(f"../../blobs/{file.name}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return repository


def test_a_name_is_found_in_the_local_cache(cache):
    folder = model_folder("org/tiny")
    assert folder == cache / "snapshots" / "0123"
    assert describe(folder)["family"] == "olmoe" and "config.json" in side_files(folder)


def test_a_folder_of_that_name_comes_first(cache, tmp_path, monkeypatch):
    shutil.copytree(BUNDLED, tmp_path / "org" / "tiny")
    monkeypatch.chdir(tmp_path)
    assert str(model_folder("org/tiny")) == "org/tiny"


def test_a_model_that_is_not_there_says_what_to_run(cache):
    with pytest.raises(ValueError, match=r"org/none: .*not in the local cache.* hf download org/none --local-dir none"):
        model_folder("org/none")


def test_without_the_library_a_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub, or hf download org/tiny"):
        hub_folder("org/tiny")


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("org/name-1.5_b", True),
        ("./folder", False),
        ("../folder", False),
        ("a/b/c", False),
        ("name", False),
        ("", False),
    ],
)
def test_what_can_be_a_name(name, is_one):
    assert is_hub_name(name) == is_one
