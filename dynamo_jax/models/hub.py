"""Models by their names: the bundled one, folders, and those of the Hugging Face hub, ``org/name``, by its library.

``huggingface_hub`` is optional. What is in its local cache is taken from there without a network.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dynamo_jax.files import shortened
from dynamo_jax.models.bundled import BUNDLED, BUNDLED_NAME

WANTED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "LICENSE*")
UNWANTED = ("original/*", "*/original/*", "metal/*", "onnx/*", "openvino/*")  # the same weights for other programs


def is_hub_name(model: str) -> bool:
    """Whether a name is of the form org/name, which a folder may have, too."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", model, re.ASCII) is not None and not model.startswith(".")


def hub_folder(name: str) -> Path:
    """The folder of a model in the local cache; with a network, after a download if it is not there whole.

    ValueError, which says what to run: the library is missing, there is no such model or no access to it, or there is
    no network.
    """
    by_hand = f"hf download {name} --local-dir {name.partition('/')[2]}"
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise ValueError(
            f"{name}: no such folder; for a model of the Hugging Face hub, pip install huggingface_hub, or {by_hand} "
            "where it is installed"
        ) from None
    chosen: dict[str, Any] = {"allow_patterns": list(WANTED), "ignore_patterns": list(UNWANTED)}
    try:
        return Path(huggingface_hub.snapshot_download(name, local_files_only=True, **chosen))
    except errors.LocalEntryNotFoundError:
        pass
    try:
        return Path(huggingface_hub.snapshot_download(name, **chosen))
    except errors.GatedRepoError:
        raise ValueError(f"{name}: gated on the hub; accept its terms there, then hf auth login") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(f"{name}: no such folder, and no such model on the Hugging Face hub") from None
    except errors.HFValidationError as error:
        raise ValueError(f"{name}: no name of the Hugging Face hub: {shortened(str(error))}") from None
    except (OSError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError) as error:
        said = shortened(str(error).strip().partition("\n")[0])
        raise ValueError(
            f"{name}: no such folder, not in the local cache of the Hugging Face hub, and the hub cannot be reached "
            f"({said}); where there is a network: {by_hand}"
        ) from None


def model_folder(model: str) -> Path:
    """The folder that ``--model`` means. ValueError, which says what is taken: it is none."""
    if not model:
        raise ValueError("--model is empty")
    if model == BUNDLED_NAME:
        return BUNDLED
    folder = Path(model)
    taken = (
        f"--model takes {BUNDLED_NAME} (bundled), a Hugging Face folder (config.json, tokenizer.json, "
        "model.safetensors or shards with model.safetensors.index.json), a name of the hub (org/name), or a folder "
        "that quantize wrote"
    )
    if not folder.is_dir():
        if folder.exists():
            raise ValueError(f"{model}: a file, not a model folder; {taken}")
        if is_hub_name(model):
            return hub_folder(model)
        raise ValueError(f"{model}: no such model folder; {taken}")
    if not ((folder / "config.json").is_file() or (folder / "dynamo_jax.json").is_file()):
        inside = sorted(p.parent for p in folder.glob("snapshots/*/config.json"))
        raise ValueError(f"{model}: holds no config.json; " + (f"{inside[-1]} does" if inside else taken))
    return folder
