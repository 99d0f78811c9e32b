"""What adaptation loses where each of several devices has its own slots for pages.

    python benchmarks/shards.py [--texts FOLDER] [--bits 3.0] [--tokens 2048] [--shards 4 8 16 48] [--json PATH]

Quantizes the bundled model, calibrated on the known texts of texts.py, and makes plans for five kinds of novel text:
for one device, and for every device of a mesh, which has the slots of the fullest. For each: nats a token that the
baseline is predicted to lose; what the plan of one device is predicted to save of that, and the plan of the mesh; what
the latter loses of what one device with as many slots as all together would save; the largest share of a device's slots
that the plan fills, and how full the plan made for that one device would make the fullest. Spare: the plan may take the
spare slots; lent: all of them, as when no request needs the baseline. No device is needed for this: it is arithmetic of
plans.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh
from texts import KNOWN, NOVEL, add_texts

from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.calibration.pipeline import quantize
from dynamo_jax.files import write_json
from dynamo_jax.models.bundled import BUNDLED
from dynamo_jax.models.huggingface import load_decoder
from dynamo_jax.models.tokenizer import load_tokenizer
from dynamo_jax.precision.plan import Plan
from dynamo_jax.runtime import memory
from dynamo_jax.runtime.adapt import Expected, expected, observe_windows, placed_anew
from dynamo_jax.runtime.mesh import DATA, MODEL, Placement
from dynamo_jax.runtime.quantized import QuantizedModel
from dynamo_jax.runtime.residency import owners_of, shards_of
from dynamo_jax.runtime.store import pages_of
from dynamo_jax.texts.demo import KINDS, collect
from dynamo_jax.texts.windows import token_windows

TEXTS = {**NOVEL, "portuguese": KINDS["portuguese"]}
WINDOW = 128  # tokens that are measured at a time, as a Follower does


def pages_of_shards(plan: Plan, placement: Placement | None) -> dict[int, np.ndarray]:
    """For each level, how many of the plan's pages each shard has."""
    found = {}
    for level, has in pages_of(plan).items():
        owners = owners_of(placement, has.shape, plan.widths.shape[-1] // plan.blocks).reshape(-1)
        found[level] = np.bincount(owners, has.sum(axis=0).reshape(-1), shards_of(placement)).astype(int)
    return found


def plan_on(
    model: QuantizedModel, text: Expected, slots: dict[int, int], lends: bool, placement: Placement | None = None
) -> Plan:
    """The plan for a text within so many slots of each device."""
    used = pages_of_shards(model.plan, placement)
    free = None if lends else {level: slots[level] - count for level, count in used.items()}
    return placed_anew(model.plan, text.errors, text.use, free, 1, 1.0, slots, placement)


def fullest(plan: Plan, slots: dict[int, int], placement: Placement) -> float:
    """Of all levels and shards, the largest share of the slots that the plan's pages fill."""
    return max(float(has.max()) / max(slots[level], 1) for level, has in pages_of_shards(plan, placement).items())


def rows_of(model: QuantizedModel, name: str, text: Expected, counts: list[int], lends: bool) -> list[dict[str, Any]]:
    def lost(plan: Plan) -> float:
        return float(plan.chosen(text.errors).sum())

    own_slots, rows = memory.slots(model.plan, model.spare), []
    gain = lost(model.plan) - lost(plan_on(model, text, own_slots, lends))
    for count in counts:
        placement = Placement.of(AbstractMesh((1, count), (DATA, MODEL)), model.config.num_experts, model.plan.blocks)
        assert placement is not None
        slots = memory.slots(model.plan, model.spare, placement)
        together = {level: count * each for level, each in slots.items()}
        plan, alone = plan_on(model, text, slots, lends, placement), plan_on(model, text, together, lends)
        own, most = (lost(model.plan) - lost(one) for one in (plan, alone))
        rows.append({"text": name, "taken": "lent" if lends else "spare"})
        rows[-1] |= {"shards": count, "baseline_loss": lost(model.plan), "gain_one_device": gain}
        rows[-1] |= {"gain": own, "gain_lost": 1 - own / most, "fullest": fullest(plan, slots, placement)}
        rows[-1] |= {"fullest_unlimited": fullest(alone, slots, placement)}
        rows[-1] |= {"slots": slots, "slots_one_device": own_slots}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_texts(parser)
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument("--tokens", type=int, default=2048, help="of each text that a plan is made for")
    parser.add_argument("--shards", type=int, nargs="+", default=[4, 8, 16, 48])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    source, tokenizer = load_decoder(BUNDLED), load_tokenizer(BUNDLED)
    known = {name: collect(parts(arguments.texts)) for name, parts in KNOWN.items()}
    model = quantize(source, tokenizer, known, QuantizeConfig(bits=arguments.bits))[0]
    rows: list[dict[str, Any]] = []
    print(
        "| text | slots | shards | predicted loss | gain, one device | gain | lost of it | fullest | without limits |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, parts in TEXTS.items():
        windows = token_windows(collect(parts(arguments.texts)), tokenizer, WINDOW, name)
        seen = observe_windows(model, windows[: -(-arguments.tokens // WINDOW)])
        found = expected(model.knowledge, seen)
        for row in (row for lends in (False, True) for row in rows_of(model, name, found, arguments.shards, lends)):
            losses = " | ".join(f"{row[key]:.4f}" for key in ("baseline_loss", "gain_one_device", "gain"))
            shares = " | ".join(f"{row[key]:.1%}" for key in ("gain_lost", "fullest", "fullest_unlimited"))
            print(f"| {name} | {row['taken']} | {row['shards']} | {losses} | {shares} |", flush=True)
            rows.append(row)
    if arguments.json:
        write_json(arguments.json, {"bits": arguments.bits, "tokens": arguments.tokens, "rows": rows})


if __name__ == "__main__":
    main()
