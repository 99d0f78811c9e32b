"""What config.json says of how weights are stored: ``quantization_config``, which other tools write.

Tensors say most of it by their names and dtypes. What they leave open stands here: sizes of blocks and groups, and
which of two tools wrote codes that look alike. Methods that are not read are refused by name.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from dynamo_jax.files import shortened, shown
from dynamo_jax.models.specs import check_number

KEY, OLDER_KEY = "quantization_config", "compression_config"
METHODS = (
    *("fp8", "mxfp8", "fbgemm_fp8", "mxfp4", "compressed-tensors"),
    *("modelopt", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed", "gptq", "awq"),
)
Raw = dict[str, Any]


class Declared(NamedTuple):
    """method: of ``METHODS``, or none. blocks: rows and columns of blocks of FP8 that share a scale. groups: bits, and
    inputs that share a scale (0: all of a row), of whole numbers. less_one: GPTQ's zero points are stored less one."""

    method: str = ""
    blocks: tuple[tuple[int, int], ...] = ()
    groups: tuple[tuple[int, int], ...] = ()
    less_one: bool = True


def declared(raw: Raw) -> Declared:
    """From a config.json, or the ``text_config`` in it. ValueError, which names the key: a method that is not read, or
    one of its settings."""
    inner = raw.get("text_config")
    for place in (raw, inner if isinstance(inner, dict) else {}):
        for key in (KEY, OLDER_KEY):
            if place.get(key):
                return _declared(key, place[key])
    return Declared()


def _declared(key: str, said: Any) -> Declared:
    method = said.get("quant_method") if isinstance(said, dict) else said
    if not isinstance(said, dict) or method not in METHODS:
        name = method if isinstance(method, str) else shown(method)
        raise ValueError(f"{key}: weights quantized by {shortened(name)} are not read; known: {', '.join(METHODS)}")
    if method == "compressed-tensors":
        return _compressed_tensors(said)
    if method in ("gptq", "awq"):
        return _by_groups(method, said)
    block = said.get("weight_block_size")
    return Declared(method, () if block is None else (_block("weight_block_size", block),))


def _block(key: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{key}={shown(value)}: expected two numbers, rows and columns")
    for number in value:
        check_number(key, number, 1)
    return value[0], value[1]


def _size(key: str, value: Any) -> int:
    """Inputs that share a scale; -1 and null mean all."""
    if value in (None, -1):
        return 0
    check_number(key, value, 1)
    return value


def _by_groups(method: str, said: Raw) -> Declared:
    bits, size = said.get("bits"), _size("group_size", said.get("group_size"))
    if bits not in (4, 8):
        raise ValueError(f"bits={shown(bits)}: of {method}, 4 and 8 are read")
    kinds = ("gptq", "gptq_v2") if method == "gptq" else ("gemm",)
    keys = ("checkpoint_format", "format") if method == "gptq" else ("version", "format")
    kind = next((said[key] for key in keys if said.get(key) is not None), kinds[0])
    if not isinstance(kind, str) or kind.lower() not in kinds:
        raise ValueError(f"{method} in the format {shown(kind)} is not read; known: {', '.join(kinds)}")
    return Declared(method, groups=((bits, size),), less_one=kind.lower() != "gptq_v2")


def _compressed_tensors(said: Raw) -> Declared:
    """All groups of modules together: which of them a tensor is of, its dtype and shape say."""
    sparse = said.get("sparsity_config") or {}
    if not isinstance(sparse, dict) or sparse.get("format", "dense") != "dense":
        raise ValueError(f"sparsity_config={shown(sparse)}: sparse weights are not read")
    if turned := said.get("transform_config"):
        raise ValueError(f"transform_config={shown(turned)}: weights that are turned are not read")
    schemes = said.get("config_groups") or {}
    if not isinstance(schemes, dict):
        raise ValueError(f"config_groups={shown(schemes)}: expected an object")
    blocks, groups = [], []
    for name, scheme in schemes.items():
        weights = scheme.get("weights") if isinstance(scheme, dict) else None
        if weights is None:
            continue
        if not isinstance(weights, dict):
            raise ValueError(f"config_groups: weights of {shown(name)} are {shown(weights)}, expected an object")
        size = _size("group_size", weights.get("group_size"))
        if weights.get("type", "int") == "int":
            bits = weights.get("num_bits")
            if bits not in (4, 8):
                raise ValueError(f"num_bits={shown(bits)}: of whole numbers, 4 and 8 bits are read")
            groups.append((bits, size))
        elif weights.get("block_structure"):
            blocks.append(_block("block_structure", weights["block_structure"]))
        elif size:
            blocks.append((1, size))
    return Declared("compressed-tensors", tuple(dict.fromkeys(blocks)), tuple(dict.fromkeys(groups)))
