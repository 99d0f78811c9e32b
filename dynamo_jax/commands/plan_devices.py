"""``dynamo-jax plan-devices``: how many devices a model takes, from headers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dynamo_jax.commands.console import print_facts
from dynamo_jax.commands.options import JsonOption, ModelOption

if TYPE_CHECKING:
    from dynamo_jax.runtime.devices import DevicePlan


def plan_devices(
    model: ModelOption,
    bits: Annotated[
        float, typer.Option(help="Bits a weight of the experts on the devices; a quantized folder has its own.")
    ] = 3.0,
    chip: Annotated[
        str, typer.Option(help="v5e, v5p, v6e, tpu7x (one of its two cores), h100, h200, b200, or GiB of memory.")
    ] = "v6e",
    batch: Annotated[int, typer.Option(min=1, help="Requests that are served together.")] = 64,
    length: Annotated[int, typer.Option(min=1, help="Tokens that the cache holds for each.")] = 4096,
    room: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Share of the memory that is left for what a step computes with.")
    ] = 0.15,
    rest: Annotated[
        int, typer.Option(help="16, 8 or 4: bits of what is no routed expert's; a quantized folder has its own.")
    ] = 16,
    json: JsonOption = None,
) -> None:
    """Say how many devices serve a model, and what lies on each: planes, slots, the rest, the cache.

    For example: dynamo-jax plan-devices --model FOLDER --bits 3.0 --chip v5e
    """
    from dynamo_jax.files import write_json
    from dynamo_jax.models import huggingface
    from dynamo_jax.models.hub import model_folder
    from dynamo_jax.models.rest import check_rest
    from dynamo_jax.runtime import devices
    from dynamo_jax.runtime.memory import SPARE
    from dynamo_jax.storage import checkpoint

    folder = model_folder(model)
    gib = _memory(chip)
    if checkpoint.is_checkpoint(folder):
        description = checkpoint.read_description(folder)
        config, plan, spare = description.config, description.plan, description.meta.spare
        rest = description.meta.rest
    else:
        config = huggingface.Source(folder).config
        plan, spare = devices.plan_of_bits(config.expert_sizes, bits), SPARE
    check_rest(rest)
    shapes = huggingface.parameter_shapes(config)
    found = devices.least_devices(config, shapes, plan, gib, batch, length, spare, room, rest)
    print_facts(_facts(found, gib, room, rest))
    if json:
        share = found.share._asdict() | {"total": found.share.total}
        settings = {"chip": chip, "gib": gib, "batch": batch, "length": length, "room": room, "rest": rest}
        rows = {name: getattr(found, name) for name in ("data", "model", "experts", "blocks")}
        write_json(json, settings | {"devices": found.data * found.model, **rows, "bytes a device": share})


def _memory(chip: str) -> float:
    from dynamo_jax.runtime.devices import MEMORY

    if chip in MEMORY:
        return MEMORY[chip]
    try:
        gib = float(chip)
    except ValueError:
        gib = 0.0
    if not 0 < gib < 1e6:
        raise ValueError(f"--chip {chip}: expected {', '.join(MEMORY)}, or GiB of memory")
    return gib


def _facts(found: DevicePlan, gib: float, room: float, rest: int) -> dict[str, str]:
    from dynamo_jax.models.rest import FLOAT
    from dynamo_jax.runtime.devices import GIB, size_words

    share, count = found.share, found.data * found.model
    split = f"{found.experts} ways"
    if found.blocks > 1:
        split += f", and the channel blocks of each {found.blocks} ways"
    named = {
        "planes and page tables": share.planes,
        "spare slots, and pages on their way": share.spare,
        f"the rest of the model, {'bfloat16' if rest == FLOAT else f'{rest} bits'}": share.rest,
        "cache": share.cache,
    }
    return {
        "devices": f"{count} of {size_words(gib * GIB)}: a mesh of data {found.data} x model {found.model}",
        "experts": f"split {split}",
        **{name: f"{size_words(size)} a device" for name, size in named.items()},
        "together": f"{size_words(share.total)}; {room:.0%} of the memory are left for a step",
    }
