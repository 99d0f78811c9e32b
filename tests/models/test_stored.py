"""Weights that other tools packed are read as what their formats' definitions give, bit for bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import stored

from dynamo_jax.models.formats.declared import declared
from dynamo_jax.models.formats.stored import StoredTensors
from dynamo_jax.models.formats.tensor_files import TensorFiles

BFLOAT16 = ml_dtypes.bfloat16


def weight_of(rows, columns, seed=0):
    """With a row and a column of large ones, so that scales differ."""
    w = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    w[rows // 2] *= 30
    w[:, columns // 3] *= 0.01
    return w


def folder_of(path, config, **tensors):
    """A folder whose tensors are what stands under each name, which dots part ("a__weight")."""
    path.mkdir(exist_ok=True)
    stored.write_file(path / "model.safetensors", {name.replace("__", "."): a for name, a in tensors.items()})
    return StoredTensors(path, declared({"quantization_config": config}))


@pytest.mark.parametrize("name", stored.FORMATS)
@pytest.mark.parametrize("shape", [(32, 64), (40, 96), (8, 32)], ids=str)
def test_a_weight_is_what_its_format_says(name, shape, tmp_path):
    fmt = stored.FORMATS[name]
    made = fmt.make(weight_of(*shape))
    files = folder_of(tmp_path, fmt.config, **{f"m.up.{leaf}": a for leaf, a in made.tensors.items()})
    assert set(files.headers) == {"m.up.weight"}
    header = files.headers["m.up.weight"]
    assert (header.shape, header.dtype, header.nbytes) == (shape, "BF16", 2 * made.value.size)
    got = files.read("m.up.weight")
    assert got.dtype == BFLOAT16
    np.testing.assert_array_equal(got.view(np.uint16), made.value.view(np.uint16))
    np.testing.assert_array_equal(files.read("m.up.weight", slice(3, 5)), made.value[3:5])
    scales = sum(a.nbytes for leaf, a in made.tensors.items() if "input" not in leaf)
    assert files.stored_bytes("m.up.weight") == scales


def test_each_code_of_fp8_and_of_fp4_is_read():
    """All finite codes at once, under a scale that bfloat16 holds exactly."""
    from dynamo_jax.models.formats.fp4 import from_fp4
    from dynamo_jax.models.formats.fp8 import from_fp8

    codes = np.array([c for c in range(256) if c & 127 != 127], np.uint8)
    np.testing.assert_array_equal(from_fp8(codes[None], np.float32([[0.5]]), (1, 254))[0], stored.E4M3[codes] / 2)
    octets = np.arange(256, dtype=np.uint8)
    want = np.stack([stored.E2M1[octets & 15], stored.E2M1[octets >> 4]], axis=1).reshape(1, -1)
    np.testing.assert_array_equal(from_fp4(octets[None], np.ones((1, 16), np.float32)), want)


@pytest.mark.parametrize("shape", [(160, 256), (576, 300), (100, 130), (128, 128)], ids=str)
def test_the_last_block_may_be_a_part_of_one(shape, tmp_path):
    """160 rows have a grid of 2, which is not 80 rows each; 576 are DeepSeek-V3's kv_a_proj_with_mqa."""
    made = stored.fp8(weight_of(*shape), (128, 128))
    assert made.tensors["weight_scale_inv"].shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    config = stored.FP8 | {"weight_block_size": [128, 128]}
    files = folder_of(tmp_path, config, **{f"a.{leaf}": a for leaf, a in made.tensors.items()})
    np.testing.assert_array_equal(files.read("a.weight"), made.value)


def test_a_row_need_not_fill_its_words(tmp_path):
    """weight_shape says how many of the codes count."""
    made = stored.packed(weight_of(6, 37))
    config = stored.FORMATS["int4, a scale a row"].config
    files = folder_of(tmp_path, config, **{f"a.{leaf}": a for leaf, a in made.tensors.items()})
    assert files.headers["a.weight"].shape == (6, 37)
    np.testing.assert_array_equal(files.read("a.weight"), made.value)


def test_gptq_without_the_group_of_each_input_counts_them_off(tmp_path):
    made = stored.gptq(weight_of(16, 48))
    tensors = {f"a.{leaf}": a for leaf, a in made.tensors.items() if leaf != "g_idx"}
    files = folder_of(tmp_path, stored.FORMATS["gptq"].config, **tensors)
    np.testing.assert_array_equal(files.read("a.weight"), made.value)


def test_a_model_may_be_in_several_formats(tmp_path):
    """FP8 attention and int4 experts, as compressed-tensors writes them, and floats beside them."""
    attention, expert = stored.fp8_rows(weight_of(32, 32)), stored.packed(weight_of(32, 64), size=32)
    config = stored.compressed(a=stored.scheme(num_bits=8, type="float", strategy="channel"), b=stored.GROUP)
    norm = np.ones(32, np.float16)
    files = folder_of(
        tmp_path,
        config,
        **{f"q.{leaf}": a for leaf, a in attention.tensors.items()},
        **{f"e.{leaf}": a for leaf, a in expert.tensors.items()},
        **{"norm.weight": norm, "q.bias": norm, "attn.k_scale": np.float32([1])},
    )
    assert {name: files.words(name) for name in files.headers} == {
        "q.weight": "FP8 with a scale a row",
        "e.weight": "int4 in groups of 32",
        "norm.weight": "float16",
        "q.bias": "float16",
    }
    np.testing.assert_array_equal(files.read("q.weight"), attention.value)
    np.testing.assert_array_equal(files.read("e.weight"), expert.value)
    assert files.read("norm.weight").dtype == np.float16


def test_what_is_said_of_the_text_part_counts(tmp_path):
    inner = {"text_config": {"quantization_config": stored.FORMATS["int4 in groups"].config}}
    assert declared(inner).groups == ((4, 32),)


FUSED = {  # shape of the scales of (E, 2F, D), or None where there are blocks; rows of a block
    "a tensor": ((), None),
    "a scale an expert": ((3,), None),
    "a scale an expert, with axes": ((3, 1, 1), None),
    "gate and up have a scale each": ((3, 2, 1), 20),
    "blocks": (None, 8),
    "blocks of gate and of up": (None, 16),
}


@pytest.mark.parametrize("kind", FUSED)
def test_fused_experts_in_fp8_are_read_one_by_one(kind, tmp_path, monkeypatch):
    shape, high = FUSED[kind]
    experts = [weight_of(40, 48, seed) for seed in range(3)]
    values, codes, scales = [], [], []
    for w in experts:
        whole = np.concatenate(experts) if shape == () else w
        parts = [w[:20], w[20:]] if high in (16, 20) else [w]
        made = [stored.fp8(p, (high, 48 if shape else 16)) if high else None for p in parts]
        if high is None:
            scale = np.float32(np.abs(whole).max() / 448)
            code = (w / scale).astype(ml_dtypes.float8_e4m3fn)
            value, scale = (stored.E4M3[code.view(np.uint8)] * scale).astype(BFLOAT16), scale[None]
        else:
            code, scale, value = (
                np.concatenate(p)
                for p in zip(*((m.tensors["weight"], m.tensors["weight_scale_inv"], m.value) for m in made))
            )
        values.append(value)
        codes.append(code)
        scales.append(scale)
    scale = np.stack(scales) if shape is None else np.stack(scales)[:1].reshape(()) if shape == () else (
        np.stack(scales).reshape(shape)
    )  # fmt: skip
    config = stored.FP8 | ({} if shape is not None else {"weight_block_size": [high, 16]})
    tensors = {"e.gate_up_proj": np.stack(codes), "e.gate_up_proj_scale_inv": scale}
    tensors["e.gate_up_proj_activation_scale"] = np.ones(3, np.float32)
    files = folder_of(tmp_path, config, **tensors)
    assert list(files.headers) == ["e.gate_up_proj"]
    read, own = [], TensorFiles.read
    monkeypatch.setattr(TensorFiles, "read", lambda *given: read.append(own(*given)) or read[-1])
    for e in (2, 0, 1):
        np.testing.assert_array_equal(files.read("e.gate_up_proj", slice(e, e + 1))[0], values[e])
    assert max(a.size for a in read) == 40 * 48, "reading an expert reads its own bytes"
    np.testing.assert_array_equal(files.read("e.gate_up_proj"), np.stack(values))


def test_an_expert_in_blocks_of_gpt_oss_is_read_alone(tmp_path, monkeypatch):
    """Rows of blocks are outputs; the tensor of floats has inputs first."""
    made = [stored.mxfp4(weight_of(40, 96, seed), ("blocks", "scales"), np.uint8, np.uint8) for seed in range(3)]
    blocks = np.stack([m.tensors["blocks"] for m in made]).reshape(3, 40, 3, 16)
    tensors = {"e.gate_up_proj_blocks": blocks, "e.gate_up_proj_scales": np.stack([m.tensors["scales"] for m in made])}
    tensors["e.gate_up_proj_bias"] = np.ones((3, 40), np.float32)
    files = folder_of(tmp_path, {"quant_method": "mxfp4"}, **tensors)
    assert files.headers["e.gate_up_proj"].shape == (3, 96, 40) and "e.gate_up_proj_bias" in files
    read, own = [], TensorFiles.read
    monkeypatch.setattr(TensorFiles, "read", lambda *given: read.append(own(*given)) or read[-1])
    for e in (2, 0, 1):
        np.testing.assert_array_equal(files.read("e.gate_up_proj", slice(e, e + 1))[0], made[e].value.T)
    assert max(a.nbytes for a in read) == blocks[0].nbytes
    tensors["e.gate_up_proj_scales"] = np.zeros((3, 40, 2), np.uint8)
    with pytest.raises(ValueError, match=r"e\.gate_up_proj_scales is \(3, 40, 2\), expected \(3, 40, 3\)"):
        folder_of(tmp_path, {"quant_method": "mxfp4"}, **tensors)


def put(**more):
    return lambda tensors: tensors | {f"a.{name}": a for name, a in more.items()}


def without(name):
    return lambda tensors: {key: a for key, a in tensors.items() if key != f"a.{name}"}


def with_value(name, at, value):
    def change(tensors):
        array = tensors[f"a.{name}"].copy()
        array.view(np.uint8 if array.dtype.itemsize == 1 else array.dtype)[at] = value
        return tensors | {f"a.{name}": array}

    return change


NAN = "holds NaN or infinity"
BAD = {  # format, what is changed, what is said
    "no scales": ("fp8 in blocks", without("weight_scale_inv"), r"a\.weight \(F8_E4M3\) needs a\.weight_scale_inv or "),
    "two scales": (
        "fp8 in blocks",
        put(weight_scale=np.ones((2, 4), np.float32)),
        r"a\.weight has a\.weight_scale_inv and a\.weight_scale: which of them",
    ),
    "scales of a wrong grid": (
        "fp8 in blocks",
        put(weight_scale_inv=np.ones((3, 4), np.float32)),
        r"a\.weight_scale_inv is \(3, 4\), expected of a\.weight, \(32, 64\): .*\(2, 4\) for blocks of 24 x 20",
    ),
    "scales that are whole numbers": (
        "fp8 in blocks",
        put(weight_scale_inv=np.ones((2, 4), np.int32)),
        r"a\.weight_scale_inv is I32, expected F32 or F16 or BF16 or U8 or F8_E8M0",
    ),
    "NaN among codes": ("fp8 in blocks", with_value("weight", (3, 4), 0xFF), rf"a\.weight {NAN}"),
    "infinite scale": ("fp8 in blocks", with_value("weight_scale_inv", (1, 1), np.inf), rf"a\.weight_scale_inv {NAN}"),
    "NaN among powers": ("fp8, scales are E8M0", with_value("scale", (0, 0), 0xFF), rf"a\.scale {NAN}"),
    "NaN among bytes": (
        "fp8, scales are bytes",
        with_value("weight_scale_inv", (0, 0), 0xFF),
        rf"a\.weight, FP8 in blocks of 1 x 32, {NAN}: see a\.weight, a\.weight_scale_inv",
    ),
    "too large": (
        "mxfp4 of compressed-tensors",
        with_value("weight_scale", (0, 0), 0xFE),
        rf"a\.weight, MXFP4, {NAN}",
    ),
    "other codes": (
        "fp8 in blocks",
        put(weight=np.zeros((32, 64), ml_dtypes.float8_e5m2)),
        r"a\.weight is F8_E5M2, expected F8_E4M3",
    ),
    "no second scale": ("nvfp4 of modelopt", without("weight_scale_2"), r"a\.weight \(U8\) needs a\.weight_scale_2"),
    "divided by nothing": (
        "nvfp4 of compressed-tensors",
        put(weight_global_scale=np.float32([0])),
        rf"a\.weight, NVFP4, {NAN}",
    ),
    "a grid of NVFP4": (
        "nvfp4 of modelopt",
        put(weight_scale=np.zeros((32, 2), ml_dtypes.float8_e4m3fn)),
        r"a\.weight_scale is \(32, 2\), expected \(32, 4\) for groups of 16 of a\.weight",
    ),
    "a scale before its rounding": (
        "nvfp4 of modelopt",
        put(pre_quant_scale=np.ones(64, np.float32)),
        r"a\.pre_quant_scale stands beside a\.weight, and what it means there is not known",
    ),
    "no shape": ("int4 in groups", without("weight_shape"), r"a\.weight_packed \(I32\) needs a\.weight_shape"),
    "another shape": (
        "int4 in groups",
        put(weight_shape=np.int64([32, 32])),
        r"a\.weight_packed is \(32, 64\), but its weight_shape says \(32, 32\)",
    ),
    "groups that config.json does not name": (
        "int4 in groups",
        put(weight_scale=np.ones((32, 4), np.float32)),
        r"a\.weight_packed is \(32, 8\) with weight_scale \(32, 4\), which fits none of these in config\.json: "
        "4 bits in groups of 32",
    ),
    "zero points of a wrong grid": (
        "int4 with zero points",
        put(weight_zero_point=np.zeros((32, 4), np.int32)),
        r"a\.weight_zero_point is \(32, 4\), expected \(4, 4\)",
    ),
    "bytes in place of words": (
        "gptq",
        put(qweight=np.zeros((8, 32), np.int64)),
        r"a\.qweight is I64, expected I32",
    ),
    "no zero points": ("gptq", without("qzeros"), r"a\.qweight \(I32\) needs a\.qzeros, which is missing"),
    "three bits": ("gptq", put(qzeros=np.zeros((4, 3), np.int32)), r"a\.qweight .* which is neither 4 nor 8 bits"),
    "an input of no group": ("gptq", with_value("g_idx", 5, 9), r"a\.qweight places an input in group 9 of 4"),
    "a group too many": ("awq", lambda t: t | {f"a.{n}": np.zeros((5, s), d) for n, s, d in (
        ("scales", 32, np.float16), ("qzeros", 4, np.int32))}, r"a\.scales is \(5, 32\), expected 4 groups of 16"),
    "scales of nothing": (
        "fp8 in blocks",
        lambda t: {"a.weight_scale_inv": t["a.weight_scale_inv"]},
        r"a\.weight_scale_inv scales a weight that is not packed, or not there",
    ),
    "scales of floats": (
        "fp8 in blocks",
        put(weight=np.zeros((32, 64), np.float32)),
        r"a\.weight_scale_inv scales a weight that is not packed, or not there",
    ),
    "an empty matrix": (
        "fp8 in blocks",
        put(weight=np.zeros((0, 64), ml_dtypes.float8_e4m3fn)),
        r"a\.weight is \(0, 64\), which holds nothing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_one_line_that_names_file_and_tensor(case, tmp_path):
    name, change, message = BAD[case]
    fmt = stored.FORMATS[name]
    tensors = change({f"a.{leaf}": a for leaf, a in fmt.make(weight_of(32, 64)).tensors.items()})
    with pytest.raises(ValueError, match=rf"model\.safetensors: {message}") as error:
        folder_of(tmp_path, fmt.config, **tensors).read("a.weight")
    assert "\n" not in str(error.value)


UNTOLD = {
    "blocks without a size": ("fp8 in blocks", stored.FP8, r"a\.weight_scale_inv .*\(config.json has no block sizes\)"),
    "GPTQ or AWQ": ("gptq", {}, r"a\.qweight may be of GPTQ or AWQ: config.json has no quantization_config"),
    "two groups that both fit": (
        "int4, a scale a row",
        stored.compressed(a=stored.scheme(group_size=100), b=stored.scheme(strategy="channel", group_size=None)),
        "",
    ),
}


@pytest.mark.parametrize("case", UNTOLD)
def test_what_tensors_leave_open_is_said_by_config_json(case, tmp_path):
    name, config, message = UNTOLD[case]
    made = stored.FORMATS[name].make(weight_of(32, 64))
    tensors = {f"a.{leaf}": a for leaf, a in made.tensors.items()}
    if not message:  # both mean a scale a row
        np.testing.assert_array_equal(folder_of(tmp_path, config, **tensors).read("a.weight"), made.value)
        return
    with pytest.raises(ValueError, match=message):
        folder_of(tmp_path, config, **tensors)


def test_what_stands_beside_fused_experts_is_known_or_refused(tmp_path):
    tensors = {"e.down_proj": np.zeros((3, 40, 16), ml_dtypes.float8_e4m3fn)}
    tensors |= {"e.down_proj_scale_inv": np.ones(3, np.float32), "e.down_proj_bias": np.ones((3, 40), np.float32)}
    files = folder_of(tmp_path, stored.FP8, **tensors)
    assert set(files.headers) == {"e.down_proj", "e.down_proj_bias"}
    with pytest.raises(ValueError, match=r"e\.down_proj_scale_2 stands beside e\.down_proj, and what it means"):
        folder_of(tmp_path, stored.FP8, **tensors, **{"e.down_proj_scale_2": np.ones(3, np.float32)})


def test_halves_that_cannot_be_told_from_a_whole_are_refused(tmp_path):
    """Two scales for 2F = 40 rows in blocks of 28: of rows 28 and 12, or of gate and of up."""
    tensors = {"e.gate_up_proj": np.zeros((3, 40, 16), ml_dtypes.float8_e4m3fn)}
    tensors["e.gate_up_proj_scale_inv"] = np.ones((3, 2, 1), np.float32)
    with pytest.raises(ValueError, match=r"e\.gate_up_proj_scale_inv is .* cannot be told"):
        folder_of(tmp_path, stored.FP8 | {"weight_block_size": [28, 16]}, **tensors)


def test_the_same_weight_twice_is_refused(tmp_path):
    made = stored.packed(weight_of(32, 64), size=32)
    tensors = {f"a.{leaf}": a for leaf, a in made.tensors.items()} | {"a.weight": np.zeros((32, 64), np.float32)}
    with pytest.raises(ValueError, match=r"a\.weight (stands beside a\.weight_packed|is there twice)"):
        folder_of(tmp_path, stored.compressed(a=stored.GROUP), **tensors)


REFUSED = {
    "weights quantized by quanto are not read; known: fp8, mxfp8": {"quant_method": "quanto"},
    "weights quantized by None are not read": {"bits": 4},
    r"bits=3: of gptq, 4 and 8 are read": {"quant_method": "gptq", "bits": 3},
    "gptq in the format 'marlin' is not read; known: gptq, gptq_v2": {
        "quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin",
    },
    "awq in the format 'gemv' is not read": {"quant_method": "awq", "bits": 4, "version": "gemv"},
    r"weight_block_size=\[128\]: expected two numbers": {"quant_method": "fp8", "weight_block_size": [128]},
    "weight_block_size=0: expected a whole number of 1 or more|weight_block_size=0: expected a positive whole": {
        "quant_method": "fp8", "weight_block_size": [0, 128],
    },
    "num_bits=3: of whole numbers, 4 and 8 bits": stored.compressed(a=stored.scheme(num_bits=3)),
    "sparse weights are not read": stored.compressed() | {"sparsity_config": {"format": "sparse-bitmask"}},
    "weights that are turned are not read": stored.compressed() | {"transform_config": {"config_groups": {"a": 1}}},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_are_not_read_are_refused(message):
    with pytest.raises(ValueError, match=message):
        declared({"quantization_config": REFUSED[message]})
