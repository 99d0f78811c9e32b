"""A mixture of experts of one's own in thirty lines of Flax NNX, quantized, watched, adapted, saved and loaded.

    python examples/own_nnx_model.py

It is trained on bytes of three kinds of text, 300 steps by default, analysed on two of them, and meets the third.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import dynamo_jax
from dynamo_jax import transform as djt
from dynamo_jax.texts.demo import KINDS, collect

KNOWN, NOVEL, TOKENS, REQUESTS = ("encyclopedic", "stories"), "python", 96, 8
D, F, E, K = 64, 32, 16, 2


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.RMSNorm(D, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(4, D, decode=False, rngs=rngs)
        self.router = nnx.Linear(D, E, use_bias=False, rngs=rngs)
        shapes = ((E, D, F), (E, D, F), (E, F, D))
        weights = (nnx.Param(jax.random.normal(rngs.params(), shape) * shape[1] ** -0.5) for shape in shapes)
        self.experts = dynamo_jax.Experts(*weights)  # what quantization is about; the rest is the model's own

    def __call__(self, x: Any) -> Any:
        normed = self.norms[0](x)
        x = x + self.attention(normed, mask=nnx.make_causal_mask(normed[..., 0]))
        normed = self.norms[1](x)
        gates, ids = jax.lax.top_k(jax.nn.softmax(self.router(normed)), K)
        return x + self.experts(normed, ids, gates / gates.sum(axis=-1, keepdims=True))


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(256, D, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.norm = nnx.RMSNorm(D, rngs=rngs)

    def __call__(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))


def loss(model: Model, tokens: Any) -> Any:
    """Summed nats of a batch."""
    return optax.softmax_cross_entropy_with_integer_labels(model(tokens[:, :-1]), tokens[:, 1:]).sum()


def forward(model: Model, tokens: Any) -> Any:
    return model(tokens[:, :-1])


def windows(text: np.ndarray, count: int, rng: np.random.Generator) -> Any:
    starts = rng.integers(0, len(text) - TOKENS - 1, count)
    return jnp.asarray(np.stack([text[s : s + TOKENS + 1] for s in starts]), jnp.int32)


def trained(texts: dict[str, np.ndarray], steps: int) -> Model:
    model, rng, value = Model(nnx.Rngs(0)), np.random.default_rng(0), float("nan")
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model: Model, optimizer: Any, tokens: Any) -> Any:
        value, gradients = nnx.value_and_grad(lambda m: loss(m, tokens) / tokens.size)(model)
        optimizer.update(model, gradients)
        return value

    for _ in range(steps):
        value = float(step(model, optimizer, jnp.concatenate([windows(text, 8, rng) for text in texts.values()])))
    print(f"trained: {value:.2f} nats a byte")
    return model


@nnx.jit
def step(model: Model, tokens: Any) -> Any:
    with djt.observe(model):  # what the router does goes to the monitors
        logits = model(tokens)
    djt.follow(model)  # requests whose text is novel run variant 1 from the next step on
    return logits


def nats(model: Model, tokens: Any) -> float:
    """Of a byte, mean; as many windows at a time as the model serves requests."""
    parts = [loss(model, tokens[i : i + REQUESTS]) for i in range(0, len(tokens), REQUESTS)]
    return float(sum(parts)) / (len(tokens) * TOKENS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="of training")
    arguments = parser.parse_args()
    rng = np.random.default_rng(1)
    texts = {k: np.frombuffer(collect(KINDS[k](None)).encode(), np.uint8) for k in (*KNOWN, NOVEL)}
    model = trained(texts, arguments.steps)

    data = {kind: [windows(texts[kind], REQUESTS, rng) for _ in range(6)] for kind in KNOWN}
    analysis = djt.analyze(model, data, loss, djt.QuantizeConfig(window=TOKENS))
    for layer, found in analysis.significance(KNOWN[0]).items():
        expert = int(found.experts[:, 0].argmax())
        print(f"{layer}: at 2 bits expert {expert} loses most, {found.experts[expert, 0]:.5f} nats a token")
    plan = djt.plan(analysis, bits=2.8)
    served, host = djt.quantize(model, plan, analysis, requests=REQUESTS)
    on_device = plan.device_bytes(analysis.config.spare)
    print(f"{plan.bits_per_weight():.2f} stored bits a weight, {on_device:,} bytes on the device")

    novel = [windows(texts[NOVEL], REQUESTS, rng) for _ in range(6)]
    for tokens in novel:
        step(served, tokens[:, :-1])
    names = [*host.datasets, "novel"]
    print("the monitors say:", ", ".join(names[label] for label in np.asarray(djt.labels(served))))
    djt.adapt(served, host, novel, forward)
    later = windows(texts[NOVEL], 16 * REQUESTS, rng)
    exact = nats(model, later)
    for variant, name in enumerate(("baseline", "adapted")):
        djt.switch(served, [variant] * REQUESTS)
        print(f"{NOVEL}, {name}: {nats(served, later) - exact:+.4f} nats a byte beside float")

    with tempfile.TemporaryDirectory() as folder:
        djt.save(Path(folder) / "quantized", served, host)
        again, _ = djt.load(Path(folder) / "quantized", nnx.eval_shape(lambda: Model(nnx.Rngs(0))))
        djt.switch(again, 1)
        same = np.array_equal(again(later[:REQUESTS, :-1]), served(later[:REQUESTS, :-1]))
        print("saved and loaded without float experts: the same logits" if same else "the logits differ")


if __name__ == "__main__":
    main()
