"""How many devices a model takes, and plans that keep to the slots of each; no device is needed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from jax.sharding import AbstractMesh
from typer.testing import CliRunner

from dynamo_jax.commands.app import app
from dynamo_jax.models.huggingface import load_config, parameter_shapes
from dynamo_jax.precision.plan import expert_plan
from dynamo_jax.runtime import memory
from dynamo_jax.runtime.adapt import placed_anew
from dynamo_jax.runtime.devices import GIB, least_devices, on_mesh, plan_of_bits
from dynamo_jax.runtime.mesh import Placement
from dynamo_jax.runtime.residency import largest_shard, owners_of
from dynamo_jax.runtime.store import pages_of


def placement_of(shards, experts=48, blocks=4):
    return Placement.of(AbstractMesh((1, shards), ("data", "model")), experts, blocks)


def pages_by_shard(placement, plan):
    for level, has in pages_of(plan).items():
        owners = placement.owners(has.shape, 1)
        yield level, np.bincount(owners.reshape(-1), has.sum(axis=0).reshape(-1), placement.shards)


@pytest.mark.parametrize("shards", [4, 8, 16, 48])
def test_an_adapted_plan_keeps_to_the_slots_of_each_device(shards):
    """Text that goes to some experts more than to others, so that without limits a device would take most pages."""
    rng = np.random.default_rng(shards)
    placement = placement_of(shards)
    plan = expert_plan(rng.choice([2, 3, 4, 8], (6, 48), p=[0.3, 0.4, 0.2, 0.1]), 64, 16, 32, 64)
    slots = memory.slots(plan, 0.05, placement)
    before = dict(pages_by_shard(placement, plan))
    free = {level: slots[level] - has for level, has in before.items()}
    use = rng.lognormal(0, 1.5, (6, 48)) * np.geomspace(0.05, 20, 48)
    errors = use[:, :, None, None] * rng.lognormal(0, 1, (6, 48, 4, 1)) * np.array([1, 0.25, 0.06, 0])
    found = placed_anew(plan, errors, use, free, 8, 1.0, slots, placement)
    for level, has in pages_by_shard(placement, found):
        assert (has <= slots[level]).all()
        new = pages_of(found)[level] & ~pages_of(plan)[level]
        owners = placement.owners(new.shape, 1)
        assert (np.bincount(owners.reshape(-1), new.sum(axis=0).reshape(-1), shards) <= free[level]).all()
    whole = {level: int(count.sum()) for level, count in before.items()}
    alone = placed_anew(plan, errors, use, None, 8, 1.0, whole)
    owned = dict(pages_by_shard(placement, alone))
    assert any((owned[level] > slots[level]).any() for level in owned)  # which the limits are for
    lost = [p.chosen(errors).sum() for p in (plan, found, alone)]
    assert lost[1] < lost[0] and lost[2] <= lost[1] + 1e-9


def test_pages_belong_to_the_device_that_has_their_block():
    placement = Placement.of(AbstractMesh((2, 4), ("data", "model")), 6, 4)
    assert placement is not None and (placement.experts, placement.blocks) == (("data",), ("model",))
    owners = placement.owners((1, 6, 8), 2)  # two units of four blocks
    np.testing.assert_array_equal(owners[0], [0, 1, 2, 3, 0, 1, 2, 3])
    np.testing.assert_array_equal(owners[3], [4, 5, 6, 7, 4, 5, 6, 7])
    table = np.arange(48).reshape(1, 6, 8)
    np.testing.assert_array_equal(placement.by_shard(table, 2)[0, 0], [0, 4, 1, 5, 2, 6, 3, 7])
    np.testing.assert_array_equal(owners_of(None, (1, 6, 8), 2), np.zeros((6, 8)))


def test_a_shard_has_slots_for_the_largest_and_its_part_of_the_spare_ones():
    widths = np.full((1, 8), 2)
    widths[0, :2] = 8
    plan = expert_plan(widths, 64, 16, 32, 64)
    placement = placement_of(4, experts=8)
    assert largest_shard(placement, [plan]) == {3: 8, 4: 8, 8: 8} and largest_shard(None, [plan])[8] == 8
    assert memory.slots(plan, 0.5, placement) == {3: 8, 4: 8, 8: 8}  # there are no more pages on a device
    plan = expert_plan(np.where(np.arange(8) % 2, 8, 2)[None], 64, 16, 32, 64)
    assert memory.slots(plan, 0.5, placement) == {3: 6, 4: 6, 8: 6}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """Of the published sizes of Qwen3-235B-A22B."""
    raw = {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
        "moe_intermediate_size": 1536, "num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "max_position_embeddings": 40960,
        "norm_topk_prob": True,
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("qwen")
    (folder / "config.json").write_text(json.dumps(raw))
    return load_config(folder)


def test_the_least_mesh_holds_what_arithmetic_says(qwen):
    plan, shapes = plan_of_bits(qwen.expert_sizes, 3.0), parameter_shapes(qwen)
    assert memory.device_bits(plan) == pytest.approx(3.0, abs=0.01)
    found = least_devices(qwen, shapes, plan, 32.0, batch=64, length=4096)
    assert (found.data * found.model, found.blocks) == (8, 1)
    experts = 94 * 128 * 3 * 1536 * 4096 * 3 / 8
    assert (found.share.planes + found.share.spare) * 8 == pytest.approx(experts, rel=0.02)
    cache = 94 * 2 * 64 * 4096 * 4 * 128 * 2
    assert found.share.cache * found.data * min(found.model, 4) == pytest.approx(cache, rel=0.01)
    half = on_mesh(qwen, shapes, plan, (2, 2), 64, 4096)
    assert half.share.total > 32 * GIB * 0.85
    with pytest.raises(ValueError, match="no mesh of up to 4,096 devices of 1 GiB holds the model"):
        least_devices(qwen, shapes, plan, 1.0, 64, 4096)
    with pytest.raises(ValueError, match="length 99999: expected one or more, and at most 40,960 tokens"):
        least_devices(qwen, shapes, plan, 32.0, 64, 99999)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_quantized_rest_takes_what_arithmetic_says(qwen, bits):
    plan, shapes = plan_of_bits(qwen.expert_sizes, 3.0), parameter_shapes(qwen)
    layers, top, routers = 94 * 2 * (4096 * 8192 + 4096 * 512), 2 * 151936 * 4096, 94 * 4096 * 128
    scales = 2 / 64 if bits == 4 else 0
    expected = layers * (bits / 8 + scales) + top * max(bits, 8) / 8 + routers * 2
    assert on_mesh(qwen, shapes, plan, (1, 1), 1, 64, rest=bits).share.rest == pytest.approx(expected, rel=1e-3)
    split = on_mesh(qwen, shapes, plan, (1, 4), 1, 64, rest=bits).share.rest
    assert 4 * split == pytest.approx(expected + 3 * routers * 2, rel=2e-3)  # which every device has


def test_experts_that_do_not_divide_are_split_by_their_blocks(qwen):
    """384 experts over 256 devices, as Kimi-K2's: sixteen ways, and sixteen blocks of each sixteen ways."""
    sizes = qwen.expert_sizes._replace(experts=384, channels=2048)
    plan = plan_of_bits(sizes, 3.0)
    placement = Placement.of(AbstractMesh((16, 16), ("data", "model")), 384, plan.blocks)
    assert placement is not None and (placement.expert_shards, placement.block_shards) == (16, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mesh", "2"], "mesh '2': expected DATAxMODEL, such as 2x4"),
        (["--mesh", "0x4"], "mesh '0x4': expected DATAxMODEL"),
        (["--mesh", "64x4"], "mesh 64x4: there are"),
        (["--hosts", "auto"], "--hosts needs --mesh"),
        (["--mesh", "1x2", "--hosts", "here"], "hosts 'here': expected auto, or ADDRESS:PORT,COUNT,NUMBER"),
        (["--mesh", "1x2", "--hosts", "here:1,2,2"], "process 2 of 2: they are counted from 0"),
    ],
)
def test_options_that_cannot_be_are_named(options, message):
    run = CliRunner().invoke(app, ["generate", "--prompt", "a", *options])
    assert run.exit_code and message in f"{run.exception}{run.output}"


def test_a_mesh_needs_a_quantized_model():
    run = CliRunner().invoke(app, ["generate", "--prompt", "a", "--mesh", "1x1"])
    assert run.exit_code and "is not quantized; a mesh splits a folder that quantize wrote" in f"{run.exception}"


def test_the_command_says_it(tmp_path):
    run = CliRunner().invoke(app, ["plan-devices", "--model", "tiny-moe", "--length", "256", "--chip", "0.01",
                                   "--json", str(tmp_path / "out.json")])  # fmt: skip
    assert run.exit_code == 0 and "a mesh of data" in run.output
    out = json.loads((tmp_path / "out.json").read_text())
    share = out["bytes a device"]
    assert share["total"] == sum(n for name, n in share.items() if name != "total") <= 0.85 * 0.01 * GIB
    wrong = CliRunner().invoke(app, ["plan-devices", "--model", "tiny-moe", "--chip", "abacus"])
    assert wrong.exit_code and "--chip abacus: expected v5e" in f"{wrong.exception}{wrong.output}"
