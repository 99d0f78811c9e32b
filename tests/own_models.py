"""Models that are not ours, written with plain nnx: what a user of the transform may have."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dynamo_jax.transform import Experts

VOCAB, HIDDEN, CHANNELS, EXPERTS, TOP = 50, 32, 24, 6, 2


def top_k(logits, k):
    gates, ids = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32)), k)
    return ids, gates / gates.sum(axis=-1, keepdims=True)


def weight(rngs, *shape):
    return nnx.Param(jax.random.normal(rngs.params(), shape) * shape[-2] ** -0.5)


class Block(nnx.Module):
    """Attention-free: a token mixes with the one before it, then goes to its experts."""

    def __init__(self, rngs, experts=EXPERTS, channels=CHANNELS):
        self.norm = nnx.LayerNorm(HIDDEN, rngs=rngs)
        self.mix = nnx.Linear(2 * HIDDEN, HIDDEN, rngs=rngs)
        self.router = nnx.Linear(HIDDEN, experts, rngs=rngs)
        self.shared = nnx.Linear(HIDDEN, HIDDEN, rngs=rngs)
        gate, up = (weight(rngs, experts, HIDDEN, channels) for _ in range(2))
        self.experts = Experts(gate, up, weight(rngs, experts, channels, HIDDEN))

    def __call__(self, x):
        before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        x = x + self.mix(jnp.concatenate([x, before], axis=-1))
        normed = self.norm(x)
        return x + self.shared(normed) + self.experts(normed, *top_k(4 * self.router(normed), TOP))


class Model(nnx.Module):
    """Tokens (B, T) to logits (B, T, VOCAB)."""

    def __init__(self, rngs, blocks=((EXPERTS, CHANNELS), (EXPERTS, CHANNELS))):
        self.embed = nnx.Embed(VOCAB, HIDDEN, rngs=rngs)
        self.blocks = nnx.List([Block(rngs, *sizes) for sizes in blocks])

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(x)


class StackedModel(nnx.Module):
    """The same with layers stacked by vmap and run by scan."""

    def __init__(self, rngs, layers=3):
        self.embed = nnx.Embed(VOCAB, HIDDEN, rngs=rngs)

        @nnx.split_rngs(splits=layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return Block(rngs)

        self.blocks = make(rngs)

    def __call__(self, tokens):
        from dynamo_jax.transform import Plane

        @nnx.scan(in_axes=(nnx.StateAxes({Plane: None, ...: 0}), nnx.Carry), out_axes=nnx.Carry)
        def run(block, x):
            return block(x)

        return self.embed.attend(run(self.blocks, self.embed(tokens)))


def nll(model, tokens):
    """Summed nats of the next tokens."""
    logits = jax.nn.log_softmax(model(tokens[:, :-1]).astype(jnp.float32))
    return -jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1).sum()


def forward(model, tokens):
    return model(tokens)


def batches(seed, low, high, count=3, sequences=4, tokens=33):
    """Token ids of one kind: those of a range."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.integers(low, high, (sequences, tokens)), jnp.int32) for _ in range(count)]


def known(count=3):
    return {"low": batches(0, 0, 20, count), "high": batches(1, 25, 45, count)}
