"""dynamo_jax on a model of somebody else: the Qwen3 mixture of experts of google-tunix, from float to an adapted step.

    python3 -m venv .venv-tunix && .venv-tunix/bin/pip install .
    .venv-tunix/bin/pip install --no-deps google-tunix==0.1.7
    .venv-tunix/bin/python examples/tunix_qwen3.py --json tunix.json

A tiny Qwen3 (2 layers of 16 experts, top 4) is trained on bytes of five kinds of text, 400 steps by default, then
analysed on three of them and quantized; of the other two it knows nothing but what its weights know. What a user of
dynamo_jax writes is ``users_code``: from the model to a step that is watched and adapted. The table compares it with
rounding, and counts what is compiled at switches, adaptations and moves of pages.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from dynamo_jax import transform as djt
from dynamo_jax.texts.demo import KINDS, collect

# tunix's own __init__ imports a stack for reinforcement learning that is not needed: the package without running it
for _name in ("tunix", "tunix.models.qwen3"):
    _spec = importlib.util.find_spec(_name)
    if _spec is None:
        raise SystemExit(f"{_name} is not installed: see the docstring of this file")
    sys.modules[_name] = importlib.util.module_from_spec(_spec)
from tunix.models.qwen3 import model as qwen3  # noqa: E402

CALIBRATED, MET = ("encyclopedic", "arithmetic", "python"), ("portuguese", "latex-math")
TOKENS, SEQUENCES = 96, 16


def top_k(router: Any, x: Any, k: int) -> Any:
    """As tunix's layer routes: experts, and their gates renormalized."""
    gates, ids = jax.lax.top_k(jax.nn.softmax(router(x).astype(jnp.float32)), k)
    return ids, gates / gates.sum(axis=-1, keepdims=True)


def forward(model: Any, tokens: Any) -> Any:
    """Logits of the next byte; tokens (B, T)."""
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (batch, length, length))
    return model(tokens, positions, None, mask)[0]


def loss(model: Any, tokens: Any) -> Any:
    """Summed nats of a batch."""
    return optax.softmax_cross_entropy_with_integer_labels(forward(model, tokens[:, :-1]), tokens[:, 1:]).sum()


def users_code(model: Any, known: Any, novel: Any, example: Any, settings: Any) -> Any:
    # --- 18 lines from a model to an adapted step
    rule = djt.ExpertsRule(
        qwen3.MoELayer,
        experts=lambda m: djt.Experts(m.gate_proj, m.up_proj, m.down_proj),
        call=lambda m, experts, x: experts(x, *top_k(m.router, x, m.experts_per_tok)),
    )
    model = djt.with_experts(model, [rule], *example)
    analysis = djt.analyze(model, known, loss, settings)
    plan = djt.plan(analysis, bits=2.75)  # on the device, with slots and page tables: 2.6 stored bits a weight
    served, host = djt.quantize(model, plan, analysis, requests=SEQUENCES)

    @nnx.jit
    def step(served: Any, tokens: Any) -> Any:
        with djt.observe(served):
            logits = forward(served, tokens)
        djt.follow(served)
        return logits

    for tokens in novel:
        step(served, tokens)
    djt.adapt(served, host, novel, forward, lend=True)  # the whole batch is of the novel text
    # ---
    return model, analysis, plan, served, host, step


def trained(texts: dict[str, np.ndarray], steps: int, seed: int) -> Any:
    config = qwen3.ModelConfig(
        num_layers=2, vocab_size=256, embed_dim=64, hidden_dim=32, num_heads=4, head_dim=16, num_kv_heads=2,
        rope_theta=1_000_000, norm_eps=1e-6, use_tied_embedding=False, num_experts=16, num_experts_per_tok=4,
    )  # fmt: skip
    model = qwen3.Qwen3(config, rngs=nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any, tokens: Any) -> Any:
        value, gradients = nnx.value_and_grad(lambda m: loss(m, tokens) / tokens.size)(model)
        optimizer.update(model, gradients)
        return value

    rng, names, value = np.random.default_rng(seed), list(texts), float("nan")
    for _ in range(steps):
        rows = [windows(texts[names[i % len(names)]], 1, rng)[0] for i in range(SEQUENCES)]
        value = float(step(model, optimizer, jnp.stack(rows)))
    print(f"trained {steps} steps, {value:.3f} nats a byte")
    return model


def windows(text: np.ndarray, count: int, rng: np.random.Generator) -> Any:
    starts = rng.integers(0, len(text) - TOKENS - 1, count)
    return jnp.asarray(np.stack([text[s : s + TOKENS + 1] for s in starts]), jnp.int32)


run = nnx.jit(forward)


def divergences(model: Any, other: Any, tokens: Any) -> np.ndarray:
    """Nats a byte, mean of each window."""
    found = []
    for start in range(0, len(tokens), 64):
        p, q = (jax.nn.log_softmax(run(m, tokens[start : start + 64])) for m in (model, other))
        found.append(np.asarray((jnp.exp(p) * (p - q)).sum(axis=-1).mean(axis=1)))
    return np.concatenate(found)


def divergence(model: Any, other: Any, tokens: Any) -> float:
    return float(divergences(model, other, tokens).mean())


def relative(model: Any, other: Any, tokens: Any) -> float:
    want, got = forward(model, tokens), forward(other, tokens)
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


@contextlib.contextmanager
def counted() -> Any:
    """The programs that XLA compiles inside."""
    found: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("Compiling "):
                found.append(record.getMessage().split(" with ")[0])

    handler, logger = Handler(), logging.getLogger("jax")
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        with jax.log_compiles():
            yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()

    texts, later = {}, {}
    for kind in (*CALIBRATED, *MET):
        whole = np.frombuffer(collect(KINDS[kind](None)).encode(), np.uint8)
        texts[kind], later[kind] = whole[: len(whole) * 3 // 4], whole[len(whole) * 3 // 4 :]
    model = trained(texts, arguments.steps, arguments.seed)
    rng = np.random.default_rng(arguments.seed + 1)
    known = {kind: [windows(texts[kind], SEQUENCES, rng) for _ in range(8)] for kind in CALIBRATED}
    example = (jnp.zeros((2, 8), jnp.int32), jnp.tile(jnp.arange(8), (2, 1)), None, jnp.ones((2, 8, 8), bool))
    settings = djt.QuantizeConfig(window=TOKENS)

    novel = {kind: [windows(texts[kind], SEQUENCES, rng)[:, :-1] for _ in range(8)] for kind in MET}
    taken, analysis, plan, served, host, step = users_code(model, known, novel[MET[0]], example, settings)
    rounded = {w: djt.quantize(taken, djt.uniform(taken, w, group_size=64))[0] for w in (2, 3, 4, 8)}
    of_known = jnp.concatenate([windows(later[kind], 64, rng)[:, :-1] for kind in CALIBRATED])
    rows = [{"text": "calibrated kinds", "stored_bits": plan.bits_per_weight()}]
    rows[0] |= {f"kl_rounded_{w}": divergence(taken, m, of_known) for w, m in rounded.items()}
    at_plan = djt.quantize(taken, plan, analysis)[0]
    rows[0]["kl_plan"] = divergence(taken, at_plan, of_known)
    more = djt.plan(analysis, bits=3.0)
    rows[0] |= {"stored_bits_more": more.bits_per_weight()}
    rows[0]["kl_plan_more"] = divergence(taken, djt.quantize(taken, more, analysis)[0], of_known)
    even = djt.quantize(taken, djt.uniform(taken, 3, group_size=64), analysis)[0]
    rows[0]["kl_planes_3"] = divergence(taken, even, of_known)
    rows[0]["logit_error_rounded_8"] = relative(taken, rounded[8], of_known)
    for kind in MET:
        djt.adapt(served, host, known["python"], with_targets)  # so that all programs are compiled
        tokens, numbers = windows(later[kind], SEQUENCES, rng)[:, :-1], [0, 1] * (SEQUENCES // 2)
        step_at(step, served, numbers, tokens)
        with counted() as compiled:
            djt.adapt(served, host, novel[kind], forward)
            mixed = np.asarray(step_at(step, served, numbers, tokens))
            alone = [np.asarray(step_at(step, served, [number] * SEQUENCES, tokens)) for number in (0, 1)]
        after = windows(later[kind], 256, rng)[:, :-1]
        row: dict[str, Any] = {"text": kind, "kl_rounded_3": divergence(taken, rounded[3], after)}
        baseline = divergences(taken, at_plan, after)
        row["kl_plan"] = float(baseline.mean())
        for name, lend in (("beside_the_plan", False), ("adapted", True)):  # True: no request is left at the baseline
            with counted() as moving:
                djt.adapt(served, host, novel[kind], forward, lend=lend)
            compiled += moving
            own = divergences(taken, served_at(served, 1), after)
            row[f"kl_{name}"] = float(own.mean())
            row[f"{name}_minus_plan"] = float((own - baseline).mean())
            row[f"{name}_standard_error"] = float((own - baseline).std(ddof=1)) / len(after) ** 0.5
        row["compilations"] = len(compiled)
        row["requests_as_alone"] = all(np.array_equal(mixed[i], alone[n][i]) for i, n in enumerate(numbers))
        rows.append(row)

    for row in rows:
        print(f"\n{row['text']}")
        for name, value in row.items():
            if name != "text":
                print(f"  {name:24} {format(value, '.5f') if isinstance(value, float) else value}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"results": rows}, indent=2) + "\n")


def with_targets(model: Any, tokens: Any) -> Any:
    return forward(model, tokens[:, :-1])


def served_at(served: Any, number: int) -> Any:
    """A copy that runs one variant for a batch of any size."""
    alone = nnx.clone(served)
    djt.for_requests(alone, 1)
    djt.switch(alone, number)
    return alone


def step_at(step: Any, served: Any, numbers: list[int], tokens: Any) -> Any:
    """One step at these variants: ``step`` follows the monitors after it."""
    djt.switch(served, numbers)
    return step(served, tokens)


if __name__ == "__main__":
    main()
