"""A rule for the experts of Gemma 4 in google-tunix: gate and up fused and transposed, a scale for each expert.

    .venv-tunix/bin/python examples/tunix_gemma4.py     (the environment of examples/tunix_qwen3.py)

One layer with random weights is taken by the rule, which must not change its outputs, then rounded.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dynamo_jax import transform as djt

# tunix's own __init__ imports a stack for reinforcement learning that is not needed: the package without running it
for _name in ("tunix", "tunix.models.gemma4"):
    _spec = importlib.util.find_spec(_name)
    if _spec is None:
        raise SystemExit(f"{_name} is not installed: see examples/tunix_qwen3.py")
    sys.modules[_name] = importlib.util.module_from_spec(_spec)
from tunix.models.gemma4 import model as gemma4  # noqa: E402
from tunix.models.gemma4 import moe  # noqa: E402


def layer(m: Any, experts: Any, x: Any) -> Any:
    """What ``MoERagged.__call__`` does; the scale of an expert's output is a factor of its gate."""
    size = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    normed = x * jax.lax.rsqrt(size + 1e-6).astype(x.dtype) * m.features**-0.5 * m.router_scale[...].astype(x.dtype)
    gates, ids = m._router(normed @ m.router_logits[...].astype(x.dtype))
    gates = jnp.take_along_axis(gates, ids, axis=-1) * m.per_expert_scale[...][ids]
    return experts(x, ids, gates)


RULE = djt.ExpertsRule(
    moe.MoERagged,
    experts=lambda m: djt.Experts(m.gating_einsum, m.linear, activation=lambda g, u: nnx.gelu(g) * u, layout="e2fd"),
    call=layer,
)


def random_layer() -> Any:
    config = gemma4.ModelConfig(
        num_layers=2, num_embed=256, embed_dim=64, hidden_dim=96, num_heads=4, head_dim=16, num_kv_heads=2,
        global_key_size=16, sliding_window_size=8, enable_moe=True, num_experts=16, num_experts_per_tok=4,
        expert_dim=32, moe_dense_hidden_dim=96,
    )  # fmt: skip
    made = moe.MoERagged(config, rngs=nnx.Rngs(0))
    rngs = nnx.Rngs(1)
    for name, scale in (("router_logits", 1.0), ("gating_einsum", 64**-0.5), ("linear", 32**-0.5)):
        own = getattr(made, name)
        own.set_value(scale * jax.random.normal(rngs.params(), own.shape))
    for name in ("per_expert_scale", "router_scale"):
        own = getattr(made, name)
        own.set_value(jax.random.uniform(rngs.params(), own.shape, minval=0.5, maxval=2.0))
    return made


def main() -> None:
    model, x = random_layer(), jax.random.normal(jax.random.key(9), (2, 24, 64))
    want, taken = model(x), djt.with_experts(random_layer(), [RULE], x)
    for name, other in [("float", taken)] + [
        (f"{w} bits", djt.quantize(taken, djt.uniform(taken, w))[0]) for w in (8, 4, 2)
    ]:
        print(f"{name:8} relative error {float(jnp.linalg.norm(other(x) - want) / jnp.linalg.norm(want)):.6f}")


if __name__ == "__main__":
    main()
